"""A source is another one as soon as any file or object that it reads is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import zarr
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

import cdd_dask
from cdd_dask import faults, identity
from cdd_dask.errors import DifferentRunError, SourceReadError
from cdd_dask.identity import check_same, source_identity
from cdd_dask.readers import open_source, versions

FIELD = np.random.default_rng(0).lognormal(size=(96, 96)).astype("float32")
FORMATS: dict[str, dict[str, Any]] = {
    "format 3": {},
    "format 2": {"zarr_format": 2},
    "shards": {"shards": (24, 24), "chunks": (12, 12)},
}


class Objects(MemoryFileSystem):
    """Objects at ``objects://…``, listed at once."""

    protocol = "objects"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        plain = str(path).removeprefix(f"{cls.protocol}://")
        return str(MemoryFileSystem._strip_protocol(plain))


class Folders(Objects):
    """The same at ``folders://…``, listed folder by folder."""

    protocol = "folders"
    find = AbstractFileSystem.find


class Unlisted(Objects):
    """The same at ``unlisted://…``, to one who may not list."""

    protocol = "unlisted"
    refusal: Exception = PermissionError(13, "no permission to list")

    def find(self, *args: Any, **options: Any) -> Any:
        raise self.refusal


class Remembered(Objects):
    """The same at ``remembered://…``, listed once."""

    protocol = "remembered"
    known: ClassVar[dict[str, Any]] = {}

    def find(self, path: str, *args: Any, **options: Any) -> Any:
        return self.known.setdefault(path, super().find(path, *args, **options))

    def invalidate_cache(self, path: str | None = None) -> None:
        self.known.clear()


@pytest.fixture(autouse=True)
def _systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty file systems; of a large source only the first and the last corner are hashed."""
    monkeypatch.setattr(Objects, "store", {})
    monkeypatch.setattr(Objects, "pseudo_dirs", [""])
    for system in (Objects, Folders, Unlisted, Remembered):
        fsspec.register_implementation(system.protocol, system, clobber=True)
    monkeypatch.setattr(identity, "SMALL", 1000)
    monkeypatch.setattr(identity, "SAMPLES", 2)
    monkeypatch.setattr(identity, "FEWEST_SAMPLES", 2)
    monkeypatch.setattr(faults, "FIRST_WAIT", 0.0)


def stored(address: Any, **more: Any) -> zarr.Array[Any]:
    """A Zarr array whose chunks are as many bytes whatever they hold."""
    options = {"chunks": (24, 24), "compressors": None, **more}
    return zarr.create_array(str(address), data=FIELD, **options)


def identity_of(address: Any) -> dict[str, Any]:
    return source_identity(open_source(str(address)))


def assert_differs(before: dict[str, Any], after: dict[str, Any], *names: str) -> None:
    """The identities differ in just these fields."""
    assert {name for name in before if before[name] != after[name]} == set(names)
    with pytest.raises(DifferentRunError, match=rf"source ({'|'.join(names)})="):
        check_same({"source": before}, {"source": after}, "out.zarr")


# Zarr arrays


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("system", ["objects", "folders", "remembered"])
def test_any_object_at_a_url(system: str, name: str):
    """Of no sampled region, of the same size: its version tells."""
    url = f"{system}://bucket/in.zarr"
    array = stored(url, **FORMATS[name])
    before = identity_of(url)
    assert before["files"] == 16 + (2 if name == "format 2" else 1)
    assert before == identity_of(url)  # reading is no change
    array[50, 50] = 7
    assert_differs(before, identity_of(url), "versions")


def test_a_run_does_not_go_on_with_another_remote_source(tmp_path: Path):
    """Nor is its finished output that of the new one."""
    url, options = "objects://bucket/in.zarr", {"max_scale": 2, "progress": False}
    array = stored(url)
    cdd_dask.decompose(url, tmp_path / "out.zarr", **options)
    cdd_dask.decompose(url, tmp_path / "out.zarr", **options)
    array[50, 50] = 7
    with pytest.raises(DifferentRunError, match="source versions="):
        cdd_dask.decompose(url, tmp_path / "out.zarr", **options)


@pytest.mark.parametrize("name", FORMATS)
def test_any_file_of_a_folder(name: str, tmp_path: Path):
    """Even one that is as large as before and older than the newest."""
    array = stored(tmp_path / "in.zarr", **FORMATS[name])
    then = 10**18
    for path in (tmp_path / "in.zarr").rglob("*"):
        os.utime(path, ns=(then, then))
    before = identity_of(tmp_path / "in.zarr")
    whole = open_source(str(tmp_path / "in.zarr"))
    assert np.array_equal(whole.read((slice(0, 96), slice(0, 96))), FIELD)
    assert before == identity_of(tmp_path / "in.zarr")
    array[50, 50] = 7
    chunk = tmp_path / "in.zarr" / array.metadata.encode_chunk_key((2, 2))
    os.utime(chunk, ns=(then, then - 1))
    assert_differs(before, identity_of(tmp_path / "in.zarr"), "versions")


@pytest.mark.parametrize("name", ["format 3", "shards"])
@pytest.mark.parametrize("place", ["many objects", "many files", "unlisted"])
def test_where_not_all_can_be_looked_at(
    place: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The metadata and the sampled chunks are, beyond what is sampled of them."""
    monkeypatch.setattr(versions, "LISTED", 16 if place == "unlisted" else 15)
    monkeypatch.setattr(versions, "WALKED", 15)
    monkeypatch.setattr(versions, "_listed" if place == "many objects" else "_walked", None)
    addresses = {"many files": str(tmp_path / "in.zarr"), "unlisted": "unlisted://bucket/in.zarr"}
    address = addresses.get(place, "objects://bucket/in.zarr")
    array = stored(address, **FORMATS[name])
    before = identity_of(address)
    array[50, 50] = 7
    assert before == identity_of(address)  # what that costs
    named = {"versions", "modified"} if place == "many files" else {"versions"}
    for voxel in ((23, 23), (79, 79)):
        array[voxel] = 7
        after = identity_of(address)
        assert_differs(before, after, *named)
        before = after
    array.attrs["title"] = "another"
    assert_differs(before, identity_of(address), "bytes", *named)


def test_a_chunk_that_was_never_written():
    """It has a version as soon as it is."""
    url = "unlisted://bucket/in.zarr"
    array = zarr.create_array(url, shape=(96, 96), chunks=(24, 24), dtype="f4", compressors=None)
    before = identity_of(url)
    assert before["files"] == 1
    array[23, 23] = 7
    assert_differs(before, identity_of(url), "bytes", "files", "versions")


def test_a_listing_that_fails_for_now_is_no_refusal(monkeypatch: pytest.MonkeyPatch):
    """A run bound to less than what can be listed could never go on."""
    stored("unlisted://bucket/in.zarr")
    expired = PermissionError(13, "the token has expired")
    for trouble in (expired, TimeoutError("no answer")):
        monkeypatch.setattr(Unlisted, "refusal", trouble)
        with pytest.raises(SourceReadError, match=r"expired|no answer"):
            identity_of("unlisted://bucket/in.zarr")


def test_an_object_that_is_not_seen_for_now_is_not_gone(monkeypatch: pytest.MonkeyPatch):
    """Whatever a web server answers, fsspec calls not found."""
    stored("unlisted://bucket/in.zarr")

    def info(self: Any, path: str, **options: Any) -> Any:
        raise FileNotFoundError(path) from TimeoutError("no answer")

    monkeypatch.setattr(Unlisted, "info", info)
    with pytest.raises(SourceReadError, match=r"in\.zarr cannot be read: FileNotFoundError"):
        identity_of("unlisted://bucket/in.zarr")


def test_a_folder_that_is_not_listed_for_now_is_not_empty(monkeypatch: pytest.MonkeyPatch):
    """It is asked for again; fsspec's own search would leave it out."""
    stored("folders://bucket/in.zarr")
    before, original, failed = identity_of("folders://bucket/in.zarr"), Folders.ls, set()

    def ls(self: Any, path: str, *args: Any, **options: Any) -> Any:
        if path not in failed:
            failed.add(path)
            raise TimeoutError("no answer")
        return original(self, path, *args, **options)

    monkeypatch.setattr(Folders, "ls", ls)
    assert before == identity_of("folders://bucket/in.zarr")
    assert len(failed) == 6  # the array, c, and its four


@pytest.mark.parametrize(
    "said",
    [
        {"ETag": '"1b2c"', "LastModified": "never looked at"},
        {"etag": "0x8D", "size": 5},
        {"Last-Modified": "Thu, 26 Nov 2026 12:00:00 GMT"},
        {"mtime": 3.5, "created": 4.0},
        {"last_write_time": 12},
    ],
)
def test_what_file_systems_call_a_version(said: dict[str, Any]):
    """S3, Azure, a web server, SFTP, SMB."""
    assert versions._entry("key", said)[2] == str(next(iter(said.values())))


# several files


def virtual(path: Path, *parts: tuple[str, str]) -> None:
    """An HDF5 file whose dataset ``a`` is made of rows of others."""
    h5py = pytest.importorskip("h5py")
    layout = h5py.VirtualLayout((len(parts) * 4, 96), "f4")
    for row, (file, name) in enumerate(parts):
        layout[row * 4 : row * 4 + 4] = h5py.VirtualSource(file, name, (4, 96))
    with h5py.File(path, "a") as opened:
        opened.create_virtual_dataset("a", layout, fillvalue=-1)


def part(path: Path, **external: Any) -> None:
    """An HDF5 file with the dataset ``part``."""
    with pytest.importorskip("h5py").File(path, "w") as opened:
        opened.create_dataset("part", (4, 96), "f4", **external)[...] = FIELD[:4]


def virtual_dataset(folder: Path) -> str:
    part(folder / "one.h5")
    part(folder / "two.h5")
    virtual(folder / "in.h5", ("one.h5", "part"), ("two.h5", "part"))
    return "in.h5"


def virtual_of_virtual(folder: Path) -> str:
    """The second of its parts lies in its own file, and that one's values are a raw file."""
    (folder / "below").mkdir()
    part(folder / "below/one.h5")
    virtual(folder / "below/in.h5", ("one.h5", "part"))
    part(folder / "in.h5", external=[(str(folder / "raw.bin"), 0, 4 * 96 * 4)])
    virtual(folder / "in.h5", ("below/in.h5", "a"), (".", "part"))
    return "in.h5::a"


def link_to_virtual(folder: Path) -> str:
    """What it needs lies beside the file that the link leads to."""
    (folder / "below").mkdir()
    part(folder / "below/one.h5")
    virtual(folder / "below/in.h5", ("one.h5", "part"))
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "in.h5", "w") as file:
        file["link"] = h5py.ExternalLink("below/in.h5", "/a")
    return "in.h5::link"


def link_to_file(folder: Path) -> str:
    """A link of the file system's; its parts lie beside it and beside what it leads to."""
    (folder / "below").mkdir()
    virtual_dataset(folder / "below")
    (folder / "below/two.h5").rename(folder / "two.h5")
    (folder / "in.h5").symlink_to("below/in.h5")
    return "in.h5"


def numbered_parts(folder: Path) -> str:
    h5py = pytest.importorskip("h5py")
    part(folder / "part0.h5")
    part(folder / "part1.h5")
    (folder / "party.h5").write_bytes(b"no part")
    target = h5py.h5s.create_simple((8, 96), (h5py.h5s.UNLIMITED, 96))
    target.select_hyperslab((0, 0), (h5py.h5s.UNLIMITED, 1), (4, 1), (4, 96))
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_virtual(target, b"part%b.h5", b"part", h5py.h5s.create_simple((4, 96)))
    with h5py.File(folder / "in.h5", "w") as file:
        space = h5py.h5s.create_simple((8, 96), (h5py.h5s.UNLIMITED, 96))
        h5py.h5d.create(file.id, b"a", h5py.h5t.IEEE_F32LE, space, settings)
    return "in.h5"


def external_dataset(folder: Path) -> str:
    part(folder / "in.h5", external=[(str(folder / "raw.bin"), 0, 4 * 96 * 4)])
    return "in.h5"


def nifti_pair(name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        nibabel = pytest.importorskip("nibabel")
        nibabel.save(nibabel.Nifti1Pair(FIELD[..., None], np.eye(4)), folder / "in.hdr")
        return name

    return make


def ome_tiff(*files: str, series: str = "") -> Callable[[Path], str]:
    """Two images of two planes in ``in.tif``'s metadata, the second in ``other.tif``."""

    def make(folder: Path) -> str:
        tifffile = pytest.importorskip("tifffile")
        planes = {0: files, 1: ("other.tif", "other.tif")}
        images = "".join(
            f'<Image ID="Image:{n}"><Pixels ID="Pixels:{n}" DimensionOrder="XYZCT" Type="float" '
            f'SizeX="96" SizeY="96" SizeZ="2" SizeC="1" SizeT="1"><Channel ID="Channel:{n}:0"/>'
            + "".join(
                f'<TiffData FirstZ="{z}" IFD="{names[:z].count(name)}" PlaneCount="1">'
                f'<UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
                for z, name in enumerate(names)
            )
            + "</Pixels></Image>"
            for n, names in planes.items()
        )
        xml = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:in.tif">{images}</OME>'
        )
        counts = {"in.tif": files.count("in.tif"), "second.tif": 1, "other.tif": 2}
        for number, (name, count) in enumerate(counts.items()):
            with tifffile.TiffWriter(folder / name) as file:
                text = {"description": xml} if name == "in.tif" else {}
                pages = np.stack([FIELD + 10 * number + n for n in range(count)])
                file.write(pages, metadata=None, photometric="minisblack", **text)
        return f"in.tif{series}"

    return make


SEVERAL: dict[str, tuple[Callable[[Path], str], set[str]]] = {
    "virtual": (virtual_dataset, {"in.h5", "one.h5", "two.h5"}),
    "virtual of virtual": (virtual_of_virtual, {"in.h5", "below/in.h5", "below/one.h5", "raw.bin"}),
    "link in a file": (link_to_virtual, {"in.h5", "below/in.h5", "below/one.h5"}),
    "link to a file": (link_to_file, {"in.h5", "below/one.h5", "two.h5"}),
    "numbered": (numbered_parts, {"in.h5", "part0.h5", "part1.h5"}),
    "external": (external_dataset, {"in.h5", "raw.bin"}),
    "NIfTI header": (nifti_pair("in.hdr"), {"in.hdr", "in.img"}),
    "NIfTI image": (nifti_pair("in.img"), {"in.hdr", "in.img"}),
    "OME-TIFF": (ome_tiff("in.tif", "second.tif"), {"in.tif", "second.tif"}),
    "OME-TIFF elsewhere": (
        ome_tiff("in.tif", "in.tif", series="::1"), {"in.tif", "other.tif"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_all_files_that_it_reads(name: str, tmp_path: Path):
    """One of them written again, or by an older one, is another source; one that is gone, none."""
    make, names = SEVERAL[name]
    address = tmp_path / make(tmp_path)
    source = open_source(str(address))
    assert {str(path.relative_to(tmp_path)) for path in source.files} == names
    assert source.read(tuple(slice(0, n) for n in source.shape)).min() > 0  # no fill value
    before = source_identity(source)
    assert before["files"] == len(names)
    for path in sorted(source.files):
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns + 10**9, state.st_mtime_ns))
        assert before == identity_of(address)  # read, which is no change
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**12))
        assert_differs(before, identity_of(address), "modified", "versions")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 10**12))
        assert before["versions"] != identity_of(address)["versions"]
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    for path in set(source.files) - {source.path}:
        shutil.move(path, tmp_path / "away")
        with pytest.raises(SourceReadError):
            source_identity(source)
        shutil.move(tmp_path / "away", path)


def test_one_file_is_what_it_was(tmp_path: Path):
    """A run begun before is gone on with."""
    np.save(tmp_path / "in.npy", FIELD)
    state = (tmp_path / "in.npy").stat()
    known = identity_of(tmp_path / "in.npy")
    assert list(known) == ["shape", "dtype", "address", "bytes", "modified", "content"]
    assert (known["bytes"], known["modified"]) == (state.st_size, state.st_mtime_ns)


@pytest.mark.parametrize("gone", ["below/one.h5", "part in below/one.h5"])
def test_a_part_of_a_part_that_is_gone(gone: str, tmp_path: Path):
    """HDF5 would read the fill value."""
    address = f"{tmp_path}/{virtual_of_virtual(tmp_path)}"
    if gone.startswith("part"):
        with pytest.importorskip("h5py").File(tmp_path / "below/one.h5", "w"):
            pass
    else:
        (tmp_path / gone).unlink()
    with pytest.raises(SourceReadError, match=r"one\.h5.* not there"):
        open_source(address)


def test_where_hdf5_finds_external_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the working folder, unless it is told otherwise."""
    monkeypatch.chdir(tmp_path)
    part(tmp_path / "in.h5", external=[("raw.bin", 0, 4 * 96 * 4)])
    assert tmp_path / "raw.bin" in open_source("in.h5").files
    monkeypatch.setenv("HDF5_EXTFILE_PREFIX", "${ORIGIN}/below")
    assert tmp_path / "below/raw.bin" in open_source("in.h5").files


def test_an_image_that_lies_in_another_file(tmp_path: Path):
    """It is read from there, not from as far into the file that names it."""
    address = f"{tmp_path}/{ome_tiff('in.tif', 'in.tif', series='::1')(tmp_path)}"
    source = open_source(address)
    assert source.chunk is None  # mapped
    values = source.read((slice(0, 2), slice(0, 96), slice(0, 96)))
    assert np.array_equal(values, np.stack([FIELD + 20, FIELD + 21]))


# arrays in this process


@pytest.mark.parametrize("place", [(0, 0), (48, 48), (95, 95)])
def test_a_lazy_array_of_large_chunks(place: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """Is told by a few samples at least: at its corners, in the middle, and at random."""
    import dask.array as da

    monkeypatch.setattr(identity, "FEWEST_SAMPLES", 8)
    other = FIELD.copy()
    other[place] += 1
    one, two = (open_source(da.from_array(field, chunks=96)) for field in (FIELD, other))
    computed: list[Any] = []
    read = one.fetch
    object.__setattr__(one, "fetch", lambda region: computed.append(region) or read(region))
    assert_differs(source_identity(one), source_identity(two), "content")
    assert len(computed) == 8


def test_a_masked_array_is_hashed_whole():
    """Any voxel, and any that is masked."""
    known = source_identity(open_source(np.ma.MaskedArray(FIELD)))
    other = FIELD.copy()
    other[37, 61] += 1
    assert_differs(known, source_identity(open_source(np.ma.MaskedArray(other))), "content")
    mask = np.zeros(FIELD.shape, bool)
    mask[37, 61] = True
    assert_differs(known, source_identity(open_source(np.ma.MaskedArray(FIELD, mask))), "content")
