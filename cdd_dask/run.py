"""One run: the metadata, then stage after stage of tasks, then ``complete``."""

from __future__ import annotations

import math
import platform
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from cdd_dask import store
from cdd_dask.errors import CddError, RunError, StoreError
from cdd_dask.executors import Executor
from cdd_dask.executors.serial import SerialExecutor
from cdd_dask.plans import Pass, Plan, Stage
from cdd_dask.progress import Progress
from cdd_dask.readers import BadValueError, Source, locate_bad_value
from cdd_dask.regimes import regime_error
from cdd_dask.statistics import Statistics
from cdd_dask.task import Task, TaskResult, describe_task, run_task
from cdd_dask.working import Nature, geometry, uses

PACKAGES = ("cdd-dask", "numpy", "scipy", "zarr", "dask", "distributed")


def prepare_store(plan: Plan, source: Source, address: str, scratch: str | None = None) -> str:
    """Write all metadata of a run's store and return the run's name.

    In the folder `scratch`, where there is one, the working arrays get a store of their own.
    """
    run = uuid.uuid4().hex[:12]
    attributes: dict[str, Any] = {
        "run": run,
        "scratch": scratch and f"{scratch.rstrip('/')}/cdd-dask-{run}.zarr",
        "parameters": plan.parameters.as_dict(),
        "edges": list(plan.edges),
        "plan": plan.as_dict(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "source": {
            "description": source.description,
            "address": source.address,
            "shape": list(source.shape),
            "file_shape": source.file_shape and list(source.file_shape),
            "dtype": source.dtype.str,
            "spacing": source.spacing and list(source.spacing),
            "units": source.units and list(source.units),
            "header": source.header,
        },
    }
    store.create_store(address, plan.grid, plan.edges, _axes(plan, source), attributes)
    if scratch:
        store.create_scratch(attributes["scratch"], run)
    return run


def _axes(plan: Plan, source: Source) -> tuple[store.Axis, ...]:
    """The axes as the store describes them: in the unit of scales where those have a spacing."""
    parameters, ndim = plan.parameters, len(plan.volume.shape)
    names = store.usable_names(source.dimension_names, ndim)
    decomposed = parameters.decomposed_axes(ndim)
    # across the slices nothing is computed, so there the source's own unit may be another
    units = [
        parameters.unit if axis in decomposed else (source.units or (None,) * ndim)[axis]
        for axis in range(ndim)
    ]
    if parameters.spacing is None:
        units = [None] * ndim
    return tuple(map(store.Axis, names, parameters.voxel_spacing(ndim), units))


def execute(
    plan: Plan, source: Source, address: str, run: str, executor: Executor, progress: Progress
) -> None:
    """Run all stages of `plan` on a prepared store, and declare it complete.

    Raises
    ------
    BadValueError
        If the source holds values that are refused, the message says where the first one is; or
        nothing but blank voxels.
    RunError
        If a block cannot be computed, or the store cannot be written.
    """
    totals = Totals()
    try:
        arrays = WorkArrays(plan, address, run)
        for number, one in enumerate(plan.passes):
            nature = _nature(plan, totals.statistics.get("source"))
            arrays.make(number, nature)
            _run_pass(plan, source, Batch(address, run, one, nature), executor, progress, totals)
            if totals.statistics["source"].count == 0:
                raise BadValueError(f"{source.description} holds nothing but blank (NaN) voxels")
            arrays.remove(number)
        names = [*map(store.channel_name, range(len(plan.edges))), store.RESIDUAL]
        whole = totals.statistics["source"]
        nature = _nature(plan, whole)
        outcome = {
            "source_statistics": whole.as_dict(),
            "error": _error_kind(nature, {stage.error for stage in plan.stages}),
            "blocks": {"computed": totals.computed, "empty": totals.empty},
        }
        known = [{"statistics": totals.statistics[name].as_dict()} for name in names]
        for stage in plan.stages:
            if stage.channel is not None:
                known[stage.channel] |= _how(plan, stage, nature)
        store.finish_store(address, run, known, outcome)
        arrays.close()
    except (OSError, StoreError) as error:
        if isinstance(error, CddError) and not isinstance(error, StoreError):
            raise
        raise RunError(f"the run stopped, and {address} is left incomplete: {error}") from error


class WorkArrays:
    """The working arrays of a run, each there from its first use to its last."""

    def __init__(self, plan: Plan, address: str, run: str) -> None:
        self._plan, self._run = plan, run
        self._scratch = store.scratch_of(address, run)
        self._address = self._scratch or address
        used = [uses(plan, one) for one in plan.passes]
        self._written = [writes for _, writes in used]
        self._last: dict[str, int] = {}
        for number, (reads, writes) in enumerate(used):
            self._last |= dict.fromkeys(reads | writes, number)
        self._there: set[str] = set()

    def make(self, number: int, nature: Nature) -> None:
        """Make room for what the pass of that number writes."""
        for name in sorted(self._written[number] - self._there):
            grid = geometry(self._plan, name, nature)
            if grid is not None:
                dtype = self._plan.parameters.dtype
                store.create_work_array(self._address, self._run, name, grid, dtype)
                self._there.add(name)

    def remove(self, number: int) -> None:
        """Remove what no pass after that of this number uses."""
        for name in sorted(self._there):
            if self._last[name] <= number:
                store.remove_work_array(self._address, self._run, name)
                self._there.remove(name)

    def close(self) -> None:
        """Remove the place they had, if it was their own."""
        if self._scratch:
            store.remove_scratch(self._scratch, self._run)


def _nature(plan: Plan, source: Statistics | None) -> Nature:
    """What is known of the source; at first that it may be anything."""
    if source is None or source.count == 0:
        return Nature(0, plan.volume.may_be_masked(plan.parameters))
    cval = plan.parameters.cval if plan.parameters.boundary == "constant" else 0.0
    low, high = min(source.min, cval), max(source.max, cval)
    sign = 1 if low >= 0 else -1 if high <= 0 else 0
    return Nature(sign, source.count < math.prod(plan.volume.shape))


@dataclass(frozen=True)
class Batch:
    """The tasks of one pass, and the store they write to."""

    address: str
    run: str
    work: Pass
    nature: Nature

    @property
    def name(self) -> str:
        """What a person calls the tasks."""
        first, last = (number - 1 for number in (self.work.stages[0], self.work.stages[-1]))
        if first < 0:
            return "decompose-copy-in"
        channels = f"ch{first:02d}" if first == last else f"ch{first:02d}-ch{last:02d}"
        kind = "pass" if self.work.kind == "diffuse" else self.work.kind
        return f"decompose-{channels}-{kind}{self.work.number + 1}"

    def tasks(self) -> Iterator[Task]:
        """One task for every block."""
        blocks = range(self.work.tasks)
        return (Task(self.address, self.run, self.work, block, self.nature) for block in blocks)


@dataclass
class Totals:
    """What all tasks so far have told."""

    statistics: dict[str, Statistics] = field(default_factory=dict)
    """Of every output, and of the ``source``."""
    computed: int = 0
    """Blocks diffused, counted once for every channel."""
    empty: int = 0
    """Blocks not diffused, having nothing but zeros and blank voxels, counted likewise."""

    def add(self, result: TaskResult) -> None:
        for name, statistics in result.statistics.items():
            known = self.statistics.get(name)
            self.statistics[name] = statistics if known is None else known + statistics
        self.computed += result.computed
        self.empty += result.empty


def _run_pass(
    plan: Plan,
    source: Source,
    batch: Batch,
    executor: Executor,
    progress: Progress,
    totals: Totals,
) -> None:
    """Run a pass's tasks and add what they tell to `totals`."""
    count = batch.work.tasks
    progress.stage(batch.name, count)
    work = sum(stage.work for stage in plan.stages if stage.number in batch.work.stages)
    work //= count * sum(one.stages == batch.work.stages for one in plan.passes)
    copying_in = batch.work.kind == "copy"
    # only this process has an array that lives in its memory
    pool = SerialExecutor() if copying_in and not source.portable else executor
    try:
        with closing(pool.run(run_task, batch.tasks(), batch.name, describe_task)) as results:
            for result in results:
                totals.add(result)
                progress.advance(work)
    except BadValueError as error:
        raise locate_bad_value(source, plan.parameters) from error


def _how(plan: Plan, stage: Stage, nature: Nature) -> dict[str, Any]:
    """How a channel was computed, and what is known of its error."""
    return {
        "regime": stage.regime,
        "passes": len(stage.parts),
        "levels": list(stage.levels),
        "halo": list(stage.depth),
        "halo_cells": list(stage.cell_depth),
        "error": {
            "kind": _error_kind(nature, {stage.error}),
            "rtol": plan.parameters.rtol,
            "relative_l2": regime_error(plan.parameters, stage.regime, stage.levels),
        },
    }


def _error_kind(nature: Nature, kinds: set[str]) -> str:
    """Whether an error of these kinds is bounded, now that the field's nature is known."""
    if kinds == {"exact"}:
        return "exact"
    mixed = nature.sign == 0 and "bounded (one sign)" in kinds
    return "estimated" if "estimated" in kinds or nature.masked or mixed else "bounded"
