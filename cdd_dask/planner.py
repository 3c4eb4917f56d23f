"""The planner: chooses blocks that fit the memory, and says what each stage will cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import mul
from typing import NoReturn

from cdd_dask.blocks import Grid, haloed_voxels
from cdd_dask.errors import BudgetError, InputError
from cdd_dask.halo import halo_depth
from cdd_dask.memory import device_peak, format_bytes, task_peak
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Plan, Resources, Stage, Volume
from cdd_dask.scales import scale_edges
from cdd_dask.time_stepping import Steps, channel_steps

SMALLEST_CORE = 16
"""Blocks are not made smaller than this, nor than their halo's depth: they would be all halo."""
CORE_MULTIPLE = 32
"""Longer cores are a multiple of this, so that chunks divide them well."""
DISK_SPEED = 2e8
"""Bytes per second and task, compressed on the way, for estimates of time only."""


def make_plan(
    parameters: Parameters,
    volume: Volume,
    resources: Resources,
    block: tuple[int, ...] | None = None,
) -> Plan:
    """Plan a run.

    Parameters
    ----------
    parameters
        What to compute.
    volume
        Of what.
    resources
        With what.
    block
        Shape of a block's core in voxels; None takes the largest that `resources` hold.

    Raises
    ------
    InputError
        If `block` does not fit the volume's axes.
    BudgetError
        If no block fits the memory; the message states the smallest budget that would do.
    """
    draft = _Draft.make(parameters, volume, resources)
    grid = Grid(volume.shape, draft.choose_block() if block is None else draft.check(block))
    first = 0 if draft.copies_in(grid) else 1
    stages = tuple(draft.stage(grid, number) for number in range(first, len(draft.edges) + 1))
    fields = draft.stored_fields(grid)
    groups = len(draft.edges) + 1
    # metadata: the root and `work`, two groups and an image each, and a coordinate array (its
    # metadata and its one chunk) per axis
    files = 2 + groups * (3 + 2 * len(volume.shape)) + fields * (len(grid) + 1)
    # a percent for zstd where it finds nothing to compress, a disk block for what ends a file
    disk = int(fields * draft.field_bytes * 1.01) + files * 4096
    return Plan(
        parameters=parameters,
        volume=volume,
        resources=resources,
        edges=draft.edges,
        block=grid.block,
        copy_in=draft.copies_in(grid),
        stages=stages,
        peak_memory=draft.peak(grid),
        disk_bytes=0 if resources.in_memory else disk,
        files=0 if resources.in_memory else files,
    )


@dataclass(frozen=True)
class _Draft:
    """A plan whose blocks are not chosen yet."""

    parameters: Parameters
    volume: Volume
    resources: Resources
    edges: tuple[float, ...]
    steps: tuple[Steps, ...]
    depths: tuple[tuple[int, ...], ...]
    """Halo of every channel in voxels per axis, where the volume is cut."""

    @staticmethod
    def make(parameters: Parameters, volume: Volume, resources: Resources) -> _Draft:
        edges = scale_edges(parameters, volume.shape)
        steps = channel_steps(parameters, edges, len(volume.shape))
        depths = tuple(halo_depth(s, parameters.rtol, len(edges)) for s in steps)
        return _Draft(parameters, volume, resources, edges, steps, depths)

    @property
    def field_bytes(self) -> int:
        """Bytes of one field of the volume's size."""
        return math.prod(self.volume.shape) * self.parameters.itemsize

    def copies_in(self, grid: Grid) -> bool:
        """Whether the source is copied first: halo'd blocks are read again and again."""
        return not self.volume.reachable or (len(grid) > 1 and not self.volume.is_zarr)

    def stored_fields(self, grid: Grid) -> int:
        """Largest number of fields in the store: channels, residual and working fields.

        The last stage reads one working field while it writes the last channel and the
        residual; no earlier stage holds more.
        """
        working = self.copies_in(grid) or (len(grid) > 1 and len(self.edges) > 1)
        return len(self.edges) + 1 + working

    def task_peak(self, grid: Grid, depth: tuple[int, ...]) -> int:
        """Bytes that one task holds at its peak on the host."""
        return task_peak(
            grid,
            depth,
            self.parameters.boundary,
            self.resources.footprint,
            self.parameters.itemsize,
            self.volume.source_itemsize,
            self.volume.source_chunk,
        )

    def device_peak(self, grid: Grid, depth: tuple[int, ...]) -> int:
        """Bytes that one task holds at its peak on the device."""
        return device_peak(grid, depth, self.parameters.boundary, self.resources.footprint)

    def peak(self, grid: Grid) -> int:
        """Bytes on the host of all tasks that run at once, and of an output kept there."""
        worst = max(self.task_peak(grid, depth) for depth in self.depths)
        # in memory a chunk is a block, and those at the edges are held at full size
        stored = math.prod(map(mul, grid.counts, grid.block)) * self.parameters.itemsize
        output = self.stored_fields(grid) * stored if self.resources.in_memory else 0
        return min(self.resources.tasks_per_budget, len(grid)) * worst + output

    def fits(self, grid: Grid) -> bool:
        """Whether tasks of `grid` fit the memory of host and device."""
        device = self.resources.device_memory
        if device is not None:
            if max(self.device_peak(grid, depth) for depth in self.depths) > device:
                return False
        return self.peak(grid) <= self.resources.memory

    def check(self, block: tuple[int, ...]) -> tuple[int, ...]:
        """`block` clipped to the volume, if it can be used."""
        shape = self.volume.shape
        if len(block) != len(shape):
            raise InputError(
                f"block={block} has {len(block)} axes, the volume of shape {shape} has {len(shape)}"
            )
        if min(block) < 1:
            raise InputError(f"block={block} must be positive along every axis")
        grid = Grid(shape, tuple(min(b, n) for b, n in zip(block, shape, strict=True)))
        if not self.fits(grid):
            self.refuse(grid, f"block={block}", "give a smaller block, ")
        return grid.block

    def choose_block(self) -> tuple[int, ...]:
        """The core that is done first, of those that fit: large, but enough for all workers."""
        grids = list(self._candidates())
        fitting = [grid for grid in grids if self.fits(grid)]
        if not fitting:
            grid = min(grids, key=self.peak)
            self.refuse(grid, f"even with blocks of {grid.block}, the plan", "")
        return min(fitting, key=self.longest_work).block

    def longest_work(self, grid: Grid) -> float:
        """Voxel-steps of the worker that has the most to do, if blocks were all alike."""
        boundary = self.parameters.boundary
        work = sum(
            steps.count * haloed_voxels(grid, depth, boundary)
            for steps, depth in zip(self.steps, self.depths, strict=True)
        )
        rounds = -(-len(grid) // self.resources.workers)
        return work * rounds / len(grid)

    def _candidates(self) -> Iterator[Grid]:
        """The whole volume, then ever smaller near-cubic blocks, down to the smallest sensible."""
        shape = self.volume.shape
        deepest = [max(along) for along in zip(*self.depths, strict=True)]
        least = tuple(min(n, max(SMALLEST_CORE, h)) for n, h in zip(shape, deepest, strict=True))
        counts = [1] * len(shape)
        while True:
            block = tuple(map(_core, shape, counts, least))
            yield Grid(shape, block)
            divisible = [axis for axis, b in enumerate(block) if b > least[axis]]
            if not divisible:
                return
            axis = max(divisible, key=lambda a: block[a])
            while _core(shape[axis], counts[axis], least[axis]) == block[axis]:
                counts[axis] += 1 + counts[axis] // 32

    def refuse(self, grid: Grid, what: str, remedy: str) -> NoReturn:
        """Raise the `BudgetError` that says what `grid` needs and what would help."""
        resources = self.resources
        needed, allowed = self.peak(grid), resources.memory
        deepest = max(range(len(self.depths)), key=lambda k: max(self.depths[k]))
        halo = f"the halo of channel {deepest} is {max(self.depths[deepest])} voxels deep"
        if needed <= allowed:
            needed = max(self.device_peak(grid, depth) for depth in self.depths)
            raise BudgetError(
                f"{what} needs {format_bytes(needed)} on {resources.device} ({halo}), where "
                f"{format_bytes(resources.device_memory or 0)} are free: {remedy}lower max_scale "
                "or raise rtol"
            )
        tasks = resources.tasks_per_budget
        fewer = f", use fewer workers (now {tasks} tasks share the memory)" if tasks > 1 else ""
        disk = ", write to disk with out=" if resources.in_memory else ""
        raise BudgetError(
            f"{what} needs {format_bytes(needed)} ({halo}), but memory allows "
            f"{format_bytes(allowed)}: {remedy}raise memory to at least "
            f'"{-(-needed // 1_000_000)}MB", lower max_scale{fewer}{disk} or raise rtol'
        )

    def stage(self, grid: Grid, number: int) -> Stage:
        """Stage `number` for the blocks of `grid`."""
        if number == 0:
            return self._copying_in(grid)
        k = number - 1
        steps = self.steps[k]
        cut = [count > 1 for count in grid.counts]
        depth = tuple(h if is_cut else 0 for h, is_cut in zip(self.depths[k], cut, strict=True))
        haloed = haloed_voxels(grid, depth, self.parameters.boundary)
        voxels, itemsize = math.prod(grid.shape), self.parameters.itemsize
        from_source = k == 0 and not self.copies_in(grid)
        # a volume of one block is read once, and its field stays in memory between channels
        one_block = len(grid) == 1
        read = 0 if one_block and k else haloed
        written = voxels if one_block and k < len(self.edges) - 1 else 2 * voxels
        reach = zip(depth, steps.reach, cut, strict=True)
        error = "exact"
        if any(is_cut and h < strict for h, strict, is_cut in reach):
            one_sign = self.parameters.constraint == "constrained"
            error = "bounded (one sign)" if one_sign else "bounded"
        return Stage(
            number=number,
            scale_from=self.edges[k - 1] if k else 0.0,
            scale_to=self.edges[k],
            steps=steps.count,
            sigma=steps.kernels[0].sigma,
            radius=steps.kernels[0].radius,
            regime="direct",
            passes=1,
            level=0,
            depth=depth,
            tasks=len(grid),
            haloed_voxels=haloed,
            voxel_steps=haloed * steps.count,
            bytes_read=read * (self.volume.source_itemsize if from_source else itemsize),
            bytes_written=written * itemsize,
            peak_memory=self.task_peak(grid, depth),
            peak_device_memory=self.device_peak(grid, depth),
            seconds=self._seconds(grid, haloed * steps.count, (read + written) * itemsize),
            error=error,
        )

    def _copying_in(self, grid: Grid) -> Stage:
        """Stage 0: the source, block by block, into the store's first working field."""
        voxels, depth = math.prod(grid.shape), (0,) * len(grid.shape)
        read = voxels * self.volume.source_itemsize
        return Stage(
            number=0,
            scale_from=0.0,
            scale_to=0.0,
            steps=0,
            sigma=0.0,
            radius=0,
            regime="copy",
            passes=1,
            level=0,
            depth=depth,
            tasks=len(grid),
            haloed_voxels=voxels,
            voxel_steps=0,
            bytes_read=read,
            bytes_written=self.field_bytes,
            peak_memory=self.task_peak(grid, depth),
            peak_device_memory=0,
            seconds=self._seconds(grid, 0, read + self.field_bytes),
            error="exact",
        )

    def _seconds(self, grid: Grid, voxel_steps: int, moved: int) -> float:
        """Rough time for `voxel_steps` and `moved` bytes, shared by the workers."""
        alone = voxel_steps / self.resources.voxel_steps_per_second + moved / DISK_SPEED
        return alone / min(self.resources.workers, len(grid))


def _core(size: int, count: int, least: int) -> int:
    """Length of a core when an axis of `size` voxels is cut into `count` blocks or fewer."""
    core = -(-size // count)
    if count > 1 and core > 2 * CORE_MULTIPLE:
        core = -(-core // CORE_MULTIPLE) * CORE_MULTIPLE
    return min(size, max(core, least))
