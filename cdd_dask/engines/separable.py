"""Smoothing along one axis at a time on the CPU: any number of axes, kernels of any radius."""

from __future__ import annotations

from cdd_dask.engines.rows import address, compiled, load, moved, row_of, store

CHUNK = 512
"""Values that are summed at once, to stay in the first-level cache."""
WIDTH = 64
"""Neighbours whose lines are smoothed together."""


@compiled
def _add_pairs(field, centre, low, high, weight, sums, width):  # type: ignore[no-untyped-def]
    work = sums.dtype.type
    for x in range(width):
        pair = work(load(field, low, x)) + work(load(field, high, x))
        sums[x] += weight * (work(0.5) * pair - work(load(field, centre, x)))


@compiled
def _add_centre(field, centre, sums, width):  # type: ignore[no-untyped-def]
    for x in range(width):
        sums[x] += sums.dtype.type(load(field, centre, x))


@compiled
def smooth_axis(field, out, shape, region, index, weights, cval, tile, sums):  # type: ignore[no-untyped-def]
    """Smooth a field along the middle one of three axes.

    Parameters
    ----------
    field, out
        Flat arrays of ``shape``; may be the same.
    shape
        ``(outer, n, inner)``.
    region
        ``(o0, o1, i0, i1)``: what to compute along the outer and the inner axis.
    index
        Where the values at ``-r … n + r - 1`` come from; -1 where they are `cval`.
    weights
        Twice the weights at distances 1 to `r`, an array of `out`'s type.
    cval
        Value beyond the field.
    tile
        Working memory of `field`'s type: ``n + 2 r`` values of `WIDTH` neighbours, or of all.
    sums
        Working memory: `CHUNK` values of `out`'s type.
    """
    _, n, inner = shape
    radius = len(weights)
    o0, o1, i0, i1 = region
    for o in range(o0, o1):
        for left in range(i0, i1, WIDTH):
            wide = min(WIDTH, i1 - left)
            for i in range(n + 2 * radius):
                k = index[i]
                for x in range(wide):
                    tile[i * wide + x] = cval if k < 0 else field[(o * n + k) * inner + left + x]
            # rows of the tile lie side by side: so many values at once as they fill
            for first in range(0, n * wide, CHUNK // wide * wide):
                width = min(CHUNK // wide * wide, n * wide - first)
                sums[:] = 0
                centre = address(tile, first + radius * wide)
                for j in range(radius, 0, -1):
                    low = address(tile, first + (radius - j) * wide)
                    high = address(tile, first + (radius + j) * wide)
                    _add_pairs(tile, centre, low, high, weights[j - 1], sums, width)
                _add_centre(tile, centre, sums, width)
                for x in range(width):
                    i, y = (first + x) // wide, (first + x) % wide
                    out[(o * n + i) * inner + left + y] = sums[x]


@compiled
def move(smooth, field, out, share, size, rule):  # type: ignore[no-untyped-def]
    """Move a flat field of so many values to its smoothed copy."""
    source, old, new = address(smooth, 0), address(field, 0), address(out, 0)
    part = row_of(share, 0, old)
    for x in range(size):
        value = load(smooth, source, x)
        store(out, new, x, moved(rule, share, field, old, part, x, value))
