"""Readers: anything a user may call a source, opened without loading it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Grid, Region
from cdd_dask.errors import CddError, InputError, SourceNotFoundError, SourceReadError
from cdd_dask.readers.arrays import known_array, open_array, open_npy
from cdd_dask.readers.base import Source

FITS_SUFFIXES = (".fits", ".fit", ".fts", ".fits.gz", ".fits.fz", ".fits.bz2")
SCAN_BYTES = 16_000_000
"""Bytes that a search for a bad value reads at a time."""

__all__ = ["NonFiniteError", "Source", "locate_nonfinite", "open_source", "read_finite"]


class NonFiniteError(InputError):
    """The source holds a NaN or an infinity."""


def open_source(source: Any) -> Source:
    """Open `source` for reading by region; nothing but metadata is read.

    Parameters
    ----------
    source
        A path (Zarr, FITS, `.npy`), a URL of a Zarr array, a NumPy, torch, dask, xarray or
        Zarr array, or the `address` of a `Source`.

    Raises
    ------
    SourceNotFoundError
        If the path does not exist.
    SourceReadError
        If it cannot be read.
    InputError
        If its shape or dtype is none that can be decomposed.
    """
    if not isinstance(source, str | Path):
        if type(source).__module__.split(".")[0] == "zarr":
            from cdd_dask.readers.zarr_arrays import zarr_source

            if not hasattr(source, "dtype"):
                raise InputError("source is a Zarr group: name one of its arrays")
            return zarr_source(source)
        return open_array(source)
    try:
        return _open_address(str(source).removeprefix("file://"))
    except CddError:
        raise
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise SourceReadError(
            f"source {source} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _open_address(address: str) -> Source:
    """Open a path, a URL, or an array in this process that has an address."""
    if address.startswith("object:"):
        return known_array(address)
    if "://" in address:
        from cdd_dask.readers.zarr_arrays import open_zarr

        return open_zarr(address)
    path = Path(os.path.abspath(Path(address).expanduser()))
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise SourceReadError(f"source {path} cannot be read: {error}") from error
    if is_file and path.name.lower().endswith(FITS_SUFFIXES):
        from cdd_dask.readers.fits import open_fits

        return open_fits(path)
    if is_file and path.suffix == ".npy":
        return open_npy(path)
    if is_folder:
        from cdd_dask.readers.zarr_arrays import open_zarr

        return open_zarr(str(path))
    if not path.exists():
        raise SourceNotFoundError(f"source {path} does not exist")
    raise SourceReadError(
        f"source {path} is of an unknown kind: give a Zarr array, a FITS file "
        f"({', '.join(FITS_SUFFIXES[:3])}) or a .npy file"
    )


def read_finite(source: Source, region: Region, dtype: str) -> NDArray[Any]:
    """The values of `region` in the working `dtype`, native byte order, C-contiguous, writable.

    Raises
    ------
    NonFiniteError
        If one of them is NaN or infinite, or within a factor 8 of what `dtype` can hold.
    """
    with np.errstate(over="ignore"):
        values = np.array(source.read(region), dtype=dtype, order="C")
    limit = _limit(dtype)
    # the extremes of an array with a NaN are NaN, which is not within anything
    if not (-limit <= values.min() and values.max() <= limit):
        raise NonFiniteError(f"{source.description} holds values that are not finite")
    return values


def _limit(dtype: str) -> float:
    """Largest absolute value whose sums and differences with a few others stay finite."""
    return float(np.finfo(dtype).max) / 8


def locate_nonfinite(source: Source, dtype: str) -> NonFiniteError:
    """The error that tells where the first NaN or infinity of `source` is, in C order."""
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
        bad = np.flatnonzero(~(np.abs(values) <= _limit(dtype)))
        if not len(bad):
            continue
        local = np.unravel_index(bad[0], values.shape)
        place = tuple(s.start + int(i) for s, i in zip(region, local, strict=True))
        value = raw[local]
        if np.isnan(value):
            blank = " (every voxel looked at is)" if len(bad) == values.size else ""
            return NonFiniteError(
                f"{source.description} is NaN at {place}{blank}: fill blank voxels first, for "
                "example with numpy.nan_to_num"
            )
        if np.isinf(value):
            return NonFiniteError(
                f"{source.description} is {value} at {place}: replace infinities by finite values"
            )
        remedy = 'use dtype="float64"' if dtype == "float32" else "divide it by some power of ten"
        return NonFiniteError(
            f'{source.description} is {value} at {place}, too large for dtype="{dtype}": {remedy}'
        )
    return NonFiniteError(f"{source.description} held values that were not finite when first read")
