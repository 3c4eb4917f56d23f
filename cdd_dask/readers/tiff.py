"""TIFF, BigTIFF, OME-TIFF and ImageJ stacks: mapped, or decoded page by page where compressed."""

from __future__ import annotations

import logging
import math
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Region
from cdd_dask.errors import InputError, MissingDependencyError, SourceReadError
from cdd_dask.readers.base import Source, check_decodable, squeezed
from cdd_dask.readers.regions import read_region
from cdd_dask.readers.units import plain_unit

METRES = {"Å": 1e-10, "nm": 1e-9, "µm": 1e-6, "mm": 1e-3, "cm": 1e-2, "m": 1.0}


def open_tiff(path: Path, part: str | None = None) -> Source:
    """A source that reads a series of a TIFF file, at its full resolution.

    Parameters
    ----------
    path
        The file.
    part
        Number of the series, from 0; None takes the first.

    Raises
    ------
    MissingDependencyError
        If tifffile is not installed, or imagecodecs, which some compressions need.
    InputError
        If there is no such series; the message lists those that are there.
    SourceReadError
        If the file is damaged, truncated or holds no image.
    """
    with _open(path) as file:
        _check_pages(path, file)
        number = _choose(path, file, part)
        series = file.series[number]
        full, axes = tuple(map(int, series.shape)), series.axes.lower()
        offset = series.dataoffset
        page = series.keyframe
        # those of an OME-TIFF lie in files that its metadata name, and which need not be this one
        pages = series.pages if series.is_multifile else [page]
        # what a page does not tell of, or what is in another file, tifffile would read as zeros
        told, parts = len(page.dataoffsets), math.prod(page.chunked)
        if offset is None and told < parts and not page.is_lsm:
            raise SourceReadError(
                f"{path} is damaged: its header tells where {told} of {parts} parts of an image lie"
            )
        if series.kind == "ome" and any(one is None for one in series.pages):
            raise SourceReadError(f"{path} lacks pages: a file that its metadata name is not there")
        files = [Path(one.parent.filehandle.path) for one in pages]
        stored = np.dtype(series.dtype).newbyteorder(page.parent.byteorder)
        tile = tuple(map(int, page.chunks)) if page.chunks else ()
        header = file.ome_metadata or file.pages.first.description or None
        steps = _spacing(file, number)
    kept = squeezed(full)
    shape = tuple(full[axis] for axis in kept)
    if offset is not None:
        expected, present = offset + stored.itemsize * math.prod(full), files[0].stat().st_size
        if present < expected:
            raise SourceReadError(
                f"{files[0]} is truncated: its pages need {expected} bytes, it has {present}"
            )
        array: Any = np.memmap(files[0], stored, "r", offset, shape)
        chunk = None
    else:
        check_decodable(path, tile or full, stored.itemsize)
        array = _Pages(path, number, full, kept, stored)
        array[(slice(0, 1),) * len(kept)]  # what cannot be decoded is refused before a run
        # pages are decoded whole, or tile by tile
        chunks = (1,) * (len(full) - len(tile)) + tile[-len(full) :]
        chunk = tuple(min(chunks[axis], full[axis]) for axis in kept)
    names = tuple(axes[axis] for axis in kept)
    spacing = tuple(steps.get(name, (1.0, None))[0] for name in names)
    units = tuple(steps.get(name, (1.0, None))[1] for name in names)
    address = str(path) if part is None else f"{path}::{part}"
    return Source(
        description=address,
        address=address,
        portable=True,
        lazy=False,
        is_zarr=False,
        shape=shape,
        dtype=stored,
        fetch=lambda region: read_region(array, region),
        dimension_names=names if set(names) <= set("tczyxs") else None,
        chunk=chunk,
        header=header,
        spacing=spacing if set(names) & steps.keys() else None,
        units=units if set(names) & steps.keys() else None,
        file_shape=full if len(kept) < len(full) else None,
        further_files=tuple(dict.fromkeys(files)),
    )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The file, opened; whatever goes wrong with it is one line that names it."""
    try:
        import tifffile
    except ImportError as error:
        raise MissingDependencyError(
            f'reading {path} needs tifffile: pip install "cdd-dask[tiff]"'
        ) from error
    # what is wrong with a file is told by our own errors
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with tifffile.TiffFile(path) as file:
            yield file
    except Exception as error:  # a damaged file makes its reader fail in any way
        if isinstance(error, InputError | SourceReadError):
            raise
        if "imagecodecs" in str(error) or isinstance(error, ImportError):
            raise MissingDependencyError(
                f"{path} is compressed in a way that needs imagecodecs: pip install imagecodecs"
            ) from error
        raise SourceReadError(f"{path} is no readable TIFF file: {error}") from error


def _check_pages(path: Path, file: Any) -> None:
    """Refuse a file whose list of pages ends beyond it: tifffile takes what it finds for all."""
    layout, handle = file.tiff, file.filehandle
    handle.seek(file.pages[-1].offset)
    (tags,) = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))
    handle.seek(tags * layout.tagsize, 1)
    following = handle.read(layout.offsetsize)
    whole = len(following) == layout.offsetsize
    if not whole or struct.unpack(layout.offsetformat, following)[0] >= handle.size:
        raise SourceReadError(
            f"{path} is truncated: of its list of pages only the first {len(file.pages)} are there"
        )


def _choose(path: Path, file: Any, part: str | None) -> int:
    """Number of the series that `part` means."""
    if not len(file.series):
        raise SourceReadError(f"{path} holds no image")
    number = 0 if part is None else int(part) if part.isdecimal() else -1
    if not 0 <= number < len(file.series):
        listed = ", ".join(
            f"{path}::{n} ({' × '.join(map(str, series.shape))})"
            for n, series in enumerate(file.series[:8])
        )
        raise InputError(f"{path} has no series {part!r}: name one of {listed}")
    return number


class _Pages:
    """A series whose pages are compressed or scattered; opened for every region."""

    def __init__(
        self,
        path: Path,
        number: int,
        full: tuple[int, ...],
        kept: tuple[int, ...],
        stored: np.dtype[Any],
    ) -> None:
        self._path, self._number, self._full, self._kept = path, number, full, kept
        self.shape, self.dtype = tuple(full[axis] for axis in kept), stored

    def __getitem__(self, region: Region) -> NDArray[Any]:
        import zarr

        where: list[Any] = [slice(0, 1)] * len(self._full)
        for axis, part in zip(self._kept, region, strict=True):
            where[axis] = part
        with _open(self._path) as file, file.series[self._number].aszarr(level=0) as store:
            array: Any = zarr.open(store, mode="r")
            values = np.asarray(array[tuple(where)])
        return values.reshape([s.stop - s.start for s in region])


def _spacing(file: Any, number: int) -> dict[str, tuple[float, str | None]]:
    """Distance of neighbouring voxels and its unit, by the name of the axis."""
    steps: dict[str, tuple[float, str | None]] = {}
    if file.ome_metadata:
        steps = _ome_spacing(file.ome_metadata, number)
    elif file.imagej_metadata:
        stated = file.imagej_metadata
        unit = plain_unit(stated.get("unit", ""))
        for name, tag in (("x", "XResolution"), ("y", "YResolution")):
            per_unit = file.pages.first.tags.valueof(tag)  # a fraction: pixels in one unit
            if unit is not None and per_unit and per_unit[0]:
                steps[name] = per_unit[1] / per_unit[0], unit
        if "spacing" in stated:
            steps["z"] = float(stated["spacing"]), unit
        if stated.get("finterval"):
            steps["t"] = float(stated["finterval"]), plain_unit(stated.get("tunit", "s"))
    steps = {name: step for name, step in steps.items() if 0 < step[0] < math.inf}
    return _in_one_unit(steps)


def _ome_spacing(xml: str, number: int) -> dict[str, tuple[float, str | None]]:
    """``PhysicalSize`` and ``TimeIncrement`` of an image's pixels."""
    steps: dict[str, tuple[float, str | None]] = {}
    try:
        found = ElementTree.fromstring(xml).findall(".//{*}Pixels")
        pixels = found[number].attrib
        for name in "xyz":
            if size := pixels.get(f"PhysicalSize{name.upper()}"):
                unit = pixels.get(f"PhysicalSize{name.upper()}Unit", "µm")
                steps[name] = float(size), plain_unit(unit)
        if size := pixels.get("TimeIncrement"):
            steps["t"] = float(size), plain_unit(pixels.get("TimeIncrementUnit", "s"))
    except (ElementTree.ParseError, IndexError, ValueError):
        return {}  # odd metadata must not keep the image from being read
    return steps


def _in_one_unit(
    steps: dict[str, tuple[float, str | None]],
) -> dict[str, tuple[float, str | None]]:
    """Lengths in the unit of x, where all are units of length."""
    unit = steps.get("x", (0, None))[1]
    if unit not in METRES:
        return steps
    return {
        name: (step * (METRES[own] / METRES[unit]), unit) if own in METRES else (step, own)
        for name, (step, own) in steps.items()
    }
