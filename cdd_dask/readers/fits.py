"""FITS images: mapped, or decoded tile by tile where they are compressed; never loaded whole."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Region
from cdd_dask.errors import InputError, MissingDependencyError, SourceReadError
from cdd_dask.readers.base import Source, check_decodable, squeezed
from cdd_dask.readers.regions import read_region
from cdd_dask.readers.units import plain_unit

AXIS_NAMES = {
    "RA": "x", "GLON": "x", "DEC": "y", "GLAT": "y",
    "VELO": "v", "VRAD": "v", "VOPT": "v", "FELO": "v",
    "FREQ": "f", "WAVE": "w", "AWAV": "w", "STOKES": "s",
}  # fmt: skip
"""Names of axes by the first part of their FITS type (``CTYPE``)."""
PACKED = (b"\x1f\x8b", b"BZ", b"PK", b"\x1f\x9d", b"\xfd7")
"""How files begin that are compressed as a whole: astropy would unpack them into memory."""
MOST_AXES = 999
"""Axes of an image, and columns of a table, that the FITS standard allows (4.4.1, 7.2.1)."""


def open_fits(path: Path, part: str | None = None) -> Source:
    """A source that reads an image of a FITS file.

    ``BSCALE`` and ``BZERO`` are applied, ``BLANK`` integers become NaN, and axes of length 1 are
    left out.

    Parameters
    ----------
    path
        The file.
    part
        Number or name of the HDU, or ``NAME,VERSION``; None takes the first image.

    Raises
    ------
    MissingDependencyError
        If astropy is not installed.
    InputError
        If there is no such HDU, or it is no image; the message lists those that are.
    SourceReadError
        If the file is damaged, truncated, compressed as a whole or holds no image.
    """
    try:
        from astropy.io import fits
        from astropy.io.fits.verify import VerifyError
    except ImportError as error:
        raise MissingDependencyError(
            f'reading {path} needs astropy: pip install "cdd-dask[fits]"'
        ) from error
    with path.open("rb") as file:
        if file.read(2) in PACKED:
            raise SourceReadError(
                f"{path} is compressed as a whole and cannot be mapped: uncompress it first "
                "(gunzip, bunzip2)"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file our errors tell
            _check_counts(path, 0)  # opening reads the first HDU
            with fits.open(path, memmap=True, do_not_scale_image_data=True) as hdus:
                number = _choose(path, hdus, part)
                hdu = hdus[number]
                header, shape = hdu.header.copy(), tuple(hdu.shape)
                compressed = isinstance(hdu, fits.CompImageHDU)
                tile = tuple(map(int, hdu.tile_shape)) if compressed else None
                offset = 0 if compressed else hdu.fileinfo()["datLoc"]
    except (OSError, ValueError, TypeError, IndexError, KeyError, VerifyError) as error:
        if isinstance(error, InputError | SourceReadError):
            raise
        raise SourceReadError(f"{path} is no readable FITS file: {error}") from error
    kept = squeezed(shape)
    if tile is not None:
        check_decodable(path, tile, 8)
        array: Any = _CompressedImage(path, number, shape, kept)
        dtype = array.dtype
    else:
        array = _MappedImage(path, header, offset, shape, kept)
        dtype = array.dtype
    spacing, units = _spacing(header, kept)
    address = str(path) if part is None else f"{path}::{part}"
    return Source(
        description=address,
        address=address,
        portable=True,
        lazy=False,
        is_zarr=False,
        shape=array.shape,
        dtype=dtype,
        fetch=array.read,
        chunk=tile and tuple(tile[axis] for axis in kept),
        dimension_names=_axis_names(header, len(shape), kept),
        header=header.tostring(sep="\n"),
        spacing=spacing,
        units=units,
        file_shape=shape if len(kept) < len(shape) else None,
    )


def _check_counts(path: Path, place: int) -> None:
    """Refuse the HDU at a place in a file if it has more axes than there are.

    astropy looks for a keyword of every axis or column that a header promises, for hours where
    that is a damaged number.

    Raises
    ------
    SourceReadError
        If the header promises more than `MOST_AXES` axes or columns, or fewer than none.
    """
    from astropy.io.fits import Header

    with path.open("rb") as file:
        file.seek(place)
        try:
            header = Header.fromfile(file)
        except (EOFError, OSError, ValueError):
            return  # the end of the file, or what astropy will tell of
    for key in ("NAXIS", "ZNAXIS", "TFIELDS"):
        count = header.get(key, 0)
        if not (isinstance(count, int) and 0 <= count <= MOST_AXES):
            raise SourceReadError(
                f"{path} is damaged: {key} = {count!r} in the header at byte {place} is no "
                f"integer of 0 to {MOST_AXES}"
            )


def _choose(path: Path, hdus: Any, part: str | None) -> int:
    """Number of the HDU that `part` means: an image with data."""
    images: dict[int, Any] = {}
    place = 0
    for n, hdu in enumerate(hdus):
        if hdu.is_image and hdu.header.get("NAXIS", 0) > 0:
            images[n] = hdu
        where = hdu.fileinfo()
        # of a negative size the next HDU would be the same again, for ever
        if (end := where["datLoc"] + where["datSpan"]) <= place:
            raise SourceReadError(f"{path} is damaged: HDU {n} ends before it begins")
        place = end
        _check_counts(path, place)
    if not images:
        raise SourceReadError(f"{path} holds no FITS image")
    if part is None:
        first: int = next(iter(images))
        return first
    name, _, version = part.partition(",")
    wanted: Any = int(part) if part.isdecimal() else name.strip()
    if version.strip().isdecimal():
        wanted = (name.strip(), int(version))
    try:
        number = int(hdus.index_of(wanted))
    except KeyError:
        number = -1
    if number not in images:
        listed = ", ".join(
            f"{n} ({h.name or 'no name'}, {' × '.join(map(str, h.shape))})"
            for n, h in list(images.items())[:8]
        )
        raise InputError(f"{path} has no image in HDU {part!r}: choose one of {listed}")
    return number


class _MappedImage:
    """An image that is not compressed, with its scaling."""

    def __init__(
        self, path: Path, header: Any, offset: int, shape: tuple[int, ...], kept: tuple[int, ...]
    ) -> None:
        from astropy.io import fits

        stored = np.dtype(fits.BITPIX2DTYPE[header["BITPIX"]]).newbyteorder(">")
        expected, present = offset + stored.itemsize * math.prod(shape), path.stat().st_size
        if present < expected:
            raise SourceReadError(
                f"{path} is truncated: its header promises {expected} bytes, it has {present}"
            )
        self.shape = tuple(shape[axis] for axis in kept)
        empty = 0 in shape
        self._mapped: NDArray[Any] = (
            np.empty(self.shape) if empty else np.memmap(path, stored, "r", offset, self.shape)
        )
        self._scale, self._zero = (
            float(header.get(key, default)) for key, default in (("BSCALE", 1), ("BZERO", 0))
        )
        self._blank = header.get("BLANK") if stored.kind in "iu" else None
        self._plain = (self._scale, self._zero, self._blank) == (1, 0, None)
        self.dtype = stored if self._plain else np.dtype(np.float64)

    def read(self, region: Region) -> NDArray[Any]:
        values = read_region(self._mapped, region)
        if self._plain:
            return values
        scaled = values.astype(np.float64) * self._scale + self._zero
        if self._blank is not None:
            scaled[values == self._blank] = np.nan
        return scaled


class _CompressedImage:
    """An image compressed tile by tile; opened for every region, which decodes its tiles."""

    def __init__(
        self, path: Path, number: int, shape: tuple[int, ...], kept: tuple[int, ...]
    ) -> None:
        self._path, self._number = path, number
        self._full, self._kept = shape, kept
        self.shape = tuple(shape[axis] for axis in kept)
        self.dtype = self[(slice(0, 1),) * len(kept)].dtype

    def read(self, region: Region) -> NDArray[Any]:
        return read_region(self, region)

    def __getitem__(self, region: Region) -> NDArray[Any]:
        from astropy.io import fits

        where: list[Any] = [slice(0, 1)] * len(self._full)
        for axis, part in zip(self._kept, region, strict=True):
            where[axis] = part
        try:
            with fits.open(self._path) as hdus:
                values = np.asarray(hdus[self._number].section[tuple(where)])
        except (OSError, ValueError, TypeError, IndexError, KeyError) as error:
            raise SourceReadError(f"{self._path} cannot be decompressed: {error}") from error
        return values.reshape([s.stop - s.start for s in region])


def _axis_names(header: Any, ndim: int, kept: tuple[int, ...]) -> tuple[str, ...] | None:
    """Names of the axes in NumPy's order, where the header knows them all apart."""
    types = [str(header.get(f"CTYPE{ndim - axis}", "")) for axis in kept]
    names = [AXIS_NAMES.get(kind.split("-")[0].strip(), "") for kind in types]
    return tuple(names) if all(names) and len(set(names)) == len(kept) else None


def _spacing(
    header: Any, kept: tuple[int, ...]
) -> tuple[tuple[float, ...] | None, tuple[str | None, ...] | None]:
    """Distance of neighbouring pixels and its unit per axis, where the header states them."""
    from astropy.wcs import WCS
    from astropy.wcs.utils import proj_plane_pixel_scales

    if not any(key.startswith(("CDELT", "CD1_", "CD2_", "CD3_", "PC")) for key in header):
        return None, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what astropy mends in a header, it also tells of
            world = WCS(header)
            scales = [float(scale) for scale in proj_plane_pixel_scales(world)]
            units = [plain_unit(unit.to_string().replace(" ", "")) for unit in world.wcs.cunit]
    except Exception:  # whatever is wrong with a world must not keep the pixels from being read
        return None, None
    last = len(scales) - 1  # FITS counts axes from the fastest
    if last < max(kept):
        return None, None
    spacing = tuple(scales[last - axis] for axis in kept)
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        return None, None
    return spacing, tuple(units[last - axis] for axis in kept)
