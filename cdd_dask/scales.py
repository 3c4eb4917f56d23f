"""Scale edges: where one channel ends and the next begins."""

from __future__ import annotations

import math

from cdd_dask.errors import InputError
from cdd_dask.parameters import Parameters

LARGEST_EDGE = 1e5
"""Largest scale edge accepted, in voxels: far beyond half the axis of any volume."""
SMALLEST_EDGE = 1e-3
"""Smallest one: far below, kernels would be lost in rounding."""
MOST_CHANNELS = 1000


def scale_edges(parameters: Parameters, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Scale edges, ascending, one per channel, in the unit of the spacing (else in voxels).

    ``l_i = min_scale * base**i`` in log mode, ``l_i = min_scale + i * step`` in lin mode
    (Li 2022, arXiv:2201.05484); channel ``k`` holds the scales from ``l_{k-1}`` (0 for the
    first) to ``l_k``.

    Parameters
    ----------
    parameters
        Where the edges begin, end and how they are spaced.
    shape
        Shape of the volume in voxels; gives the default of `max_scale`, half of the largest
        axis that is decomposed.

    Raises
    ------
    InputError
        If no edge fits between the two scales, or one is below 1e-3 or beyond 1e5 voxels.

    Examples
    --------
    >>> scale_edges(Parameters(max_scale=9), (64, 64))
    (1.0, 2.0, 4.0, 8.0)
    >>> scale_edges(Parameters(mode="lin", max_scale=6, linear_scale_step=2), (64, 64))
    (1.0, 3.0, 5.0)
    """
    ndim = len(shape)
    spacing, smallest = parameters.voxel_spacing(ndim), parameters.smallest_spacing(ndim)
    largest = max(shape[axis] * spacing[axis] for axis in parameters.decomposed_axes(ndim))
    low = smallest if parameters.min_scale is None else parameters.min_scale
    high = largest / 2 if parameters.max_scale is None else parameters.max_scale
    if high <= low and parameters.num_channels is None:
        meaning = " (half of the largest decomposed axis)" if parameters.max_scale is None else ""
        raise InputError(
            f"max_scale={high:g}{meaning} must be larger than min_scale={low:g} for the shape "
            f"{shape}: give a smaller min_scale, a larger max_scale or num_channels"
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
    elif (count - 1) * math.log(base) + math.log(low) > math.log(LARGEST_EDGE * smallest):
        edges = (math.inf,)
    else:
        edges = tuple(low * base**i for i in range(count))
    if edges[-1] > LARGEST_EDGE * smallest:
        raise InputError(
            f"the largest scale edge would exceed {LARGEST_EDGE:g} voxels: "
            "lower max_scale, num_channels or log_scale_base"
        )
    coarsest = max(spacing[axis] for axis in parameters.decomposed_axes(ndim))
    if edges[0] < SMALLEST_EDGE * coarsest:
        raise InputError(
            f"min_scale={low:g} is less than {SMALLEST_EDGE:g} of a voxel (of spacing "
            f"{coarsest:g}): raise it, or leave out the axis of that spacing (axes=)"
        )
    return edges
