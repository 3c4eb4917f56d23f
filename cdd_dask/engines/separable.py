"""Smoothing along one axis at a time on the CPU: any number of axes, kernels of any radius."""

from __future__ import annotations

import numpy as np

from cdd_dask.engines.rows import address, compiled, load, moved, row_of, store

CHUNK = 512
"""Values that are summed at once, to stay in the first-level cache."""


@compiled
def _add_pairs(field, centre, low, high, weight, sums, width):  # type: ignore[no-untyped-def]
    work = sums.dtype.type
    for x in range(width):
        pair = work(load(field, low, x)) + work(load(field, high, x))
        sums[x] += weight * (work(0.5) * pair - work(load(field, centre, x)))


@compiled
def _add_centre(field, centre, sums, out, target, width):  # type: ignore[no-untyped-def]
    for x in range(width):
        store(out, target, x, sums.dtype.type(load(field, centre, x)) + sums[x])


@compiled
def smooth_axis(field, out, shape, region, index, weights, cval, sums):  # type: ignore[no-untyped-def]
    """Smooth a field along the middle one of three axes.

    Parameters
    ----------
    field, out
        Flat arrays of ``shape``; not the same.
    shape
        ``(outer, n, inner)``.
    region
        ``(start, stop)`` along the outer axis.
    index
        Where the values at ``-r … n + r - 1`` come from; -1 where they are `cval`.
    weights
        Twice the weights at distances 1 to `r`, an array of `out`'s type.
    cval
        Value beyond the field.
    sums
        Working memory: a row of `CHUNK` values, of `out`'s type.
    """
    _, n, inner = shape
    radius = len(weights)
    outside = np.full(CHUNK, cval, field.dtype)
    line = np.empty(n + 2 * radius if inner == 1 else 0, field.dtype)
    for o in range(region[0], region[1]):
        if inner == 1:
            for i in range(n + 2 * radius):
                k = index[i]
                line[i] = cval if k < 0 else field[o * n + k]
            for left in range(0, n, CHUNK):
                width = min(CHUNK, n - left)
                sums[:] = 0
                centre = address(line, left + radius)
                for j in range(radius, 0, -1):
                    low, high = address(line, left + radius - j), address(line, left + radius + j)
                    _add_pairs(line, centre, low, high, weights[j - 1], sums, width)
                _add_centre(line, centre, sums, out, address(out, o * n + left), width)
            continue
        for i in range(n):
            for left in range(0, inner, CHUNK):
                width = min(CHUNK, inner - left)
                sums[:] = 0
                centre = address(field, (o * n + i) * inner + left)
                for j in range(radius, 0, -1):
                    below, above = index[i + radius - j], index[i + radius + j]
                    low = high = address(outside, 0)
                    if below >= 0:
                        low = address(field, (o * n + below) * inner + left)
                    if above >= 0:
                        high = address(field, (o * n + above) * inner + left)
                    _add_pairs(field, centre, low, high, weights[j - 1], sums, width)
                target = address(out, (o * n + i) * inner + left)
                _add_centre(field, centre, sums, out, target, width)


@compiled
def move(smooth, field, out, share, size, rule):  # type: ignore[no-untyped-def]
    """Move a flat field of so many values to its smoothed copy."""
    source, old, new = address(smooth, 0), address(field, 0), address(out, 0)
    part = row_of(share, 0, old)
    for x in range(size):
        value = load(smooth, source, x)
        store(out, new, x, moved(rule, share, field, old, part, x, value))
