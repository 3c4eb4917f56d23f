"""One run: the metadata, then stage after stage of tasks, then ``complete``."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cdd_dask import store
from cdd_dask.errors import CddError, RunError, StoreError
from cdd_dask.executors import Executor
from cdd_dask.executors.serial import SerialExecutor
from cdd_dask.plans import Plan, Stage
from cdd_dask.progress import Progress
from cdd_dask.readers import NonFiniteError, Source, locate_nonfinite
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
            "dtype": source.dtype.str,
            "header": source.header,
        },
    }
    store.create_store(
        address,
        plan.grid,
        plan.edges,
        plan.parameters.dtype,
        store.usable_names(source.dimension_names, len(source.shape)),
        attributes,
    )
    return run


def execute(
    plan: Plan, source: Source, address: str, run: str, executor: Executor, progress: Progress
) -> None:
    """Run all stages of `plan` on a prepared store, and declare it complete.

    Raises
    ------
    NonFiniteError
        If the source holds a NaN or an infinity; the message says where the first one is.
    RunError
        If a block cannot be computed, or the store cannot be written.
    """
    totals: dict[str, Statistics] = {}
    stored = _working_fields(plan)
    try:
        for stages in stage_groups(plan):
            before, after = stages[0].number - 1, stages[-1].number
            if after in stored:
                store.create_working_field(address, run, after, plan.grid, plan.parameters.dtype)
            _run_stages(plan, source, Batch(address, run, stages), executor, progress, totals)
            if before in stored:  # nothing needs what these stages started from any more
                store.remove_working_field(address, run, before)
        names = [*map(store.channel_name, range(len(plan.edges))), store.RESIDUAL]
        field = totals["source"]
        outcome = {"source_statistics": field.as_dict(), "error": _error_kind(plan, field)}
        store.finish_store(address, run, [totals[name].as_dict() for name in names], outcome)
    except (OSError, StoreError) as error:
        if isinstance(error, CddError) and not isinstance(error, StoreError):
            raise
        raise RunError(f"the run stopped, and {address} is left incomplete: {error}") from error


def stage_groups(plan: Plan) -> list[tuple[Stage, ...]]:
    """The stages that one task computes in one go: all of them where the volume is one block."""
    copying = [(stage,) for stage in plan.stages if stage.number == 0]
    channels = [stage for stage in plan.stages if stage.number > 0]
    return copying + ([tuple(channels)] if plan.one_block else [(stage,) for stage in channels])


def _working_fields(plan: Plan) -> set[int]:
    """Numbers of the channels that start from a stored working field."""
    later = set() if plan.one_block else set(range(1, len(plan.edges)))
    return later | ({0} if plan.copy_in else set())


@dataclass(frozen=True)
class Batch:
    """Stages that run together, and the store they write to."""

    address: str
    run: str
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """What a person calls the tasks."""
        return self.stages[0].name if len(self.stages) == 1 else "decompose-all-channels"

    def tasks(self) -> Iterator[Task]:
        """One task for every block."""
        numbers = tuple(stage.number for stage in self.stages)
        count = self.stages[0].tasks
        return (Task(self.address, self.run, numbers, block) for block in range(count))


def _run_stages(
    plan: Plan,
    source: Source,
    batch: Batch,
    executor: Executor,
    progress: Progress,
    totals: dict[str, Statistics],
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
                _accumulate(totals, result)
                progress.advance(work)
    except NonFiniteError as error:
        raise locate_nonfinite(source, plan.parameters.dtype) from error


def _accumulate(totals: dict[str, Statistics], result: TaskResult) -> None:
    for name, statistics in result.statistics.items():
        totals[name] = totals[name] + statistics if name in totals else statistics


def _error_kind(plan: Plan, field: Statistics) -> str:
    """Whether the error of this field's blocks is bounded, now that its signs are known."""
    kinds = {stage.error for stage in plan.stages}
    if kinds == {"exact"}:
        return "exact"
    cval = plan.parameters.cval if plan.parameters.boundary == "constant" else 0.0
    mixed = min(field.min, cval) < 0 < max(field.max, cval)
    return "estimated" if mixed and "bounded (one sign)" in kinds else "bounded"
