"""Between the full grid and ever coarser ones, on the CPU.

Down, cells are means of four voxels with the weights ``[1, 3, 3, 1] / 8`` along every axis that is
halved; up, voxels lie between two cells with the weights 3/4 and 1/4. Both leave a constant field
as it is, to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.engines.rows import (
    address,
    between_along,
    blended,
    compiled,
    gathered,
    load,
    mean_along,
    moved,
    row_of,
    store,
)

CACHE = 400_000
"""Bytes of the rows that neighbouring cells share, to stay in the second-level cache."""


def row_arrays(
    length: int, field: np.dtype[Any], working: np.dtype[Any], cval: float
) -> tuple[NDArray[Any], ...]:
    """Working memory of `gather` and `spread` for one thread and rows of `length`."""
    row, cells = (np.zeros(length + 4, working) for _ in range(2))
    return row, cells, np.full(length, cval, field), np.zeros(16, np.uintp)


@compiled
def _gather_across(field, sources, target, row, halve, width):  # type: ignore[no-untyped-def]
    for x in range(width):
        store(target, row, x, gathered(target, field, sources, halve, x))


@compiled
def _blend_across(coarse, sources, target, row, halve, width):  # type: ignore[no-untyped-def]
    for x in range(width):
        store(target, row, x, blended(coarse, sources, halve, x))


@compiled
def _halve_along(row, source, target, cells, width):  # type: ignore[no-untyped-def]
    for x in range(width):
        store(target, cells, x, mean_along(row, source, 2 * x))


@compiled
def _copy_along(row, source, target, cells, width):  # type: ignore[no-untyped-def]
    for x in range(width):
        store(target, cells, x, load(row, source, x))


@compiled
def _double_along(row, source, target, width):  # type: ignore[no-untyped-def]
    for x in range(width):
        store(row, target, 2 * x, between_along(row, source, x, x - 1))
        store(row, target, 2 * x + 1, between_along(row, source, x, x + 1))


@compiled
def _move(row, source, field, out, places, share, rule, width):  # type: ignore[no-untyped-def]
    old, new, part = places
    for x in range(width):
        smooth = load(row, source, x)
        store(out, new, x, moved(rule, share, field, old, part, x, smooth))


@compiled
def gather(field, shape, coarse, coarse_shape, region, index, before, halve, cval, scratch):  # type: ignore[no-untyped-def]
    """Cells of a coarser grid from a field.

    Parameters
    ----------
    field, coarse
        Flat arrays of ``shape`` and ``coarse_shape``.
    region
        ``(z0, z1, y0, y1)``: the rows of cells to compute.
    index
        Per axis where the voxels come from, -1 for `cval`: along a halved axis the four of cell
        `i` are at ``2 i … 2 i + 3``, along others voxel `i` is.
    before
        How many of the last axis' voxels lie before the field.
    halve
        Per axis ``(0,)`` where it is halved, else ``()``.
    cval
        Value beyond the field.
    scratch
        ``(row, _, outside, sources)`` as `row_arrays` makes them.
    """
    _, ny, nx = shape
    _, my, mx = coarse_shape
    zi, yi, xi = index
    hz, hy, hx = halve
    row, _, outside, sources = scratch
    nearest_z, nearest_y = (4 if len(hz) else 1), (4 if len(hy) else 1)
    stride_z, stride_y = (2 if len(hz) else 1), (2 if len(hy) else 1)
    z0, z1, y0, y1 = region
    for z in range(z0, z1):
        for y in range(y0, y1):
            for j in range(nearest_y):
                for i in range(nearest_z):
                    plane, line = zi[stride_z * z + i], yi[stride_y * y + j]
                    if plane < 0 or line < 0:
                        sources[j * nearest_z + i] = address(outside, 0)
                    else:
                        sources[j * nearest_z + i] = address(field, (plane * ny + line) * nx)
            _gather_across(field, sources, row, address(row, before), hz + hy, nx)
            for x in range(before):
                row[np.uintp(x)] = cval if xi[x] < 0 else row[np.uintp(before + xi[x])]
            for x in range(before + nx, len(xi)):
                row[np.uintp(x)] = cval if xi[x] < 0 else row[np.uintp(before + xi[x])]
            source, target = address(row, 0), address(coarse, (z * my + y) * mx)
            if len(hx):
                _halve_along(row, source, coarse, target, mx)
            else:
                _copy_along(row, source, coarse, target, mx)


@compiled
def spread(coarse, coarse_shape, field, out, share, shape, region, index, halve, rule, scratch):  # type: ignore[no-untyped-def]
    """Voxels between the cells of a coarser grid, the field moved to them.

    Parameters
    ----------
    coarse
        Flat array of ``coarse_shape``.
    field, out
        Flat arrays of ``shape``; may be the same.
    share
        As in `fused.step`.
    region
        ``(z0, z1, y0, y1)``: the rows to compute.
    index
        Along the first two axes ``(near, far)``, a voxel's cell and the neighbour on the voxel's
        side; along the last ``(before, first, last)``: half cells before the field, and the cells
        that stand for those before the first and behind the last.
    halve
        Per axis ``(0,)`` where it is halved, else ``()``.
    rule
        One of `rows.RULES`.
    scratch
        ``(row, cells, _, sources)`` as `row_arrays` makes them.
    """
    _, ny, nx = shape
    _, my, mx = coarse_shape
    (z_near, z_far), (y_near, y_far), (before, first, last) = index
    hz, hy, hx = halve
    row, cells, _, sources = scratch
    z0, z1, y0, y1 = region
    for z in range(z0, z1):
        for y in range(y0, y1):
            count = 0
            for j in range(1 + len(hy)):
                line = y_far[y] if j else y_near[y]
                for i in range(1 + len(hz)):
                    plane = z_far[z] if i else z_near[z]
                    sources[count] = address(coarse, (plane * my + line) * mx)
                    count += 1
            place = (z * ny + y) * nx
            old, new = address(field, place), address(out, place)
            places = (old, new, row_of(share, place, old))
            _blend_across(coarse, sources, cells, address(cells, 1), hz + hy, mx)
            if len(hx):
                cells[0], cells[np.uintp(mx + 1)] = (
                    cells[np.uintp(first + 1)],
                    cells[np.uintp(last + 1)],
                )
                source = address(cells, 1 + before // 2)
                odd = before % 2
                _double_along(row, source, address(row, 0), (nx + odd + 1) // 2)
                _move(row, address(row, odd), field, out, places, share, rule, nx)
            else:
                source = address(cells, 1 + before)
                _move(cells, source, field, out, places, share, rule, nx)
