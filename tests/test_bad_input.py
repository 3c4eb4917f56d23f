"""What cannot be done is refused: the right error, a message that helps, and nothing left behind.

"Nothing" means that no store is there that could be taken for a whole one, and that no file of
the user's was touched.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray

import cdd_dask
from cdd_dask import store
from cdd_dask.cli import cli
from cdd_dask.errors import (
    BlockError,
    BudgetError,
    DeviceError,
    DiskSpaceError,
    InputError,
    OutputAccessError,
    OutputExistsError,
    PreflightError,
    RunError,
    SourceNotFoundError,
    SourceReadError,
    StoreError,
)

FIELD = np.random.default_rng(0).lognormal(size=(24, 10)).astype("float32")
FAST: dict[str, Any] = {"max_scale": 2, "e_rel": 0.3, "progress": False}
CUT: dict[str, Any] = {**FAST, "block": (9, 10)}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All files and folders in `folder`, with their bytes."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# the source


class Refused(NamedTuple):
    """A source that cannot be decomposed, and what is said about it."""

    make: Callable[[], Any]
    message: str


def ragged_dask() -> Any:
    """A dask array that does not know its own shape."""
    da = pytest.importorskip("dask.array")
    array = da.from_array(FIELD)
    return array[array[:, 0] > 1]


SOURCES = {
    "empty": Refused(lambda: np.zeros((4, 0)), r"empty \(shape \(4, 0\)\)"),
    "0-d": Refused(lambda: np.float64(3), r"0 axes \(shape \(\)\): give .* 1 to 4 axes"),
    "a number": Refused(lambda: 3.0, r"0 axes"),
    "5-D": Refused(lambda: np.ones((1, 2, 1, 2, 1)), r"5 axes \(shape .*\): give .* 1 to 4 axes"),
    "complex": Refused(lambda: np.ones(4, complex), r"complex128: only real numbers"),
    "texts": Refused(lambda: np.array(["1", "2"]), r"<U1: only real numbers"),
    "list of texts": Refused(lambda: ["1", "2"], r"<U1: only real numbers"),
    "objects": Refused(lambda: np.array([1, None]), r"object: only real numbers"),
    "dates": Refused(lambda: np.zeros(4, "M8[s]"), r"datetime64.*: only real numbers"),
    "records": Refused(lambda: np.zeros(4, "f4,f4"), r"only real numbers"),
    "ragged list": Refused(lambda: [[1.0, 2.0], [3.0]], r"list"),
    "None": Refused(lambda: None, r"None"),
    "a dict": Refused(lambda: {"a": 1}, r"dict"),
    "dask of unknown shape": Refused(ragged_dask, r"shape"),
    "xarray dataset": Refused(
        lambda: pytest.importorskip("xarray").Dataset({"a": ("x", FIELD[0])}),
        r"Dataset: choose one of its variables",
    ),
    "pandas table": Refused(
        lambda: pytest.importorskip("pandas").DataFrame(FIELD), r"(?i)dataframe|pandas"
    ),
    "sparse tensor": Refused(
        lambda: pytest.importorskip("torch").eye(4).to_sparse(), r"sparse tensor: .*to_dense"
    ),
    "complex tensor": Refused(
        lambda: pytest.importorskip("torch").zeros(4).to(pytest.importorskip("torch").complex64),
        r"complex64: only real numbers",
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_that_are_no_field(tmp_path: Path, kind: str):
    """The message says what the source is and what would do; nothing is written."""
    with pytest.raises(InputError, match=SOURCES[kind].message):
        cdd_dask.decompose(SOURCES[kind].make(), tmp_path / "out.zarr", **FAST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", [(9, 10), (24, 10), (5, 4)])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({(13, 7): np.nan}, r"is NaN at \(13, 7\).*nan=.mask. or nan=.fill"),
        ({(13, 7): np.inf}, r"is inf at \(13, 7\): replace infinities"),
        ({(2, 9): -np.inf, (3, 0): np.nan}, r"is -inf at \(2, 9\): replace infinities"),
        ({(20, 1): np.inf, (20, 0): np.nan}, r"is NaN at \(20, 0\)"),
    ],
)
def test_bad_values_are_found(
    tmp_path: Path, values: dict[tuple[int, int], float], message: str, block: tuple[int, int]
):
    """The first in C order is named, whatever the blocks, with what to do; no store is left."""
    field = FIELD.copy()
    for place, value in values.items():
        field[place] = value
    np.save(tmp_path / "in.npy", field)
    zarr.create_array(tmp_path / "in.zarr", data=field)
    options = {**FAST, "block": block, "nan": "raise"}
    for source in (field, tmp_path / "in.npy", tmp_path / "in.zarr"):
        with pytest.raises(InputError, match=message):
            cdd_dask.decompose(source, tmp_path / "out.zarr", **options)
        assert not (tmp_path / "out.zarr").exists()


def test_bad_values_are_found_by_any_worker(tmp_path: Path):
    """A NaN met in another process comes back as the same error."""
    field = FIELD.copy()
    field[13, 7] = np.nan
    np.save(tmp_path / "in.npy", field)
    pool = {"executor": "processes", "workers": 2, "nan": "raise"}
    with pytest.raises(InputError, match=r"in\.npy is NaN at \(13, 7\)"):
        cdd_dask.decompose(tmp_path / "in.npy", tmp_path / "out.zarr", **pool, **CUT)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("block", [(4, 4), (2, 3)])
def test_nothing_but_nan(tmp_path: Path, block: tuple[int, int]):
    """A field that is blank altogether is said to be, and leaves no store."""
    with pytest.raises(InputError, match=r"holds nothing but blank \(NaN\) voxels"):
        cdd_dask.decompose(
            np.full((4, 4), np.nan), tmp_path / "out.zarr", **{**FAST, "block": block}
        )
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_float32():
    """1e300 is finite, but not in float32: the message says so, and float64 takes it."""
    field = FIELD.astype("float64")
    field[3, 4] = 1e300
    with pytest.raises(InputError, match=r"is 1e\+300 at \(3, 4\), too large .*dtype=.float64"):
        cdd_dask.decompose(field, **FAST)
    assert cdd_dask.decompose(field, dtype="float64", **FAST).shape == field.shape


@pytest.mark.parametrize("name", ["no.fits", "no.npy", "no.zarr", "no", "no/image"])
def test_a_source_that_is_not_there(tmp_path: Path, name: str):
    """A `FileNotFoundError` with the whole path."""
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        cdd_dask.decompose(tmp_path / name, tmp_path / "out.zarr", **FAST)
    assert isinstance(error.value, SourceNotFoundError)
    assert str(tmp_path / name) in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["in.fits", "in.npy", "in.png", "in", "in.h5"])
def test_files_of_no_use(tmp_path: Path, name: str):
    """Damaged or of an unknown kind: an `OSError` that names the file; it is left alone."""
    (tmp_path / name).write_bytes(b"neither fish nor fowl" * 200)
    with pytest.raises(OSError, match=name.replace(".", r"\.")) as error:
        cdd_dask.decompose(tmp_path / name, tmp_path / "out.zarr", **FAST)
    assert isinstance(error.value, SourceReadError)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_source_that_is_damaged_inside(tmp_path: Path):
    """A chunk that cannot be decoded: found before anything is written, where it is looked at."""
    source = zarr.create_array(tmp_path / "in.zarr", data=FIELD, chunks=(6, 10))
    chunk = tmp_path / "in.zarr" / "c" / "2" / "0"
    chunk.write_bytes(chunk.read_bytes()[:10])
    with pytest.raises(SourceReadError, match=r"in\.zarr cannot be read"):
        cdd_dask.decompose(source, tmp_path / "out.zarr", **CUT)
    assert not (tmp_path / "out.zarr").exists()


# arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"engine": "magic"},
            r"engine='magic' is unknown: choose one of auto, reference, cpu, torch",
        ),
        ({"executor": "magic"}, r"executor='magic' is unknown: choose one of auto, serial"),
        ({"memory": "lots"}, r"memory='lots' is no amount of bytes: write 500000000"),
        ({"memory": 0}, r"memory=0 must be more than 0"),
        ({"memory": "-5MB"}, r"memory='-5MB' must be more than 0"),
        ({"workers": 0}, r"workers=0 must be .*>= 1"),
        ({"workers": -2}, r"workers=-2 must be .*>= 1"),
        ({"workers": 1.5}, r"workers=1\.5 must be a whole number"),
        ({"workers": True}, r"workers=True must be a whole number"),
        ({"workers": "two"}, r"workers='two' must be a whole number"),
        ({"executor": "serial", "workers": 2}, r'workers=2 with executor="serial": use "threads"'),
        ({"client": object()}, r"client=<object .* must be a synchronous distributed.Client"),
        ({"block": (5,)}, r"block=\(5,\) has 1 axes, .* \(24, 10\) has 2"),
        ({"block": (5, 5, 5)}, r"block=\(5, 5, 5\) has 3 axes"),
        ({"block": (5, 0)}, r"block=.*0.* must be"),
        ({"boundary": "open"}, r"boundary='open' is unknown: choose one of reflect"),
        ({"dtype": "float16"}, r"dtype='float16' is unknown: choose one of float32, float64"),
        ({"rtol": -1e-3}, r"rtol=-0\.001 must be >= 0"),
        ({"max_scale": 0.5}, r"max_scale=0\.5 must be larger than min_scale=1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_mean_nothing(tmp_path: Path, arguments: dict[str, Any], message: str):
    """The message names the argument, the value and what is allowed; nothing is written."""
    with pytest.raises(InputError, match=message):
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", **{**FAST, **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "torch", "device": "cuda:97"}, r"device='cuda:97' is not present"),
        ({"engine": "torch", "device": "abacus"}, r"device='abacus' is not present"),
        ({"device": "abacus"}, r"device='abacus' is not present"),
        ({"engine": "reference", "device": "cuda"}, r"device='cuda' .*engine=.torch"),
    ],
)
def test_devices_that_are_not_there(tmp_path: Path, arguments: dict[str, Any], message: str):
    """Never silently another device."""
    if arguments.get("engine") != "reference":
        pytest.importorskip("torch")
    with pytest.raises(DeviceError, match=message):
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", **FAST, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["processes", "distributed"])
def test_memory_of_this_process_is_out_of_reach_of_others(name: str):
    """``out=None`` with workers elsewhere: refused, with both ways out."""
    with pytest.raises(InputError, match=f"out=None .*executor='{name}' .*give out=.*threads"):
        cdd_dask.decompose(FIELD, executor=name, workers=2, **FAST)


class Unconnected:
    """Something like a client."""

    status = "closed"
    asynchronous = False

    def scheduler_info(self, **_: Any) -> dict[str, Any]:
        return {"workers": {}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 2}, r"workers=2 with a client: .*leave it out"),
        ({"executor": "threads"}, r"client is given, but executor='threads'"),
        ({}, r"client=.* is closed: connect it"),
    ],
)
def test_clients_and_their_contradictions(tmp_path: Path, arguments: dict[str, Any], message: str):
    """A client decides the workers, and must be connected."""
    with pytest.raises(InputError, match=message):
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", client=Unconnected(), **FAST, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_too_small(tmp_path: Path):
    """A `MemoryError` with both numbers, before anything is written."""
    with pytest.raises(MemoryError, match=r"needs [\d.]+ MB .*memory allows 1 MB: raise") as error:
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", memory="1MB", **FAST)
    assert isinstance(error.value, BudgetError)
    assert list(tmp_path.iterdir()) == []


# the output


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished decomposition."""
    cdd_dask.decompose(FIELD, tmp_path / "out.zarr", **FAST)
    return tmp_path / "out.zarr"


def test_an_output_that_exists_stays(out: Path):
    """Refused with the remedy, and not a byte of it changes."""
    before = snapshot(out)
    with pytest.raises(FileExistsError, match=r"out=.*out\.zarr was .*overwrite=True") as error:
        cdd_dask.decompose(FIELD * 2, out, **FAST)
    assert isinstance(error.value, OutputExistsError)
    assert snapshot(out) == before


def test_overwriting_replaces_all_of_it(out: Path):
    """A finished store of ours goes; of its eight channels nothing is left in the new one's two."""
    cdd_dask.decompose(FIELD, out, overwrite=True, **{**FAST, "max_scale": 8})
    assert (out / "channel_03").exists()
    result = cdd_dask.decompose(FIELD * 2, out, overwrite=True, **FAST)
    assert np.allclose(result.reconstruct(), FIELD * 2, rtol=1e-6)
    assert sorted(path.name for path in out.iterdir()) == [
        "channel_00",
        "channel_01",
        "done",
        "residual",
        "zarr.json",
    ]


def test_overwriting_an_unfinished_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What an interrupted run left may be replaced too, and then is whole."""
    interrupt_after(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", **CUT)
    monkeypatch.undo()
    assert_not_whole(tmp_path / "out.zarr")
    result = cdd_dask.decompose(FIELD, tmp_path / "out.zarr", overwrite=True, **CUT)
    assert np.allclose(result.reconstruct(), FIELD, rtol=1e-6)


def test_a_bad_request_does_not_cost_the_old_result(out: Path):
    """With `overwrite`, the old store goes only when the new run is known to fit."""
    before = snapshot(out)
    for arguments in ({"memory": "1MB"}, {"block": (1,)}, {"engine": "magic"}, {"workers": 0}):
        with pytest.raises((InputError, BudgetError)):
            cdd_dask.decompose(FIELD, out, overwrite=True, **{**FAST, **arguments})
    assert snapshot(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "zarr", "link"])
def test_what_is_not_ours_is_never_deleted(tmp_path: Path, kind: str, overwrite: bool):
    """A folder, a file, another program's Zarr store, a link: refused, `overwrite` or not."""
    out = tmp_path / "out.zarr"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    elif kind == "file":
        out.write_text("years of work")
    elif kind == "zarr":
        group = zarr.open_group(out, mode="w", attributes={"cdd_dask": "mentioned"})
        group.create_array("image", data=FIELD)
    else:
        cdd_dask.decompose(FIELD, tmp_path / "elsewhere.zarr", **FAST)
        out.symlink_to(tmp_path / "elsewhere.zarr")
    before = snapshot(tmp_path)
    if kind == "link" and not overwrite:  # a run may go on through a link; here nothing is left
        cdd_dask.decompose(FIELD, out, **FAST)
    else:
        refusal = "is a symbolic link to a decomposition.*elsewhere" if kind == "link" else "exists"
        with pytest.raises(OutputExistsError, match=rf"out=.*out\.zarr {refusal}"):
            cdd_dask.decompose(FIELD, out, overwrite=overwrite, **FAST)
    assert snapshot(tmp_path) == before


def test_only_our_stores_can_be_removed(tmp_path: Path):
    """The one function that deletes checks once more, whoever calls it."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="not deleted"):
        store.remove_store(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_empty_folder_serves(tmp_path: Path):
    """A folder that somebody made for the output is no obstacle."""
    (tmp_path / "out.zarr").mkdir()
    assert cdd_dask.decompose(FIELD, tmp_path / "out.zarr", **FAST).attrs["complete"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_is_not_the_source(tmp_path: Path, out: Path, overwrite: bool):
    """Same path, inside it, around it, also by links and dots: refused before anything goes."""
    image = out / "residual" / "scale0" / "image"
    (tmp_path / "link").symlink_to(out)
    zarr.create_array(tmp_path / "in.zarr", data=FIELD)
    np.save(tmp_path / "in.npy", FIELD)
    before = snapshot(tmp_path)
    for source, target, message in (
        (tmp_path / "in.npy", tmp_path / "in.npy", "is the source"),
        (tmp_path / "in.zarr", tmp_path / "in.zarr", "is the source"),
        (tmp_path / "in.zarr", tmp_path / "in.zarr" / "c" / "new.zarr", "lies in the source"),
        (tmp_path / "in.npy", out / "new.zarr", "lies in the decomposition"),
        (tmp_path / "in.zarr", tmp_path / "x" / ".." / "in.zarr", "is the source"),
        (image, out, "contains the source"),
        (tmp_path / "link" / "residual" / "scale0" / "image", out, "contains the source"),
        (zarr.open_array(image, mode="r"), out, "contains the source"),
        (tmp_path / "in.npy", tmp_path, "contains the source"),
    ):
        with pytest.raises(InputError, match=rf"out=.* {message}.*: name another output"):
            cdd_dask.decompose(source, target, overwrite=overwrite, **FAST)
    assert snapshot(tmp_path) == before


def lazy_dask(image: Path) -> Any:
    return pytest.importorskip("dask.array").from_zarr(str(image))


def lazy_xarray(image: Path) -> Any:
    group = image.parent
    return pytest.importorskip("xarray").open_zarr(group, consolidated=False)["image"]


def lazy_memmap(image: Path) -> Any:
    np.save(image.parent / "in.npy", FIELD)
    return np.load(image.parent / "in.npy", mmap_mode="r")


def file_url(image: Path) -> Any:
    return f"file://{image}"


@pytest.mark.parametrize("make", [lazy_dask, lazy_xarray, lazy_memmap, file_url])
def test_a_lazy_source_in_the_output_is_not_lost(out: Path, make: Callable[[Path], Any]):
    """Overwriting the store that a lazy array reads from must not decompose zeros instead.

    Refused, or done right; but never the source deleted first and missing chunks read as fill.
    """
    residual = cdd_dask.open_decomposition(out).residual[...]
    source = make(out / "residual" / "scale0" / "image")
    expected = FIELD if make is lazy_memmap else residual
    try:
        result = cdd_dask.decompose(source, out, overwrite=True, **FAST)
    except InputError:
        assert np.array_equal(cdd_dask.open_decomposition(out).residual[...], residual)
    else:
        assert np.allclose(result.reconstruct(), expected, rtol=1e-6)


@pytest.mark.parametrize("beneath", ["file", "file/deeper"])
def test_an_output_in_a_file(tmp_path: Path, beneath: str):
    """A path through a file can be no folder."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputAccessError, match=r"out=.* is no folder"):
        cdd_dask.decompose(FIELD, tmp_path / beneath / "out.zarr", **FAST)


def test_folders_on_the_way_are_made(tmp_path: Path):
    """As long as the disk lets us."""
    out = tmp_path / "a" / "b" / "out.zarr"
    assert cdd_dask.decompose(FIELD, out, **FAST).path == str(out)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder that may not be written: a `PermissionError` that names it."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="no permission to write") as error:
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", **FAST)
    assert isinstance(error.value, OutputAccessError)
    assert list(tmp_path.iterdir()) == []


def test_no_permission_that_shows_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system that says yes and then refuses: found before the run."""

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PreflightError, match=r"output on client: .* cannot be written: .*denied"):
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", **FAST)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Refused before anything is written, with both numbers."""
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs up to .* kB, but its disk has 50 kB free") as error:
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", **FAST)
    assert isinstance(error.value, DiskSpaceError)
    assert list(tmp_path.iterdir()) == []


def test_what_is_overwritten_counts_as_free(out: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk can hold the same decomposition again, in place of the old one."""
    held = sum(len(content) for content in snapshot(out).values() if content)
    needed = cdd_dask.plan(FIELD, out, max_scale=2, e_rel=0.3).disk_bytes
    usage = shutil.disk_usage(out)._replace(free=needed - held)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert cdd_dask.decompose(FIELD, out, overwrite=True, **FAST).attrs["complete"]


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ENOSPC in the middle of a run: the block and the cause are named, the store is not whole.

    It opens only for those who ask for what is there.
    """
    out = tmp_path / "out.zarr"
    interrupt_after(monkeypatch, 4, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(BlockError, match=r"block \d of channel 0, region .*No space left"):
        cdd_dask.decompose(FIELD, out, **CUT)
    assert_not_whole(out)
    partly = cdd_dask.open_decomposition(out, allow_incomplete=True)
    assert "INCOMPLETE" in repr(partly)
    assert partly.shape == FIELD.shape
    for ask in (partly.scale_spectrum, partly.table):  # no statistics yet: said so, not a KeyError
        with pytest.raises(StoreError, match="not complete"):
            ask()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, writes: int, error: BaseException) -> None:
    """Let so many blocks be written, then raise `error`."""
    original, done = store.write_block, []

    def write(*args: Any) -> None:
        done.append(args)
        if len(done) > writes:
            raise error
        original(*args)

    monkeypatch.setattr(store, "write_block", write)


def assert_not_whole(path: Path) -> None:
    """There may be something at `path`, but nobody can take it for a result."""
    assert path.exists()
    with pytest.raises(StoreError, match=r"is not complete: .*goes on with it.*allow_incomplete"):
        cdd_dask.open_decomposition(path)


# opening


def test_opening_what_is_no_decomposition(tmp_path: Path, out: Path):
    """Nothing there, a file, a folder, an array, a damaged or a future store: all told apart."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        cdd_dask.open_decomposition(tmp_path / "no.zarr")
    np.save(tmp_path / "in.npy", FIELD)
    zarr.create_array(tmp_path / "in.zarr", data=FIELD)
    (tmp_path / "folder").mkdir()
    for name in ("in.npy", "in.zarr", "folder", "out.zarr/residual"):
        with pytest.raises(StoreError, match="is no decomposition store"):
            cdd_dask.open_decomposition(tmp_path / name)
    shutil.rmtree(out / "channel_01")
    with pytest.raises(StoreError, match="is damaged"):
        cdd_dask.open_decomposition(out)
    root = zarr.open_group(out, mode="r+")
    root.attrs["cdd_dask"] = {**root.attrs["cdd_dask"], "format_version": 99}
    with pytest.raises(StoreError, match=r"has format version 99, .* reads 2: install"):
        cdd_dask.open_decomposition(out)


def test_reading_is_checked(out: Path) -> None:
    """A finished store is read only: its channels cannot be written by accident."""
    channel: Any = cdd_dask.open_decomposition(out).channels[0]
    values: NDArray[Any] = channel[...]
    with pytest.raises(ValueError, match="read-only"):
        channel[0] = 1
    assert np.array_equal(channel[...], values)


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"), [(1e38, "float32", "float64"), (1e308, "float64", "divide")]
)
@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_values_near_the_end_of_a_type(engine: str, value: float, dtype: str, remedy: str):
    """Their sums would be infinite, and the channels NaN: refused, with the place."""
    if engine == "torch":
        pytest.importorskip("torch")
    field = FIELD.astype("float64")
    field[3, 2] = value
    with pytest.raises(InputError, match=rf"at \(3, 2\), too large.*{remedy}"):
        cdd_dask.decompose(field, engine=engine, device="cpu", **{**FAST, "dtype": dtype})


@pytest.mark.parametrize("name", ["overwrite", "break_lease", "progress", "inverted"])
def test_a_word_is_no_flag(name: str, tmp_path: Path):
    """``"no"`` would be true, and cost a store."""
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(FIELD, out, **FAST)
    before = snapshot(tmp_path)
    for value in ("no", None, 0):
        with pytest.raises(InputError, match=rf"{name}={value!r} must be True or False"):
            cdd_dask.decompose(FIELD * 2, out, **{**FAST, name: value})
    assert snapshot(tmp_path) == before
    cdd_dask.decompose(FIELD, out, **{**FAST, name: np.bool_(False)})


@pytest.mark.parametrize("out", [True, 5, [], {}, float("nan"), b"x.zarr", "", "memory://"])
def test_outputs_that_are_no_place(out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No folder of such a name is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"out=.* (is no path|names no place)"):
        cdd_dask.decompose(FIELD, out, **FAST)
    assert not [*tmp_path.iterdir()]


def test_a_scratch_that_is_no_place_leaves_no_output(tmp_path: Path):
    """The run that it was named for would never go on."""
    with pytest.raises(InputError, match=r"scratch=memory:// names no place"):
        cdd_dask.decompose(FIELD, tmp_path / "out.zarr", scratch="memory://", **FAST)
    assert not [*tmp_path.iterdir()]


def test_more_memory_than_there_can_be():
    """Said before it is stored, where it could not be read again."""
    for memory in ("1e12GB", 10**30):
        with pytest.raises(InputError, match=r"memory=.* is more than any machine has"):
            cdd_dask.plan((64, 64), memory=memory)


def test_numbers_of_numpy_are_numbers():
    """As whole numbers, not as others."""
    options = {key: value for key, value in FAST.items() if key != "progress"}
    assert cdd_dask.plan(FIELD, upsample=np.int64(2), **options).parameters.upsample == 2
    with pytest.raises(InputError, match=r"upsample=2\.0 must be 1, 2 or 4"):
        cdd_dask.plan(FIELD, upsample=2.0, **options)


def test_arrays_that_are_not_what_they_say():
    """A meta tensor holds nothing; blocks of a dask array may be complex."""
    import dask
    import dask.array as da

    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="meta tensor"):
        cdd_dask.decompose(torch.zeros((8, 8), device="meta"), **FAST)
    blocks = da.from_delayed(dask.delayed(lambda: np.ones((8, 8)) * 1j)(), (8, 8), "f4")
    with pytest.raises((SourceReadError, RunError), match="holds complex numbers, not float32"):
        cdd_dask.decompose(blocks, **FAST)


def test_who_comes_second_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not to overwrite what another run begins at the same moment."""
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(FIELD, out, **FAST)
    monkeypatch.setattr("cdd_dask.api.find_begun", lambda address: None)
    with pytest.raises(OutputExistsError, match="was begun by another run just now: wait"):
        cdd_dask.decompose(FIELD, out, **FAST)


def test_a_command_that_would_lose_its_result():
    """Its memory ends with it."""
    result = CliRunner().invoke(cli, ["decompose", "a.npy", "memory://x"])
    assert result.exit_code == 2
    assert "gone when it ends" in result.output
