"""One step of diffusion on the CPU, all axes and the constraint in one go."""

# Numba reads these functions' source: they are written for it, one loop and one value at a time,
# and their arguments are what it can pass on to compiled code.

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.engines.rows import address, compiled, row_of
from cdd_dask.engines.vectors import (
    BATCH,
    LINE,
    move_across,
    move_along,
    smooth_across,
    smooth_along,
)

TILE_ROWS = 32
"""Most rows of a tile, a multiple of `BATCH`."""
TILE_WIDTH = 512
"""Most voxels of a tile along its rows."""
MARGIN = 16
"""Room on both sides of a row for what lies beyond its ends."""
LARGEST_RADIUS = MARGIN
"""Largest radius that `step` is compiled for."""
ROW = TILE_WIDTH + 4 * MARGIN
"""Distance of rows in a tile, in voxels."""
PLANE = TILE_ROWS * ROW + 16
"""Distance of planes in a tile; no multiple of a page, or their rows would share cache lines."""
CACHE = 400_000
"""Bytes that a tile's smoothed planes may take, to stay in the second-level cache."""


def scratch_arrays(
    radius: int, field: np.dtype[Any], working: np.dtype[Any], cval: float
) -> tuple[NDArray[Any], ...]:
    """Working memory of `step` for one thread and a `radius` along the first axis."""
    ring = 2 * radius + BATCH
    rows, planes = aligned(BATCH * ROW, working), aligned(ring * PLANE, working)
    rows[:] = 0
    tables = np.zeros((4, 2 * LARGEST_RADIUS + BATCH), np.uintp)
    return rows, planes, np.full(ROW, cval, field), *tables


def aligned(size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """An empty array that begins where a cache line does, which loading its rows profits from."""
    itemsize = np.dtype(dtype).itemsize
    array = np.empty(size + LINE // itemsize, dtype)
    start = -array.ctypes.data % LINE // itemsize
    return array[start : start + size]


@compiled
def _smooth_across(field, sources, ahead, work, targets, weights, width):  # type: ignore[no-untyped-def]
    """`BATCH` neighbouring rows, each smoothed across the rows of `sources`."""
    lanes = LINE // work.itemsize
    whole = width // lanes * lanes
    for x in range(0, whole, lanes):
        smooth_across(field, sources, ahead, work, targets, weights, x, ())
    if whole < width:
        smooth_across(field, sources, ahead, work, targets, weights, whole, width - whole)


@compiled
def _smooth_along(work, row, target, weights, width):  # type: ignore[no-untyped-def]
    """`BATCH` rows, `ROW` apart, each smoothed along itself."""
    for b in range(BATCH):
        by = np.uintp(b * ROW * work.itemsize)
        for x in range(0, width, LINE // work.itemsize):
            smooth_along(work, row + by, target + by, weights, x)


@compiled
def _move_along(row, source, field, out, places, share, weights, rule, width):  # type: ignore[no-untyped-def]
    """One row, smoothed along itself, and the field's moved to it."""
    lanes = LINE // row.itemsize
    whole = width // lanes * lanes
    for x in range(0, whole, lanes):
        move_along(row, source, field, out, places, share, weights, rule, x, ())
    if whole < width:
        move_along(row, source, field, out, places, share, weights, rule, whole, width - whole)


@compiled
def _move_across(planes, sources, field, out, tables, share, weights, rule, width):  # type: ignore[no-untyped-def]
    """As `_smooth_across`, and the field's rows moved to the results."""
    lanes = LINE // planes.itemsize
    whole = width // lanes * lanes
    for x in range(0, whole, lanes):
        move_across(planes, sources, field, out, tables, share, weights, rule, x, ())
    if whole < width:
        move_across(planes, sources, field, out, tables, share, weights, rule, whole, width - whole)


@compiled
def _fill(rows, start, stop, value):  # type: ignore[no-untyped-def]
    for x in range(start, stop):
        rows[np.uintp(x)] = value


@compiled
def _extend(rows, place, index, first, count, left, begin, end, cval):  # type: ignore[no-untyped-def]
    """Put what lies beyond an end of the field into `BATCH` rows, from `place` on.

    It comes from the voxels ``index[first:]``; the rows hold those from `begin` to `end`, voxel
    `left` at place 0. What they do not hold, where the field wraps around, is left to `_wrap`.
    """
    for i in range(count):
        k = index[first + i]
        target = MARGIN + place + i
        if k < 0:
            for b in range(BATCH):
                rows[np.uintp(b * ROW + target)] = cval
        elif begin <= k < end:
            source = MARGIN + k - left
            for b in range(BATCH):
                rows[np.uintp(b * ROW + target)] = rows[np.uintp(b * ROW + source)]


@compiled
def _wrap(field, sources, rows, targets, weights, by, place, width, outside):  # type: ignore[no-untyped-def]
    """Smooth the field's other end, which lies `by` voxels along the rows of `sources`.

    Whole vectors are written: what lies behind `place` has to be made afterwards.
    """
    count = BATCH + 2 * len(weights)
    for i in range(count):
        if sources[i] != address(outside, 0):
            sources[i] += np.uintp(by * field.itemsize)
    for b in range(BATCH):
        targets[b] = address(rows, b * ROW + place)
    _smooth_across(field, sources, 0, rows, targets, weights, width)
    for i in range(count):
        if sources[i] != address(outside, 0):
            sources[i] -= np.uintp(by * field.itemsize)


@compiled
def step(field, out, share, shape, region, index, weights, rule, cval, scratch):  # type: ignore[no-untyped-def]
    """One step of diffusion of a region of `field`, written to `out`.

    A tile of rows goes along the first axis. Every plane of it is smoothed along the second and
    the third axis, and kept in a ring of ``2 r + BATCH`` planes, from which `BATCH` planes are
    smoothed along the first::

        field ──across──→ rows ──along──→ ring of planes ──across──→ out

    Parameters
    ----------
    field, out
        Flat arrays of ``shape``; not the same. Blank voxels are 0.
    share
        What blanks leave of the kernel, like `field`, infinite where blank; or ``()``.
    shape
        ``(nz, ny, nx)``.
    region
        ``(z0, z1, y0, y1)``: what to compute, of whole rows.
    index
        Per axis where the values at ``-r … n + r - 1`` (and `BATCH` more) come from; -1 where
        they are `cval`.
    weights
        Per axis, twice the weights at distances 1 to `r`; none along an axis to leave alone.
    rule
        One of `RULES`.
    cval
        Value beyond the field.
    scratch
        Arrays as `scratch_arrays` makes them.
    """
    _, ny, nx = shape
    z0, z1, y0, y1 = region
    zi, yi, xi = index
    wz, wy, wx = weights
    rows, planes, outside, sources, targets, centres, shares = scratch
    rz, ry, rx = len(wz), len(wy), len(wx)
    ring = 2 * rz + BATCH
    tiles = (nx + TILE_WIDTH - 1) // TILE_WIDTH
    tile = (nx + tiles - 1) // tiles
    high = CACHE // (ring * tile * rows.itemsize) // BATCH * BATCH
    high = max(BATCH, min(TILE_ROWS, high))
    for top in range(y0, y1, high):
        bottom = min(top + high, y1)
        for t in range(tiles):
            left = nx * t // tiles
            width = nx * (t + 1) // tiles - left
            begin, end = max(left - rx, 0), min(left + width + rx, nx)
            plane = z0 - rz  # the next to smooth
            newest, oldest = 0, 0  # their places in the ring
            for z in range(z0, z1, BATCH):
                while plane < z + BATCH + rz:
                    source = zi[plane + rz]
                    for y in range(top, bottom, BATCH):
                        if source < 0:
                            for b in range(BATCH):
                                start = newest * PLANE + (y - top + b) * ROW
                                _fill(planes, start, start + width, cval)
                            continue
                        for i in range(BATCH + 2 * ry):
                            k = yi[y + i]
                            if k < 0:
                                sources[i] = address(outside, 0)
                            else:
                                sources[i] = address(field, (source * ny + k) * nx + begin)
                        if rx > 0 and left == 0 and xi[0] >= end:  # beyond is the other end
                            by = nx - rx - begin
                            _wrap(field, sources, rows, targets, wy, by, MARGIN - rx, rx, outside)
                        for b in range(BATCH):
                            targets[b] = address(rows, b * ROW + MARGIN + begin - left)
                        _smooth_across(field, sources, BATCH * nx, rows, targets, wy, end - begin)
                        if rx > 0 and left + width == nx and 0 <= xi[nx + rx] < begin:
                            _wrap(
                                field,
                                sources,
                                rows,
                                targets,
                                wy,
                                -begin,
                                MARGIN + width,
                                rx,
                                outside,
                            )
                        if left == 0:
                            _extend(rows, -rx, xi, 0, rx, left, begin, end, cval)
                        if left + width == nx:
                            _extend(rows, width, xi, nx + rx, rx, left, begin, end, cval)
                        if rz > 0:
                            target = address(planes, newest * PLANE + (y - top) * ROW)
                            _smooth_along(rows, address(rows, MARGIN), target, wx, width)
                            continue
                        for b in range(min(BATCH, bottom - y)):
                            row = address(rows, b * ROW + MARGIN)
                            place = (plane * ny + y + b) * nx + left
                            old, new = address(field, place), address(out, place)
                            places = (old, new, row_of(share, place, old))
                            _move_along(rows, row, field, out, places, share, wx, rule, width)
                    plane += 1
                    newest = newest + 1 if newest + 1 < ring else 0
                    if rz == 0 and plane == z1:
                        break
                if rz == 0:
                    continue
                for y in range(top, bottom):
                    for i in range(ring):
                        slot = oldest + i if oldest + i < ring else oldest + i - ring
                        sources[i] = address(planes, slot * PLANE + (y - top) * ROW)
                    for b in range(BATCH):
                        if z + b < z1:
                            place = ((z + b) * ny + y) * nx + left
                            centres[b], targets[b] = address(field, place), address(out, place)
                            shares[b] = row_of(share, place, centres[b])
                        else:  # no such plane: compute it for nothing
                            centres[b] = targets[b] = address(rows, b * ROW)
                            shares[b] = shares[0]
                    tables = (targets, centres, shares)
                    _move_across(planes, sources, field, out, tables, share, wz, rule, width)
                oldest = (oldest + BATCH) % ring
