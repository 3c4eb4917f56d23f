"""How far around a block its neighbours matter: a bound, not a guess.

A block is computed from its core plus a halo::

        cut                                            cut
         |<---- depth ---->|  core  |<---- depth ---->|
         |  error may live here, and is trimmed away   |

A step of diffusion is monotone and a contraction in the maximum norm, so what a wrong value
beyond the cut does to a voxel at distance `h` is at most the probability that a random walk
with the steps' kernels reaches the cut (first passage; Lévy's inequality)::

    error / range <= sum over cut faces of 2 P(X_n >= h + 1)

where ``X_n`` is the sum of `n` draws from the kernels and the range includes `cval`. Steps that
run without reading the neighbours in between, be they of one channel or of several, are a *pass*.

It does not hold where `crossing` lets voxels jump across zero; there the error is an estimate.
Beside blank voxels the walk is not the same everywhere; there a halo for an error `BLANK_MARGIN`
times smaller is taken, and the error is an estimate, too.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.kernels import Kernel
from cdd_dask.refinement import STENCIL, range_growth
from cdd_dask.time_stepping import Steps

Pass = tuple[Steps, ...]

BLANK_MARGIN = 50
"""A block that holds blank voxels takes the halo of `rtol` divided by this."""


def rounding(count: int) -> float:
    """Absolute error of a tail probability got by FFT, added so that the bound stays a bound.

    It grows with the number of steps, the power to which a spectrum near 1 is raised.
    """
    return 1e-14 * max(1.0, count / 100)


@lru_cache(maxsize=256)
def tail_probability(draws: tuple[tuple[Kernel, int], ...]) -> NDArray[np.float64]:
    """``P(X_n >= h + 1)`` for ``h = 0, 1, …``, until it is lost in rounding or 0.

    Parameters
    ----------
    draws
        Kernels, the distributions of one step of the random walk, and how many steps of each.

    Returns
    -------
    ndarray
        Shape ``(h_max + 1,)``; beyond it the probability is below `rounding`.
    """
    from scipy.fft import irfft, next_fast_len, rfft

    deviation = math.sqrt(sum(count * kernel.sigma**2 for kernel, count in draws))
    longest = max(kernel.radius for kernel, _ in draws)
    if longest == 0:
        return np.empty(0)  # the walk stays where it is
    # beyond 40 standard deviations (and 60 voxels, for the heavier tails of small kernels)
    # nothing is left that double precision could tell from 0
    reach = min(
        sum(count * kernel.radius for kernel, count in draws), 40 * math.ceil(deviation) + 60
    )
    size = next_fast_len(2 * max(reach, longest) + 1, real=True)
    spectrum: Any = 1.0
    for kernel, count in draws:
        density = np.zeros(size)
        weights = kernel.weights
        density[: kernel.radius + 1] = weights[kernel.radius :]
        density[size - kernel.radius :] = weights[: kernel.radius]
        spectrum = spectrum * rfft(density) ** count
    walk = irfft(spectrum, size)  # the convolution of all draws
    tails: NDArray[np.float64] = np.maximum(np.cumsum(walk[reach:0:-1])[::-1], 0.0)
    return tails


def _draws(steps: Pass, axis: int) -> tuple[tuple[Kernel, int], ...]:
    return tuple((part.kernels[axis], part.count) for part in steps)


def _reach(steps: Pass, axis: int) -> int:
    """Strict dependence radius of a pass along `axis`, in cells."""
    return sum(part.reach[axis] for part in steps)


def error_bound(steps: Pass, depth: tuple[int, ...]) -> float:
    """Largest error in a core after a pass, relative to the field's range.

    Both faces of every axis are taken to be cut at `depth` cells from the core.
    """
    total = 0.0
    count = sum(part.count for part in steps)
    for axis, h in enumerate(depth):
        if h < _reach(steps, axis):
            tails = tail_probability(_draws(steps, axis))
            total += 4 * ((tails[h] if h < len(tails) else 0.0) + rounding(count))
    return total


def halo_depth(steps: Pass, rtol: float, passes: int) -> tuple[int, ...]:
    """Halo per axis in cells that keeps a whole plan within `rtol`.

    The smallest `h` with ``4 ndim P(X_n >= h + 1) <= rtol / (2 passes)``: errors add along the
    passes, and a channel is the difference of two fields. Never more than ``n * r``, which
    ``rtol=0`` takes.

    Parameters
    ----------
    steps
        The steps of one pass.
    rtol
        Error allowed relative to the field's range, >= 0.
    passes
        Number of passes in the whole plan.

    Examples
    --------
    >>> from cdd_dask.parameters import Parameters
    >>> from cdd_dask.time_stepping import channel_steps
    >>> first, second = channel_steps(Parameters(), (1.0, 2.0), ndim=3)
    >>> halo_depth((first,), 1e-3, 2), halo_depth((first,), 0.0, 2)
    ((5, 5, 5), (66, 66, 66))
    """
    reaches = [_reach(steps, axis) for axis in range(len(steps[0].kernels))]
    along = len(steps[0].axes)
    count = sum(part.count for part in steps)
    allowed = rtol / (2 * passes) / (4 * along) - rounding(count)
    depths = []
    for axis, reach in enumerate(reaches):
        if allowed <= 0:
            depths.append(reach)
            continue
        tails = tail_probability(_draws(steps, axis))
        enough = np.flatnonzero(tails <= allowed)
        depths.append(min(reach, int(enough[0]) if len(enough) else len(tails)))
    return tuple(depths)


def channel_passes(steps: tuple[Steps, ...]) -> tuple[range, ...]:
    """The channels of every pass: the refined ones are one, so that no refined field is stored.

    Examples
    --------
    >>> from cdd_dask.parameters import Parameters
    >>> from cdd_dask.time_stepping import channel_steps
    >>> channel_passes(channel_steps(Parameters(upsample=2), (1.0, 2.0, 4.0, 8.0), ndim=1))
    (range(0, 3), range(3, 4))
    """
    refined = sum(part.refinement > 1 for part in steps)
    return ((range(refined),) if refined else ()) + tuple(
        range(k, k + 1) for k in range(refined, len(steps))
    )


def channel_halos(steps: tuple[Steps, ...], rtol: float) -> tuple[tuple[int, ...], ...]:
    """Halo of every channel per axis, in voxels, that keeps a whole plan within `rtol`.

    A refined pass may see a range that interpolation has enlarged, and the cells next to a cut
    depend on voxels beyond it.
    """
    halos = []
    passes = channel_passes(steps)
    for channels in passes:
        one = steps[channels.start : channels.stop]
        factor = one[0].refinement
        axes = one[0].axes
        allowed = rtol / range_growth(factor, len(axes))
        cells = halo_depth(one, allowed, len(passes))
        beyond = STENCIL if factor > 1 else 0
        depth = tuple(
            -(-h // factor) + beyond if axis in axes else 0 for axis, h in enumerate(cells)
        )
        halos += [depth] * len(channels)
    return tuple(halos)
