"""What lies beyond an edge: the boundary rules of `scipy.ndimage`, as indices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CUT = "cut"
"""Rule of a face inside the volume: the halo ends there, any extension will do."""
OUTSIDE = -1
"""Index that stands for `cval` under the rule ``constant``."""


def extension_index(rule: str, size: int, start: int, stop: int) -> NDArray[np.intp]:
    """Where the values at the positions ``start … stop - 1`` of an extended axis come from.

    ::

        reflect   d c b a | a b c d | d c b a
        mirror    d c b   | a b c d | c b a
        nearest   a a a a | a b c d | d d d d
        wrap      a b c d | a b c d | a b c d
        constant  k k k k | a b c d | k k k k

    Parameters
    ----------
    rule
        A boundary mode of `scipy.ndimage`, or `CUT` (here like ``nearest``).
    size
        Length of the axis in voxels, >= 1.
    start, stop
        Range of positions, which may lie far outside ``0 … size - 1``.

    Returns
    -------
    ndarray
        Shape ``(stop - start,)``: indices into the axis, `OUTSIDE` where the value is `cval`.

    Examples
    --------
    >>> extension_index("reflect", 3, -4, 5).tolist()
    [2, 2, 1, 0, 0, 1, 2, 2, 1]
    >>> extension_index("mirror", 3, -3, 5).tolist()
    [1, 2, 1, 0, 1, 2, 1, 0]
    """
    position = np.arange(start, stop)
    if rule == "reflect":
        folded = position % (2 * size)
        return np.minimum(folded, 2 * size - 1 - folded)
    if rule == "mirror":
        period = max(1, 2 * size - 2)
        folded = position % period
        return np.minimum(folded, period - folded) if size > 1 else folded
    if rule == "wrap":
        return position % size
    if rule == "constant":
        return np.where((position >= 0) & (position < size), position, OUTSIDE)
    return np.clip(position, 0, size - 1)
