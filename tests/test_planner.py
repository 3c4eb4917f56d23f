"""The planner: its blocks fit the memory, its refusals help, its numbers are what a run does."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from examples import few
from hypothesis import assume, example, given
from hypothesis import strategies as st

import cdd_dask
from cdd_dask.errors import BudgetError, InputError
from cdd_dask.memory import TASK_OVERHEAD

SIDES = st.sampled_from([1, 5, 40, 100, 333, 1000])
SHAPES = st.lists(SIDES, min_size=1, max_size=3).map(tuple)
AMPLE = 10**13


def pool(workers: int) -> dict[str, Any]:
    """Options for so many threads."""
    return {"executor": "threads" if workers > 1 else "serial", "workers": workers}


# memory


@few(40)
@given(
    shape=SHAPES,
    megabytes=st.integers(7, 3000),
    workers=st.sampled_from([1, 2, 8]),
    max_scale=st.sampled_from([2, 8, 32]),
    in_memory=st.booleans(),
)
def test_what_is_planned_fits(
    shape: tuple[int, ...], megabytes: int, workers: int, max_scale: int, in_memory: bool
):
    """The projected peak of the chosen block never exceeds the memory given."""
    memory = megabytes * 1_000_000
    options = {"max_scale": max_scale, "out": None if in_memory else "x.zarr", **pool(workers)}
    try:
        plan = cdd_dask.plan(shape, memory=memory, **options)
    except BudgetError:
        return
    assert plan.peak_memory <= memory
    assert all(b <= n for b, n in zip(plan.block, shape, strict=True))
    at_once = min(workers, len(plan.grid))
    kept = 0 if not in_memory else (len(plan.edges) + 1) * 4 * math.prod(shape)
    assert plan.peak_memory >= at_once * max(s.peak_memory for s in plan.stages) + kept


@few(4)
@given(shape=SHAPES, workers=st.sampled_from([1, 4, 16]), max_scale=st.sampled_from([2, 8, 32]))
@example(shape=(400, 400, 400), workers=16, max_scale=32)  # whole it needs an eighth
def test_a_refusal_names_the_smallest_budget_that_would_do(
    shape: tuple[int, ...], workers: int, max_scale: int
):
    """Both numbers are there; the budget named is enough, and 2 MB less is not."""
    options = {"max_scale": max_scale, **pool(workers)}
    with pytest.raises(BudgetError, match=r"needs .* but memory allows 1 kB") as refused:
        cdd_dask.plan(shape, memory=1000, **options)
    least = budget_named_by(refused.value)
    assert cdd_dask.plan(shape, memory=least, **options).peak_memory <= least
    with pytest.raises(BudgetError):
        cdd_dask.plan(shape, memory=least - 2_000_000, **options)


@few(25)
@given(
    shape=SHAPES,
    megabytes=st.integers(7, 2000),
    workers=st.sampled_from([2, 4, 16]),
    max_scale=st.sampled_from([2, 8, 32]),
)
@example(shape=(256, 256, 256), megabytes=350, workers=4, max_scale=16)
def test_nothing_is_refused_that_fits_as_one_block(
    shape: tuple[int, ...], megabytes: int, workers: int, max_scale: int
):
    """Cutting gives idle workers blocks; it must not turn a volume that fits into a refusal."""
    options = {"max_scale": max_scale, "memory": f"{megabytes}MB", **pool(workers)}
    try:
        cdd_dask.plan(shape, block=shape, **options)
    except BudgetError:
        assume(False)
    cdd_dask.plan(shape, **options)


def budget_named_by(error: BudgetError) -> int:
    """The bytes that a refusal says would do."""
    found = re.search(r'raise memory to at least "(\d+)MB"', str(error))
    assert found, error
    return int(found[1]) * 1_000_000


def test_a_large_volume_is_planned_in_small_memory():
    """4096 cubed, 275 GB, in 2 GB: blocks are cut until they fit, and the halo stays bounded."""
    plan = cdd_dask.plan((4096,) * 3, max_scale=16, memory="2GB")
    assert plan.peak_memory <= 2_000_000_000
    assert min(plan.block) >= 128
    assert max(stage.haloed_voxels for stage in plan.stages) < 8 * 4096**3
    assert plan.disk_bytes >= 6 * 4096**3 * 4


def test_workers_share_the_memory():
    """Four tasks at once get smaller blocks than one, and still use what there is."""
    alone = cdd_dask.plan((1000,) * 3, max_scale=8, memory="2GB")
    shared = cdd_dask.plan((1000,) * 3, max_scale=8, memory="2GB", **pool(4))
    assert math.prod(shared.block) < math.prod(alone.block)
    assert shared.peak_memory > 1e9


def test_every_worker_gets_a_block_where_that_pays():
    """A volume that fits as one block is cut for eight workers, but not into slivers."""
    assert len(cdd_dask.plan((512,) * 3, max_scale=4, memory=AMPLE, **pool(8)).grid) >= 8
    scales = {"min_scale": 8, "max_scale": 32}
    whole = cdd_dask.plan((64,) * 3, memory=AMPLE, **scales, **pool(2))
    assert len(whole.grid) == 1  # two halves would each read nearly all of it
    halves = cdd_dask.plan((64,) * 3, memory=AMPLE, block=(32, 64, 64), **scales, **pool(2))
    assert halves.seconds > whole.seconds


def test_the_demo_is_cut_into_blocks():
    """The options of `scripts/demo.sh` force its 128 cubed volume into at least 8 blocks."""
    script = (Path(__file__).parent.parent / "scripts" / "demo.sh").read_text()
    memory = re.search(r"--memory (\w+) --workers 2 --nan raise", script)
    assert memory
    plan = cdd_dask.plan((128,) * 3, max_scale=8, memory=memory[1], workers=2, nan="raise")
    assert len(plan.grid) >= 8


def test_a_long_axis_is_planned_at_once():
    """Ten million voxels in a row: no step of the planner goes through them one by one."""
    plan = cdd_dask.plan((10_000_000,), max_scale=64, memory="20MB")
    assert plan.peak_memory <= 20_000_000


def test_memory_grows_with_what_is_held():
    """More voxels in a block, float64 and a deeper halo all cost memory in the projection."""
    peak = {
        name: cdd_dask.plan((300,) * 3, memory=AMPLE, **{"max_scale": 4, "block": 100, **more})
        for name, more in {
            "plain": {},
            "larger": {"block": 200},
            "double": {"dtype": "float64"},
            "deeper": {"max_scale": 16},
        }.items()
    }
    plain = peak.pop("plain").peak_memory
    assert plain > 4 * 100**3 + TASK_OVERHEAD
    assert all(other.peak_memory > plain for other in peak.values())


# the block given


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.data())
def test_a_block_given_is_taken_and_clipped(shape: list[int], data: st.DataObject):
    """The user's block is used as it is, at most as long as the volume."""
    block = tuple(data.draw(st.integers(1, 80)) for _ in shape)
    plan = cdd_dask.plan(tuple(shape), max_scale=2, block=block)
    assert plan.block == tuple(map(min, block, shape))


@pytest.mark.parametrize("block", [7, np.int64(7), (7, 7), [7, 7], np.array([7, 7]), (7, 99)])
def test_one_number_or_one_per_axis(block: Any):
    """Whole numbers of any type, alone or one per axis, are a block."""
    wanted = (7, 9) if np.ndim(block) and block[1] == 99 else (7, 7)
    assert cdd_dask.plan((10, 9), max_scale=2, block=block).block == wanted


@pytest.mark.parametrize(
    "block", [(4,), (4, 4, 4), 0, (4, 0), -1, (4, -4), True, (4, True), 4.5, (4, 4.5), "44", 4.0]
)
def test_blocks_that_are_none_are_refused(block: Any):
    """The message names the argument."""
    with pytest.raises(InputError, match="block="):
        cdd_dask.plan((10, 10), max_scale=2, block=block)


def test_a_block_that_does_not_fit_is_refused():
    """Not silently replaced by a smaller one: the message says what the given one needs."""
    with pytest.raises(BudgetError, match="give a smaller block") as refused:
        cdd_dask.plan((500,) * 3, max_scale=4, memory="50MB", block=256)
    least = budget_named_by(refused.value)
    assert cdd_dask.plan((500,) * 3, max_scale=4, memory=least, block=256).block == (256,) * 3


# what people and programs read


def test_a_plan_reads_as_a_table():
    """Every channel has its row; the head states blocks, memory, disk and whether it is exact."""
    plan = cdd_dask.plan((300,) * 3, max_scale=8, memory="100MB")
    text = str(plan)
    for k in range(len(plan.edges)):
        assert f"channel {k}" in text
    for word in ("300 × 300 × 300", "100 MB allowed", "files", "halo", "bounded", "blank"):
        assert word in text
    assert max(map(len, text.splitlines())) < 200


def test_a_plan_is_json():
    """`as_dict` survives JSON unchanged but for tuples, so the store and the CLI can print it."""
    plan = cdd_dask.plan((64, 64), max_scale=8, block=32)
    text = json.dumps(plan.as_dict(), allow_nan=False)
    assert json.loads(text)["block"] == [32, 32]
    assert json.loads(text)["stages"][-1]["scale_to"] == 8


def test_a_plan_reads_nothing(tmp_path: Path):
    """Planning a source touches its metadata only, and leaves no output behind."""
    array = zarr.create_array(tmp_path / "in.zarr", shape=(64, 64), chunks=(32, 32), dtype="f4")
    array[:] = np.nan  # would be refused if it were read
    cdd_dask.plan(array, tmp_path / "out.zarr", max_scale=4)
    assert [path.name for path in tmp_path.iterdir()] == ["in.zarr"]


# a plan and a run


@pytest.mark.parametrize(
    ("kind", "block"), [("numpy", (10, 17)), ("zarr", (10, 17)), ("numpy", (30, 40))]
)
def test_a_run_does_what_the_plan_says(
    tmp_path: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch, kind: str, block: Any
):
    """Bytes, tasks, files and disk of every stage, counted while a run writes them.

    Read and written bytes agree to the byte; files and disk are largest just before a working
    field goes, and never more than planned.
    """
    field, out = lognormal((30, 40)), tmp_path / "out.zarr"
    source = field
    if kind == "zarr":
        source = zarr.create_array(tmp_path / "in.zarr", data=field, chunks=(8, 8))
    options = {"max_scale": 8, "e_rel": 0.3, "block": block, "memory": "50MB"}
    plan = cdd_dask.plan(source, out, **options)
    seen = Seen(out, monkeypatch)
    cdd_dask.decompose(source, out, progress=False, **options)
    seen.look()
    assert seen.read == sum(stage.bytes_read for stage in plan.stages)
    assert seen.written == sum(stage.bytes_written for stage in plan.stages)
    groups = 1 if plan.one_block else sum(len(stage.parts) for stage in plan.stages)
    assert seen.tasks == groups * len(plan.grid) == groups * plan.stages[0].tasks
    assert seen.tasks == sum(one.tasks for one in plan.passes)
    assert plan.copy_in == (kind == "numpy" and not plan.one_block)
    assert 0.8 * plan.files < seen.files <= plan.files
    assert seen.disk <= plan.disk_bytes


class Seen:
    """What a run reads and writes, by looking over its shoulder."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.read, self.written, self.tasks = out, 0, 0, 0
        self.files, self.disk = 0, 0
        for home, name, watch in (
            ("cdd_dask.store", "read_block", self.after_reading),
            ("cdd_dask.task", "read_field", self.after_source),
            ("cdd_dask.store", "write_block", self.before_writing),
            ("cdd_dask.store", "remove_work_array", self.look),
            ("cdd_dask.run", "run_task", self.before_task),
        ):
            monkeypatch.setattr(f"{home}.{name}", self.wrap(f"{home}.{name}", watch))

    def wrap(self, path: str, watch: Any) -> Any:
        home, name = path.rsplit(".", 1)
        original = getattr(__import__(home, fromlist=[name]), name)

        def watched(*args: Any) -> Any:
            if not watch.__name__.startswith("after"):
                watch(*args)
                return original(*args)
            result = original(*args)
            watch(result, *args)
            return result

        return watched

    def after_reading(self, values: Any, *_: Any) -> None:
        self.read += values.nbytes

    def after_source(self, values: Any, source: Any, *_: Any) -> None:
        self.read += values.size * source.dtype.itemsize

    def before_writing(self, address: str, path: str, core: Any, values: Any) -> None:
        self.written += values.nbytes

    def before_task(self, *_: Any) -> None:
        self.tasks += 1

    def look(self, *_: Any) -> None:
        files = [file for file in self.out.rglob("*") if file.is_file()]
        self.files = max(self.files, len(files))
        self.disk = max(self.disk, sum(-(-f.stat().st_size // 4096) * 4096 for f in files))


def test_a_run_runs_the_plan_that_is_shown(tmp_path: Path, lognormal: Any):
    """The store remembers, to the last number, what `plan` printed for the same arguments."""
    field = lognormal((40, 30))
    options = {"max_scale": 4, "e_rel": 0.3, "memory": "60MB", "block": (16, 30)}
    plan = cdd_dask.plan(field, tmp_path / "out.zarr", **options)
    result = cdd_dask.decompose(field, tmp_path / "out.zarr", progress=False, **options)
    assert result.attrs["plan"] == json.loads(json.dumps(plan.as_dict()))


def test_a_shape_is_planned_like_a_zarr_array_of_it(tmp_path: Path):
    """A tuple of integers stands for a Zarr array that is not there yet."""
    array = zarr.create_array(tmp_path / "in.zarr", shape=(200, 90), chunks=(64, 64), dtype="f4")
    by_shape = cdd_dask.plan((200, 90), max_scale=4, block=50, memory="50MB")
    by_array = cdd_dask.plan(array, max_scale=4, block=50, memory="50MB")
    assert [s.bytes_read for s in by_shape.stages] == [s.bytes_read for s in by_array.stages]
    assert by_shape.files == by_array.files


@pytest.mark.parametrize("shape", [(), (1,) * 5, (4, 0), (4, -1), (10**200,) * 3])
def test_shapes_that_are_none_are_refused(shape: tuple[int, ...]):
    """An empty tuple, five axes or an empty one: the message shows the shape."""
    with pytest.raises(InputError, match="shape"):
        cdd_dask.plan(shape)


def test_error_kinds_are_stated():
    """Exact where nothing is cut or the halo is strict, bounded where it is not.

    Estimated where voxels cross zero.
    """
    kinds = {
        name: {s.error for s in cdd_dask.plan((900, 4), max_scale=2, **options).stages}
        for name, options in {
            "whole": {"block": (900, 4)},
            "strict": {"block": (300, 4), "rtol": 0},
            "bounded": {"block": (300, 4)},
            "unconstrained": {"block": (300, 4), "constrained": False},
            "crossing": {"block": (300, 4), "crossing": True},
        }.items()
    }
    assert kinds == {
        "whole": {"exact"},
        "strict": {"exact"},
        "bounded": {"bounded"},
        "unconstrained": {"bounded"},
        "crossing": {"estimated"},
    }
