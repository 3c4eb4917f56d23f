"""FITS images: mapped, never loaded as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Region
from cdd_dask.errors import MissingDependencyError, SourceReadError
from cdd_dask.readers.base import Source
from cdd_dask.readers.regions import read_region

AXIS_NAMES = {
    "RA": "x", "GLON": "x", "DEC": "y", "GLAT": "y",
    "VELO": "v", "VRAD": "v", "VOPT": "v", "FELO": "v",
    "FREQ": "f", "WAVE": "w", "AWAV": "w", "STOKES": "s",
}  # fmt: skip
"""Names of axes by the first part of their FITS type (``CTYPE``)."""


def open_fits(path: Path) -> Source:
    """A source that reads the first image of a FITS file.

    ``BSCALE`` and ``BZERO`` are applied, ``BLANK`` integers become NaN.

    Raises
    ------
    MissingDependencyError
        If astropy is not installed.
    SourceReadError
        If the file is damaged, truncated, compressed or holds no image.
    """
    try:
        from astropy.io import fits
        from astropy.io.fits.verify import VerifyError
    except ImportError as error:
        raise MissingDependencyError(
            f'reading {path} needs astropy: pip install "cdd-dask[fits]"'
        ) from error
    try:
        with fits.open(path, memmap=True, do_not_scale_image_data=True) as hdus:
            hdu = next((h for h in hdus if h.is_image and h.header.get("NAXIS", 0) > 0), None)
            if hdu is None:
                raise SourceReadError(f"{path} holds no FITS image")
            if isinstance(hdu, fits.CompImageHDU) or _is_packed(path):
                raise SourceReadError(
                    f"{path} is compressed and cannot be mapped: uncompress it first "
                    "(gunzip, funpack)"
                )
            header, offset, shape = hdu.header.copy(), hdu.fileinfo()["datLoc"], hdu.shape
    except (OSError, ValueError, TypeError, IndexError, KeyError, VerifyError) as error:
        if isinstance(error, SourceReadError):
            raise
        raise SourceReadError(f"{path} is no readable FITS file: {error}") from error
    stored = np.dtype(fits.BITPIX2DTYPE[header["BITPIX"]]).newbyteorder(">")
    expected, present = offset + stored.itemsize * int(np.prod(shape)), path.stat().st_size
    if present < expected:
        raise SourceReadError(
            f"{path} is truncated: its header promises {expected} bytes, it has {present}"
        )
    mapped = np.memmap(path, stored, "r", offset, shape) if 0 not in shape else np.empty(shape)
    scale, zero = header.get("BSCALE", 1), header.get("BZERO", 0)
    blank = header.get("BLANK") if stored.kind in "iu" else None
    plain = (scale, zero, blank) == (1, 0, None)

    def read(region: Region) -> NDArray[Any]:
        values = read_region(mapped, region)
        if plain:
            return values
        scaled = values * np.float64(scale) + np.float64(zero)
        if blank is not None:
            scaled[values == blank] = np.nan
        return scaled

    return Source(
        description=str(path),
        address=str(path),
        portable=True,
        lazy=False,
        is_zarr=False,
        shape=tuple(shape),
        dtype=stored if plain else np.dtype(np.float64),
        read=read,
        dimension_names=_axis_names(header, len(shape)),
        header=header.tostring(sep="\n"),
    )


def _is_packed(path: Path) -> bool:
    """Whether a whole file is compressed, whatever it is called: astropy would unpack it."""
    with path.open("rb") as file:
        return file.read(2) in (b"\x1f\x8b", b"BZ", b"PK", b"\x1f\x9d", b"\xfd7")


def _axis_names(header: Any, ndim: int) -> tuple[str, ...] | None:
    """Names of the axes in NumPy's order, where the header knows them all apart."""
    types = [str(header.get(f"CTYPE{ndim - axis}", "")) for axis in range(ndim)]
    names = [AXIS_NAMES.get(kind.split("-")[0].strip(), "") for kind in types]
    return tuple(names) if all(names) and len(set(names)) == ndim else None
