"""Scale edges: where one channel ends and the next begins."""

from __future__ import annotations

import math

from cdd_dask.errors import InputError
from cdd_dask.parameters import Parameters

LARGEST_EDGE = 1e5
"""Largest scale edge accepted, in voxels: far beyond half the axis of any volume."""
MOST_CHANNELS = 1000


def scale_edges(parameters: Parameters, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Scale edges in voxels, ascending, one per channel.

    ``l_i = min_scale * base**i`` in log mode, ``l_i = min_scale + i * step`` in lin mode
    (Li 2022, arXiv:2201.05484); channel ``k`` holds the scales from ``l_{k-1}`` (0 for the
    first) to ``l_k``.

    Parameters
    ----------
    parameters
        Where the edges begin, end and how they are spaced.
    shape
        Shape of the volume in voxels; gives the default of `max_scale`.

    Raises
    ------
    InputError
        If no edge fits between the two scales, or one is beyond 1e5 voxels.

    Examples
    --------
    >>> scale_edges(Parameters(max_scale=9), (64, 64))
    (1.0, 2.0, 4.0, 8.0)
    >>> scale_edges(Parameters(mode="lin", max_scale=6, linear_scale_step=2), (64, 64))
    (1.0, 3.0, 5.0)
    """
    low = 1.0 if parameters.min_scale is None else parameters.min_scale
    high = max(shape) / 2 if parameters.max_scale is None else parameters.max_scale
    if high <= low and parameters.num_channels is None:
        raise InputError(
            f"max_scale={high:g} (half of the largest axis of shape {shape}) must be larger than "
            f"min_scale={low:g}: give a smaller min_scale, a max_scale or num_channels"
        )
    step, base = parameters.linear_scale_step, parameters.log_scale_base
    # the margin keeps an edge that falls on max_scale but for rounding
    if step is not None:  # mode="lin"
        intervals = (high - low) / step * (1 + 1e-9)
    else:
        intervals = (math.log(high * (1 + 1e-9)) - math.log(low)) / math.log(base)
    if parameters.num_channels is not None:
        count = parameters.num_channels
    else:
        count = math.floor(min(intervals, MOST_CHANNELS)) + 1
    if count > MOST_CHANNELS:
        raise InputError(
            f"the scale edges make more than {MOST_CHANNELS} channels, at most allowed: space them "
            "wider (raise min_scale, log_scale_base or linear_scale_step) or lower num_channels"
        )
    if step is not None:
        edges = tuple(low + i * step for i in range(count))
    elif (count - 1) * math.log(base) + math.log(low) > math.log(LARGEST_EDGE):
        edges = (math.inf,)
    else:
        edges = tuple(low * base**i for i in range(count))
    if edges[-1] > LARGEST_EDGE:
        raise InputError(
            f"the largest scale edge would exceed {LARGEST_EDGE:g} voxels: "
            "lower max_scale, num_channels or log_scale_base"
        )
    return edges
