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
from cdd_dask.blocks import Grid, HaloedBlock, haloed_block, shifted, starts, with_halo
from cdd_dask.engines import Diffusion, Engine, Faces, load_engine
from cdd_dask.errors import BlockError
from cdd_dask.halo import channel_passes
from cdd_dask.kernels import discrete_gaussian
from cdd_dask.memory import return_freed_memory
from cdd_dask.parameters import Parameters
from cdd_dask.readers import BadValueError, open_source, read_field
from cdd_dask.readers.regions import read_region
from cdd_dask.refinement import Refinement
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
    computed: int
    """Number of channels that were diffused."""
    empty: int
    """Number of channels that were not: the block had nothing but zeros and blank voxels."""


@dataclass(frozen=True)
class _Job:
    """What the tasks of one run share in one process."""

    parameters: Parameters
    grid: Grid
    depths: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]
    """Halos of a stage's blocks: without blank voxels, and with them."""
    tiles: dict[int, tuple[int, ...]]
    levels: dict[int, tuple[int, ...]]
    """How often a stage halves the grid for its smoothing, per axis."""
    steps: tuple[Steps, ...]
    engine_name: str
    device: str
    source: str
    copy_in: bool
    as_if_blank: bool
    """Whether all blocks are computed as if they had blank voxels: bits must not tell."""

    def diffusion(self, k: int, faces: Faces, start: tuple[int, ...]) -> Diffusion:
        """What the steps of channel `k` do to a block with such `faces` that begins at `start`."""
        levels = self.levels[k + 1]
        return Diffusion(
            self.steps[k],
            self.parameters.constraint,
            faces,
            self.parameters.cval,
            levels,
            tuple(place % 2**level for place, level in zip(start, levels, strict=True)),
            self.as_if_blank,
        )

    def diffuse(
        self, k: int, field: NDArray[Any], faces: Faces, start: tuple[int, ...]
    ) -> NDArray[Any]:
        """A block that begins at `start` after the steps of channel `k`."""
        return self.engine.diffuse(field, self.diffusion(k, faces, start))

    @cached_property
    def engine(self) -> Engine:
        """The engine, loaded when it first computes: a process that only copies needs none."""
        return load_engine(self.engine_name, self.device)

    def has_source(self, stage: int) -> bool:
        """Whether `stage` starts from the source rather than from a working field."""
        return stage == 0 or (stage == 1 and not self.copy_in)

    def output(self, stage: int) -> str:
        """Where the field lies that `stage` ends with: the residual, for the last."""
        last = stage == len(self.steps)
        return store.image_path(store.RESIDUAL) if last else store.field_path(stage)


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
    BadValueError
        If the source holds values there that are refused.
    BlockError
        If anything else goes wrong; the message names the block, its region and the cause.
    """
    try:
        store.root_of_run(task.address, task.run)  # also where the job is known already
        return _run(_load_job(task.address, task.run), task)
    except BadValueError:
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
        return f"channels {stages[0] - 1} to {stages[-1] - 1}"
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
        depths={
            stage["number"]: (tuple(stage["depth"]), tuple(stage["blank_depth"]))
            for stage in plan["stages"]
        },
        tiles={stage["number"]: tuple(stage["tile"]) for stage in plan["stages"]},
        levels={stage["number"]: tuple(stage["levels"]) for stage in plan["stages"]},
        steps=channel_steps(parameters, tuple(attributes["edges"]), len(shape)),
        engine_name=plan["resources"]["engine"],
        device=plan["resources"]["device"],
        source=attributes["source"]["address"],
        copy_in=plan["copy_in"],
        as_if_blank=parameters.rtol == 0
        and parameters.nan == "mask"
        and bool(plan["volume"]["has_nan"]),
    )


def _run(job: _Job, task: Task) -> TaskResult:
    """Compute the stages of `task`; between them the field stays in memory."""
    statistics: dict[str, Statistics] = {}
    core = job.grid.core(task.block)
    field, block, depth = _read(job, task)
    if job.has_source(task.stages[0]):
        statistics["source"] = Statistics.of(np.ascontiguousarray(field[block.inner]))
    if task.stages == (0,):
        store.write_block(task.address, store.field_path(0), core, field)
        return TaskResult(task.block, statistics, computed=0, empty=0)
    empty = 0
    for channels in channel_passes(job.steps):
        if channels.start + 1 not in task.stages:
            continue
        if _is_empty(job.parameters, field, block):
            start = field[block.inner].copy()
            ends = [start] * len(channels)
            empty += len(channels)
        elif job.steps[channels.start].refinement > 1:
            start, *ends = _diffuse_refined(job, channels, field, block, depth)
            if job.grid.shape == field.shape:
                field = ends[-1].copy()  # the next pass starts from here
        else:
            start = field[block.inner].copy()
            field = _diffuse(job, channels.start, field, block)
            ends = [field[block.inner]]
        if channels.stop == task.stages[-1]:
            # the next task, or a reader, starts from here
            ends[-1] = np.ascontiguousarray(ends[-1])
            field = ends[-1]
            path = job.output(channels.stop)
            if path == store.image_path(store.RESIDUAL):
                statistics[store.RESIDUAL] = Statistics.of(field)
            store.write_block(task.address, path, core, field)
        for k, end in zip(channels, ends, strict=True):
            # a channel is I(t_{k-1}) - I(t_k): the sum of all telescopes (Li 2022)
            channel = np.subtract(start, end, out=start)
            name = store.channel_name(k)
            statistics[name] = Statistics.of(channel)
            store.write_block(task.address, store.image_path(name), core, channel)
            start = end
    return TaskResult(task.block, statistics, computed=len(task.stages) - empty, empty=empty)


def _read(job: _Job, task: Task) -> tuple[NDArray[Any], HaloedBlock, tuple[int, ...]]:
    """The block with its halo, writable and in the working dtype, and how deep the halo is.

    A block with blank voxels takes a deeper one, unless nothing will become of it.
    """
    depth, deeper = job.depths[task.stages[0]]
    field, block = _read_with_halo(job, task, depth)
    if depth == deeper or not np.isnan(field.min()) or _is_empty(job.parameters, field, block):
        return field, block, depth
    del field  # before the next one is there
    return *_read_with_halo(job, task, deeper), deeper


def _read_with_halo(
    job: _Job, task: Task, depth: tuple[int, ...]
) -> tuple[NDArray[Any], HaloedBlock]:
    stage = task.stages[0]
    block = haloed_block(job.grid, task.block, depth, job.parameters.boundary)
    if job.has_source(stage):
        # opened for every task: a handle that outlives one is state that a retry would inherit
        return read_field(open_source(job.source), block.outer, job.parameters), block
    return store.read_block(task.address, store.field_path(stage - 1), block.outer), block


def _is_empty(parameters: Parameters, field: NDArray[Any], block: HaloedBlock) -> bool:
    """Whether diffusion leaves the block's core as it is.

    Under the constraint zeros stay, and blank voxels always do. Else there must be nothing but
    these in the halo, too, nor a value beyond the volume.
    """
    if parameters.constraint == "unconstrained":
        if parameters.boundary == "constant" and parameters.cval != 0:
            return False
    else:
        field = field[block.inner]
    low, high = np.fmin.reduce(field, axis=None), np.fmax.reduce(field, axis=None)
    return not (low < 0 or high > 0)  # both NaN where all is blank


def _diffuse(job: _Job, k: int, field: NDArray[Any], block: HaloedBlock) -> NDArray[Any]:
    return job.diffuse(k, field, block.faces, starts(block.outer))


def _diffuse_refined(
    job: _Job, channels: range, field: NDArray[Any], block: HaloedBlock, depth: tuple[int, ...]
) -> list[NDArray[Any]]:
    """The block's core before, between and after `channels`, computed on the refined grid.

    The core is cut into tiles, each with a halo from `field`, so that the cells fit the memory::

        |<-- depth -->|<------ core ------>|<-- depth -->|   field
        |<-- depth -->| tile |<-- depth -->|
               |<-- depth -->| tile |<-- depth -->|
    """
    parameters, shape = job.parameters, job.grid.shape
    origin = starts(block.outer)
    core = shifted(block.inner, origin)
    tiles = Grid(tuple(s.stop - s.start for s in core), job.tiles[channels.start + 1])
    cores = [np.empty(tiles.shape, field.dtype) for _ in range(len(channels) + 1)]
    for place in map(tiles.core, range(len(tiles))):
        around = with_halo(shifted(place, starts(core)), shape, depth, parameters.boundary)
        part = read_region(field, shifted(around.outer, tuple(-n for n in origin)))
        if _is_empty(parameters, part, around):
            for values in cores:
                values[place] = part[around.inner]
            continue
        refinement = Refinement(
            job.steps[channels.start].refinement,
            parameters.decomposed_axes(len(shape)),
            around.faces,
            parameters.cval,
        )
        states = refinement.states(part, starts(around.outer), channels, job.diffuse)
        for values in cores:
            values[place] = next(states)[around.inner]
    return cores
