"""The closure: a channel of a large scale computed on coarse cells, its voxels met only twice.

Within a channel a voxel's value follows from the one it starts with and from the smooth field
`S_m` before every step, and that needs the means of cells alone. A cell is ``2^L`` voxels along
an axis of level `L`; the smooth field is ``S = U G_c (cell means)``, `U` the interpolation of the
pyramid and `G_c` the small kernel that makes the chain equal the step's kernel
(`pyramid.coarse_kernel`). How a cell's mean moves is followed on groups of its voxels::

    gather   (voxels)  deviations I_0 - U S_0 of a cell's voxels, sorted, averaged in groups
    evolve   (cells)   every group takes the step's rule; their mean, smoothed, is S_{m+1}
    scatter  (voxels)  I_n from I_0 and the S_m

Groups are small at both tails, where the constraint acts first, and double inwards.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cdd_dask.kernels import IDENTITY, Kernel
from cdd_dask.pyramid import coarse_kernel, variance_left
from cdd_dask.time_stepping import Steps

HALO = 1
"""Cells around a voxel's own on which its interpolation depends."""
STENCIL = 4
"""Cells that a value beyond a face is interpolated from, where the face cuts a cell."""
SNAPSHOTS = 32
"""Smooth fields of one channel that are kept for voxels of changing sign."""
LEAST_VARIANCE = 5.0
"""Variance that the small kernel keeps, in cells². What a cell's mean does not tell of its voxels
falls with it; from 1.6 to 7.4 the error of smooth fields falls from 3e-3 to below 1e-3."""


def closure_levels(steps: Steps, largest: tuple[int, ...]) -> tuple[int, ...]:
    """How often the grid is halved along each axis, at most `largest` times.

    Examples
    --------
    >>> from cdd_dask.parameters import Parameters
    >>> from cdd_dask.time_stepping import channel_steps
    >>> steps = channel_steps(Parameters(), (64.0, 128.0), ndim=2)[1]
    >>> closure_levels(steps, (9, 1))
    (2, 1)
    """
    levels = []
    for kernel, most in zip(steps.kernels, largest, strict=True):
        level = 0
        while level < most and variance_left(kernel, level + 1, True) >= LEAST_VARIANCE:
            level += 1
        levels.append(level)
    return tuple(levels)


def closure_kernels(steps: Steps, levels: tuple[int, ...]) -> tuple[Kernel, ...]:
    """The kernel of one step on the cells, per axis."""
    return tuple(
        coarse_kernel(kernel, level, True)
        for kernel, level in zip(steps.kernels, levels, strict=True)
    )


def cell_shape(levels: tuple[int, ...]) -> tuple[int, ...]:
    """Voxels of a cell along each axis."""
    return tuple(2**level for level in levels)


def coarse_shape(shape: tuple[int, ...], levels: tuple[int, ...]) -> tuple[int, ...]:
    """Cells along each axis of a volume of `shape`; the last of an axis may reach beyond it.

    Examples
    --------
    >>> coarse_shape((128, 130), (3, 3))
    (16, 17)
    """
    return tuple(-(-n // f) for n, f in zip(shape, cell_shape(levels), strict=True))


def cell_halo(levels: tuple[int, ...]) -> tuple[int, ...]:
    """Cells around a volume's that its outermost voxels need, along each axis."""
    return tuple(HALO * (level > 0) for level in levels)


@lru_cache
def group_sizes(voxels: int) -> tuple[int, ...]:
    """Sizes of the groups of a cell of so many voxels, a power of 2.

    Examples
    --------
    >>> group_sizes(8), sum(group_sizes(64)), len(group_sizes(64))
    ((1, 1, 2, 2, 1, 1), 64, 12)
    """
    if voxels == 1:
        return (1,)
    half = [1, *(2**i for i in range(int(math.log2(voxels)) - 1))]
    return (*half, *reversed(half))


def group_borders(voxels: int, count: int) -> NDArray[np.intp]:
    """Where groups begin and end among the `count` of a cell's `voxels` that take part, sorted.

    Examples
    --------
    >>> group_borders(8, 8).tolist(), group_borders(8, 3).tolist()
    ([0, 1, 2, 4, 6, 7, 8], [0, 0, 1, 2, 2, 3, 3])
    """
    whole = np.cumsum((0, *group_sizes(voxels)))
    return np.rint(whole * (count / voxels)).astype(np.intp)


@lru_cache
def interpolated_mean(level: int) -> Kernel:
    """The mean over a cell of what `U` interpolates, as a kernel on the cells.

    A voxel at the distance `d` from its cell's centre, in cells, has ``|d|`` of its neighbour.

    Examples
    --------
    >>> interpolated_mean(1).weights.tolist()
    [0.125, 0.75, 0.125]
    """
    if level == 0:
        return IDENTITY
    line = np.array([0.0, 1.0, 0.0])
    for _ in range(level):
        line = doubled(line, 0)
    side = 0.5 * (1.0 - float(line[1:-1].mean()))
    return Kernel(math.sqrt(2 * side), (side,))


def doubled(cells: NDArray[np.floating], axis: int) -> NDArray[np.floating]:
    """Cells of half the size along an axis, each with 3/4 of its own and 1/4 of the nearer one.

    Of the outermost cells only the inner halves can be made::

        |   a   |   b   |   c   |
            | a2| b1| b2| c1|
    """
    low = cells[(slice(None),) * axis + (slice(None, -1),)]
    high = cells[(slice(None),) * axis + (slice(1, None),)]
    shape = list(low.shape)
    shape[axis] *= 2
    halves = np.empty(shape, cells.dtype)
    quarter = (high - low) * cells.dtype.type(0.25)
    halves[(slice(None),) * axis + (slice(0, None, 2),)] = low + quarter
    halves[(slice(None),) * axis + (slice(1, None, 2),)] = high - quarter
    return halves


def beyond_cells(
    rule: str, size: int, level: int, places: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """What the cells at `places`, beyond a face of an axis of `size` voxels, are like.

    A face need not lie on a border of cells: beyond it the field is its own image, and the image
    of a cell lies between cells, from which it is interpolated by a cubic.

    Returns
    -------
    cells, weights
        Numbers of cells, and their weights, shape ``(len(places), 4)``; the weights are 0 for
        ``constant``.
    """
    cell = 2**level
    count = -(-size // cell)
    centre = (places + 0.5) * cell - 0.5  # in voxels
    if rule == "constant":
        nothing = np.zeros((len(places), STENCIL))
        return nothing.astype(np.intp), nothing
    if rule == "wrap":
        image = np.mod(centre + 0.5, size) - 0.5
    elif rule == "reflect":
        folded = np.mod(centre + 0.5, 2 * size)
        image = np.minimum(folded, 2 * size - folded) - 0.5
    elif rule == "mirror":
        period = max(2 * (size - 1), 1)
        folded = np.mod(centre, period)
        image = np.minimum(folded, period - folded)
    else:
        image = np.clip(centre, 0, size - 1)
    place = np.clip((image + 0.5) / cell - 0.5, 0, count - 1)
    first = np.clip(np.floor(place).astype(np.intp) - 1, 0, max(0, count - STENCIL))
    cells = np.minimum(first[:, None] + np.arange(STENCIL), count - 1)
    offset = place - first
    nodes = range(min(STENCIL, count))
    weights = np.zeros((len(places), STENCIL))
    for node in nodes:
        others = [m for m in nodes if m != node]
        weights[:, node] = np.prod([(offset - m) / (node - m) for m in others], axis=0)
    return cells, weights
