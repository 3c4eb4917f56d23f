"""The ways in which a channel of any scale can be computed, and what each of them costs.

``direct``, ``pyramid``
    Blocks with a halo; in several passes the halo is smaller by about the root of their number,
    and reading and writing grow with it.
``closure``
    On coarse cells, the voxels being met twice whatever the scale (see `closure`).
``linear``
    The same for unconstrained fields, whose cells need no groups.
``stream``
    Cells of exact means, from all voxels at every step: many reads, and no error but the
    pyramid's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cdd_dask.blocks import Grid, haloed_shape, haloed_voxels
from cdd_dask.closure import (
    HALO,
    SNAPSHOTS,
    STENCIL,
    cell_halo,
    closure_kernels,
    closure_levels,
    coarse_shape,
    group_sizes,
)
from cdd_dask.halo import halo_depth
from cdd_dask.parameters import Parameters
from cdd_dask.pyramid import pyramid_error, smallest_rtol
from cdd_dask.time_stepping import Steps

CLOSURE_ERROR = 1e-2
"""Relative L2 error of a channel that the closure may cause."""
EXACT_CELLS_ERROR = 3e-3
"""The same of cells with exact means, besides the pyramid's: near faces that cut cells, and those
of the rules ``mirror`` and ``constant``; elsewhere a tenth."""
CLOSURE_RTOL = 1e-3
"""Below it the closure's error, 1e-2 of a channel's L2 norm, is too large."""
MOST_PARTS = 64
"""Passes that a channel is cut into, at most."""
GATHER_WORK, SCATTER_WORK, RELAX_WORK, SMOOTH_WORK = 30, 10, 15, 4
"""What a voxel's part in a pass, or a cell's, costs in voxel-steps."""
EVOLVE_WORK, GROUP_WORK = 15, 1
"""What a step of a cell and of each of its groups costs in voxel-steps."""


@dataclass(frozen=True)
class Regime:
    """How one channel is computed, for one grid of blocks."""

    name: str
    """``direct``, ``pyramid``, ``refined``, ``closure``, ``linear`` or ``stream``."""
    levels: tuple[int, ...]
    """How often the grid is halved per axis: for the smoothing, or for the cells."""
    parts: tuple[int, ...]
    """Steps of every pass: over the voxels, or where there are cells over those."""
    depth: tuple[int, ...]
    """Halo in voxels per axis, where the volume is cut."""
    blank_depth: tuple[int, ...]
    """Halo of blocks that hold blank voxels."""
    cells: Grid | None = None
    """The cells, with those around them that voxels need, cut into blocks."""
    cell_depth: tuple[int, ...] = ()
    """Halo of those blocks in cells, where they are cut."""

    @property
    def groups(self) -> int:
        """Values that stand for a cell's voxels."""
        return group_count(self.name, self.levels)


def group_count(regime: str, levels: tuple[int, ...]) -> int:
    """Values that stand for the voxels of a cell of these levels, 0 but for ``closure``."""
    return len(group_sizes(2 ** sum(levels))) if regime == "closure" else 0


def even_parts(count: int, parts: int) -> tuple[int, ...]:
    """`count` steps in so many nearly equal parts.

    Examples
    --------
    >>> even_parts(10, 3)
    (4, 3, 3)
    """
    return tuple(count // parts + (i < count % parts) for i in range(parts))


def part_counts(steps: int) -> list[int]:
    """Numbers of passes worth trying."""
    counts, count = [], 1
    while count <= min(steps, MOST_PARTS):
        counts.append(count)
        count += max(1, count // 2)
    return counts


def split_halo(steps: Steps, count: int, rtol: float, passes: int) -> tuple[int, ...]:
    """Halo of each of `count` passes of a channel that together keep its share of `rtol`.

    `passes` channels (or refined ones together) share the plan's `rtol`.
    """
    part = replace(steps, count=even_parts(steps.count, count)[0])
    return halo_depth((part,), rtol, passes * count)


def coarse_regimes(parameters: Parameters) -> tuple[str, ...]:
    """The regimes on cells that `rtol` and the rules of the field allow.

    None where voxels cross zero, which is there to be compared with other software. Groups tell
    nothing of the voxels at a ``nearest`` face, which the field beyond follows, nor of
    zeros in inverted fields, which stay while all around them grows.
    """
    rtol, constraint = parameters.rtol, parameters.constraint
    if constraint == "crossing":
        return ()
    follows = parameters.boundary == "nearest"
    allowed, exact = [], smallest_rtol(parameters)  # which steep faces raise
    if constraint == "constrained" and rtol >= max(CLOSURE_RTOL, exact) and not follows:
        allowed.append("closure")
    if rtol >= exact:
        linear = constraint == "unconstrained" and not follows
        allowed.append("linear" if linear else "stream")
    return tuple(allowed)


def face_layers(parameters: Parameters, levels: tuple[int, ...]) -> tuple[int, ...]:
    """Layers of cells beyond the faces whose means are kept, per axis.

    Beyond a ``nearest`` face the field is like its outermost voxels, not like their cells.
    """
    follows = parameters.boundary == "nearest"
    return tuple(int(follows and level > 0) for level in levels)


def regime_error(parameters: Parameters, regime: str, levels: tuple[int, ...]) -> float:
    """Relative L2 error of a channel that its regime may cause, besides that of halos."""
    if regime == "closure":
        return CLOSURE_ERROR
    if regime in ("linear", "stream"):
        return EXACT_CELLS_ERROR + pyramid_error(parameters)
    return pyramid_error(parameters) if any(levels) else 0.0


def largest_levels(grid: Grid) -> tuple[int, ...]:
    """How often blocks can be cut into whole cells along each axis."""
    return tuple(
        (block & -block).bit_length() - 1 if count > 1 else max(0, size.bit_length() - 2)
        for size, block, count in zip(grid.shape, grid.block, grid.counts, strict=True)
    )


def has_shares(parameters: Parameters, shape: tuple[int, ...], levels: tuple[int, ...]) -> bool:
    """Whether cells at a face have voxels that take no part, even where none is blank.

    Beyond a ``constant`` face the value is held; other rules complete cells with voxels.
    """
    cut = any(n % 2**level for n, level in zip(shape, levels, strict=True))
    return parameters.boundary == "constant" and cut


def cell_domain(shape: tuple[int, ...], levels: tuple[int, ...]) -> tuple[int, ...]:
    """Cells of a volume, and around it those that its outermost voxels need."""
    cells = coarse_shape(shape, levels)
    return tuple(n + 2 * halo for n, halo in zip(cells, cell_halo(levels), strict=True))


def cell_grids(domain: tuple[int, ...]) -> Iterator[Grid]:
    """The cells in one block, then in ever smaller ones."""
    cut = 1
    while True:
        block = tuple(-(-n // cut) for n in domain)
        yield Grid(domain, block)
        if max(block) <= 16:
            return
        cut += max(1, cut // 2)


def evolve_values(regime: Regime) -> int:
    """Values that evolving holds for every cell."""
    # groups, their weights and means of them; base, share, reference, smooth field, changes
    return 2 * regime.groups + 10


def coarse_options(
    parameters: Parameters,
    steps: Steps,
    grid: Grid,
    passes: int,
    name: str,
    fits: Callable[[Regime], bool],
) -> Iterator[Regime]:
    """The evolution of the cells in several numbers of passes, in the largest blocks that fit."""
    levels = closure_levels(steps, largest_levels(grid))
    if not any(levels):
        return
    nothing = (0,) * len(levels)
    kernels = closure_kernels(steps, levels)
    # cells beyond a face are made of those within, see `beyond_cells`
    least = tuple(kernel.radius + HALO + STENCIL if kernel.radius else 0 for kernel in kernels)
    counts = [1] if name == "stream" else part_counts(steps.count)
    domain = cell_domain(grid.shape, levels)
    for count in counts:
        if name == "stream":  # a step at a time, smoothed from exact means
            parts, depth = (1,) * steps.count, least
        else:
            parts = even_parts(steps.count, count)
            halo = halo_depth((Steps(parts[0], kernels),), parameters.rtol, passes * count)
            depth = tuple(map(max, halo, least))
        for cells in cell_grids(domain):
            regime = Regime(name, levels, parts, nothing, nothing, cells, depth)
            if fits(regime):
                break
        yield regime
        if len(cells) == 1:  # more passes would gain nothing
            return


def evolve_cells(regime: Regime) -> int:
    """Cells that all blocks of a pass over the cells compute, halos included."""
    assert regime.cells is not None
    return haloed_voxels(regime.cells, regime.cell_depth, "reflect")


def cell_block(regime: Regime) -> int:
    """Cells of the largest block with its halo."""
    assert regime.cells is not None
    return math.prod(haloed_shape(regime.cells, regime.cell_depth, "reflect"))


def coarse_work(regime: Regime, steps: Steps, voxels: int) -> int:
    """What a channel on cells costs, in voxel-steps."""
    cells = evolve_cells(regime)
    if regime.name == "stream":
        return steps.count * (voxels * RELAX_WORK + cells * SMOOTH_WORK)
    evolve = steps.count * cells * (EVOLVE_WORK + GROUP_WORK * regime.groups)
    gather = voxels * GATHER_WORK if regime.groups else 0
    return evolve + gather + voxels * SCATTER_WORK


def cell_traffic(regime: Regime, itemsize: int) -> tuple[int, int]:
    """Bytes of values of cells that all passes of a channel read and write."""
    if regime.cells is None:
        return 0, 0
    values, one = regime.groups + 2, math.prod(regime.cells.shape) * itemsize
    passes = len(regime.parts)
    if regime.name == "stream":
        return 4 * one * passes, 2 * one * passes
    haloed = evolve_cells(regime) * itemsize
    return passes * haloed * values + 3 * one, (passes + 1) * values * one + 2 * one


def cell_bytes(regime: Regime, itemsize: int) -> int:
    """Bytes of all values of cells that are stored at once."""
    if regime.cells is None:
        return 0
    kept = SNAPSHOTS + 2 if regime.name == "closure" else 3
    return math.prod(regime.cells.shape) * itemsize * (kept + 2 * (regime.groups + 2))
