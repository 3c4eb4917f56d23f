"""What one worker does with one block: read it with its halo, diffuse, trim, write the core.

A task is an address and integers. Everything else lies in the store, where any worker finds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import store
from cdd_dask.blocks import Grid, HaloedBlock, Region, shifted, starts, with_halo
from cdd_dask.cell_tasks import CellWork
from cdd_dask.engines import Diffusion, Engine, Faces, load_engine
from cdd_dask.errors import BlockError
from cdd_dask.halo import channel_passes
from cdd_dask.kernels import discrete_gaussian
from cdd_dask.marks import Mark, block_path, marks_at, write_mark
from cdd_dask.memory import return_freed_memory
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Pass, Stage, Volume, stage_from_dict
from cdd_dask.readers import BadValueError, open_source, read_field
from cdd_dask.readers.regions import read_region
from cdd_dask.refinement import Refinement
from cdd_dask.statistics import Statistics
from cdd_dask.time_stepping import Steps, channel_steps
from cdd_dask.working import Nature, field_name, keeps_states, part_name

THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """One block's work in one pass."""

    address: str
    """Address of the store."""
    run: str
    """Name of the run that made the store: another run's store is not this task's."""
    work: Pass
    """What to do."""
    number: int
    """Number of the pass in the plan."""
    block: int
    """Number of the block, of voxels or of cells."""
    nature: Nature
    """What is known of the source."""


@dataclass(frozen=True)
class _Job:
    """What the tasks of one run share in one process."""

    fingerprint: str
    """Of everything that decides the values; done marks carry it."""
    parameters: Parameters
    grid: Grid
    stages: dict[int, Stage]
    """The plan's stages, by number."""
    work: str
    """Address of the store with the working arrays."""
    steps: tuple[Steps, ...]
    engine_name: str
    device: str
    source: str
    copy_in: bool
    as_if_blank: bool
    """Whether all blocks are computed as if they had blank voxels: bits must not tell."""

    def diffuse(
        self,
        k: int,
        field: NDArray[Any],
        faces: Faces,
        start: tuple[int, ...],
        count: int | None = None,
    ) -> NDArray[Any]:
        """A block that begins at `start` after all steps of channel `k`, or `count` of them."""
        levels, steps = self.stages[k + 1].levels, self.steps[k]
        diffusion = Diffusion(
            steps if count is None else replace(steps, count=count),
            self.parameters.constraint,
            faces,
            self.parameters.cval,
            levels,
            tuple(place % 2**level for place, level in zip(start, levels, strict=True)),
            self.as_if_blank,
        )
        return self.engine.diffuse(field, diffusion)

    @cached_property
    def engine(self) -> Engine:
        """The engine, loaded when it first computes: a process that only copies needs none."""
        return load_engine(self.engine_name, self.device)

    def has_source(self, stage: int) -> bool:
        """Whether `stage` starts from the source rather than from a working field."""
        return stage == 0 or (stage == 1 and not self.copy_in)

    def cells(self, stage: int, nature: Nature) -> CellWork:
        """What the tasks on the cells of a stage share."""
        return CellWork(
            self.parameters,
            self.grid,
            self.stages[stage],
            self.steps[stage - 1],
            nature,
            self.work,
            self.engine,
        )


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


def run_task(task: Task) -> Mark:
    """Compute one block, unless it is done, and mark it as done when everything is written.

    Raises
    ------
    BadValueError
        If the source holds values there that are refused.
    BlockError
        If anything else goes wrong; the message names the block, its region and the cause.
    """
    try:
        store.root_of_run(task.address, task.run)  # also where the job is known already
        job = _load_job(task.address, task.run)
        # what a worker tells is lost with it, or with its client, unless that has heard it
        path = block_path(task.number, task.block)
        known = marks_at(task.address, job.fingerprint, task.number, path)
        if task.block in known:
            return known[task.block]
        with store.recorded(task.address, task.run) as record:
            mark = _run(job, task)
        record.check()
        mark = replace(mark, checksums=record.checksums)
        write_mark(task.address, job.fingerprint, task.number, mark)
        return mark
    except BadValueError:
        raise
    except Exception as error:
        raise BlockError(f"{describe_task(task)} failed: {_reason(error)}") from error


def describe_task(task: Task) -> str:
    """The task in words, with its region where the store still tells it."""
    on_cells = task.work.kind in ("smooth", "evolve")
    what = f"block {task.block} of {'the cells of ' * on_cells}{_stage_name(task.work.stages)}"
    try:
        core = _load_job(task.address, task.run).grid.core(task.block)
    except Exception:
        return what
    if on_cells:
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
    parameters = Parameters.of_dict(attributes["parameters"])
    shape = tuple(plan["volume"]["shape"])
    return _Job(
        fingerprint=attributes["fingerprint"],
        parameters=parameters,
        grid=Grid(shape, tuple(plan["block"])),
        stages={stage["number"]: stage_from_dict(stage) for stage in plan["stages"]},
        work=attributes["scratch"] or address,
        steps=channel_steps(parameters, tuple(attributes["edges"]), len(shape)),
        engine_name=plan["resources"]["engine"],
        device=plan["resources"]["device"],
        source=attributes["source"]["address"],
        copy_in=plan["copy_in"],
        as_if_blank=Volume(shape, has_nan=plan["volume"]["has_nan"]).as_if_blank(parameters),
    )


def _run(job: _Job, task: Task) -> Mark:
    """Compute one block of a pass."""
    kind, block = task.work.kind, task.block
    if kind == "copy":
        return _copy(job, task)
    if kind == "diffuse":
        several = len(job.grid) == 1 or job.stages[task.work.stages[0]].refinement > 1
        return (_diffuse_channels if several else _diffuse_pass)(job, task)
    cells = job.cells(task.work.stages[0], task.nature)
    if kind == "smooth":
        cells.smooth(block, task.work.number)
    elif kind == "gather":
        cells.gather(block)
    elif kind == "evolve":
        cells.evolve(task.work, block)
    else:
        return _move_block(job, task, cells)
    return Mark(block)


def _copy(job: _Job, task: Task) -> Mark:
    core = job.grid.core(task.block)
    field = read_field(open_source(job.source), core, job.parameters)
    _write_field(job, task, 0, core, field)
    return Mark(task.block, {"source": Statistics.of(field)})


def _diffuse_pass(job: _Job, task: Task) -> Mark:
    """Take a block through some steps of one channel."""
    core, work, stage = job.grid.core(task.block), task.work, task.work.stages[0]
    start, end, empty = _diffused_block(job, task)
    statistics: dict[str, Statistics] = {}
    if job.has_source(stage) and work.number == 0:
        statistics["source"] = Statistics.of(start)
    if work.last < job.stages[stage].steps:
        path = store.work_path(part_name(stage - 1, work.number))
        store.write_block(job.work, path, core, end)
        return Mark(task.block, statistics)
    if work.number:  # the channel began passes ago
        start = _read_core(job, stage, core)
    statistics |= _write_field(job, task, stage, core, end)
    statistics |= _write_channel(task, stage - 1, core, start, end)
    return Mark(task.block, statistics, computed=int(not empty), empty=int(empty))


def _diffused_block(job: _Job, task: Task) -> tuple[NDArray[Any], NDArray[Any], bool]:
    """A block's core before and after the steps of a pass, and whether nothing became of it.

    Blank voxels need a deeper halo and more memory: a block that holds some is computed in tiles,
    each with a halo of its own.
    """
    core = job.grid.core(task.block)
    stage, count = job.stages[task.work.stages[0]], task.work.last - task.work.first
    field, block = _read_with_halo(job, task, core, stage.depth)
    start = field[block.inner].copy()
    if _is_empty(job.parameters, field, block):
        return start, start.copy(), True
    tiled = stage.blank_tile != job.grid.block or stage.blank_depth != stage.depth
    if not tiled or not (job.as_if_blank or np.isnan(field.min())):
        field = _diffuse(job, stage.number - 1, field, block, count)
        return start, np.ascontiguousarray(field[block.inner]), False
    del field  # before the tiles are there
    end = np.empty_like(start)
    tiles = Grid(start.shape, tuple(map(min, stage.blank_tile, start.shape)))
    for place in map(tiles.core, range(len(tiles))):
        tile = shifted(place, starts(core))
        field, block = _read_with_halo(job, task, tile, stage.blank_depth)
        if not _is_empty(job.parameters, field, block):
            field = _diffuse(job, stage.number - 1, field, block, count)
        end[place] = field[block.inner]
        del field
    return start, end, False


def _diffuse_channels(job: _Job, task: Task) -> Mark:
    """Diffuse a block through several channels, between which its field stays in memory."""
    statistics: dict[str, Statistics] = {}
    core, stages = job.grid.core(task.block), task.work.stages
    field, block, depth = _read(job, task)
    if job.has_source(stages[0]):
        statistics["source"] = Statistics.of(np.ascontiguousarray(field[block.inner]))
    empty = 0
    for channels in channel_passes(job.steps):
        if channels.start + 1 not in stages:
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
        if channels.stop == stages[-1]:
            # the next task, or a reader, starts from here
            ends[-1] = np.ascontiguousarray(ends[-1])
            field = ends[-1]
            statistics |= _write_field(job, task, channels.stop, core, field)
        for k, end in zip(channels, ends, strict=True):
            statistics |= _write_channel(task, k, core, start, end)
            start = end
    return Mark(task.block, statistics, computed=len(stages) - empty, empty=empty)


def _move_block(job: _Job, task: Task, cells: CellWork) -> Mark:
    """Move a block's voxels to what their cells say."""
    core, stage, work = job.grid.core(task.block), task.work.stages[0], task.work
    states, ends = keeps_states(job.parameters, task.nature), work.last == job.stages[stage].steps
    goes_on = work.kind == "relax" and work.number > 0 and states
    if goes_on:
        path = store.work_path(part_name(stage - 1, work.number - 1))
        field = store.read_block(job.work, path, core)
    else:
        field = _read_core(job, stage, core)
    if _stays(job.parameters, field):
        end = field.copy()
    else:
        scattered = work.kind == "scatter"
        end = cells.scatter(field, core) if scattered else cells.relax(field, core, work.number)
    if not ends:
        cells.write_means(core, end, work.number + 1)
        if states:
            path = store.work_path(part_name(stage - 1, work.number))
            store.write_block(job.work, path, core, end)
        return Mark(task.block)
    start = _read_core(job, stage, core) if goes_on else field
    empty = _stays(job.parameters, start)
    statistics = _write_field(job, task, stage, core, end)
    statistics |= _write_channel(task, stage - 1, core, start, end)
    return Mark(task.block, statistics, computed=int(not empty), empty=int(empty))


def _write_field(
    job: _Job, task: Task, stage: int, core: Region, field: NDArray[Any]
) -> dict[str, Statistics]:
    """Write what `stage` ends with, and what the next one needs of it; the residual at last."""
    if stage == len(job.steps):
        store.write_block(task.address, store.image_path(store.RESIDUAL), core, field)
        return {store.RESIDUAL: Statistics.of(field)}
    store.write_block(job.work, store.work_path(field_name(stage)), core, field)
    if job.stages[stage + 1].cell_domain:
        job.cells(stage + 1, task.nature).write_means(core, field)
    return {}


def _write_channel(
    task: Task, k: int, core: Region, start: NDArray[Any], end: NDArray[Any]
) -> dict[str, Statistics]:
    """Write ``I(t_{k-1}) - I(t_k)``: the sum of all telescopes (Li 2022). `start` is used up."""
    channel = np.subtract(start, end, out=start)
    name = store.channel_name(k)
    store.write_block(task.address, store.image_path(name), core, channel)
    return {name: Statistics.of(channel)}


def _read(job: _Job, task: Task) -> tuple[NDArray[Any], HaloedBlock, tuple[int, ...]]:
    """The block with its halo, writable and in the working dtype, and how deep the halo is.

    A block with blank voxels takes a deeper one, unless nothing will become of it.
    """
    stage, core = job.stages[task.work.stages[0]], job.grid.core(task.block)
    depth, deeper = stage.depth, stage.blank_depth
    field, block = _read_with_halo(job, task, core, depth)
    if depth == deeper or not np.isnan(field.min()) or _is_empty(job.parameters, field, block):
        return field, block, depth
    del field  # before the next one is there
    return *_read_with_halo(job, task, core, deeper), deeper


def _read_with_halo(
    job: _Job, task: Task, core: Region, depth: tuple[int, ...]
) -> tuple[NDArray[Any], HaloedBlock]:
    stage, number = task.work.stages[0], task.work.number
    block = with_halo(core, job.grid.shape, depth, job.parameters.boundary)
    if number:
        path = store.work_path(part_name(stage - 1, number - 1))
        return store.read_block(job.work, path, block.outer), block
    return _read_core(job, stage, block.outer), block


def _read_core(job: _Job, stage: int, region: Region) -> NDArray[Any]:
    """A region of the field that `stage` starts from."""
    if job.has_source(stage):
        # opened for every task: a handle that outlives one is state that a retry would inherit
        return read_field(open_source(job.source), region, job.parameters)
    return store.read_block(job.work, store.work_path(field_name(stage - 1)), region)


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
    return not _has_values(field)


def _stays(parameters: Parameters, field: NDArray[Any]) -> bool:
    """Whether a step leaves voxels as they are, whatever lies around them."""
    return parameters.constraint != "unconstrained" and not _has_values(field)


def _has_values(field: NDArray[Any]) -> bool:
    """Whether there is anything but zeros and blank voxels."""
    low, high = np.fmin.reduce(field, axis=None), np.fmax.reduce(field, axis=None)
    return bool(low < 0 or high > 0)  # both NaN where all is blank


def _diffuse(
    job: _Job, k: int, field: NDArray[Any], block: HaloedBlock, count: int | None = None
) -> NDArray[Any]:
    return job.diffuse(k, field, block.faces, starts(block.outer), count)


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
    tiles = Grid(tuple(s.stop - s.start for s in core), job.stages[channels.start + 1].tile)
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
