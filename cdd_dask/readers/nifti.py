"""NIfTI volumes, as ``z, y, x`` (or ``t, z, y, x``): the order in which they lie in the file.

nibabel shows the same voxels as ``x, y, z``, so ``img.dataobj[i, j, k]`` is our ``[k, j, i]``.
A `.nii` file is mapped. A `.nii.gz` can only be read from its start, while a run reads blocks, so
each process that reads it unpacks it once into a temporary file (in `tempfile.gettempdir`, of
the size of the unpacked volume), which goes when the process does.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import shutil
import tempfile
import threading
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Region
from cdd_dask.errors import InputError, MissingDependencyError, SourceReadError
from cdd_dask.readers.base import Source, squeezed
from cdd_dask.readers.regions import read_region
from cdd_dask.readers.units import plain_unit

AXIS_NAMES = ("t", "z", "y", "x")
_unpacking = threading.Lock()


def open_nifti(path: Path, part: str | None = None) -> Source:
    """A source that reads a NIfTI-1 or NIfTI-2 volume; its slope and intercept are applied.

    Raises
    ------
    MissingDependencyError
        If nibabel is not installed.
    InputError
        If a `part` is given.
    SourceReadError
        If the file is damaged or truncated, or of another kind.
    """
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError as error:
        raise MissingDependencyError(
            f'reading {path} needs nibabel: pip install "cdd-dask[nifti]"'
        ) from error
    if part is not None:
        raise InputError(f"source {path} is one volume and has no parts: leave out ::{part}")
    # what is odd in a header it would print
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    try:
        image: Any = nibabel.load(path)
        header, voxels = image.header, image.dataobj
        if not isinstance(image, nibabel.Nifti1Pair):
            raise SourceReadError(f"{path} is no NIfTI file, but {type(image).__name__}")
        file = Path(image.file_map["image"].filename)
        files = tuple(Path(holder.filename) for holder in image.file_map.values())
        offset, stored = int(voxels.offset), np.dtype(header.get_data_dtype())
        slope, intercept = float(voxels.slope), float(voxels.inter)
    except (ImageFileError, HeaderDataError, OSError, ValueError, EOFError, zlib.error) as error:
        if isinstance(error, SourceReadError):
            raise
        raise SourceReadError(f"{path} is no readable NIfTI file: {error}") from error
    full = tuple(map(int, reversed(image.shape)))
    if min(full, default=0) < 0:  # two of which would seem to be some voxels
        raise SourceReadError(f"{path} is damaged: by its header its shape is {full}")
    kept = squeezed(full)
    shape = tuple(full[axis] for axis in kept)
    if not _is_packed(file):
        expected, present = offset + stored.itemsize * math.prod(full), file.stat().st_size
        if present < expected:
            raise SourceReadError(
                f"{file} is truncated: its header promises {expected} bytes, it has {present}"
            )
    plain = (slope, intercept) == (1.0, 0.0)
    names = AXIS_NAMES[-len(full) :] if len(full) <= 4 else None
    spacing, units = _spacing(header, kept)

    def read(region: Region) -> NDArray[Any]:
        if _is_packed(file):
            content = _unpacked(file, file.stat().st_mtime_ns)
            if content.size < offset + stored.itemsize * math.prod(full):
                raise SourceReadError(f"{file} is truncated: it unpacks to {content.size} bytes")
            mapped: NDArray[Any] = np.ndarray(shape, stored, content, offset)
        else:
            mapped = np.memmap(file, stored, "r", offset, shape)
        values = read_region(mapped, region)
        return values if plain else values * slope + intercept

    return Source(
        description=str(path),
        address=str(path),
        portable=True,
        lazy=False,
        is_zarr=False,
        shape=shape,
        dtype=stored if plain else np.dtype(np.float64),
        fetch=read,
        dimension_names=names and tuple(names[axis] for axis in kept),
        header=json.dumps({key: _simple(value) for key, value in header.items()}),
        spacing=spacing,
        units=units,
        file_shape=full if len(kept) < len(full) else None,
        further_files=files,
    )


def _is_packed(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"\x1f\x8b"


def _unpacked(file: Path, changed: int) -> NDArray[np.uint8]:
    """The content of a `.gz` file, mapped; only that of the last one asked for is kept."""
    with _unpacking:  # the threads of a process share one
        return _unpack(file, changed)


@lru_cache(maxsize=1)
def _unpack(file: Path, changed: int) -> NDArray[np.uint8]:
    try:
        with tempfile.TemporaryFile(prefix="cdd-dask-") as content:
            with gzip.open(file) as packed:
                shutil.copyfileobj(packed, content, 1 << 20)
            content.flush()
            # it has no name, and its bytes go with their last map, whatever ends the process
            return np.memmap(content, np.uint8, "r")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault
        raise SourceReadError(f"{file} is truncated or damaged: {error}") from error


def _spacing(
    header: Any, kept: tuple[int, ...]
) -> tuple[tuple[float, ...] | None, tuple[str | None, ...] | None]:
    """Zooms and their units per axis, in our order, where they are usable."""
    zooms = [float(zoom) for zoom in reversed(header.get_zooms())]
    length, time = (plain_unit(unit) for unit in header.get_xyzt_units())
    last = len(zooms) - 1
    spacing = tuple(zooms[axis] for axis in kept)
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        return None, None
    units = (length, length, length, time)
    return spacing, tuple(units[last - axis] if last - axis < 4 else None for axis in kept)


def _simple(value: Any) -> Any:
    """A header's field as JSON has it."""
    plain = np.asarray(value)
    if plain.dtype.kind == "S":
        return plain.item().decode("latin-1")
    plain = plain.astype(object) if plain.dtype.kind != "f" else plain.astype(float).astype(object)
    return json.loads(json.dumps(plain.tolist(), default=str).replace("NaN", "null"))
