"""What one worker does with one block: read it with its halo, diffuse, trim, write the core.

A task is an address and integers. Everything else lies in the store, where any worker finds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import store
from cdd_dask.blocks import Grid, HaloedBlock, haloed_block
from cdd_dask.engines import Diffusion, Engine, load_engine
from cdd_dask.errors import BlockError
from cdd_dask.kernels import discrete_gaussian
from cdd_dask.memory import return_freed_memory
from cdd_dask.parameters import Parameters
from cdd_dask.readers import NonFiniteError, open_source, read_finite
from cdd_dask.statistics import Statistics
from cdd_dask.time_stepping import Steps, channel_steps

THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """One block's work for one stage, or for all stages where a volume is one block."""

    address: str
    """Address of the store."""
    run: str
    """Name of the run that made the store: another run's store is not this task's."""
    stages: tuple[int, ...]
    """Numbers of the stages to compute, in order; 0 is the copying-in."""
    block: int
    """Number of the block."""


@dataclass(frozen=True)
class TaskResult:
    """What a task tells of the block's core."""

    block: int
    statistics: dict[str, Statistics]
    """Statistics of what was written (and of the ``source``), by the output's name."""


@dataclass(frozen=True)
class _Job:
    """What the tasks of one run share in one process."""

    parameters: Parameters
    grid: Grid
    depths: dict[int, tuple[int, ...]]
    steps: tuple[Steps, ...]
    engine_name: str
    device: str
    source: str
    copy_in: bool

    @cached_property
    def engine(self) -> Engine:
        """The engine, loaded when it first computes: a process that only copies needs none."""
        return load_engine(self.engine_name, self.device)

    def has_source(self, stage: int) -> bool:
        """Whether `stage` starts from the source rather than from a working field."""
        return stage == 0 or (stage == 1 and not self.copy_in)

    def is_last(self, stage: int) -> bool:
        return stage == len(self.steps)


@contextmanager
def limited_threads(engine: str, device: str, threads: int) -> Iterator[None]:
    """Compute in this process with so many threads a task, and afterwards as before."""
    loaded = load_engine(engine, device)
    before = loaded.limit_threads(threads)
    try:
        yield
    finally:
        loaded.limit_threads(before)


def prepare_process(engine: str, device: str, threads: int) -> None:
    """Make a worker's process ready: its libraries loaded, its threads and its memory capped.

    Done when it starts, so that its first task does not pay for it.
    """
    for variable in THREAD_LIMITS:
        os.environ.setdefault(variable, str(threads))
    return_freed_memory()
    loaded = load_engine(engine, device)
    loaded.limit_threads(threads)
    # a step on next to nothing loads what the engine loads when it first computes
    steps = Steps(1, (discrete_gaussian(0.5),))
    rehearsal = Diffusion(steps, "constrained", (("reflect", "reflect"),))
    loaded.diffuse(np.ones(4, np.float32), rehearsal)
    store.rehearse()


def run_task(task: Task) -> TaskResult:
    """Compute one block.

    Raises
    ------
    NonFiniteError
        If the source holds a NaN or an infinity there.
    BlockError
        If anything else goes wrong; the message names the block, its region and the cause.
    """
    try:
        store.root_of_run(task.address, task.run)  # also where the job is known already
        return _run(_load_job(task.address, task.run), task)
    except NonFiniteError:
        raise
    except Exception as error:
        raise BlockError(f"{describe_task(task)} failed: {_reason(error)}") from error


def describe_task(task: Task) -> str:
    """The task in words, with its region where the store still tells it."""
    what = f"block {task.block} of {_stage_name(task.stages)}"
    try:
        core = _load_job(task.address, task.run).grid.core(task.block)
    except Exception:
        return what
    region = ", ".join(f"{s.start}:{s.stop}" for s in core)
    return f"{what}, region [{region}],"


def _stage_name(stages: tuple[int, ...]) -> str:
    if len(stages) > 1:
        return "all channels"
    return f"channel {stages[0] - 1}" if stages[0] else "the copying-in"


def _reason(error: BaseException) -> str:
    text = str(error) or "no message"
    return (
        text if type(error).__module__.startswith("cdd_dask") else f"{type(error).__name__}: {text}"
    )


@lru_cache(maxsize=4)
def _load_job(address: str, run: str) -> _Job:
    return_freed_memory()
    attributes: Any = store.root_of_run(address, run).attrs[store.KEY]
    plan = attributes["plan"]
    parameters = Parameters(**attributes["parameters"])
    shape = tuple(plan["volume"]["shape"])
    return _Job(
        parameters=parameters,
        grid=Grid(shape, tuple(plan["block"])),
        depths={stage["number"]: tuple(stage["depth"]) for stage in plan["stages"]},
        steps=channel_steps(parameters, tuple(attributes["edges"]), len(shape)),
        engine_name=plan["resources"]["engine"],
        device=plan["resources"]["device"],
        source=attributes["source"]["address"],
        copy_in=plan["copy_in"],
    )


def _run(job: _Job, task: Task) -> TaskResult:
    """Compute the stages of `task`; between them the field stays in memory."""
    statistics: dict[str, Statistics] = {}
    block = haloed_block(job.grid, task.block, job.depths[task.stages[0]], job.parameters.boundary)
    core = job.grid.core(task.block)
    field = _read(job, task, block)
    if job.has_source(task.stages[0]):
        statistics["source"] = Statistics.of(np.ascontiguousarray(field[block.inner]))
    for stage in task.stages:
        if stage == 0:
            store.write_block(task.address, store.field_path(0), core, field)
            continue
        k = stage - 1
        start = field[block.inner].copy()
        field = _diffuse(job, k, field, block)
        end = field[block.inner]
        if stage == task.stages[-1]:
            # the next channel, or a reader, starts from here
            end = np.ascontiguousarray(end)
            del field
            last = job.is_last(stage)
            path = store.image_path(store.RESIDUAL) if last else store.field_path(stage)
            if last:
                statistics[store.RESIDUAL] = Statistics.of(end)
            store.write_block(task.address, path, core, end)
        # a channel is I(t_{k-1}) - I(t_k): the sum of all telescopes (Li 2022)
        channel = np.subtract(start, end, out=start)
        name = store.channel_name(k)
        statistics[name] = Statistics.of(channel)
        store.write_block(task.address, store.image_path(name), core, channel)
    return TaskResult(task.block, statistics)


def _read(job: _Job, task: Task, block: HaloedBlock) -> NDArray[Any]:
    """The block with its halo, writable and in the working dtype."""
    stage, dtype = task.stages[0], job.parameters.dtype
    if not job.has_source(stage):
        return store.read_block(task.address, store.field_path(stage - 1), block.outer)
    # opened for every task: a handle that outlives one is state that a retry would inherit
    return read_finite(open_source(job.source), block.outer, dtype)


def _diffuse(job: _Job, k: int, field: NDArray[Any], block: HaloedBlock) -> NDArray[Any]:
    parameters = job.parameters
    diffusion = Diffusion(job.steps[k], parameters.constraint, block.faces, parameters.cval)
    return job.engine.diffuse(field, diffusion)
