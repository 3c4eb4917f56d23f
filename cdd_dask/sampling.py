"""Proof by sample: random blocks of every channel, computed again and more exactly.

What channel `k` starts from is stored, within rounding: it is what the channels from `k` on and
the residual add up to. So a block of any channel can be computed by itself, whatever the volume's
size, from a small random core and its halo::

    channel k  =  I - (steps of channel k) I,    I = channel k + channel k+1 + … + residual

Of the same steps the recomputation is one class more exact: its halo is that of a tenth of
`rtol`, and its kernels are full ones, or at least a level finer, where the run's were coarse.
What it cannot see is an error of what a channel starts from: every channel is tested by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Grid, HaloedBlock, Region, shifted, starts, with_halo
from cdd_dask.calibration import cores
from cdd_dask.decomposition import Decomposition
from cdd_dask.engines import Diffusion, Engine, Faces, load_engine
from cdd_dask.halo import BLANK_MARGIN, channel_halos, channel_passes
from cdd_dask.memory import TaskMemory, format_bytes, return_freed_memory
from cdd_dask.parameters import Parameters
from cdd_dask.progress import Progress
from cdd_dask.pyramid import StepGrids, coarse_levels, computed_steps, pyramid_error
from cdd_dask.readers import Source, read_field
from cdd_dask.readers.regions import read_region
from cdd_dask.refinement import Refinement
from cdd_dask.regimes import regime_error
from cdd_dask.statistics import difference
from cdd_dask.tables import text_table
from cdd_dask.time_stepping import Steps, channel_steps

LARGEST_CORE = 32
"""Voxels a side of what is compared at once."""
MARGIN = 10
"""The halo of a recomputation is that of `rtol` divided by this."""
WIDEST_KERNEL = 16
"""Largest radius of full kernels that take the place of coarse ones."""
BLANKS_ERROR = 1e-2
"""The same of a pyramid where few voxels are not blank, on top of `pyramid_error`."""
SIGNS_ERROR = 1e-3
"""The same of rounding, where voxels of either sign may cross zero."""
ROUNDINGS = 100
"""Units of rounding, one more for every step, by which two ways of computing may differ."""


@dataclass(frozen=True)
class Sample:
    """What the recomputed blocks of one channel showed."""

    channel: int
    """Number of the channel."""
    scale_from: float
    """Lower scale edge in the unit of scales, 0 for the first channel."""
    scale_to: float
    """Upper scale edge in the unit of scales."""
    regime: str
    """How the run computed the channel, see `plans.Stage.regime`."""
    promise: str
    """What the store says of the error: ``exact``, ``bounded`` or ``estimated``."""
    rtol: float
    """What the run promised, relative to the field's range."""
    blocks: int
    """Number of blocks compared; 0 where they would not fit the memory."""
    error: float
    """Largest difference of a voxel, relative to the field's range; NaN without blocks."""
    where: tuple[int, ...]
    """Voxel of that difference."""
    l2: float
    """L2 norm of all differences, relative to that of the recomputed channel there."""
    share: float
    """Share of what the promise allows that the differences take; above 1 it is broken."""
    needed_memory: int
    """Bytes that the largest of the blocks needs."""
    memory: int = field(compare=False)
    """Bytes that it may have."""

    @property
    def is_broken(self) -> bool:
        """Whether the channel is not what the store promises; an estimate promises nothing."""
        return self.promise != "estimated" and self.share > 1

    def __str__(self) -> str:
        if not self.blocks:
            return (
                f"channel {self.channel} is not sampled: a block with its halo needs "
                f"{format_bytes(self.needed_memory)}, but memory allows "
                f"{format_bytes(self.memory)}: raise memory to at least "
                f'"{-(-self.needed_memory // 1_000_000)}MB"'
            )
        return (
            f"channel {self.channel} differs by {self.error:.3g} of the field's range, at voxel "
            f"{self.where}, and by {self.l2:.3g} in L2 norm from {self.blocks} recomputed blocks"
        )


def describe_samples(samples: Sequence[Sample]) -> str:
    """The samples as a table for people, and below it what was not sampled."""
    columns: dict[str, Callable[[Sample], str]] = {
        "channel": lambda s: str(s.channel),
        "scales": lambda s: f"{s.scale_from:g} - {s.scale_to:g}",
        "regime": lambda s: s.regime,
        "blocks": lambda s: str(s.blocks),
        "largest": lambda s: f"{s.error:.2g}" if s.blocks else "-",
        "rel. L2": lambda s: f"{s.l2:.2g}" if s.blocks else "-",
        "rtol": lambda s: f"{s.rtol:g}",
        "of allowed": lambda s: f"{100 * s.share:.2f}%" if s.blocks else "-",
        "error": lambda s: s.promise,
    }
    rows = [[column(sample) for column in columns.values()] for sample in samples]
    missing = [str(sample) for sample in samples if not sample.blocks]
    return "\n".join([text_table(list(columns), rows), *missing])


def sample_channels(
    result: Decomposition, source: Source, count: int, seed: int, memory: int, shown: Progress
) -> tuple[Sample, ...]:
    """Recompute random blocks of every channel, and compare.

    Parameters
    ----------
    result
        The decomposition; its outputs sum up to `source`.
    source
        What was decomposed.
    count
        Blocks of every channel, all of them where there are fewer.
    seed
        Of the random choice: the same seed chooses the same blocks.
    memory
        Bytes that a recomputation may take. Channels whose blocks need more are not sampled.
    shown
        Advanced by 1 for every block.
    """
    return_freed_memory()
    again = _Recomputation(result, source)
    random = np.random.default_rng(seed)
    samples = []
    for channels in channel_passes(again.steps):
        size = min(count, len(again.grid))
        shown.stage(f"sample-ch{channels.start:02d}", size)
        cores = [again.grid.core(int(n)) for n in random.choice(len(again.grid), size, False)]
        needed = max(again.needed_memory(channels, core) for core in cores)
        tallies = [_Tally() for _ in channels]
        for core in cores if needed <= memory else ():
            states = pairwise(again.states(channels, core))
            for k, tally, (before, after) in zip(channels, tallies, states, strict=True):
                tally.add(core, before - after, result.channels[k][core], again.span)
            shown.advance(1)
        for k, tally in zip(channels, tallies, strict=True):
            samples.append(again.sample(k, tally, needed, memory))
    return tuple(samples)


@dataclass
class _Tally:
    """The differences of one channel so far, in units of the field's range."""

    blocks: int = 0
    voxels: int = 0
    worst: float = -1.0
    where: tuple[int, ...] = ()
    squares: float = 0.0
    """Sum of their squares."""
    norm: float = 0.0
    """Sum of the recomputed channel's squares."""

    def add(self, core: Region, again: NDArray[Any], stored: NDArray[Any], span: float) -> None:
        off = difference(again, stored) / span
        place = np.unravel_index(int(off.argmax()), off.shape)
        if off[place] > self.worst:
            self.worst = float(off[place])
            self.where = tuple(s.start + int(i) for s, i in zip(core, place, strict=True))
        self.blocks += 1
        self.voxels += off.size
        self.squares += float((off**2).sum())
        self.norm += float(np.nansum((again.astype(np.float64) / span) ** 2))


@dataclass(frozen=True)
class _Recomputation:
    """How blocks of a result are computed again."""

    result: Decomposition
    source: Source

    @cached_property
    def parameters(self) -> Parameters:
        return self.result.parameters

    @cached_property
    def grid(self) -> Grid:
        """The volume cut into the cores to choose from."""
        shape = self.result.shape
        return Grid(shape, tuple(min(n, LARGEST_CORE) for n in shape))

    @cached_property
    def engine(self) -> Engine:
        """The CPU engine, whatever computed the run: it is on every machine."""
        return load_engine("cpu")

    @cached_property
    def stages(self) -> list[Any]:
        """What the plan says of every channel."""
        return [stage for stage in self.result.attrs["plan"]["stages"] if stage["number"] > 0]

    @cached_property
    def steps(self) -> tuple[Steps, ...]:
        edges = tuple(map(float, self.result.scales))
        return channel_steps(self.parameters, edges, len(self.result.shape))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        pairs = zip(self.stages, self.steps, strict=True)
        return tuple(finer_levels(self.parameters, stage, steps) for stage, steps in pairs)

    @cached_property
    def has_blanks(self) -> bool:
        return bool(self.result.attrs["source_statistics"]["count"] < math.prod(self.result.shape))

    @cached_property
    def depths(self) -> tuple[tuple[int, ...], ...]:
        """Halo of every channel per axis, in voxels."""
        rtol = self.parameters.rtol / MARGIN / (BLANK_MARGIN if self.has_blanks else 1)
        return channel_halos(tuple(map(computed_steps, self.steps, self.levels)), rtol)

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value of the field, `cval` included where it is met."""
        whole = self.result.attrs["source_statistics"]
        met = [self.parameters.cval] if self.parameters.boundary == "constant" else []
        return min([whole["min"], *met]), max([whole["max"], *met])

    @cached_property
    def span(self) -> float:
        """The field's range, what differences are relative to."""
        low, high = self.extremes
        return high - low or abs(high) or 1.0

    def block(self, k: int, core: Region) -> HaloedBlock:
        """A core of channel `k` with its halo."""
        shape, depth, boundary = self.result.shape, self.depths[k], self.parameters.boundary
        # a halo that wraps around to its own core is no more than the whole axis
        wide = tuple(
            slice(0, n) if boundary == "wrap" and s.stop - s.start + 2 * h >= n else s
            for s, n, h in zip(core, shape, depth, strict=True)
        )
        around = with_halo(wide, shape, depth, boundary)
        return replace(around, inner=shifted(core, tuple(-n for n in starts(around.outer))))

    def starts_from_source(self, k: int) -> bool:
        """Whether the field before channel `k` is counted from the source.

        Inverted, it is the larger the later, and sums from the other end would lose small values.
        """
        return k == 0 or self.parameters.constraint == "inverted"

    def field(self, k: int, region: Region) -> NDArray[Any]:
        """What channel `k` starts from, in the working dtype."""
        parts = self.result.channels
        if self.starts_from_source(k):
            field = read_field(self.source, region, self.parameters)
            for part in parts[:k]:
                field -= read_region(part, region)
            return field
        field = np.array(read_region(parts[k], region))
        for part in (*parts[k + 1 :], self.result.residual):
            field += read_region(part, region)
        return field

    def states(self, channels: range, core: Region) -> Iterator[NDArray[Any]]:
        """The field in a core before, between and after the channels of a pass."""
        first = channels.start
        block, steps = self.block(first, core), self.steps[first]
        field, start = self.field(first, block.outer), starts(block.outer)
        if steps.refinement == 1:
            yield field[block.inner].copy()
            yield self.diffuse(first, field, block.faces, start)[block.inner].copy()
            return
        cval = self.parameters.cval
        refinement = Refinement(steps.refinement, steps.axes, block.faces, cval)
        for state in refinement.states(field, start, channels, self.diffuse):
            yield state[block.inner].copy()

    def diffuse(
        self, k: int, field: NDArray[Any], faces: Faces, start: tuple[int, ...]
    ) -> NDArray[Any]:
        """A block after the steps of channel `k`, which begins at `start` of the volume's grid."""
        levels = self.levels[k]
        phase = tuple(place % 2**level for place, level in zip(start, levels, strict=True))
        rule, cval = self.parameters.constraint, self.parameters.cval
        return self.engine.diffuse(
            field, Diffusion(self.steps[k], rule, faces, cval, levels, phase)
        )

    def needed_memory(self, channels: range, core: Region) -> int:
        """Bytes at the peak of a recomputation."""
        k, itemsize = channels.start, self.parameters.itemsize
        haloed = tuple(s.stop - s.start for s in self.block(k, core).outer)
        steps, reads_source = self.steps[k], self.starts_from_source(k)
        cells, whole = steps.in_cells(haloed), steps.in_cells(self.grid.shape)

        def needed(k: int) -> int:
            kernels, levels = self.steps[k].kernels, self.levels[k]
            return TaskMemory(
                grid=self.grid,
                haloed=haloed,
                footprint=self.engine.footprint(itemsize, self.has_blanks, cores()),
                itemsize=itemsize,
                source_itemsize=max(itemsize, self.source.dtype.itemsize if reads_source else 0),
                source_chunk=self.source.chunk if reads_source else None,
                grids=StepGrids.of(cells, whole, kernels, levels, self.parameters.boundary),
                cells=cells if steps.refinement > 1 else None,
                channels=len(channels),
            ).host

        return max(map(needed, channels))

    def sample(self, k: int, tally: _Tally, needed: int, memory: int) -> Sample:
        """What the differences of channel `k` come to."""
        stage = self.stages[k]
        squares, norm = tally.squares, tally.norm
        return Sample(
            channel=k,
            scale_from=stage["scale_from"],
            scale_to=stage["scale_to"],
            regime=stage["regime"],
            promise=self.result.details(k)["error"]["kind"],
            rtol=self.parameters.rtol,
            blocks=tally.blocks,
            error=tally.worst if tally.blocks else math.nan,
            where=tally.where,
            l2=math.sqrt(squares / norm) if norm else math.inf if squares else 0.0,
            share=self._share(k, tally) if tally.blocks else math.nan,
            needed_memory=needed,
            memory=memory,
        )

    def _share(self, k: int, tally: _Tally) -> float:
        """The differences of channel `k` in units of those that are allowed.

        No voxel's may exceed `rtol` of the range, and so not their root mean square either. What
        else there may be is known relative to the root mean square of the channel, and is added.
        """
        largest = max(map(abs, self.extremes)) / self.span
        rounding = float(np.finfo(self.parameters.dtype).eps) * (ROUNDINGS + self.steps[k].count)
        allowed = self.parameters.rtol + rounding * largest
        relative = self._relative_error(k)
        if not relative:
            return tally.worst / allowed
        off, rms = (math.sqrt(part / tally.voxels) for part in (tally.squares, tally.norm))
        return off / (allowed + relative * rms)

    def _relative_error(self, k: int) -> float:
        """What two computations of channel `k` may differ by in relative L2 norm, beside halos."""
        low, high = self.extremes
        mixed = self.parameters.constraint == "crossing" and low < 0 < high
        pyramid = pyramid_error(self.parameters) + (BLANKS_ERROR if self.has_blanks else 0)
        allowed = SIGNS_ERROR if mixed else 0.0
        stage = self.stages[k]
        if any(stage["levels"]):
            blanks = BLANKS_ERROR if self.has_blanks else 0
            levels = tuple(stage["levels"])
            allowed += regime_error(self.parameters, stage["regime"], levels) + blanks
        return allowed + (pyramid if any(self.levels[k]) else 0.0)


def finer_levels(parameters: Parameters, stage: dict[str, Any], steps: Steps) -> tuple[int, ...]:
    """How often a recomputation may halve the grid, where the plan's `stage` says what a run did.

    Not at all where full kernels are narrow enough; else once less than the run's pyramid, and as
    a pyramid may where the run went further.

    Examples
    --------
    >>> channels = channel_steps(Parameters(), (16.0, 32.0, 64.0), ndim=1)
    >>> run = {"regime": "pyramid", "levels": [2]}
    >>> [finer_levels(Parameters(), run, steps) for steps in channels[1:]]
    [(0,), (1,)]
    """
    levels = stage["levels"]
    if not any(levels) or max(kernel.radius for kernel in steps.kernels) <= WIDEST_KERNEL:
        return (0,) * len(levels)
    if stage["regime"] in ("pyramid", "refined"):
        return tuple(max(0, level - 1) for level in levels)
    return coarse_levels(parameters, steps)
