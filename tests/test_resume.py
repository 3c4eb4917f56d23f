"""A run that was stopped goes on where it stopped, to the same bits, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from examples import slowly

import cdd_dask
from cdd_dask import layout, lease, run, store, task
from cdd_dask.errors import (
    BlockError,
    BudgetError,
    DifferentRunError,
    OutputExistsError,
    RunError,
    StoreError,
)
from cdd_dask.readers import BadValueError
from cdd_dask.seals import sealed

BASE: dict[str, Any] = {"max_scale": 8, "e_rel": 0.3, "block": 16, "progress": False}
CELLS: dict[str, Any] = {"min_scale": 16, "max_scale": 32, "e_rel": 0.4}
STREAM: dict[str, Any] = {**CELLS, "rtol": 2e-4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "halos": ("positive", {}),
    "one block": ("positive", {"block": 48}),
    "an array in memory": ("in memory", {}),
    "several passes": ("positive", {"max_scale": 16, "memory": "15.4MB"}),
    "closure": ("positive", CELLS),
    "closure of both signs": ("signed", CELLS),
    "stream": ("positive", STREAM),
    "stream of both signs": ("signed", {**STREAM, "scratch": "here"}),
    "blanks": ("blank", {**CELLS, "scratch": "here"}),
    "refined": ("positive", {"upsample": 2, "switch_scale": 2}),
}


class Stopped(BaseException):
    """Stands for whatever ends a run at once, like Ctrl-C."""


def source_of(kind: str, folder: Path, lognormal: Any) -> Any:
    """The field of a case, and in a file, unless it is one in memory."""
    field = lognormal((48, 32, 30))
    if kind == "signed":
        field = np.log(field).astype("float32")
    if kind == "blank":
        field[10:20, 5:9] = np.nan
    if kind == "in memory":
        return field
    np.save(folder / "field.npy", field)
    return folder / "field.npy"


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tasks that were run, and a limit after which they fail, as the attribute `limit`."""

    class Executed(list[Any]):
        limit = 10**9

    tasks = Executed()
    original = run.run_task

    def counted(task: Any) -> Any:
        if len(tasks) >= tasks.limit:
            raise Stopped
        tasks.append((task.number, task.block))
        return original(task)

    monkeypatch.setattr(run, "run_task", counted)
    return tasks


def arrays_of(path: Path) -> list[Any]:
    result = cdd_dask.open_decomposition(path)
    return [part[...] for part in (*result.channels, result.residual)]


SLOW = {kind: pytest.mark.slow for kind in ("closure", "stream")}
"""Of one sign: what they do is done for both signs, too."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=SLOW[kind] if kind in SLOW else ()) for kind in KINDS]
)
def test_goes_on_where_it_stopped(kind: str, executed: Any, tmp_path: Path, lognormal: Any):
    """Every block is computed once, wherever the run is stopped, and not one bit differs."""
    what, options = KINDS[kind]
    options = {**BASE, **options}
    if "scratch" in options:
        options["scratch"] = tmp_path
    source, out = source_of(what, tmp_path, lognormal), tmp_path / "out.zarr"
    whole = cdd_dask.decompose(source, tmp_path / "whole.zarr", **options)
    tasks = list(executed)
    assert len(set(tasks)) == len(tasks) > (0 if kind == "one block" else 20)
    del executed[:]
    for share in (0.0, 0.4, 0.8):
        executed.limit = int(share * len(tasks))
        with pytest.raises(Stopped):
            cdd_dask.decompose(source, out, **options)
        with pytest.raises(StoreError, match="not complete"):
            cdd_dask.open_decomposition(out)
        assert not (out / "lease").exists()
    executed.limit = len(tasks)
    result = cdd_dask.decompose(source, out, **options)
    assert executed == tasks
    for one, other in zip(arrays_of(tmp_path / "whole.zarr"), arrays_of(out), strict=True):
        assert np.array_equal(one, other, equal_nan=True)
    for key in ("source_statistics", "blocks", "error", "edges", "fingerprint"):
        assert result.attrs[key] == whole.attrs[key]
    assert [*result.outputs()] == [*whole.outputs()]
    assert {path.name for path in tmp_path.iterdir()} <= {"whole.zarr", "out.zarr", "field.npy"}
    assert not (out / "work").exists()
    cdd_dask.decompose(source, out, **options)
    assert executed == tasks  # nothing was left to do


# what decides the values


def test_a_shorter_memory_or_another_executor_goes_on(
    executed: Any, tmp_path: Path, lognormal: Any
):
    """What does not decide the values may change; blocks stay what they were."""
    source, out = source_of("positive", tmp_path, lognormal), tmp_path / "out.zarr"
    executed.limit = 30
    with pytest.raises(Stopped):
        cdd_dask.decompose(source, out, **BASE, memory="1GB")
    more = {"executor": "threads", "workers": 2, "memory": "100MB"}
    free = {name: value for name, value in BASE.items() if name != "block"}
    executed.limit = 10**9
    result = cdd_dask.decompose(source, out, **free, **more)
    assert len(executed) == len(set(executed))
    assert result.attrs["plan"]["resources"]["executor"] == "threads"
    whole = cdd_dask.decompose(source, tmp_path / "whole.zarr", **BASE)
    for one, other in zip(whole.channels, result.channels, strict=True):
        assert np.array_equal(one[...], other[...])


def test_blocks_that_do_not_fit_are_refused(executed: Any, tmp_path: Path, lognormal: Any):
    """With both numbers; nothing is lost by it."""
    source, out = source_of("positive", tmp_path, lognormal), tmp_path / "out.zarr"
    options = {**BASE, "block": 32}
    executed.limit = 3
    with pytest.raises(Stopped):
        cdd_dask.decompose(source, out, **options)
    free = {name: value for name, value in options.items() if name != "block"}
    with pytest.raises(BudgetError, match=r"in blocks of \(32, 32, 30\), which need .* 11 MB"):
        cdd_dask.decompose(source, out, **free, memory="11MB")


MUTATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "min_scale": ({"min_scale": 2.0}, r"min_scale=null, and now min_scale=2\.0"),
    "max_scale": ({"max_scale": 9}, r"max_scale=4\.0, and now max_scale=9\.0"),
    "num_channels": ({"num_channels": 4}, "num_channels=null, and now num_channels=4"),
    "mode": ({"mode": "lin", "linear_scale_step": 2.0}, 'mode="log", and now mode="lin"'),
    "log_scale_base": ({"log_scale_base": 2.5}, r"log_scale_base=2\.0, and now .*=2\.5"),
    "e_rel": ({"e_rel": 0.2}, r"e_rel=0\.3, and now e_rel=0\.2"),
    "constrained": ({"constrained": False}, "constrained=true, and now constrained=false"),
    "inverted": ({"inverted": True}, "inverted=false, and now inverted=true"),
    "kernel": ({"kernel": "sampled"}, 'kernel="discrete", and now kernel="sampled"'),
    "boundary": ({"boundary": "mirror"}, 'boundary="reflect", and now boundary="mirror"'),
    "cval": ({"cval": 1.0}, r"cval=0\.0, and now cval=1\.0"),
    "rtol": ({"rtol": 1e-2}, r"rtol=0\.001, and now rtol=0\.01"),
    "dtype": ({"dtype": "float64"}, 'dtype="float32", and now dtype="float64"'),
    "axes": ({"axes": (0, 1)}, r"axes=null, and now axes=\[0, 1\]"),
    "spacing": ({"spacing": 2.0, "min_scale": None}, "spacing=null, and now spacing="),
    "unit": ({"unit": "pc", "spacing": 1.0}, "spacing=null, and now spacing="),
    "nan": ({"nan": "raise"}, 'nan="mask", and now nan="raise"'),
    "fill_value": ({"fill_value": 1.0}, r"fill_value=0\.0, and now fill_value=1\.0"),
    "upsample": ({"upsample": 2}, "upsample=1, and now upsample=2"),
    "switch_scale": ({"switch_scale": 3.0}, r"switch_scale=null, and now switch_scale=3\.0"),
    "engine": (
        {"engine": "reference"},
        r'engine="cpu \(arithmetic 2\) on cpu", and now engine="reference on cpu"',
    ),
    "block": ({"block": 24}, r"block=\[16, 16, 16\], and now block=\[24, 24, 24\]"),
    "scratch": ({"scratch": "/tmp"}, 'scratch=null, and now scratch="/tmp"'),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", MUTATIONS)
def test_another_parameter_is_refused(
    name: str, finished: bool, executed: Any, begun: tuple[Path, Path], lognormal: Any
):
    """The message names it, with both values; nothing is run and nothing is changed."""
    source, out = begun[0], begun[1] / ("finished.zarr" if finished else "half.zarr")
    change, message = MUTATIONS[name]
    before = snapshot(out)
    if finished and name == "scratch":  # nothing is left that would lie there
        cdd_dask.decompose(source, out, **{**BASE, "max_scale": 4, "engine": "cpu", **change})
        assert snapshot(out) == before
        return
    with pytest.raises(DifferentRunError, match=message):
        cdd_dask.decompose(source, out, **{**BASE, "max_scale": 4, "engine": "cpu", **change})
    assert not executed
    assert snapshot(out) == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and the folder of a finished and of a half done output."""
    folder = tmp_path_factory.mktemp("begun")
    field = np.random.default_rng(0).lognormal(size=(48, 48, 30)).astype("float32")
    np.save(folder / "field.npy", field)
    options = {**BASE, "max_scale": 4, "engine": "cpu"}
    cdd_dask.decompose(folder / "field.npy", folder / "finished.zarr", **options)
    original, count = run.run_task, iter(range(30))

    def some(task: Any) -> Any:
        if next(count, None) is None:
            raise Stopped
        return original(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_task", some)
        with pytest.raises(Stopped):
            cdd_dask.decompose(folder / "field.npy", folder / "half.zarr", **options)
    return folder / "field.npy", folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _touch(path: Path) -> None:
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))


def _one_bit(path: Path) -> None:
    """Another value, the time of the last change set back."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def _save(field: Any) -> Any:
    return lambda path: np.save(path, field)


SOURCES: dict[str, tuple[Any, str]] = {
    "modified": (_touch, "source modified=20.*T.*, and now source modified=20.*T"),
    "content": (_one_bit, 'source content="[0-9a-f]+", and now'),
    "shape": (_save(np.ones((48, 48, 31), "float32")), r"source shape=\[48, 48, 30\], and now"),
    "dtype": (_save(np.ones((48, 48, 30), "float64")), 'source dtype="<f4", and now'),
    "bytes": (_save(np.ones((48, 30, 48), "float32")), r"source shape=\[48, 48, 30\], and now"),
}


@pytest.mark.parametrize("what", SOURCES)
def test_another_source_is_refused(
    what: str, executed: Any, begun: tuple[Path, Path], tmp_path: Path
):
    """The message names what differs."""
    change, message = SOURCES[what]
    shutil.copytree(begun[1] / "half.zarr", tmp_path / "half.zarr")
    saved = snapshot(begun[1])["field.npy"]
    state = begun[0].stat()
    try:
        change(begun[0])
        options = {**BASE, "max_scale": 4, "engine": "cpu"}
        with pytest.raises(DifferentRunError, match=message):
            cdd_dask.decompose(begun[0], tmp_path / "half.zarr", **options)
        assert not executed
    finally:
        begun[0].write_bytes(saved)
        os.utime(begun[0], ns=(state.st_atime_ns, state.st_mtime_ns))


def test_another_place_or_array_is_refused(begun: tuple[Path, Path], tmp_path: Path):
    """The same bytes elsewhere, a Zarr array whose chunk changed, another array in memory."""
    options = {**BASE, "max_scale": 4, "engine": "cpu"}
    shutil.copy2(begun[0], tmp_path / "field.npy")
    with pytest.raises(DifferentRunError, match="source address="):
        cdd_dask.decompose(tmp_path / "field.npy", begun[1] / "half.zarr", **options)
    field = np.load(begun[0])
    cdd_dask.decompose(field, tmp_path / "memory.zarr", **options)
    cdd_dask.decompose(field.copy(), tmp_path / "memory.zarr", **options)
    field[40, 3, 2] += 1
    with pytest.raises(DifferentRunError, match="source content="):
        cdd_dask.decompose(field, tmp_path / "memory.zarr", **options)
    array = zarr.create_array(str(tmp_path / "a.zarr"), data=field, chunks=(16, 16, 16))
    cdd_dask.decompose(tmp_path / "a.zarr", tmp_path / "zarr.zarr", **options)
    array[0, 0, 0] += 1
    with pytest.raises(DifferentRunError, match=r"source (bytes|modified)="):
        cdd_dask.decompose(tmp_path / "a.zarr", tmp_path / "zarr.zarr", **options)


# marks that mean nothing


@pytest.mark.parametrize(
    "damage", ["stale", "empty", *slowly("no JSON", "no mark", "another block")]
)
def test_a_mark_that_means_nothing_is_none(
    damage: str, executed: Any, begun: tuple[Path, Path], tmp_path: Path
):
    """Its block is computed again."""
    out = tmp_path / "half.zarr"
    shutil.copytree(begun[1] / "half.zarr", out)
    mark = sorted(out.glob("done/pass_*/blocks/0*/zarr.json"))[0]
    number, block = int(mark.parents[2].name.removeprefix("pass_")), int(mark.parent.name)
    document = json.loads(mark.read_text())
    held = document["attributes"]["cdd_dask"]
    if damage == "stale":
        held["fingerprint"] = "0" * 32
    elif damage == "no mark":
        held["marks"] = [{"block": block}, 3, None, [1, 2]]
    elif damage == "another block":
        held["marks"][0][0] = block + 1
    text = {"no JSON": "{", "empty": ""}.get(damage, json.dumps(document))
    mark.write_text(text)
    result = cdd_dask.decompose(begun[0], out, **{**BASE, "max_scale": 4, "engine": "cpu"})
    assert (number, block) in executed
    whole = cdd_dask.open_decomposition(begun[1] / "finished.zarr")
    for one, other in zip(whole.channels, result.channels, strict=True):
        assert np.array_equal(one[...], other[...])


@pytest.mark.parametrize("what", ["field", "scratch", "torn", *slowly("shard", "channel")])
def test_what_is_gone_is_made_again(what: str, executed: Any, tmp_path: Path, lognormal: Any):
    """Working fields, their shards, a scratch folder, a channel's shard: from where it can be."""
    source, out = source_of("positive", tmp_path, lognormal), tmp_path / "out.zarr"
    options = {**BASE, **CELLS, "engine": "cpu"}
    if what == "scratch":
        (tmp_path / "scratch").mkdir()
        options["scratch"] = tmp_path / "scratch"
    whole = cdd_dask.decompose(source, tmp_path / "whole.zarr", **options)
    executed.limit = len(executed) // 2
    del executed[:]
    with pytest.raises(Stopped):
        cdd_dask.decompose(source, out, **options)
    if what == "scratch":
        shutil.rmtree(next((tmp_path / "scratch").iterdir()))
    elif what == "field":
        shutil.rmtree(out / "work/field_00")
    else:
        folder = out / ("channel_00/scale0/image" if what == "channel" else "work/field_00")
        shards = sorted(path for path in folder.glob("c/**/*") if path.is_file())
        if what == "torn":
            shards[-1].write_bytes(shards[-1].read_bytes()[:-100])
        elif what == "channel":
            pytest.skip("not begun") if len(shards) < 2 else shards[1].unlink()
        else:
            shards[0].unlink()
    executed.limit = 10**9
    if what == "torn":  # found when it is read, and removed
        with pytest.raises(RunError, match="is damaged"):
            cdd_dask.decompose(source, out, **options)
    result = cdd_dask.decompose(source, out, **options)
    for one, other in zip(whole.channels, result.channels, strict=True):
        assert np.array_equal(one[...], other[...])
    assert np.array_equal(whole.residual[...], result.residual[...])


@pytest.mark.parametrize("what", ["snapshots", "array", "output"])
def test_what_is_damaged_late_is_made_again(
    what: str, executed: Any, tmp_path: Path, lognormal: Any
):
    """A run that once failed for it goes on, too; what no mark tells of hides no loss."""
    source, out = source_of("positive", tmp_path, lognormal), tmp_path / "out.zarr"
    options = {**BASE, **CELLS, "engine": "cpu"}
    if what != "snapshots":
        options = {**BASE, "max_scale": 4, "engine": "cpu"}
    whole = cdd_dask.decompose(source, tmp_path / "whole.zarr", **options)
    plan = cdd_dask.plan(source, **options)
    scatters = [number for number, one in enumerate(plan.passes) if one.kind == "scatter"]
    last = scatters[0] if what == "snapshots" else len(plan.passes) - 1
    executed.limit = sum(one.tasks for one in plan.passes[:last]) + 3
    del executed[:]
    with pytest.raises(Stopped):
        cdd_dask.decompose(source, out, **options)
    executed.limit = 10**9
    if what == "snapshots":
        shard = next(path for path in (out / "work/snapshots_00/c").rglob("*") if path.is_file())
        shard.write_bytes(shard.read_bytes()[:-9])
        with pytest.raises(RunError, match=r"run the same command again.*makes it anew"):
            cdd_dask.decompose(source, out, **options)
    elif what == "array":
        (name,) = {path.name for path in (out / "work").iterdir()} - {"zarr.json"}
        (out / "work" / name / "zarr.json").unlink()
    else:  # a block that is there without a mark makes up for one that was lost
        shards = out / "residual/scale0/image/c"
        shutil.copytree(shards / "0", shards / "2")
        (shards / "0/0/0").unlink()
    result = cdd_dask.decompose(source, out, **options)
    for one, other in zip(arrays_of(tmp_path / "whole.zarr"), arrays_of(out), strict=True):
        assert np.array_equal(one, other)
    assert result.attrs["source_statistics"] == whole.attrs["source_statistics"]


@pytest.mark.parametrize("count", [1, 9, *slowly(0, 2)])
def test_a_run_killed_while_it_began_goes_on(
    count: int, executed: Any, begun: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """The root is written first, and whole; from it the rest follows."""
    out, options = tmp_path / "out.zarr", {**BASE, "max_scale": 4, "engine": "cpu"}
    original, written = layout.write_object, []

    def stopped(*args: Any, **how: Any) -> None:
        if how or not str(args[0]).startswith(str(tmp_path)):
            return original(*args, **how)
        if len(written) == count:
            raise Stopped
        written.append(args[1])
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(layout, "write_object", stopped)
        with pytest.raises(Stopped):
            cdd_dask.decompose(begun[0], out, **options)
    assert written[:1] == ["zarr.json"][:count]
    result = cdd_dask.decompose(begun[0], out, **options)
    whole = cdd_dask.open_decomposition(begun[1] / "finished.zarr")
    for one, other in zip(whole.channels, result.channels, strict=True):
        assert np.array_equal(one[...], other[...])
    assert cdd_dask.verify(out, progress=False)


@pytest.mark.parametrize(
    ("key", "how"),
    [("zarr.json", "garbage"), ("channel_01", "gone"),
     ("residual/scale0/image/zarr.json", "garbage"), ("channel_00/scale0/x/c/0", "gone")],
)  # fmt: skip
def test_metadata_of_an_unfinished_output_are_restored(
    key: str, how: str, executed: Any, begun: tuple[Path, Path], tmp_path: Path
):
    """Whatever of them is lost; of the root there is a copy."""
    out = tmp_path / "half.zarr"
    shutil.copytree(begun[1] / "half.zarr", out)
    if how == "gone":
        shutil.rmtree(out / key) if (out / key).is_dir() else (out / key).unlink()
    else:
        (out / key).write_text("{")
    options = {**BASE, "max_scale": 4, "engine": "cpu"}
    result = cdd_dask.decompose(begun[0], out, **options)
    whole = cdd_dask.open_decomposition(begun[1] / "finished.zarr")
    for one, other in zip(whole.channels, result.channels, strict=True):
        assert np.array_equal(one[...], other[...])
    assert cdd_dask.verify(out, progress=False)


def test_a_damaged_root_is_no_strangers(begun: tuple[Path, Path], tmp_path: Path):
    """Messages lead to its repair, and it can be overwritten."""
    out, options = tmp_path / "out.zarr", {**BASE, "max_scale": 4, "engine": "cpu"}
    shutil.copytree(begun[1] / "finished.zarr", out)
    (out / "zarr.json").write_text("{")
    for use in (
        lambda: cdd_dask.open_decomposition(out),
        lambda: cdd_dask.decompose(begun[0], out, **options),
    ):
        with pytest.raises(StoreError, match="cdd-dask repair` mends"):
            use()
    assert cdd_dask.repair(out, progress=False).repaired
    assert cdd_dask.verify(out, progress=False)
    (out / "zarr.json").unlink()
    assert cdd_dask.decompose(begun[0], out, **options, overwrite=True).attrs["complete"]


def test_an_empty_shard_is_none(executed: Any, begun: tuple[Path, Path], tmp_path: Path):
    """A lost machine may leave one of a block that is done; the same of marks."""
    out, options = tmp_path / "half.zarr", {**BASE, "max_scale": 4, "engine": "cpu"}
    shutil.copytree(begun[1] / "half.zarr", out)
    (out / "channel_00/scale0/image/c/0/0/0").write_bytes(b"")
    gathered = next(
        path for path in out.glob("done/*/zarr.json") if (path.parent / "copy").exists()
    )
    gathered.write_bytes(b"")
    cdd_dask.decompose(begun[0], out, **options)
    assert cdd_dask.verify(out, progress=False)


def test_what_killed_writers_left_goes(executed: Any, begun: tuple[Path, Path], tmp_path: Path):
    """Zarr writes files under other names first, and leaves them if it is killed."""
    out = tmp_path / "half.zarr"
    shutil.copytree(begun[1] / "half.zarr", out)
    left = out / "channel_00/scale0/image/c/0/0/0.0123.partial"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    (out / "work/field_99/c").mkdir(parents=True)  # half-removed
    cdd_dask.decompose(begun[0], out, **{**BASE, "max_scale": 4, "engine": "cpu"})
    assert not left.exists()
    assert not (out / "work").exists()


def test_a_late_task_spares_what_replaced_its_run(
    begun: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A worker may still compute when its run was stopped and the output is overwritten."""
    out, tasks, last = tmp_path / "out.zarr", [], 3
    original, computed = run.run_task, task._diffused_block

    def stop(late: Any) -> Any:
        if late.work.stages[-1] < last:
            return original(late)
        tasks.append(late)
        raise Stopped

    options = {**BASE, "max_scale": 4}
    with monkeypatch.context() as patch:
        patch.setattr(run, "run_task", stop)
        with pytest.raises(Stopped):
            cdd_dask.decompose(begun[0], out, **options)
    others = {**options, "e_rel": 0.5, "overwrite": True}

    def overtaken(job: Any, late: Any) -> Any:
        values = computed(job, late)
        monkeypatch.setattr(task, "_diffused_block", computed)
        cdd_dask.decompose(begun[0], out, **others)
        return values

    monkeypatch.setattr(task, "_diffused_block", overtaken)
    with pytest.raises(BlockError, match="replaced by another run"):
        task.run_task(tasks[0])
    whole = cdd_dask.decompose(begun[0], tmp_path / "whole.zarr", **others)
    for one, other in zip((*whole.channels, whole.residual), arrays_of(out), strict=True):
        assert np.array_equal(one[...], other)


def test_data_of_no_use_do_not_cost_what_others_made(
    executed: Any, begun: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only a run that made the output deletes it, with its scratch."""

    def bad(_: Any) -> Any:
        raise BadValueError("not finite when first read")

    out, options = tmp_path / "half.zarr", {**BASE, "max_scale": 4, "engine": "cpu"}
    shutil.copytree(begun[1] / "half.zarr", out)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(run, "run_task", bad)
    with pytest.raises(BadValueError):
        cdd_dask.decompose(begun[0], out, **options)
    assert out.exists()
    with pytest.raises(BadValueError):
        cdd_dask.decompose(begun[0], tmp_path / "b.zarr", **options, scratch=tmp_path / "scratch")
    assert not (tmp_path / "b.zarr").exists()
    assert not [*(tmp_path / "scratch").iterdir()]


@pytest.mark.parametrize("place", ["file://{}/scratch", "{}/scratch/"])
def test_a_scratch_is_named_in_any_way(
    place: str, executed: Any, begun: tuple[Path, Path], tmp_path: Path
):
    """That means the same place; a run that goes on finds it by itself."""
    (tmp_path / "scratch").mkdir()
    options = {**BASE, "max_scale": 4, "engine": "cpu"}
    out, scratch = tmp_path / "out.zarr", tmp_path / "scratch"
    executed.limit = 3
    with pytest.raises(Stopped):
        cdd_dask.decompose(begun[0], out, **options, scratch=place.format(tmp_path))
    executed.limit = 6
    with pytest.raises(Stopped):
        cdd_dask.decompose(begun[0], out, **options, scratch=scratch)
    assert len([*scratch.iterdir()]) == 1
    executed.limit = 9
    with pytest.raises(Stopped):
        cdd_dask.decompose(begun[0], out, **options, overwrite=True)
    assert not [*scratch.iterdir()]  # it went with the run that made it
    executed.limit = 10**9
    cdd_dask.decompose(begun[0], out, **options, overwrite=True, scratch=scratch)
    assert not [*scratch.iterdir()]


def test_overwriting_starts_anew(executed: Any, begun: tuple[Path, Path], tmp_path: Path):
    """After everything else was checked: what is refused has not cost the output."""
    out = tmp_path / "half.zarr"
    shutil.copytree(begun[1] / "half.zarr", out)
    before = snapshot(out)
    options = {**BASE, "max_scale": 4, "engine": "cpu", "overwrite": True}
    with pytest.raises(BudgetError):
        cdd_dask.decompose(begun[0], out, **options, memory="1kB")
    assert snapshot(out) == before
    result = cdd_dask.decompose(begun[0], out, **options)
    assert len(executed) == cdd_dask.plan(begun[0], **options).tasks
    assert result.attrs["complete"] is True


def test_what_is_left_beside_a_complete_output_goes(
    tmp_path: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch
):
    """By a run that was killed between the end of its work and its own."""
    options, out = {**BASE, "scratch": tmp_path}, tmp_path / "out.zarr"
    np.save(tmp_path / "field.npy", lognormal((48, 32, 30)))
    decompose = cdd_dask.decompose  # which loads what is patched below, as it is

    def killed(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(run, "clean_up", killed)
        patch.setattr(lease.Lease, "__exit__", killed)
        with pytest.raises(Stopped):
            decompose(tmp_path / "field.npy", out, **options)
    assert cdd_dask.open_decomposition(out)
    names = {path.name for path in (*out.rglob("*"), *tmp_path.iterdir())}
    assert {"pass_0000", "lease"} < names
    assert any(name.startswith("cdd-dask-") for name in names)
    monkeypatch.setattr(lease.Holder, "is_gone", True)
    cdd_dask.decompose(tmp_path / "field.npy", out, **options)
    names = {path.name for path in (*out.rglob("*"), *tmp_path.iterdir())}
    assert not names & {"pass_0000", "lease"}
    assert not any(name.startswith("cdd-dask-") for name in names)


def test_nothing_else_is_gone_on_with(tmp_path: Path):
    """A folder of something else, or a store of another format."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="no decomposition store"):
        cdd_dask.decompose(np.ones((8, 8)), tmp_path, progress=False)
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(np.ones((8, 8)), out, progress=False)
    text = (out / "zarr.json").read_text()
    assert f'"format_version": {store.FORMAT_VERSION}' in text
    root = zarr.open_group(out, mode="r+")
    root.attrs["cdd_dask"] = sealed({**root.attrs["cdd_dask"], "format_version": 1})
    with pytest.raises(DifferentRunError, match="another format version"):
        cdd_dask.decompose(np.ones((8, 8)), out, progress=False)
