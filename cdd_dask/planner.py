"""The planner: chooses blocks that fit the memory, and says what each stage will cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import mul
from typing import NoReturn

from cdd_dask.blocks import Grid, haloed_shape, haloed_voxels
from cdd_dask.errors import BudgetError, InputError
from cdd_dask.halo import BLANK_MARGIN, channel_halos, channel_passes
from cdd_dask.memory import TaskMemory, format_bytes
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Plan, Resources, Stage, Volume
from cdd_dask.pyramid import coarse_cells, coarse_levels, computed_steps
from cdd_dask.scales import scale_edges
from cdd_dask.time_stepping import Steps, channel_steps

SMALLEST_CORE = 16
"""Blocks are not made smaller than this, nor than their halo's depth: they would be all halo."""
CORE_MULTIPLE = 32
"""Longer cores are a multiple of this, so that chunks divide them well."""
SMALLEST_TILE = 8
"""Tiles on the refined grid are not made smaller than this, in voxels."""
TILE_SHARES = (0.95, 0.8, 0.6, 0.4, 0.2)
"""Shares of a task's memory that a tile on the refined grid may take; the planner tries all."""


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
    draft, grid = _choose(_drafts(parameters, volume, resources), block)
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


def _drafts(parameters: Parameters, volume: Volume, resources: Resources) -> list[_Draft]:
    """A draft for every size of tile that may do; one where nothing is refined."""
    edges = scale_edges(parameters, volume.shape)
    steps = channel_steps(parameters, edges, len(volume.shape))
    levels = tuple((0,) * len(volume.shape) for _ in steps)
    if resources.has_pyramid:
        levels = tuple(coarse_levels(parameters, part) for part in steps)
    computed = tuple(map(computed_steps, steps, levels))
    depths = channel_halos(computed, parameters.rtol)
    blank_depths = depths
    if volume.may_be_masked(parameters):
        blank_depths = channel_halos(computed, parameters.rtol / BLANK_MARGIN)
    draft = _Draft(
        parameters=parameters,
        volume=volume,
        resources=resources,
        edges=edges,
        steps=steps,
        levels=levels,
        computed_steps=computed,
        depths=depths,
        blank_depths=blank_depths,
        tile=volume.shape,
    )
    if not draft.refined:
        return [draft]
    tiles = dict.fromkeys(draft.largest_tile(share) for share in TILE_SHARES)
    return [replace(draft, tile=tile) for tile in tiles]


def _choose(drafts: list[_Draft], block: tuple[int, ...] | None) -> tuple[_Draft, Grid]:
    """The draft and the blocks that are done first, of those that fit."""
    options = [
        (draft, grid)
        for draft in drafts
        for grid in (draft.grids() if block is None else [draft.check(block)])
    ]
    fitting = [(draft, grid) for draft, grid in options if draft.fits(grid)]
    if fitting:
        return min(fitting, key=lambda option: option[0].longest_work(option[1]))
    draft, grid = min(options, key=lambda option: option[0].peak(option[1]))
    if block is None:
        draft.refuse(grid, f"even with blocks of {grid.block}, the plan", "")
    draft.refuse(grid, f"block={block}", "give a smaller block, ")


@dataclass(frozen=True)
class _Draft:
    """A plan whose blocks are not chosen yet."""

    parameters: Parameters
    volume: Volume
    resources: Resources
    edges: tuple[float, ...]
    steps: tuple[Steps, ...]
    levels: tuple[tuple[int, ...], ...]
    """How often every channel halves the grid for its smoothing, per axis."""
    computed_steps: tuple[Steps, ...]
    """The steps with the kernels that these halvings make of theirs."""
    depths: tuple[tuple[int, ...], ...]
    """Halo of every channel in voxels per axis, where the volume is cut."""
    blank_depths: tuple[tuple[int, ...], ...]
    """The same for blocks that hold blank voxels."""
    tile: tuple[int, ...]
    """What is refined at once, in voxels, where blocks are larger."""

    @property
    def refined(self) -> int:
        """Number of channels computed on the refined grid."""
        return sum(steps.refinement > 1 for steps in self.steps)

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
        several = len(grid) > 1 and len(channel_passes(self.steps)) > 1
        return len(self.edges) + 1 + (self.copies_in(grid) or several)

    def task_memory(self, grid: Grid, k: int) -> TaskMemory:
        """What decides the bytes that a task of channel `k` holds at its peak."""
        depth, boundary = self.blank_depths[k], self.parameters.boundary
        refined = self.steps[k].refinement > 1
        haloed = haloed_shape(grid, depth, boundary)
        cells = self.cells(self.tiles(grid), k) if refined else None
        return TaskMemory(
            grid=grid,
            haloed=haloed,
            footprint=self.resources.footprint,
            itemsize=self.parameters.itemsize,
            source_itemsize=self.volume.source_itemsize,
            source_chunk=self.volume.source_chunk,
            cells=cells,
            coarse_cells=coarse_cells(cells or haloed, self.steps[k], self.levels[k]),
            channels=self.refined if refined else 1,
        )

    def tiles(self, grid: Grid) -> Grid:
        """The volume cut into tiles of the refined grid, as if blocks were whole tiles."""
        return Grid(grid.shape, tuple(map(min, self.tile, grid.block)))

    def cells(self, tiles: Grid, k: int) -> tuple[int, ...]:
        """Shape of the largest of `tiles` with the halo of channel `k`, in cells."""
        voxels = haloed_shape(tiles, self.blank_depths[k], self.parameters.boundary)
        return tuple(
            n * (self.steps[k].refinement if axis in self.steps[k].axes else 1)
            for axis, n in enumerate(voxels)
        )

    def largest_tile(self, share: float) -> tuple[int, ...]:
        """The largest tile whose cells take no more than a `share` of a task's memory."""
        resources, on_device = self.resources, self.resources.device_memory
        allowed = share * resources.memory / resources.tasks_per_budget
        per_cell = max(resources.footprint.host, 3 * self.parameters.itemsize)
        for tile in self._candidates(SMALLEST_TILE, self.blank_depths[0]):
            cells = math.prod(self.cells(tile, 0))
            if cells * per_cell <= allowed and (
                on_device is None or cells * resources.footprint.device <= on_device
            ):
                break
        return tile.block  # the smallest, where none is small enough

    def peak(self, grid: Grid) -> int:
        """Bytes on the host of all tasks that run at once, and of an output kept there."""
        worst = max(self.task_memory(grid, k).host for k in range(len(self.edges)))
        # in memory a chunk is a block, and those at the edges are held at full size
        stored = math.prod(map(mul, grid.counts, grid.block)) * self.parameters.itemsize
        output = self.stored_fields(grid) * stored if self.resources.in_memory else 0
        return min(self.resources.tasks_per_budget, len(grid)) * worst + output

    def device_peak(self, grid: Grid) -> int:
        """Bytes that one task holds at its peak on the device."""
        return max(self.task_memory(grid, k).device for k in range(len(self.edges)))

    def fits(self, grid: Grid) -> bool:
        """Whether tasks of `grid` fit the memory of host and device."""
        device = self.resources.device_memory
        if device is not None and self.device_peak(grid) > device:
            return False
        return self.peak(grid) <= self.resources.memory

    def check(self, block: tuple[int, ...]) -> Grid:
        """The blocks of a core that the user gives, clipped to the volume."""
        shape = self.volume.shape
        if len(block) != len(shape):
            raise InputError(
                f"block={block} has {len(block)} axes, the volume of shape {shape} has {len(shape)}"
            )
        if min(block) < 1:
            raise InputError(f"block={block} must be positive along every axis")
        return Grid(shape, tuple(min(b, n) for b, n in zip(block, shape, strict=True)))

    def grids(self) -> Iterator[Grid]:
        """Blocks to choose from: large ones have small halos, many keep all workers busy."""
        deepest = tuple(max(along) for along in zip(*self.blank_depths, strict=True))
        return self._candidates(SMALLEST_CORE, deepest)

    def longest_work(self, grid: Grid) -> float:
        """Voxel-steps of the worker that has the most to do, if blocks were all alike."""
        work = sum(
            steps.count * self.computed(grid, k, self.depths[k])
            for k, steps in enumerate(self.steps)
        )
        rounds = -(-len(grid) // self.resources.workers)
        return work * rounds / len(grid)

    def computed(self, grid: Grid, k: int, depth: tuple[int, ...]) -> int:
        """Voxels (or cells) that all blocks of channel `k` compute, with halos of `depth`."""
        factor = self.steps[k].refinement
        cut = self.tiles(grid) if factor > 1 else grid
        cells = factor ** len(self.steps[k].axes)
        return int(haloed_voxels(cut, depth, self.parameters.boundary) * cells)

    def _candidates(self, smallest: int, depth: tuple[int, ...]) -> Iterator[Grid]:
        """The whole volume, then ever smaller blocks, shaped like their halo, down to `smallest`.

        Where there is no halo a cut costs nothing, so it comes first.
        """
        shape = self.volume.shape
        least = tuple(min(n, max(smallest, h)) for n, h in zip(shape, depth, strict=True))
        counts = [1] * len(shape)
        while True:
            block = tuple(map(_core, shape, counts, least))
            yield Grid(shape, block)
            divisible = [axis for axis, b in enumerate(block) if b > least[axis]]
            if not divisible:
                return
            axis = max(
                divisible, key=lambda a: (block[a] / depth[a] if depth[a] else math.inf, block[a])
            )
            while _core(shape[axis], counts[axis], least[axis]) == block[axis]:
                counts[axis] += 1 + counts[axis] // 32

    def refuse(self, grid: Grid, what: str, remedy: str) -> NoReturn:
        """Raise the `BudgetError` that says what `grid` needs and what would help."""
        resources = self.resources
        needed, allowed = self.peak(grid), resources.memory
        depths = self.blank_depths
        deepest = max(range(len(depths)), key=lambda k: max(depths[k]))
        halo = f"the halo of channel {deepest} is {max(depths[deepest])} voxels deep"
        others = "lower max_scale"
        if self.refined:
            others += ", lower upsample"
        if self.blank_depths != self.depths:
            others += ', say nan="raise" if no voxel is blank'
        if needed <= allowed:
            needed = self.device_peak(grid)
            raise BudgetError(
                f"{what} needs {format_bytes(needed)} on {resources.device} ({halo}), where "
                f"{format_bytes(resources.device_memory or 0)} are free: {remedy}{others} or "
                "raise rtol"
            )
        tasks = resources.tasks_per_budget
        others += f", use fewer workers (now {tasks} tasks share the memory)" if tasks > 1 else ""
        others += ", write to disk with out=" if resources.in_memory else ""
        raise BudgetError(
            f"{what} needs {format_bytes(needed)} ({halo}), but memory allows "
            f"{format_bytes(allowed)}: {remedy}raise memory to at least "
            f'"{-(-needed // 1_000_000)}MB", {others} or raise rtol'
        )

    def stage(self, grid: Grid, number: int) -> Stage:
        """Stage `number` for the blocks of `grid`."""
        if number == 0:
            return self._copying_in(grid)
        k = number - 1
        steps, memory = self.steps[k], self.task_memory(grid, k)
        cut = [count > 1 for count in (self.tiles(grid) if steps.refinement > 1 else grid).counts]
        depth, blank_depth = (
            tuple(h if is_cut else 0 for h, is_cut in zip(depths[k], cut, strict=True))
            for depths in (self.depths, self.blank_depths)
        )
        computed = self.computed(grid, k, depth)
        voxels, itemsize = math.prod(grid.shape), self.parameters.itemsize
        from_source = k == 0 and not self.copies_in(grid)
        # what starts a pass is read; between its channels the field stays in memory
        one_block = len(grid) == 1
        starts_pass = k == 0 or not (one_block or k < self.refined)
        ends_pass = k == len(self.edges) - 1 or not (one_block or k < self.refined - 1)
        read = haloed_voxels(grid, depth, self.parameters.boundary) if starts_pass else 0
        written = 2 * voxels if ends_pass else voxels
        return Stage(
            number=number,
            scale_from=self.edges[k - 1] if k else 0.0,
            scale_to=self.edges[k],
            steps=steps.count,
            sigma=max(kernel.sigma for kernel in steps.kernels),
            radius=max(kernel.radius for kernel in steps.kernels),
            regime=self._regime(k),
            passes=1,
            levels=self.levels[k],
            depth=depth,
            blank_depth=blank_depth,
            refinement=steps.refinement,
            tile=self.tiles(grid).block if steps.refinement > 1 else grid.block,
            tasks=len(grid),
            haloed_voxels=computed,
            voxel_steps=computed * steps.count,
            bytes_read=read * (self.volume.source_itemsize if from_source else itemsize),
            bytes_written=written * itemsize,
            peak_memory=memory.host,
            peak_device_memory=memory.device,
            seconds=self._seconds(grid, k, computed, read * itemsize, written * itemsize),
            error=self._error(k, depth, cut),
        )

    def _regime(self, k: int) -> str:
        if self.steps[k].refinement > 1:
            return "refined"
        return "pyramid" if any(self.levels[k]) else "direct"

    def _error(self, k: int, depth: tuple[int, ...], cut: list[bool]) -> str:
        """What is known of the error that cutting causes in channel `k`."""
        passes = next(p for p in channel_passes(self.steps) if k in p)
        factor = self.steps[k].refinement
        for axis, is_cut in enumerate(cut):
            computed = self.computed_steps[passes.start : passes.stop]
            reach = sum(steps.reach[axis] for steps in computed)
            if is_cut and depth[axis] * factor < reach:
                one_sign = self.parameters.constraint == "constrained"
                return "bounded (one sign)" if one_sign else "bounded"
        return "exact"

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
            levels=depth,
            depth=depth,
            blank_depth=depth,
            refinement=1,
            tile=grid.block,
            tasks=len(grid),
            haloed_voxels=voxels,
            voxel_steps=0,
            bytes_read=read,
            bytes_written=self.field_bytes,
            peak_memory=replace(self.task_memory(grid, 0), haloed=grid.block, cells=None).host,
            peak_device_memory=0,
            seconds=self._seconds(grid, 0, 0, read, self.field_bytes),
            error="exact",
        )

    def _seconds(self, grid: Grid, k: int, computed: int, read: int, written: int) -> float:
        """Time for channel `k`'s steps of so many voxels and for bytes, shared by the workers."""
        speeds, steps = self.resources.speeds, self.steps[k]
        radius = max(kernel.radius for kernel in steps.kernels)
        stepping = computed * steps.count * speeds.per_step(radius, any(self.levels[k]))
        alone = stepping + read / speeds.read + written / speeds.written
        return alone / min(self.resources.workers, len(grid))


def _core(size: int, count: int, least: int) -> int:
    """Length of a core when an axis of `size` voxels is cut into `count` blocks or fewer."""
    core = -(-size // count)
    if count > 1 and core > 2 * CORE_MULTIPLE:
        core = -(-core // CORE_MULTIPLE) * CORE_MULTIPLE
    return min(size, max(core, least))
