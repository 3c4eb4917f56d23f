"""Wide kernels as small ones on a coarser grid: a step then costs the same at every scale.

Instead of smoothing with a kernel, a step averages voxels to cells, `level` times with the weights
``[1, 3, 3, 1] / 8``, smooths the cells with a small kernel, and goes back as many times with the
weights 3/4 and 1/4::

    S = U G_c D I

The constraint acts on the full grid, where it must. The second and the fourth cumulant of the
whole chain are those of the kernel it replaces: each way through level `j` adds the variance
``0.75 4^j`` and the fourth cumulant ``-0.375 16^j``, and the small kernel the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT
from cdd_dask.kernels import Kernel
from cdd_dask.parameters import Parameters
from cdd_dask.time_stepping import Steps

SMALLEST_RTOL = 1e-4
"""Below it full kernels are asked for."""
SMALLEST_RTOL_AT_STEEP_FACES = 1e-2
"""The same where the field stays away from what lies beyond ``constant`` faces."""
SMALLEST_VARIANCE = 1.2
"""Variance, in cells, that must be left for the small kernel; its square root is 1.1 cells."""
MOST_AXES = 3
"""Axes that a pyramid smooths along."""
REACH_OF_CASCADE = 4
"""Cells beyond a kernel's reach on which a voxel depends, the way down and up."""


def coarse_levels(parameters: Parameters, steps: Steps) -> tuple[int, ...]:
    """How often `steps` may halve the grid along each axis, for the error that `rtol` allows.

    A channel then differs by up to `pyramid_error` from that of full kernels. Inverted fields at
    ``constant`` faces are fed by the steepest gradients there are, and take full kernels.

    Examples
    --------
    >>> from cdd_dask.time_stepping import channel_steps
    >>> channels = channel_steps(Parameters(), (16.0, 32.0, 64.0), ndim=2)
    >>> [coarse_levels(Parameters(), steps) for steps in channels]
    [(1, 1), (1, 1), (2, 2)]
    >>> coarse_levels(Parameters(rtol=1e-5), channels[2])
    (0, 0)
    """
    if parameters.rtol < smallest_rtol(parameters) or len(steps.axes) > MOST_AXES:
        return (0,) * len(steps.kernels)
    return tuple(map(pyramid_level, steps.kernels))


def smallest_rtol(parameters: Parameters) -> float:
    """The `rtol` from which on a coarser grid may serve."""
    if parameters.boundary == "constant":
        if parameters.constraint == "inverted":
            return math.inf
        if parameters.cval != 0:
            return SMALLEST_RTOL_AT_STEEP_FACES
    return SMALLEST_RTOL


def pyramid_error(parameters: Parameters) -> float:
    """How far a channel may be, in relative L2 norm, from that of full kernels."""
    if parameters.boundary == "constant" and parameters.cval != 0:
        return 4e-3
    return 1e-3 if parameters.constraint == "inverted" else 2e-4


def pyramid_level(kernel: Kernel) -> int:
    """How often the grid can be halved for `kernel`; 0 where it is too narrow.

    Examples
    --------
    >>> from cdd_dask.kernels import discrete_gaussian
    >>> [pyramid_level(discrete_gaussian(sigma)) for sigma in (1.4, 2.8, 5.5, 11.1)]
    [0, 1, 2, 3]
    """
    level = 0
    while variance_left(kernel, level + 1) >= SMALLEST_VARIANCE:
        level += 1
    return level


def variance_left(kernel: Kernel, level: int, from_means: bool = False) -> float:
    """Variance of the small kernel in cells: what the ways down and up leave of the whole.

    Cascades take ``(4^L - 1) / 4`` voxels² each way, plain means a twelfth instead of a quarter.
    """
    ways = (4**level - 1) / (3 if from_means else 2)
    return float((_moment(kernel, 2) - ways) / 4**level)


@lru_cache(maxsize=256)
def coarse_kernel(kernel: Kernel, level: int, from_means: bool = False) -> Kernel:
    """The kernel on the grid of `level` that makes the chain equal `kernel`.

    Weights ``exp(-a x² - b x⁴)``, positive and normalised, with `a` and `b` solved for the variance
    and the fourth cumulant that are left.

    Parameters
    ----------
    kernel
        What the chain replaces.
    level
        Number of halvings; with 0 `kernel` itself is returned.
    from_means
        Whether cells are plain means of their voxels, of variance ``(4^L - 1) / 12`` and fourth
        cumulant ``-(16^L - 1) / 120``, instead of cascades' averages.
    """
    from scipy.optimize import root

    if level == 0:
        return kernel
    variance = variance_left(kernel, level, from_means)
    fourth = _moment(kernel, 4) - 3 * _moment(kernel, 2) ** 2  # the cumulant
    fourth = (fourth + (16**level - 1) / (30 if from_means else 20)) / 16**level
    x = np.arange(math.ceil(4 * math.sqrt(variance)) + 1)
    twice = np.where(x > 0, 2.0, 1.0)

    def weights(a: float, b: float) -> NDArray[np.float64]:
        one_sided = np.exp(-a * x**2 - b * x**4)
        normalised: NDArray[np.float64] = one_sided / (twice * one_sided).sum()
        return normalised

    def excess(unknown: NDArray[np.float64]) -> list[float]:
        w = twice * weights(*unknown)
        second = (w * x**2).sum()
        return [second - variance, (w * x**4).sum() - 3 * second**2 - fourth]

    solution = root(excess, [0.5 / variance, 0.0], tol=1e-13).x
    return Kernel(math.sqrt(variance), tuple(weights(*solution)[1:].tolist()))


def chain_kernel(kernel: Kernel, level: int) -> Kernel:
    """What the chain of `level` halvings smooths with, averaged over the voxels of a cell.

    Each way through a level spreads by ``[1, 3, 3, 1] / 8``. The radius is the chain's reach.
    """
    weights = coarse_kernel(kernel, level).weights
    for _ in range(level):
        cells = np.zeros(2 * len(weights) - 1)
        cells[::2] = weights
        for _ in ("down", "up"):
            cells = np.convolve(cells, np.array([1, 3, 3, 1]) / 8)
        weights = cells
    return Kernel(kernel.sigma, tuple(weights[len(weights) // 2 + 1 :].tolist()))


def computed_steps(steps: Steps, levels: tuple[int, ...]) -> Steps:
    """The steps with the kernels that a pyramid of `levels` makes of theirs."""
    return replace(steps, kernels=tuple(map(chain_kernel, steps.kernels, levels)))


@dataclass(frozen=True)
class StepGrids:
    """The grids that a block's steps run on, as far as they decide what the steps hold."""

    levels: tuple[int, ...]
    """How often the grid is halved along each axis."""
    padded: tuple[int, ...]
    """Shape of what the cells are made of, at most: the block's voxels, and voxels beyond its faces
    where these need some, see `can_extend_cells`; whole cells in all."""
    radius: int
    """Largest radius of the kernels, in cells of the coarsest grid."""
    wraps: bool
    """Whether a side of the block may be the volume's, which wraps around."""

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        volume: tuple[int, ...],
        kernels: tuple[Kernel, ...],
        levels: tuple[int, ...],
        boundary: str,
    ) -> StepGrids:
        """For a block of `shape` anywhere in a volume, and a step's full `kernels`."""
        axes = zip(shape, volume, kernels, levels, strict=True)
        radius = max(coarse_kernel(*one).radius for one in zip(kernels, levels, strict=True))
        padded = tuple(_padded(*axis, boundary) for axis in axes)
        return cls(levels, padded, radius, boundary == "wrap")

    @property
    def coarsest(self) -> tuple[int, ...]:
        """Shape of the coarsest grid, in cells."""
        return tuple(n >> level for n, level in zip(self.padded, self.levels, strict=True))

    @property
    def cells(self) -> int:
        """Cells of all coarser grids; the coarsest are held twice, and so are the finest."""
        depth = max(self.levels)
        if not depth:
            return 0
        counts = [
            math.prod(n >> min(level, j) for n, level in zip(self.padded, self.levels, strict=True))
            for j in range(1, depth + 1)
        ]
        return sum(counts) + counts[-1] + (counts[0] if depth > 1 else 0)


def _padded(size: int, whole: int, kernel: Kernel, level: int, boundary: str) -> int:
    if level == 0:
        return size
    cell = 1 << level
    ends_with_cell = whole % cell == 0
    low = not can_extend_cells(boundary, ends_with_cell or boundary != "wrap")
    high = not can_extend_cells(boundary, ends_with_cell)
    # of a part of the axis, one face at most is the volume's, but it begins within a cell
    beyond, phase = (low + high, 0) if size == whole else (low or high, cell - 1)
    return -(-(phase + size + beyond * margin(kernel, level)) // cell) * cell


def _moment(kernel: Kernel, power: int) -> float:
    distances = np.arange(1, kernel.radius + 1)
    return float(2 * (np.array(kernel.wings) * distances**power).sum())


def can_extend_cells(rule: str, at_border: bool) -> bool:
    """Whether a face's `rule` may be applied to the cells instead of the voxels.

    It is exact for ``reflect`` and ``wrap`` where the face lies `at_border` of a cell (where both
    do, for ``wrap``); beyond a cut anything will do.
    """
    return rule == CUT or (rule in ("reflect", "wrap") and at_border)


def margin(kernel: Kernel, level: int) -> int:
    """Voxels beyond a face from which cells are made, where its rule must act on voxels.

    None where there are no cells.
    """
    if level == 0:
        return 0
    return int((coarse_kernel(kernel, level).radius + REACH_OF_CASCADE) * 2**level)
