"""Plans whose blocks are not chosen yet: what any grid of blocks would need and cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from operator import mul

from cdd_dask.blocks import Grid, haloed_shape, haloed_voxels
from cdd_dask.halo import BLANK_MARGIN, channel_halos, channel_passes
from cdd_dask.memory import TaskMemory, cell_task_bytes, voxel_task_bytes
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Resources, Volume
from cdd_dask.pyramid import StepGrids, coarse_levels, computed_steps
from cdd_dask.regimes import (
    Regime,
    cell_block,
    cell_bytes,
    cell_traffic,
    coarse_options,
    coarse_regimes,
    coarse_work,
    even_parts,
    evolve_values,
    part_counts,
    split_halo,
)
from cdd_dask.scales import scale_edges
from cdd_dask.time_stepping import Steps, channel_steps

SMALLEST_CORE = 16
"""Blocks are not made smaller than this: they would be all halo."""
CORE_MULTIPLE = 32
"""Longer cores are a multiple of this, so that chunks divide them well."""
SMALLEST_TILE = 8
"""Tiles on the refined grid are not made smaller than this, in voxels."""
TILE_SHARES = (0.95, 0.8, 0.6, 0.4, 0.2)
"""Shares of a task's memory that a tile on the refined grid may take; the planner tries all."""
MOST_WORK = 3
"""Work of a channel, over that of its steps without halos, which is avoided if it can be."""
WORTH = 4
"""Times the fastest way's time that avoiding it may take."""
REOPENING = 0.02
"""Seconds that a further pass takes for a block besides steps and bytes, roughly."""
SMALL_HALO = 1.15
"""Voxels with halos over those without, below which halos are not worth another pass."""


def drafts_of(parameters: Parameters, volume: Volume, resources: Resources) -> list[Draft]:
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
    draft = Draft(
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


@dataclass(frozen=True)
class Draft:
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
    chosen: dict[tuple[Grid, int], Regime] = field(default_factory=dict, init=False, compare=False)
    """The regimes chosen for channels in a grid, as far as they were looked at."""
    memories: dict[tuple[Grid, int, Regime], TaskMemory] = field(
        default_factory=dict, init=False, compare=False
    )
    """What tasks take, as far as it was looked at."""
    blank_tiles: dict[tuple[Grid, int, Regime], tuple[int, ...]] = field(
        default_factory=dict, init=False, compare=False
    )
    """What is computed at once of blocks with blank voxels, as far as it was looked at."""
    splits: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=dict, init=False, compare=False
    )
    """Halos of a channel in so many passes, as far as they were looked at."""

    @property
    def refined(self) -> int:
        """Number of channels computed on the refined grid."""
        return sum(steps.refinement > 1 for steps in self.steps)

    @property
    def field_bytes(self) -> int:
        """Bytes of one field of the volume's size."""
        return math.prod(self.volume.shape) * self.parameters.itemsize

    def copies_in(self, grid: Grid) -> bool:
        """Whether the source is copied first."""
        cells = len(grid) > 1 and self.regimes(grid)[0].cells is not None
        return cells or not self._reads_source(grid)

    def _reads_source(self, grid: Grid) -> bool:
        """Whether tasks can read the source: halo'd blocks are read again and again."""
        return self.volume.reachable and (len(grid) == 1 or self.volume.is_zarr)

    def regimes(self, grid: Grid) -> tuple[Regime, ...]:
        """How every channel is computed: the fastest way that fits, or else the smallest."""
        return tuple(self._regime(grid, k) for k in range(len(self.edges)))

    def _regime(self, grid: Grid, k: int) -> Regime:
        if (grid, k) not in self.chosen:
            self.chosen[grid, k] = self._fastest(grid, k, self.options(grid, k))
        return self.chosen[grid, k]

    def _fastest(self, grid: Grid, k: int, options: Iterator[Regime]) -> Regime:
        fitting: list[Regime] = []
        others: list[Regime] = []
        for option in options:
            (fitting if self._fits(grid, k, option) else others).append(option)
        if not fitting:
            return min(others, key=lambda option: self.host(grid, k, option))
        seconds = {option: self.channel_seconds(grid, k, option) for option in fitting}
        most = MOST_WORK * self.steps[k].count * math.prod(grid.shape)
        allowed = WORTH * min(seconds.values())
        cheap = [
            option
            for option in fitting
            if self.work(grid, k, option) <= most and seconds[option] <= allowed
        ]
        return min(cheap or fitting, key=seconds.__getitem__)

    def _fits(self, grid: Grid, k: int, option: Regime) -> bool:
        """Whether tasks of channel `k` fit the memory, what stays there being a guess."""
        if option.cells is None and not self._has_room(grid, self.task_memory(grid, k, option)):
            return False  # not even without blank voxels
        device = self.resources.device_memory
        if device is not None and self.device(grid, k, option) > device:
            return False
        return self.host(grid, k, option) <= self._share(grid)

    def _has_room(self, grid: Grid, needed: TaskMemory) -> bool:
        """Whether a task's arrays fit on host and device."""
        device = self.resources.device_memory
        fits_device = device is None or needed.device <= device
        return fits_device and needed.host <= self._share(grid)

    def _share(self, grid: Grid) -> int:
        """Bytes on the host that one task may take."""
        kept = (len(self.edges) + 2) * self.field_bytes if self.resources.in_memory else 0
        return (self.resources.memory - kept) // min(self.resources.tasks_per_budget, len(grid))

    def options(self, grid: Grid, k: int) -> Iterator[Regime]:
        """The ways in which channel `k` can be computed in blocks of `grid`."""
        steps, levels = self.steps[k], self.levels[k]
        name = "pyramid" if any(levels) else "direct"
        if steps.refinement > 1:
            name = "refined"
        yield Regime(name, levels, (steps.count,), self.depths[k], self.blank_depths[k])
        if len(grid) == 1 or steps.refinement > 1:
            return
        depth = self.depths[k]
        for count in part_counts(steps.count)[1:]:
            if self.computed(grid, k, depth) < SMALL_HALO * math.prod(grid.shape):
                break  # more passes would gain next to nothing
            depth, blank = self._split(k, count)
            yield Regime(name, levels, even_parts(steps.count, count), depth, blank)
        passes = len(channel_passes(self.steps))
        for name in coarse_regimes(self.parameters):
            yield from coarse_options(
                self.parameters, steps, grid, passes, name, partial(self._fits, grid, k)
            )

    def _split(self, k: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Halo of channel `k` in so many passes, without and with blank voxels."""
        if (k, count) not in self.splits:
            rtol, passes = self.parameters.rtol, len(channel_passes(self.steps))
            margin = BLANK_MARGIN if self.volume.may_be_masked(self.parameters) else 1
            depth, blank = (
                split_halo(self.computed_steps[k], count, allowed, passes)
                for allowed in (rtol, rtol / margin)
            )
            self.splits[k, count] = depth, blank
        return self.splits[k, count]

    def host(self, grid: Grid, k: int, regime: Regime) -> int:
        """Bytes that one task of channel `k` holds at its peak on the host."""
        if regime.cells is None:
            return max(
                self.task_memory(grid, k, regime).host,
                self.blank_memory(grid, k, regime, self.blank_tile(grid, k, regime)).host,
            )
        itemsize, footprint = self.parameters.itemsize, self.resources.footprint
        masked = self.volume.may_be_masked(self.parameters)
        return max(
            voxel_task_bytes(grid, regime.levels, itemsize, masked),
            cell_task_bytes(
                cell_block(regime), evolve_values(regime), itemsize, footprint.host + footprint.copy
            ),
        )

    def device(self, grid: Grid, k: int, regime: Regime) -> int:
        """Bytes that one task of channel `k` holds at its peak on the device."""
        if regime.cells is None:
            return max(
                self.task_memory(grid, k, regime).device,
                self.blank_memory(grid, k, regime, self.blank_tile(grid, k, regime)).device,
            )
        return cell_block(regime) * self.resources.footprint.device

    def blank_tile(self, grid: Grid, k: int, regime: Regime) -> tuple[int, ...]:
        """What is computed at once of a block with blank voxels, of channel `k`."""
        if regime.cells is not None or len(grid) == 1 or self.steps[k].refinement > 1:
            return grid.block
        if (grid, k, regime) not in self.blank_tiles:

            def has_room(tile: tuple[int, ...]) -> bool:
                return self._has_room(grid, self.blank_memory(grid, k, regime, tile))

            tiles = smaller_tiles(grid.block)
            best = len(tiles) - 1
            if has_room(tiles[best]):  # else none has
                best = 0 if has_room(tiles[0]) else bisect_left(tiles, True, 1, best, key=has_room)
            self.blank_tiles[grid, k, regime] = tiles[best]
        return self.blank_tiles[grid, k, regime]

    def task_memory(self, grid: Grid, k: int, regime: Regime) -> TaskMemory:
        """What decides the bytes that a task of channel `k` holds at its peak."""
        if (grid, k, regime) not in self.memories:
            self.memories[grid, k, regime] = self._task_memory(grid, k, regime)
        return self.memories[grid, k, regime]

    def _task_memory(self, grid: Grid, k: int, regime: Regime) -> TaskMemory:
        depth, boundary, from_source = regime.depth, self.parameters.boundary, k == 0
        refined = self.steps[k].refinement > 1
        whole = len(grid) == 1 or refined or self.volume.as_if_blank(self.parameters)
        if whole:  # blank voxels make no difference
            depth = regime.blank_depth
        haloed = haloed_shape(grid, depth, boundary)
        cells = self.cells(self.tiles(grid), k) if refined else None
        return TaskMemory(
            grid=grid,
            haloed=haloed,
            footprint=self.resources.blank_footprint if whole else self.resources.footprint,
            itemsize=self.parameters.itemsize,
            source_itemsize=self.volume.source_itemsize if from_source else 0,
            source_chunk=self.volume.source_chunk if from_source else None,
            cells=cells,
            grids=self.step_grids(k, cells or haloed, regime.levels),
            channels=self.refined if refined else 1,
        )

    def step_grids(self, k: int, shape: tuple[int, ...], levels: tuple[int, ...]) -> StepGrids:
        """What a block of `shape` is smoothed on in channel `k`."""
        steps = self.steps[k]
        whole = steps.in_cells(self.volume.shape)
        return StepGrids.of(shape, whole, steps.kernels, levels, self.parameters.boundary)

    def blank_memory(self, grid: Grid, k: int, regime: Regime, tile: tuple[int, ...]) -> TaskMemory:
        """The same where blank voxels are found, and a block is computed tile by tile."""
        plain = self.task_memory(grid, k, regime)
        if len(grid) == 1 or self.steps[k].refinement > 1:
            return plain
        beyond = self.parameters.boundary == "wrap"
        haloed = tuple(
            n if t == n else t + 2 * h if beyond else min(n, t + 2 * h)
            for n, t, h in zip(grid.shape, tile, regime.blank_depth, strict=True)
        )
        return replace(
            plain,
            haloed=haloed,
            footprint=self.resources.blank_footprint,
            grids=self.step_grids(k, haloed, regime.levels),
            cores=2,
        )

    def disk(self, grid: Grid) -> tuple[Space, Space]:
        """What the output takes at the most, and what of it the working fields take.

        With scratch space of their own these do not lie in the output.
        """
        groups, ndim, blocks = len(self.edges) + 1, len(self.volume.shape), len(grid)
        # metadata: the root and `work`, two groups and an image each, and a coordinate array (its
        # metadata and its one chunk) per axis
        metadata = 2 + groups * (3 + 2 * ndim)
        # done marks: three objects for every pass, and one for each block as it goes on; the lease
        passes = self.copies_in(grid) + sum(len(regime.parts) for regime in self.regimes(grid))
        metadata += 3 * (passes if blocks > 1 else 1) + blocks + 2
        most, work = 0.0, 0.0
        for channels in [range(groups - 1)] if blocks == 1 else channel_passes(self.steps):
            regime, last = self.regimes(grid)[channels.start], channels.stop == len(self.edges)
            working = (channels.start > 0 or self.copies_in(grid)) + (not last)
            working += (
                2
                if regime.name == "stream"
                else min(2, len(regime.parts) - 1) * (regime.cells is None)
            )
            cells = cell_bytes(regime, self.parameters.itemsize) / self.field_bytes
            work = max(work, working + cells)
            most = max(most, channels.stop + last + working + cells)
        coarse = any(regime.cells is not None for regime in self.regimes(grid))

        def space(fields: float, more: int) -> Space:
            files = math.ceil(fields) * (blocks + 1) + more + coarse * (3 * blocks + 100)
            return Space.of(int(fields * self.field_bytes), files)

        scratch = space(work, 2)
        if self.resources.scratch:
            return Space.of(groups * self.field_bytes, metadata + groups * (blocks + 1)), scratch
        return space(most, metadata), scratch

    def tiles(self, grid: Grid) -> Grid:
        """The volume cut into tiles of the refined grid, as if blocks were whole tiles."""
        return Grid(grid.shape, tuple(map(min, self.tile, grid.block)))

    def cells(self, tiles: Grid, k: int) -> tuple[int, ...]:
        """Shape of the largest of `tiles` with the halo of channel `k`, in cells."""
        voxels = haloed_shape(tiles, self.blank_depths[k], self.parameters.boundary)
        return self.steps[k].in_cells(voxels)

    def largest_tile(self, share: float) -> tuple[int, ...]:
        """The largest tile whose cells take no more than a `share` of a task's memory."""
        resources, on_device = self.resources, self.resources.device_memory
        allowed = share * resources.memory / resources.tasks_per_budget
        footprint = resources.blank_footprint
        per_cell = max(footprint.host + footprint.copy, 3 * self.parameters.itemsize)
        for tile in self._candidates(SMALLEST_TILE, self.blank_depths[0]):
            cells = math.prod(self.cells(tile, 0))
            if cells * per_cell <= allowed and (
                on_device is None or cells * footprint.device <= on_device
            ):
                break
        return tile.block  # the smallest, where none is small enough

    def peak(self, grid: Grid) -> int:
        """Bytes on the host of all tasks that run at once, and of an output kept there."""
        regimes = self.regimes(grid)
        worst = max(self.host(grid, k, regime) for k, regime in enumerate(regimes))
        return min(self.resources.tasks_per_budget, len(grid)) * worst + self.kept(grid)

    def kept(self, grid: Grid) -> int:
        """Bytes of what stays in memory."""
        if not self.resources.in_memory:
            return 0
        # in memory a chunk is a block, and those at the edges are held at full size
        stored: int = math.prod(map(mul, grid.counts, grid.block)) * self.parameters.itemsize
        return math.ceil(self.disk(grid)[0].bytes / self.field_bytes * stored)

    def device_peak(self, grid: Grid) -> int:
        """Bytes that one task holds at its peak on the device."""
        return max(self.device(grid, k, regime) for k, regime in enumerate(self.regimes(grid)))

    def fits(self, grid: Grid) -> bool:
        """Whether tasks of `grid` fit the memory of host and device."""
        memory, device = self.resources.memory, self.resources.device_memory
        tasks = min(self.resources.tasks_per_budget, len(grid))
        # the coarsest channel first, which needs most: most grids are refused by one look
        for k in reversed(range(len(self.edges))):
            if tasks * self.host(grid, k, self._regime(grid, k)) > memory:
                return False
        if device is not None and self.device_peak(grid) > device:
            return False
        return self.peak(grid) <= memory

    def grids(self) -> Iterator[Grid]:
        """Blocks to choose from: large ones have small halos, many keep all workers busy."""
        deepest = tuple(max(along) for along in zip(*self.depths, strict=True))
        for grid in self._candidates(SMALLEST_CORE, deepest):
            yield grid
            # the same in multiples of large powers of 2, which hold whole cells
            rounded = tuple(
                min(n, _multiple(b, 1 << max(0, b.bit_length() - 2))) if c > 1 else b
                for n, b, c in zip(grid.shape, grid.block, grid.counts, strict=True)
            )
            if rounded != grid.block:
                yield Grid(grid.shape, rounded)

    def seconds(self, grid: Grid) -> float:
        """Rough time of the run, if its blocks were all alike."""
        regimes = self.regimes(grid)
        return sum(self.channel_seconds(grid, k, regime) for k, regime in enumerate(regimes))

    def channel_seconds(self, grid: Grid, k: int, regime: Regime) -> float:
        """Rough time of channel `k`."""
        radius = max(kernel.radius for kernel in self.steps[k].kernels)
        on_cells = regime.cells is not None
        per_step = self.resources.speeds.per_step(radius, on_cells or any(regime.levels))
        stepping = self.work(grid, k, regime) * per_step
        if not on_cells:
            stepping += (len(regime.parts) - 1) * len(grid) * REOPENING
        return self.seconds_of(grid, stepping, *self.moved_bytes(grid, k, regime))

    def work(self, grid: Grid, k: int, regime: Regime) -> int:
        """Voxel-steps of channel `k`, halos included."""
        steps = self.steps[k]
        if regime.cells is not None:
            return coarse_work(regime, steps, math.prod(grid.shape))
        return self.computed(grid, k, regime.depth) * steps.count

    def moved_bytes(self, grid: Grid, k: int, regime: Regime) -> tuple[int, int]:
        """Bytes that channel `k` reads and writes, uncompressed."""
        voxels, itemsize = math.prod(grid.shape), self.parameters.itemsize
        # what starts a pass is read; between its channels the field stays in memory
        one_block = len(grid) == 1
        starts_pass = k == 0 or not (one_block or k < self.refined)
        ends_pass = k == len(self.edges) - 1 or not (one_block or k < self.refined - 1)
        written = (2 if ends_pass else 1) * voxels * itemsize
        if regime.cells is not None:
            cells_read, cells_written = cell_traffic(regime, itemsize)
            read = voxels * itemsize * (len(regime.parts) if regime.name == "stream" else 2)
            return read + cells_read, written + cells_written
        from_source = k == 0 and self._reads_source(grid)
        size = self.volume.source_itemsize if from_source else itemsize
        haloed = haloed_voxels(grid, regime.depth, self.parameters.boundary)
        more = len(regime.parts) - 1  # passes, the last of which reads the start again
        read = haloed * (size + more * itemsize) + (voxels * itemsize if more else 0)
        return read if starts_pass else 0, written + more * voxels * itemsize

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
        least = tuple(min(n, smallest) for n in shape)
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

    def copying_memory(self, grid: Grid) -> int:
        """Bytes that a task of the copying-in holds at its peak."""
        memory = self.task_memory(grid, 0, next(self.options(grid, 0)))
        grids = self.step_grids(0, grid.block, (0,) * len(grid.block))
        return replace(memory, haloed=grid.block, cells=None, grids=grids).host

    def seconds_of(self, grid: Grid, stepping: float, read: int, written: int) -> float:
        """Time for so many seconds of steps and for bytes, shared by the workers."""
        speeds = self.resources.speeds
        alone = stepping + read / speeds.read + written / speeds.written
        # rounds of all workers, the last of which may leave some idle
        return alone * -(-len(grid) // self.resources.workers) / len(grid)


@dataclass(frozen=True)
class Space:
    """What something takes on a disk."""

    bytes: int
    files: int

    @classmethod
    def of(cls, bytes_: int, files: int) -> Space:
        """With a percent for zstd where it finds nothing to compress, and a disk block per file."""
        return cls(int(bytes_ * 1.01) + files * 4096, files)


@lru_cache
def smaller_tiles(block: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A block, and ever smaller parts of it: the longest side is halved each time.

    Examples
    --------
    >>> smaller_tiles((16, 10, 40))
    [(16, 10, 40), (16, 10, 20), (16, 10, 10), (8, 10, 10), (8, 5, 10), (8, 5, 5)]
    """
    tiles = [block]
    while max(block) > SMALLEST_TILE:
        longest = block.index(max(block))
        block = (*block[:longest], -(-block[longest] // 2), *block[longest + 1 :])
        tiles.append(block)
    return tiles


def _multiple(length: int, unit: int) -> int:
    """`length`, rounded up to a multiple of `unit`."""
    return -(-length // unit) * unit


def _core(size: int, count: int, least: int) -> int:
    """Length of a core when an axis of `size` voxels is cut into `count` blocks or fewer."""
    core = -(-size // count)
    if count > 1 and core > 2 * CORE_MULTIPLE:
        core = _multiple(core, CORE_MULTIPLE)
    return min(size, max(core, least))
