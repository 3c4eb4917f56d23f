"""From a source's values to a field that can be decomposed: one type, blanks, no infinities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Grid, Region
from cdd_dask.errors import InputError
from cdd_dask.parameters import LARGEST, Parameters
from cdd_dask.readers.base import Source

SCAN_BYTES = 16_000_000
"""Bytes that a search for a bad value reads at a time."""


class BadValueError(InputError):
    """The source holds values that cannot be decomposed: infinite, or blank where none may be."""


def read_field(source: Source, region: Region, parameters: Parameters) -> NDArray[Any]:
    """The values of `region` in the working dtype, native byte order, C-contiguous, writable.

    Blank voxels are NaN, or filled if `parameters` say so.

    Raises
    ------
    BadValueError
        If a value is infinite, as large as the dtype can hold, or blank where
        `parameters` allow no blanks.
    """
    with np.errstate(over="ignore"):
        values = np.array(source.read(region), dtype=parameters.dtype, order="C")
    limit = LARGEST[parameters.dtype]
    if np.fmin.reduce(values, axis=None) < -limit or np.fmax.reduce(values, axis=None) > limit:
        raise BadValueError(f"{source.description} holds values that are not finite")
    if parameters.nan != "mask" and np.isnan(values.min()):
        if parameters.nan == "raise":
            raise BadValueError(f"{source.description} holds blank (NaN) voxels")
        values[np.isnan(values)] = parameters.fill_value
    return values


def locate_bad_value(source: Source, parameters: Parameters) -> BadValueError:
    """The error that tells where the first value of `source` is, in C order, that is refused."""
    dtype = parameters.dtype
    # as many of the last axes as fit at once: the slabs then follow each other in C order
    slab, left = [1] * len(source.shape), SCAN_BYTES // source.dtype.itemsize
    for axis in reversed(range(len(source.shape))):
        slab[axis] = max(1, min(source.shape[axis], left))
        left //= source.shape[axis]
    grid = Grid(source.shape, tuple(slab))
    for region in map(grid.core, range(len(grid))):
        raw = source.read(region)
        with np.errstate(over="ignore"):
            values = raw.astype(dtype)
        refused = np.abs(values) > LARGEST[dtype]
        if parameters.nan == "raise":
            refused |= np.isnan(values)
        bad = np.flatnonzero(refused)
        if not len(bad):
            continue
        local = np.unravel_index(bad[0], values.shape)
        place = tuple(s.start + int(i) for s, i in zip(region, local, strict=True))
        value = raw[local]
        if np.isnan(value):
            return BadValueError(
                f"{source.description} is NaN at {place}, and nan='raise': use nan=\"mask\" or "
                'nan="fill"'
            )
        if np.isinf(value):
            return BadValueError(
                f"{source.description} is {value} at {place}: replace infinities by finite values, "
                "or by NaN where the voxel is blank"
            )
        remedy = 'use dtype="float64"' if dtype == "float32" else "divide it by some power of ten"
        return BadValueError(
            f'{source.description} is {value} at {place}, too large for dtype="{dtype}": {remedy}'
        )
    return BadValueError(f"{source.description} held values that were not finite when first read")
