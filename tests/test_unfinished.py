"""What happens to an unfinished output, or to its source, is found when its run goes on or ends."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from examples import slowly

import cdd_dask
from cdd_dask import resuming, run, store
from cdd_dask.errors import (
    CddError,
    DamagedError,
    DifferentRunError,
    InputError,
    OutputAccessError,
    RunError,
)

OPTIONS: dict[str, Any] = {
    **{"max_scale": 4, "e_rel": 0.3, "rtol": 1e-2, "block": 16},
    **{"engine": "reference", "progress": False},
}
FIELD = np.random.default_rng(0).lognormal(size=(48, 40)).astype("float32")


class Stopped(BaseException):
    """Stands for whatever ends a run at once."""


@pytest.fixture
def before_task(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], list[Any]]:
    """Have something done before a task, given by how many came before; tells of the tasks."""

    def plant(count: int, what: Callable[[], None]) -> list[Any]:
        executed: list[Any] = []
        done: list[bool] = []
        original = run_task

        def task(one: Any) -> Any:
            if len(executed) == count and not done:
                done.append(True)
                what()
            executed.append((one.number, one.block))
            return original(one)

        monkeypatch.setattr(run, "run_task", task)
        return executed

    run_task = run.run_task
    return plant


def stop() -> None:
    raise Stopped


def begin(before_task: Any, source: Path, out: Path, count: int = 21, **more: Any) -> list[Any]:
    """Begin an output of the field, and stop before a task, of which there were so many."""
    np.save(source, FIELD)
    executed: list[Any] = before_task(count, stop)
    with pytest.raises(Stopped):
        cdd_dask.decompose(source, out, **OPTIONS, **more)
    return executed


def outputs_of(path: Path) -> list[Any]:
    result = cdd_dask.open_decomposition(path)
    return [part[...] for part in (*result.channels, result.residual)]


def assert_whole(out: Path, source: Any) -> None:
    """It is what an undisturbed run makes of the source."""
    cdd_dask.verify(out, source, progress=False)
    whole = cdd_dask.decompose(source, **OPTIONS)
    for one, other in zip((*whole.channels, whole.residual), outputs_of(out), strict=True):
        assert np.array_equal(one[...], other)


@pytest.fixture(params=["npy", "zarr", "array"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Of every kind: copied first, read in place, and in memory."""
    if request.param == "array":
        return FIELD.copy()
    path = tmp_path / f"field.{request.param}"
    if request.param == "npy":
        np.save(path, FIELD)
    else:
        zarr.create_array(path, data=FIELD, chunks=(16, 16))
    return path


def write(source: Any, value: float) -> None:
    """Have the source hold another value somewhere."""
    if isinstance(source, np.ndarray):
        source[17, 3] = value
    elif source.suffix == ".zarr":
        zarr.open_array(source)[17, 3] = value
    else:
        field = np.load(source)
        field[17, 3] = value
        np.save(source, field)


def test_a_source_that_changes_while_it_is_read(source: Any, before_task: Any, tmp_path: Path):
    """The run says what did, and forgets the blocks that may be of either."""
    out = tmp_path / "out.zarr"
    executed = before_task(4, lambda: write(source, 7.0))
    message = r"was written while .* read: it had source (bytes|modified|content|versions)=.*now"
    with pytest.raises(RunError, match=message):
        cdd_dask.decompose(source, out, **OPTIONS)
    passes = {number for number, _ in executed}
    assert passes == {0}
    with pytest.raises(DifferentRunError, match="source"):
        cdd_dask.decompose(source, out, **OPTIONS)
    if isinstance(source, np.ndarray):  # which can become again what it was
        write(source, FIELD[17, 3])
        cdd_dask.decompose(source, out, **OPTIONS)
        assert set(executed[9:18]) == set(executed[:9])
    cdd_dask.decompose(source, out, **OPTIONS, overwrite=True)
    assert_whole(out, source)


def test_a_source_may_change_that_is_not_read_any_more(before_task: Any, tmp_path: Path):
    """The working copy is what counts then."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    np.save(source, FIELD)
    before_task(12, lambda: write(source, 7.0))
    cdd_dask.decompose(source, out, **OPTIONS)
    np.save(source, FIELD)
    assert_whole(out, source)


@pytest.mark.parametrize("how", ["truncated", "another block's", "zeros"])
def test_what_a_lost_machine_has_not_written_is_made_again(
    how: str, before_task: Any, tmp_path: Path
):
    """Though it is marked as done, and no later pass reads it."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    executed = begin(before_task, source, out)
    shards = out / "channel_00/scale0/image/c"
    data = (shards / "1/1").read_bytes()
    others = {"truncated": data[:-30], "zeros": bytes(len(data))}
    (shards / "1/1").write_bytes(others.get(how, (shards / "0/1").read_bytes()))
    cdd_dask.decompose(source, out, **OPTIONS)
    again = {key for key in executed if executed.count(key) == 2}
    assert (1, 4) in again
    assert {number for number, _ in again} <= {0, 1}  # the copied field was gone by then
    assert_whole(out, source)


def test_what_was_written_long_before_is_not_read_again(
    before_task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """A run over days need not read all that it has written whenever it goes on."""
    monkeypatch.setattr(resuming, "TIMES_TO_DOUBT", 1)
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    begin(before_task, source, out)
    files = sorted(path for path in out.glob("*/scale0/image/c/*/*"))
    for path in files[:-2]:
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 400 * 10**9))
    with caplog.at_level(logging.INFO, "cdd_dask"):
        cdd_dask.decompose(source, out, **OPTIONS)
    assert "checking the 2 shards that were written last" in caplog.text


def test_a_time_in_the_future_hides_nothing(before_task: Any, tmp_path: Path):
    """As of a clock that was set: what was torn is found all the same."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    begin(before_task, source, out)
    shards = out / "channel_00/scale0/image/c"
    moment = shards.stat().st_mtime + 4000
    os.utime(shards / "0/0", (moment, moment))
    (shards / "1/1").write_bytes((shards / "1/1").read_bytes()[:-30])
    cdd_dask.decompose(source, out, **OPTIONS)
    assert_whole(out, source)


@pytest.mark.parametrize(("key", "value"), [("scale_from", 9.0), ("scale_to", 7.5), ("unit", "pc")])
def test_what_an_output_is_follows_from_the_plan(
    key: str, value: Any, before_task: Any, tmp_path: Path
):
    """Whatever its attributes were made to say before the run goes on, or while it does."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"

    def edit() -> None:
        path = out / "channel_01/zarr.json"
        document = json.loads(path.read_text())
        document["attributes"]["cdd_dask"][key] = value
        path.write_text(json.dumps(document))

    begin(before_task, source, out, 15)
    edit()
    before_task(3, edit)
    cdd_dask.decompose(source, out, **OPTIONS)
    assert_whole(out, source)


def test_what_cannot_be_removed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The store is complete; the next call removes it."""
    source, out, scratch = (tmp_path / name for name in ("field.npy", "out.zarr", "scratch"))
    np.save(source, FIELD)
    scratch.mkdir()

    def refuse(*_: Any) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(store, "remove_scratch", refuse)
        result = cdd_dask.decompose(source, out, **OPTIONS, scratch=scratch)
    assert result.attrs["complete"] is True
    assert "is complete, but what it does not need any more could not be removed" in caplog.text
    assert [*scratch.iterdir()]
    cdd_dask.decompose(source, out, **OPTIONS)
    assert not [*scratch.iterdir()]


def test_a_finished_output_that_lacks_blocks_is_not_done(tmp_path: Path):
    """Nor is it begun: what mends it is said."""
    np.save(tmp_path / "field.npy", FIELD)
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(tmp_path / "field.npy", out, **OPTIONS)
    shutil.rmtree(out / "residual/scale0/image/c/0")
    with pytest.raises(DamagedError, match=r"lacks 3 of 9 blocks: .* repair"):
        cdd_dask.decompose(tmp_path / "field.npy", out, **OPTIONS)


def test_blocks_of_other_axes_are_refused(tmp_path: Path):
    """As they are where nothing has begun."""
    np.save(tmp_path / "field.npy", FIELD)
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(tmp_path / "field.npy", out, **OPTIONS)
    for block in ((16,), (16, 16, 16)):
        with pytest.raises(InputError, match=r"block=\(16.* has \d axes, the volume"):
            cdd_dask.decompose(tmp_path / "field.npy", out, **{**OPTIONS, "block": block})


def test_overwriting_a_copy_leaves_the_scratch_of_the_original(before_task: Any, tmp_path: Path):
    """Which goes on with it."""
    source, out, scratch = (tmp_path / name for name in ("field.npy", "out.zarr", "scratch"))
    scratch.mkdir()
    executed = begin(before_task, source, out, scratch=scratch)
    shutil.copytree(out, tmp_path / "copy.zarr")
    kept = [*scratch.iterdir()]
    before_task(10**9, stop)
    cdd_dask.decompose(source, tmp_path / "copy.zarr", **OPTIONS, overwrite=True)
    assert [*scratch.iterdir()] == kept
    again = before_task(10**9, stop)
    cdd_dask.decompose(source, out, **OPTIONS)
    assert not set(again) & set(executed)
    assert not [*scratch.iterdir()]
    assert_whole(out, source)


def test_only_what_is_needed_is_made_again(before_task: Any, tmp_path: Path):
    """Where a lost block's input is gone: its neighbours in the passes before, and theirs."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    np.save(source, np.random.default_rng(0).lognormal(size=320).astype("float32"))
    executed = before_task(41, stop)
    with pytest.raises(Stopped):
        cdd_dask.decompose(source, out, **{**OPTIONS, "max_scale": 2})
    first = [*executed]
    assert not (out / "work/field_00").exists()
    (out / "channel_00/scale0/image/c/7").unlink()
    again = before_task(10**9, stop)
    cdd_dask.decompose(source, out, **{**OPTIONS, "max_scale": 2})
    assert set(again) & set(first) == {(0, 6), (0, 7), (0, 8), (1, 7)}
    cdd_dask.verify(out, progress=False)


def test_output_and_scratch_may_move(before_task: Any, tmp_path: Path):
    """Wherever the working fields lie by now; one without them is refused."""
    source, here, there = (tmp_path / name for name in ("field.npy", "here", "there"))
    (here / "scratch").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    executed = begin(before_task, source, here / "out.zarr", scratch=here / "scratch")
    with pytest.raises(DifferentRunError, match=r"scratch=.*here/scratch.*now scratch=.*empty"):
        cdd_dask.decompose(source, here / "out.zarr", **OPTIONS, scratch=tmp_path / "empty")
    here.rename(there)
    again = before_task(10**9, stop)
    cdd_dask.decompose(source, there / "out.zarr", **OPTIONS, scratch=there / "scratch/")
    assert not set(again) & set(executed)
    assert not [*(there / "scratch").iterdir()]
    assert_whole(there / "out.zarr", source)


def test_a_scratch_that_is_lost(before_task: Any, tmp_path: Path):
    """With the machine that it was on: another one will do, and what is needed is made again."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    begin(before_task, source, out, scratch=tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(OutputAccessError, match="is no folder: make it first, or name another"):
        cdd_dask.decompose(source, out, **OPTIONS)
    cdd_dask.decompose(source, out, **OPTIONS, scratch=tmp_path / "two")
    assert not [*(tmp_path / "two").iterdir()]
    assert_whole(out, source)


def test_a_source_that_changes_in_a_pass_that_is_stopped(before_task: Any, tmp_path: Path):
    """Its blocks are done, and must not count when the source is what it was again."""
    field, out = FIELD.copy(), tmp_path / "out.zarr"
    before_task(3, lambda: write(field, 7.0))
    executed: list[Any] = []
    original = run.run_task

    def task(one: Any) -> Any:
        if len(executed) == 7:
            executed.append(None)
            raise KeyboardInterrupt
        executed.append((one.number, one.block))
        return original(one)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_task", task)
        with pytest.raises(RunError, match="was written while"):
            cdd_dask.decompose(field, out, **OPTIONS)
    assert len(executed) == 8
    write(field, float(FIELD[17, 3]))
    before_task(10**9, stop)
    cdd_dask.decompose(field, out, **OPTIONS)
    assert_whole(out, field)


def test_a_file_where_the_working_fields_go(before_task: Any, tmp_path: Path):
    """The message names it."""
    source, out, scratch = (tmp_path / name for name in ("field.npy", "out.zarr", "scratch"))
    scratch.mkdir()
    begin(before_task, source, out, scratch=scratch)
    (work,) = scratch.iterdir()
    shutil.rmtree(work)
    work.write_text("a file")
    with pytest.raises(OutputAccessError, match=rf"{work} is in the way of working fields"):
        cdd_dask.decompose(source, out, **OPTIONS)


# what a lost machine, or somebody, has done to metadata


@pytest.fixture
def half(before_task: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A source, and an output that was stopped."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    begin(before_task, source, out)
    return source, out


@pytest.mark.parametrize("content", [b"", b"{", b"\0\0\0", b"[]"])
def test_a_working_array_without_metadata_is_none(content: bytes, half: tuple[Path, Path]):
    """It is made anew, from what it was made of."""
    source, out = half
    for document in (out / "work").glob("*/zarr.json"):
        document.write_bytes(content)
    cdd_dask.decompose(source, out, **OPTIONS)
    assert_whole(out, source)


def test_a_torn_root_of_the_working_fields_is_written_again(before_task: Any, tmp_path: Path):
    """Where they have a store of their own."""
    source, out, scratch = (tmp_path / name for name in ("field.npy", "out.zarr", "scratch"))
    scratch.mkdir()
    begin(before_task, source, out, scratch=scratch)
    (work,) = scratch.iterdir()
    (work / "zarr.json").write_bytes(b"")
    cdd_dask.decompose(source, out, **OPTIONS)
    assert_whole(out, source)


def test_an_edited_root_gives_way_to_its_copy(half: tuple[Path, Path]):
    """Which is sealed, as it was."""
    source, out = half
    document = json.loads((out / "zarr.json").read_text())
    document["attributes"]["cdd_dask"]["edges"][1] += 1
    (out / "zarr.json").write_text(json.dumps(document))
    cdd_dask.decompose(source, out, **OPTIONS)
    assert_whole(out, source)


def test_a_damaged_coordinate_is_written_again(half: tuple[Path, Path]):
    """It would be damage of the finished output."""
    source, out = half
    path = out / "channel_00/scale0/y/c/0"
    path.write_bytes(path.read_bytes()[:-3] + b"\1\2\3")
    cdd_dask.decompose(source, out, **OPTIONS)
    assert_whole(out, source)


def test_scratch_goes_with_its_output_whoever_took_it_last(
    before_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that went on was killed before the output knew of it."""
    source, out, scratch = (tmp_path / name for name in ("field.npy", "out.zarr", "scratch"))
    scratch.mkdir()
    begin(before_task, source, out, 12, scratch=scratch)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_attributes", lambda *_: stop())
        with pytest.raises(Stopped):
            cdd_dask.decompose(source, out, **OPTIONS)
    cdd_dask.decompose(source, out, **OPTIONS, overwrite=True)
    assert not [*scratch.iterdir()]


def test_axes_keep_their_names(before_task: Any, tmp_path: Path):
    """Those of the source that the output was begun with."""
    xarray = pytest.importorskip("xarray")
    out = tmp_path / "out.zarr"
    before_task(12, stop)
    with pytest.raises(Stopped):
        cdd_dask.decompose(xarray.DataArray(FIELD, dims=("v", "x")), out, **OPTIONS)
    before_task(10**9, stop)
    cdd_dask.decompose(xarray.DataArray(FIELD), out, **OPTIONS)
    for group in ("channel_00", "residual"):
        names = {path.name for path in (out / group / "scale0").iterdir()}
        assert names == {"image", "v", "x", "zarr.json"}
    cdd_dask.verify(out, xarray.DataArray(FIELD), progress=False)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("what", ["file", *slowly("loop", "pipe")])
@pytest.mark.parametrize(
    "names",
    [
        ("work/field_01/c/1", "done/pass_0001", "channel_00/scale0/image/c", "lease"),
        ("work/field_01", "done/pass_0002/blocks", "channel_00/scale0"),
        ("work", "residual/scale0/image/c"),
        ("done",),
    ],
)
def test_what_is_no_folder_is_replaced(
    what: str, names: tuple[str], half: tuple[Path, Path], put_in_place: Any
):
    """And what lay in it is made again."""
    source, out = half
    for name in names:
        put_in_place(out / name, what)
    cdd_dask.decompose(source, out, **OPTIONS)
    assert_whole(out, source)


def test_a_link_to_what_is_not_there_stays(half: tuple[Path, Path], tmp_path: Path):
    """It may be a disk that is not mounted: a run that goes on says so, and does nothing."""
    source, out = half
    (out / "channel_00").rename(tmp_path / "elsewhere")
    (out / "channel_00").symlink_to(tmp_path / "disk" / "channel_00")
    with pytest.raises(CddError, match="channel_00"):
        cdd_dask.decompose(source, out, **OPTIONS)
    assert (out / "channel_00").is_symlink()
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "disk" / "channel_00")
    cdd_dask.decompose(source, out, **OPTIONS)
    assert (out / "channel_00").is_symlink()
    assert_whole(out, source)


def test_links_that_lead_back_are_not_followed(half: tuple[Path, Path]):
    """For ever."""
    source, out = half
    for name in ("channel_00/scale0/image/c/a", "channel_00/scale0/image/c/b"):
        (out / name).symlink_to(".")
    cdd_dask.decompose(source, out, **OPTIONS)
    cdd_dask.decompose(source, out, **OPTIONS)
    assert_whole(out, source)


@pytest.mark.parametrize("boundary", ["reflect", "nearest"])
@pytest.mark.parametrize("count", [9, *slowly(4)])
def test_means_that_are_lost_are_made_again(
    boundary: str, count: int, before_task: Any, tmp_path: Path
):
    """Of the block that wrote them, whether or not all have done so."""
    options = {"min_scale": 16, "max_scale": 32, "e_rel": 0.4, "boundary": boundary}
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    np.save(source, FIELD)
    executed = before_task(count, stop)
    options = {**OPTIONS, "rtol": 1e-3, **options}
    options.pop("engine")
    with pytest.raises(Stopped):
        cdd_dask.decompose(source, out, **options)
    first = [*executed]
    lost = [*(out / "work/means_00_part_0/c/0").glob("*/*")][-1]
    lost.unlink()
    again = before_task(10**9, stop)
    cdd_dask.decompose(source, out, **options)
    assert len({key for key in set(first) & set(again) if key[0] == 0}) == 1
    cdd_dask.verify(out, source, progress=False)
    whole = cdd_dask.decompose(source, **options)
    for one, other in zip((*whole.channels, whole.residual), outputs_of(out), strict=True):
        assert np.array_equal(one[...], other[...])


def test_the_probe_of_a_run_that_was_killed_goes(half: tuple[Path, Path]):
    """With the run that ends, or with the next call, be it complete."""
    source, out = half
    probe = out / ".cdd-dask-probe-0123456789ab"
    for _ in range(2):
        probe.write_text("a token")
        os.utime(probe, (0, time.time() - 60))
        cdd_dask.decompose(source, out, **OPTIONS)
        assert not probe.exists()
    assert_whole(out, source)
