"""Readers: anything a user may call a source, opened without loading it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cdd_dask.errors import CddError, InputError, SourceNotFoundError, SourceReadError
from cdd_dask.readers.arrays import known_array, open_array, open_npy
from cdd_dask.readers.base import Source
from cdd_dask.readers.fields import BadValueError, locate_bad_value, read_field

FITS_SUFFIXES = (".fits", ".fit", ".fts", ".fits.gz", ".fits.fz", ".fits.bz2")

__all__ = ["BadValueError", "Source", "locate_bad_value", "open_source", "read_field"]


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
