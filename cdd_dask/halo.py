"""How far around a block its neighbours matter: a bound, not a guess.

A block is computed from its core plus a halo::

        cut                                            cut
         |<---- depth ---->|  core  |<---- depth ---->|
         |  error may live here, and is trimmed away   |

A step of diffusion is monotone and a contraction in the maximum norm, so what a wrong value
beyond the cut does to a voxel at distance `h` is at most the probability that a random walk
with the steps' kernels reaches the cut (first passage; Lévy's inequality)::

    error / range <= sum over cut faces of 2 P(X_n >= h + 1)

where ``X_n`` is the sum of `n` draws from the kernel and the range includes `cval`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cdd_dask.kernels import Kernel
from cdd_dask.time_stepping import Steps


def rounding(count: int) -> float:
    """Absolute error of a tail probability got by FFT, added so that the bound stays a bound.

    It grows with the number of steps, the power to which a spectrum near 1 is raised.
    """
    return 1e-14 * max(1.0, count / 100)


@lru_cache(maxsize=256)
def tail_probability(kernel: Kernel, count: int) -> NDArray[np.float64]:
    """``P(X_n >= h + 1)`` for ``h = 0, 1, …``, until it is lost in rounding or 0.

    Parameters
    ----------
    kernel
        Distribution of one step of the random walk.
    count
        Number of steps `n`.

    Returns
    -------
    ndarray
        Shape ``(h_max + 1,)``; beyond it the probability is below `rounding`.
    """
    from scipy.fft import irfft, next_fast_len, rfft

    deviation = math.sqrt(count) * kernel.sigma
    # beyond 40 standard deviations (and 60 voxels, for the heavier tails of small kernels)
    # nothing is left that double precision could tell from 0
    reach = min(count * kernel.radius, 40 * math.ceil(deviation) + 60)
    size = next_fast_len(2 * max(reach, kernel.radius) + 1, real=True)
    density = np.zeros(size)
    weights = kernel.weights
    density[: kernel.radius + 1] = weights[kernel.radius :]
    density[size - kernel.radius :] = weights[: kernel.radius]
    walk = irfft(rfft(density) ** count, size)  # the n-fold convolution
    tails: NDArray[np.float64] = np.maximum(np.cumsum(walk[reach:0:-1])[::-1], 0.0)
    return tails


def error_bound(steps: Steps, depth: tuple[int, ...]) -> float:
    """Largest error in a core after `steps`, relative to the field's range.

    Both faces of every axis are taken to be cut at `depth` voxels from the core.
    """
    total = 0.0
    for kernel, h, reach in zip(steps.kernels, depth, steps.reach, strict=True):
        if h < reach:
            tails = tail_probability(kernel, steps.count)
            total += 4 * ((tails[h] if h < len(tails) else 0.0) + rounding(steps.count))
    return total


def halo_depth(steps: Steps, rtol: float, passes: int) -> tuple[int, ...]:
    """Halo per axis in voxels that keeps a whole plan within `rtol`.

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
    >>> halo_depth(first, 1e-3, 2), halo_depth(first, 0.0, 2)
    ((5, 5, 5), (66, 66, 66))
    """
    allowed = rtol / (2 * passes) / (4 * len(steps.kernels)) - rounding(steps.count)
    depths = []
    for kernel, reach in zip(steps.kernels, steps.reach, strict=True):
        tails = tail_probability(kernel, steps.count)
        enough = np.flatnonzero(tails <= allowed)
        if allowed <= 0:
            depths.append(reach)
        else:
            depths.append(min(reach, int(enough[0]) if len(enough) else len(tails)))
    return tuple(depths)
