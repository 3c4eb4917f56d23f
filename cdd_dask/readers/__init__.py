"""Readers: anything a user may call a source, opened without loading it."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from cdd_dask.addresses import check_address
from cdd_dask.errors import CddError, InputError, SourceNotFoundError, SourceReadError
from cdd_dask.readers.arrays import known_array, open_array, open_npy
from cdd_dask.readers.base import Source, split_address
from cdd_dask.readers.fields import BadValueError, locate_bad_value, read_field

Opener = Callable[[Path, str | None], Source]

SUFFIXES = {
    ".npy": "npy", ".fits": "fits", ".fit": "fits", ".fts": "fits", ".fits.gz": "fits",
    ".fits.fz": "fits", ".fits.bz2": "fits", ".h5": "hdf5", ".hdf5": "hdf5", ".hdf": "hdf5",
    ".he5": "hdf5", ".tif": "tiff", ".tiff": "tiff", ".btf": "tiff", ".nii": "nifti",
    ".nii.gz": "nifti", ".hdr": "nifti", ".img": "nifti",
}  # fmt: skip
"""Formats by the end of a file's name."""
SIGNATURES = {
    b"\x89HDF\r\n\x1a\n": "hdf5", b"SIMPLE  =": "fits", b"\x93NUMPY": "npy",
    b"II*\0": "tiff", b"MM\0*": "tiff", b"II+\0": "tiff", b"MM\0+": "tiff",
}  # fmt: skip
"""Formats by how a file of another name begins."""

__all__ = ["BadValueError", "Source", "locate_bad_value", "open_source", "read_field"]


def open_source(source: Any) -> Source:
    """Open `source` for reading by region; nothing but metadata is read.

    Parameters
    ----------
    source
        A path (Zarr, FITS, HDF5, TIFF, NIfTI, `.npy`; ``file::part`` for an HDU, a dataset or
        a series), a URL of a Zarr array, a NumPy, torch, dask, xarray or Zarr array, or the
        `address` of a `Source`.

    Raises
    ------
    SourceNotFoundError
        If the path does not exist.
    SourceReadError
        If it cannot be read.
    InputError
        If its shape or dtype is none that can be decomposed, or its address holds credentials.
    """
    if not isinstance(source, str | Path):
        if type(source).__module__.split(".")[0] == "zarr":
            from cdd_dask.readers.zarr_arrays import zarr_source

            if not hasattr(source, "dtype"):
                raise InputError("source is a Zarr group: name one of its arrays")
            return zarr_source(source)
        return open_array(source)
    check_address("source", str(source))
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
    name, part = split_address(os.path.expanduser(address))
    path = Path(os.path.abspath(name))
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise SourceReadError(f"source {path} cannot be read: {error}") from error
    if is_file:
        return _opener(path)(path, part)
    if is_folder and part is None:
        from cdd_dask.readers.zarr_arrays import open_zarr

        return open_zarr(str(path))
    if is_folder:
        raise InputError(f"source {address}: name an array in {path} by its path, {path}/{part}")
    if not path.exists():
        raise SourceNotFoundError(f"source {path} does not exist")
    raise SourceReadError(f"source {path} is neither a file nor a folder")


def _opener(path: Path) -> Opener:
    """What opens a file, by its name or else by how it begins."""
    name = path.name.lower()
    kind = next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)
    if kind is None:
        with path.open("rb") as file:
            begin = file.read(16)
        kind = next((kind for sign, kind in SIGNATURES.items() if begin.startswith(sign)), None)
    if kind == "npy":
        return _open_npy
    if kind is None:
        raise SourceReadError(
            f"source {path} is of an unknown kind: give a Zarr array or a file of "
            f"{', '.join(dict.fromkeys(SUFFIXES.values()))}"
        )
    # each imports its library when it opens a file
    module = import_module(f"cdd_dask.readers.{kind}")
    opener: Opener = getattr(module, f"open_{kind}")
    return opener


def _open_npy(path: Path, part: str | None) -> Source:
    if part is not None:
        raise InputError(f"source {path} is one array and has no parts: leave out ::{part}")
    return open_npy(path)
