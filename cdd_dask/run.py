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
from cdd_dask.plans import Plan, Stage
from cdd_dask.progress import Progress
from cdd_dask.readers import BadValueError, Source, locate_bad_value
from cdd_dask.statistics import Statistics
from cdd_dask.task import Task, TaskResult, describe_task, run_task

PACKAGES = ("cdd-dask", "numpy", "scipy", "zarr", "dask", "distributed")


def prepare_store(plan: Plan, source: Source, address: str) -> str:
    """Write all metadata of a run's store and return the run's name."""
    run = uuid.uuid4().hex[:12]
    attributes: dict[str, Any] = {
        "run": run,
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
    stored = _working_fields(plan)
    try:
        for stages in plan.passes:
            before, after = stages[0].number - 1, stages[-1].number
            if after in stored:
                store.create_working_field(address, run, after, plan.grid, plan.parameters.dtype)
            _run_stages(plan, source, Batch(address, run, stages), executor, progress, totals)
            if totals.statistics["source"].count == 0:
                raise BadValueError(f"{source.description} holds nothing but blank (NaN) voxels")
            if before in stored:  # nothing needs what these stages started from any more
                store.remove_working_field(address, run, before)
        names = [*map(store.channel_name, range(len(plan.edges))), store.RESIDUAL]
        whole = totals.statistics["source"]
        outcome = {
            "source_statistics": whole.as_dict(),
            "error": _error_kind(plan, whole),
            "blocks": {"computed": totals.computed, "empty": totals.empty},
        }
        outputs = [totals.statistics[name].as_dict() for name in names]
        store.finish_store(address, run, outputs, outcome)
    except (OSError, StoreError) as error:
        if isinstance(error, CddError) and not isinstance(error, StoreError):
            raise
        raise RunError(f"the run stopped, and {address} is left incomplete: {error}") from error


def _working_fields(plan: Plan) -> set[int]:
    """Numbers of the channels that start from a stored working field."""
    firsts = {stages[0].number - 1 for stages in plan.passes if stages[0].number > 0}
    return firsts if plan.copy_in else firsts - {0}


@dataclass(frozen=True)
class Batch:
    """Stages that run together, and the store they write to."""

    address: str
    run: str
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """What a person calls the tasks."""
        first, last = self.stages[0].channel, self.stages[-1].channel
        if first is None or last is None:
            return "decompose-copy-in"
        channels = f"ch{first:02d}" if first == last else f"ch{first:02d}-ch{last:02d}"
        return f"decompose-{channels}-pass1"

    def tasks(self) -> Iterator[Task]:
        """One task for every block."""
        numbers = tuple(stage.number for stage in self.stages)
        count = self.stages[0].tasks
        return (Task(self.address, self.run, numbers, block) for block in range(count))


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


def _run_stages(
    plan: Plan,
    source: Source,
    batch: Batch,
    executor: Executor,
    progress: Progress,
    totals: Totals,
) -> None:
    """Run a batch's tasks and add what they tell to `totals`."""
    count = batch.stages[0].tasks
    progress.stage(batch.name, count)
    work = sum(stage.work for stage in batch.stages) // count
    copying_in = batch.stages[0].number == 0
    # only this process has an array that lives in its memory
    pool = SerialExecutor() if copying_in and not source.portable else executor
    try:
        with closing(pool.run(run_task, batch.tasks(), batch.name, describe_task)) as results:
            for result in results:
                totals.add(result)
                progress.advance(work)
    except BadValueError as error:
        raise locate_bad_value(source, plan.parameters) from error


def _error_kind(plan: Plan, whole: Statistics) -> str:
    """Whether the error of this field's blocks is bounded, now that its signs are known."""
    kinds = {stage.error for stage in plan.stages}
    if kinds == {"exact"}:
        return "exact"
    if whole.count < math.prod(plan.volume.shape):
        return "estimated"
    cval = plan.parameters.cval if plan.parameters.boundary == "constant" else 0.0
    mixed = min(whole.min, cval) < 0 < max(whole.max, cval)
    return "estimated" if mixed and "bounded (one sign)" in kinds else "bounded"
