"""The store: what others find in it, and what it does when bytes go wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import cdd_dask
from cdd_dask import layout, objects, store
from cdd_dask.blocks import Grid
from cdd_dask.errors import (
    BlockError,
    CddError,
    DamagedError,
    InputError,
    OutputAccessError,
    OutputExistsError,
    RunError,
    StoreError,
)
from cdd_dask.lease import GROUP, Holder
from cdd_dask.parameters import Parameters

FAST: dict[str, Any] = {"max_scale": 2, "e_rel": 0.3, "progress": False}
OUTPUTS = ("channel_00", "channel_01", "residual")
NAMES = {1: ("x",), 2: ("y", "x"), 3: ("z", "y", "x"), 4: ("dim_0", "dim_1", "dim_2", "dim_3")}
SHAPES = {1: (30,), 2: (22, 15), 3: (11, 10, 9), 4: (5, 6, 4, 7)}


def decomposed(path: Path | None, lognormal: Any, ndim: int = 2, **options: Any) -> Any:
    """A small decomposition in several blocks."""
    block = (-(-SHAPES[ndim][0] // 2), *SHAPES[ndim][1:])
    return cdd_dask.decompose(lognormal(SHAPES[ndim]), path, **{**FAST, "block": block, **options})


# layout


@pytest.mark.parametrize("ndim", SHAPES)
def test_the_layout(tmp_path: Path, lognormal: Any, ndim: int):
    """Channels, residual and nothing else; each with image, coordinates and its scale range."""
    result = decomposed(tmp_path / "out.zarr", lognormal, ndim)
    root = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert sorted(root.group_keys()) == sorted([*OUTPUTS, "done"])
    assert list(root.attrs) == ["cdd_dask"]
    names, ranges = NAMES[ndim], [(0.0, 1.0), (1.0, 2.0), (2.0, None)]
    for output, (low, high) in zip(OUTPUTS, ranges, strict=True):
        ours = root[output].attrs["cdd_dask"]
        assert (ours["scale_from"], ours["scale_to"], ours["unit"]) == (low, high, "voxel")
        level = root[output]["scale0"]
        assert sorted(level.array_keys()) == sorted(("image", *names))
        assert level["image"].metadata.dimension_names == names
        assert level["image"].shape == SHAPES[ndim]
        for name, size in zip(names, SHAPES[ndim], strict=True):
            assert np.array_equal(level[name][:], np.arange(size))
            assert level[name].metadata.dimension_names == (name,)
    assert np.array_equal(root["channel_01/scale0/image"][...], result.channels[1][...])


def test_what_the_root_remembers(tmp_path: Path, lognormal: Any):
    """Everything to know how the numbers came about, in plain JSON, and nothing that is secret."""
    result = decomposed(tmp_path / "out.zarr", lognormal, cval=0.5)
    text = (tmp_path / "out.zarr" / "zarr.json").read_text()
    ours = json.loads(text)["attributes"]["cdd_dask"]
    assert ours["format_version"] == store.FORMAT_VERSION
    assert ours["parameters"]["cval"] == 0.5
    assert ours["edges"] == [1.0, 2.0]
    assert ours["complete"] is True
    assert set(ours["versions"]) >= {"python", "numpy", "scipy", "zarr", "cdd-dask"}
    assert ours["source"]["shape"] == [22, 15]
    assert ours["error"] == "bounded"
    assert dict(result.attrs) == ours


@pytest.mark.parametrize("ndim", SHAPES)
def test_xarray_opens_it(tmp_path: Path, lognormal: Any, ndim: int):
    """With dimensions and coordinates, and the same bytes."""
    xarray = pytest.importorskip("xarray")
    result = decomposed(tmp_path / "out.zarr", lognormal, ndim)
    opened = xarray.open_zarr(tmp_path / "out.zarr", group="channel_00/scale0", consolidated=False)
    assert opened["image"].dims == NAMES[ndim]
    assert set(opened.coords) == set(NAMES[ndim])
    assert np.array_equal(opened["image"].values, result.channels[0][...])


def ome_image(path: Path, output: str) -> Any:
    """An output, validated as OME-Zarr 0.5 by a third party."""
    v05 = pytest.importorskip("ome_zarr_models.v05")
    return v05.Image.from_zarr(zarr.open_group(path / output, mode="r"))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("output", OUTPUTS)
def test_images_are_ome_zarr(tmp_path: Path, lognormal: Any, ndim: int, output: str):
    """Two and three axes of space validate, so viewers open every channel and the residual."""
    decomposed(tmp_path / "out.zarr", lognormal, ndim)
    multiscales = ome_image(tmp_path / "out.zarr", output).ome_attributes.multiscales[0]
    assert [axis.name for axis in multiscales.axes] == list(NAMES[ndim])
    assert {axis.type for axis in multiscales.axes} == {"space"}
    assert multiscales.datasets[0].path == "scale0/image"


def test_spectral_cubes_are_ome_zarr(tmp_path: Path, fits_cube: Path):
    """A FITS cube has one axis that is no space: it validates with its own type."""
    cdd_dask.decompose(fits_cube, tmp_path / "out.zarr", **FAST)
    axes = ome_image(tmp_path / "out.zarr", "residual").ome_attributes.multiscales[0].axes
    assert [(axis.name, axis.type) for axis in axes] == [
        ("v", "velocity"),
        ("y", "space"),
        ("x", "space"),
    ]


def test_films_are_ome_zarr(tmp_path: Path, lognormal: Any):
    """Four axes validate where the first is known to be time."""
    xarray = pytest.importorskip("xarray")
    film = xarray.DataArray(lognormal(SHAPES[4]), dims=("t", "z", "y", "x"))
    cdd_dask.decompose(film, tmp_path / "out.zarr", **FAST)
    axes = ome_image(tmp_path / "out.zarr", "channel_00").ome_attributes.multiscales[0].axes
    assert [axis.type for axis in axes] == ["time", "space", "space", "space"]


@pytest.mark.parametrize("ndim", [1, 4])
def test_what_is_no_image_does_not_claim_to_be(tmp_path: Path, lognormal: Any, ndim: int):
    """One axis, or four of which nobody said what the first is, carry no OME metadata."""
    decomposed(tmp_path / "out.zarr", lognormal, ndim)
    for output in OUTPUTS:
        assert "ome" not in zarr.open_group(tmp_path / "out.zarr" / output, mode="r").attrs


@pytest.mark.parametrize("names", [("x", "y"), ("a", "b"), ("x", "time")])
def test_axes_out_of_order_do_not_claim_to_be_an_image(
    tmp_path: Path, lognormal: Any, names: tuple[str, str]
):
    """OME-Zarr wants space last and in order; other names are stored without it."""
    xarray = pytest.importorskip("xarray")
    field = xarray.DataArray(lognormal(SHAPES[2]), dims=names)
    result = cdd_dask.decompose(field, tmp_path / "out.zarr", **FAST)
    assert result.residual.metadata.dimension_names == names
    assert "ome" not in zarr.open_group(tmp_path / "out.zarr" / "residual", mode="r").attrs


# from beginning to end


def test_working_fields_come_and_go(
    tmp_path: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch
):
    """At most two at a time, and at the end no trace of them."""
    out, seen = tmp_path / "out.zarr", []
    original = store.remove_work_array

    def remove(address: str, run: str, name: str) -> None:
        seen.append(sorted(path.name for path in (out / "work").iterdir() if path.is_dir()))
        original(address, run, name)

    monkeypatch.setattr(store, "remove_work_array", remove)
    decomposed(out, lognormal, max_scale=4)
    assert seen == [["field_00", "field_01"], ["field_01", "field_02"], ["field_02"]]
    assert not (out / "work").exists()


def test_complete_is_written_last(tmp_path: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch):
    """Stopped after any write whatever, a run has left a store that does not say it is complete.

    The run is stopped at each of its writes in turn, metadata included, and then at none.
    """
    from zarr.storage import LocalStore

    writes, limit = [], None
    original = LocalStore.set

    async def write(self: Any, key: str, value: Any, *args: Any) -> None:
        writes.append(key)
        if limit is not None and len(writes) > limit:
            raise OSError("the power is off")
        await original(self, key, value, *args)

    monkeypatch.setattr(LocalStore, "set", write)
    decomposed(tmp_path / "whole.zarr", lognormal)
    total = len(writes)
    for limit in {*range(0, total, 7), total - 3, total - 2, total - 1}:
        out = tmp_path / f"{limit}.zarr"
        writes.clear()
        with pytest.raises((CddError, OSError)):
            decomposed(out, lognormal)
        with pytest.raises((StoreError, FileNotFoundError)):
            cdd_dask.open_decomposition(out)
    writes.clear()
    limit = total
    assert decomposed(tmp_path / "again.zarr", lognormal).attrs["complete"]
    assert len(writes) == total


# bytes


def shards_of(path: Path, output: str) -> list[Path]:
    """The files of an output's image."""
    folder = path / output / "scale0" / "image" / "c"
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_a_flipped_bit_is_noticed(tmp_path: Path, lognormal: Any):
    """Every bit of a shard is under a checksum: flipped ones raise, none is read as data."""
    result = decomposed(tmp_path / "out.zarr", lognormal)
    file = shards_of(tmp_path / "out.zarr", "channel_00")[0]
    whole = file.read_bytes()
    values = result.channels[0][...]
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="checksum"):
            result.channels[0][...]
    file.write_bytes(whole)
    assert np.array_equal(result.channels[0][...], values)


def test_a_block_of_zeros_leaves_its_chunks(tmp_path: Path):
    """A missing file always means missing data: zeros are written like anything else."""
    field = np.zeros((64, 20), "float32")
    field[:3] = 1
    result = cdd_dask.decompose(field, tmp_path / "out.zarr", **FAST, block=(16, 20))
    assert (result.channels[0][32:] == 0).all()
    for output in OUTPUTS:
        assert len(shards_of(tmp_path / "out.zarr", output)) == 4
    assert not any(map(store.missing_shards, (*result.channels, result.residual)))


@pytest.mark.parametrize("shape", [(22, 15), (100, 30)])
def test_missing_shards_are_found(tmp_path: Path, lognormal: Any, shape: tuple[int, ...]):
    """Each deleted file once, however many chunks are in it; reading it is an error."""
    result = cdd_dask.decompose(
        lognormal(shape), tmp_path / "out.zarr", **FAST, block=(-(-shape[0] // 2), 7)
    )
    files = shards_of(tmp_path / "out.zarr", "channel_01")
    for deleted, file in enumerate(files):
        assert len(store.missing_shards(result.channels[1])) == deleted
        file.unlink()
        place = tuple(map(int, file.parts[-2:]))
        assert place in store.missing_shards(result.channels[1])
        with pytest.raises(DamagedError, match=r"channel_01.*shard \(\d, \d\) is not there"):
            result.reconstruct()
    assert len(store.missing_shards(result.channels[1])) == len(files)
    assert not store.missing_shards(result.channels[0])


def make_store(address: str, grid: Grid) -> None:
    """An empty store of one channel."""
    axes = tuple(layout.Axis(name, 1.0, None) for name in "zyx"[3 - len(grid.shape) :])
    layout.Layout(grid, [1.0], axes, {"parameters": Parameters().as_dict()}).create(address)


@pytest.fixture
def empty(tmp_path: Path) -> str:
    """An empty store of two blocks, with its address."""
    address = str(tmp_path / "out.zarr")
    make_store(address, Grid((20, 70), (10, 70)))
    return address


@pytest.mark.parametrize("left", [b"", b"torn", 0.5])
def test_a_torn_shard_can_be_written_again(empty: str, left: Any):
    """A retry after a torn write succeeds: Zarr alone would read the shard first, and fail."""
    core = (slice(10, 20), slice(0, 70))
    values = np.random.default_rng(0).random((10, 70)).astype("float32")
    path = store.image_path("residual")
    store.write_block(empty, path, core, values)
    (file,) = shards_of(Path(empty), "residual")
    whole = file.read_bytes()
    file.write_bytes(left if isinstance(left, bytes) else whole[: len(whole) // 2])
    store.write_block(empty, path, core, values)
    assert np.array_equal(store.read_block(empty, path, core), values)
    assert [file.read_bytes() for file in shards_of(Path(empty), "residual")] == [whole]


def test_a_block_can_be_written_twice(empty: str):
    """The second write replaces the first, and neither touches the other block."""
    path = store.image_path("channel_00")
    first, second = (slice(0, 10), slice(0, 70)), (slice(10, 20), slice(0, 70))
    store.write_block(empty, path, first, np.ones((10, 70), "float32"))
    before = shards_of(Path(empty), "channel_00")[0].read_bytes()
    for value in (2, 3):
        store.write_block(empty, path, second, np.full((10, 70), value, "float32"))
    assert (store.read_block(empty, path, second) == 3).all()
    assert shards_of(Path(empty), "channel_00")[0].read_bytes() == before


def test_a_store_is_never_made_over_another(empty: str):
    """`Layout.create` refuses a place where anything is."""
    with pytest.raises(FileExistsError):
        make_store(empty, Grid((4,), (4,)))


def test_a_store_can_be_moved(tmp_path: Path, lognormal: Any):
    """Nothing in it depends on where it lies: a copy elsewhere opens as before."""
    result = decomposed(tmp_path / "out.zarr", lognormal)
    whole = result.reconstruct()
    shutil.move(tmp_path / "out.zarr", tmp_path / "archive")
    again = cdd_dask.open_decomposition(tmp_path / "archive")
    assert np.array_equal(again.reconstruct(), whole)
    same = cdd_dask.open_decomposition(str(tmp_path / "archive"))
    assert list(again.scale_spectrum()) == list(same.scale_spectrum())


def test_a_store_in_memory_is_the_same_without_a_path(tmp_path: Path, lognormal: Any):
    """``out=None``: the same channels, usable while they are held, and nothing on disk."""
    in_memory = decomposed(None, lognormal)
    on_disk = decomposed(tmp_path / "out.zarr", lognormal)
    assert in_memory.path is None
    assert "in memory" in repr(in_memory)
    assert np.array_equal(in_memory.channels[1][...], on_disk.channels[1][...])
    assert in_memory.table() == on_disk.table()
    with pytest.raises(InputError, match="keep what decompose returned"):
        cdd_dask.open_decomposition(in_memory._address)


def test_a_missing_shard_of_a_working_field_stops_the_run(
    tmp_path: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch
):
    """Zarr would read it as zeros; a run must not go on with those."""
    out = tmp_path / "out.zarr"
    original = store.create_work_array

    def create(address: str, run: str, name: str, *rest: Any) -> None:
        if name == "field_01":
            (out / "work/field_00/c/0/0").unlink()
        original(address, run, name, *rest)

    monkeypatch.setattr(store, "create_work_array", create)
    with pytest.raises(BlockError, match="is not there"):
        decomposed(out, lognormal, 2, max_scale=4)
    with pytest.raises(StoreError, match="not complete"):
        cdd_dask.open_decomposition(out)


def test_a_replaced_store_is_left_alone(
    tmp_path: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch
):
    """A run whose store another run replaced stops, and does not declare that one complete."""
    out = tmp_path / "out.zarr"
    original = store.finish_store

    def finish(*arguments: Any) -> None:
        monkeypatch.setattr(store, "finish_store", original)
        attributes = store.open_root(str(out), "r+").attrs
        attributes[store.KEY] = {**attributes[store.KEY], "run": "another"}
        original(*arguments)

    monkeypatch.setattr(store, "finish_store", finish)
    with pytest.raises(RunError, match="replaced by another run"):
        decomposed(out, lognormal)
    with pytest.raises(StoreError, match="not complete"):
        cdd_dask.open_decomposition(out)


def test_many_write_where_a_file_is_in_the_way(tmp_path: Path):
    """At once: whoever removes it removes nothing of what the others have written."""
    keys = [f"a/b/{i % 5}/{i}" for i in range(40)]
    for attempt in range(10):
        address = str(tmp_path / str(attempt))
        objects.write_object(address, "a", b"no folder")
        with ThreadPoolExecutor(8) as pool:
            done = [pool.submit(objects.write_object, address, key, key.encode()) for key in keys]
        for one in done:
            one.result()
        assert all(objects.read_object(address, key) == key.encode() for key in keys)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path):
    """Nor is what a store is not."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").write_text("precious")
    address = str(tmp_path / "store")
    objects.write_object(address, "one/two", b"")
    (tmp_path / "store/three").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "store/four").symlink_to(tmp_path / "elsewhere")
    objects.remove_objects(address, "three")
    objects.write_object(address, "four", b"a file")
    assert (tmp_path / "elsewhere/mine").read_text() == "precious"
    assert objects.names_in(address, "") == ["four", "one"]


@pytest.mark.parametrize(
    "what", ["lease", "lease/contract.pdf", "lease/zarr.json", "work/thesis.tex"]
)
@pytest.mark.parametrize("kind", ["folder", "url"])
def test_what_others_have_put_there_stays(kind: str, what: str, tmp_path: Path, lognormal: Any):
    """Whatever it is called."""
    pytest.importorskip("fsspec")
    out = str(tmp_path / "out") if kind == "folder" else f"memory://{tmp_path.name}/out"
    objects.write_object(out, what, b"precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            cdd_dask.decompose(lognormal((20, 20)), out, overwrite=overwrite, **FAST)
    assert objects.read_object(out, what) == b"precious"
    assert objects.names_in(out, "") == [what.partition("/")[0]]


@pytest.mark.parametrize("held", ["of a process that is gone", "torn", "zeros"])
@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_lease_alone_is_taken_over(kind: str, held: str, tmp_path: Path, lognormal: Any):
    """Its run was killed before it had made a store."""
    pytest.importorskip("fsspec")
    out = str(tmp_path / "out") if kind == "folder" else f"memory://{tmp_path.name}/out"
    gone = replace(Holder.here(), process=2**30, born=1.0)
    whole = objects.group_document(asdict(gone))
    data = {"torn": b"", "zeros": bytes(len(whole))}.get(held, whole)
    objects.write_object(out, f"{GROUP}/zarr.json", data)
    done = cdd_dask.decompose(
        lognormal((20, 20)), out, break_lease=held != "of a process that is gone", **FAST
    )
    assert done.attrs["complete"]


def test_a_url_that_cannot_be_listed(tmp_path: Path, lognormal: Any, monkeypatch: Any):
    """The message is ours."""
    memory = pytest.importorskip("fsspec.implementations.memory")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no listing")

    monkeypatch.setattr(memory.MemoryFileSystem, "ls", refuse)
    with pytest.raises(OutputAccessError, match="cannot be reached: no listing"):
        cdd_dask.decompose(lognormal((20, 20)), f"memory://{tmp_path.name}/out", **FAST)


def test_a_disk_that_fails_for_a_moment_is_asked_again(
    tmp_path: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch
):
    """And one that cannot bring a file to its disk is none that fails."""
    monkeypatch.setattr("cdd_dask.faults.FIRST_WAIT", 0.0)
    original, calls = os.fsync, []

    def fails(number: int) -> None:
        calls.append(number)
        if len(calls) in (1, 5):
            raise OSError(errno.EIO if len(calls) == 1 else errno.EINVAL, "no")
        original(number)

    monkeypatch.setattr(os, "fsync", fails)
    assert decomposed(tmp_path / "out.zarr", lognormal).attrs["complete"]
    assert len(calls) > 5
