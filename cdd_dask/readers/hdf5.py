"""HDF5 datasets (also netCDF 4 and MATLAB 7.3), read by region."""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Region
from cdd_dask.errors import InputError, MissingDependencyError, SourceReadError
from cdd_dask.parameters import MAX_NDIM
from cdd_dask.readers.base import Source, even_spacing, squeezed
from cdd_dask.readers.regions import read_region
from cdd_dask.readers.units import plain_unit

SPACING_ATTRIBUTES = ("spacing", "voxel_size", "voxelsize", "pixel_size")
MOST_LISTED = 8


def open_hdf5(path: Path, part: str | None = None) -> Source:
    """A source that reads a dataset of an HDF5 file.

    CF's ``scale_factor`` and ``add_offset`` are applied; ``_FillValue`` and ``missing_value``
    become NaN; of ``_Unsigned`` ones the sign bit is a bit.

    Parameters
    ----------
    path
        The file.
    part
        Path of the dataset in it; None takes the only one that there is.

    Raises
    ------
    MissingDependencyError
        If h5py is not installed.
    InputError
        If it is not clear which dataset is meant; the message lists those that are there.
    SourceReadError
        If the file is damaged or truncated, or holds no dataset that could be decomposed.
    """
    with _open(path) as file:
        name = _choose(path, file, part)
        dataset = file[name]
        if dataset.shape is None:
            raise InputError(f"{path}::{name} holds no values")
        files = tuple(dict.fromkeys(_files(path, name, set())))
        attributes = {key: _simple(value) for key, value in _items(dataset.attrs)}
        full, stored = tuple(map(int, dataset.shape)), np.dtype(dataset.dtype)
        chunk = dataset.chunks and tuple(map(int, dataset.chunks))
        axes = [_axis(dataset, axis) for axis in range(len(full))]
    # what is squeezed is no more than has to be: lengths of 1 may be meant here
    kept = squeezed(full) if len(full) > MAX_NDIM else tuple(range(len(full)))
    array = _Dataset(path, name, full, kept, stored, attributes)
    address = f"{path}::{name}"
    spacing, units = _spacing(attributes, axes, kept)
    names = tuple(axes[axis][0] or "" for axis in kept)
    return Source(
        description=str(path) if part is None else address,
        address=address,
        portable=True,
        lazy=False,
        is_zarr=False,
        shape=array.shape,
        dtype=array.dtype,
        fetch=array.read,
        dimension_names=names if all(names) else None,
        chunk=chunk and tuple(chunk[axis] for axis in kept),
        header=json.dumps(attributes) if attributes else None,
        spacing=spacing,
        units=units,
        file_shape=full if len(kept) < len(full) else None,
        further_files=files,
    )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The file, opened; whatever goes wrong with it is one line that names it."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            f'reading {path} needs h5py: pip install "cdd-dask[hdf5]"'
        ) from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, InputError | SourceReadError):
            raise
        plugin = ": install hdf5plugin?" if "filter" in str(error) else ""
        raise SourceReadError(f"{path} is no readable HDF5 file: {error}{plugin}") from error


def _choose(path: Path, file: Any, part: str | None) -> str:
    """Full name of the dataset that `part` means."""
    import h5py

    found: dict[str, Any] = {}

    def look(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and _is_field(item):
            found[f"/{name}"] = item.shape

    file.visititems(look)
    name = None if part is None else "/" + part.strip("/")
    if name is not None and isinstance(file.get(name), h5py.Dataset):
        return name
    if not found:
        raise SourceReadError(f"{path} holds no dataset of real numbers")
    if name is None and len(found) == 1:
        return next(iter(found))
    beneath = {key: n for key, n in found.items() if name and key.startswith(name + "/")} or found
    listed = ", ".join(
        f"{path}::{key} ({' × '.join(map(str, n))})"
        for key, n in list(beneath.items())[:MOST_LISTED]
    )
    more = f" and {len(beneath) - MOST_LISTED} more" if len(beneath) > MOST_LISTED else ""
    if name is None:
        problem = f"{path} holds several datasets"
    elif file.get(name) is not None:
        problem = f"{path}::{name} is a group"
    else:
        problem = f"{path} has no dataset {name}"
    raise InputError(f"{problem}: name one of {listed}{more}")


def _files(path: Path, name: str, met: set[tuple[Path, str]]) -> Iterator[Path]:
    """All files that a dataset's values lie in: behind a link, external, or a virtual one's parts.

    Raises
    ------
    SourceReadError
        If a part is gone or truncated: HDF5 would read its fill value.
    """
    import h5py

    met.add((path, name))
    with _open(path) as file:
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise SourceReadError(f"{path}::{name} is part of another dataset, but is not there")
        home = Path(dataset.file.filename).absolute()
        prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(home.parent))
        external = [Path(prefix, raw).absolute() for raw, *_ in dataset.external or ()]
        needed = dataset.size * dataset.dtype.itemsize
        for file_path, (_, offset, room) in zip(external, dataset.external or (), strict=True):
            held = min(room, needed)  # the last one may have no end
            if file_path.is_file() and file_path.stat().st_size < offset + held:
                raise SourceReadError(f"{path}::{name} needs {file_path}, which is truncated")
            needed -= held
        virtual = dataset.virtual_sources() if dataset.is_virtual else ()
        parts = sorted({(part.file_name, part.dset_name) for part in virtual})
    yield home
    yield from external
    for file_name, part_name in parts:
        found = [home] if file_name == "." else _matching(home, file_name)
        if not found and "%b" not in file_name:
            raise SourceReadError(f"{path}::{name} needs {file_name}, which is not there")
        for part in found:
            yield part
            if "%b" not in part_name and (part, part_name) not in met:
                yield from _files(part, part_name, met)


def _matching(home: Path, name: str) -> list[Path]:
    """Files that a virtual dataset in `home` calls `name`, a pattern where it holds ``%b``."""
    pattern = "[0-9]*".join(map(glob.escape, name.split("%b")))
    for folder in (home.parent, Path.cwd(), home.resolve().parent):  # HDF5's order
        if found := glob.glob(os.path.join(glob.escape(str(folder)), pattern)):
            return [Path(os.path.abspath(path)) for path in sorted(found)]
    return []


def _is_field(dataset: Any) -> bool:
    """Whether a dataset could be decomposed: real numbers, and no coordinates of another's."""
    return bool(dataset.shape) and dataset.dtype.kind in "biuf" and not dataset.is_scale


class _Dataset:
    """A dataset's values, scaled; the file is opened for every region."""

    def __init__(
        self,
        path: Path,
        name: str,
        full: tuple[int, ...],
        kept: tuple[int, ...],
        stored: np.dtype[Any],
        attributes: dict[str, Any],
    ) -> None:
        self._path, self._name, self._full, self._kept = path, name, full, kept
        self.shape = tuple(full[axis] for axis in kept)
        self._blanks = [*_numbers(attributes, "_FillValue"), *_numbers(attributes, "missing_value")]
        if stored.kind == "i" and str(attributes.get("_Unsigned")).lower() == "true":
            stored = np.dtype(f"{stored.byteorder}u{stored.itemsize}")
            # they are stated as they are stored
            self._blanks = [value % 2 ** (8 * stored.itemsize) for value in self._blanks]
        self._stored = stored
        self._scale = attributes.get("scale_factor", 1), attributes.get("add_offset", 0)
        plain = self._scale == (1, 0)
        as_stored = plain and (not self._blanks or stored.kind == "f")
        self.dtype = stored if as_stored or stored.kind not in "biuf" else np.dtype(np.float64)

    def read(self, region: Region) -> NDArray[Any]:
        return read_region(self, region)

    def __getitem__(self, region: Region) -> NDArray[Any]:
        where: list[Any] = [0] * len(self._full)
        for axis, part in zip(self._kept, region, strict=True):
            where[axis] = part
        with _open(self._path) as file:
            stored = np.asarray(file[self._name][tuple(where)])
        if self._stored.kind == "u":
            stored = stored.view(self._stored)
        values = stored.astype(self.dtype)
        if self._scale != (1, 0):
            values = values * self._scale[0] + self._scale[1]
        for blank in self._blanks:
            values[stored == blank] = np.nan
        return values


def _numbers(attributes: dict[str, Any], key: str) -> list[int | float]:
    """The number or numbers that an attribute states."""
    stated = attributes.get(key)
    values = stated if isinstance(stated, list) else [stated]
    return [value for value in values if isinstance(value, int | float)]


def _items(attributes: Any) -> Iterator[tuple[str, Any]]:
    """Attributes that can be read; some kinds have no counterpart in NumPy."""
    for key in attributes:
        try:
            yield key, attributes[key]
        except (OSError, TypeError, ValueError):
            continue


def _simple(value: Any) -> Any:
    """An attribute as JSON has it; one number is no list."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    plain = np.asarray(value)
    if plain.size == 1 and plain.dtype.kind in "biuf":
        number = plain.reshape(()).item()
        return number if not isinstance(number, float) or math.isfinite(number) else None
    if plain.dtype.kind in "biuf" and plain.size <= 64 and np.isfinite(plain).all():
        return plain.tolist()
    return str(value)


def _axis(dataset: Any, axis: int) -> tuple[str | None, float | None, str | None]:
    """Name, spacing and unit of an axis, from its label and its dimension scale."""
    dimension = dataset.dims[axis]
    name = dimension.label or None
    if not len(dimension):
        return name, None, None
    scale = dimension[0]
    step = even_spacing(scale[:]) if scale.shape == (dataset.shape[axis],) else None
    unit = plain_unit(_simple(scale.attrs.get("units", "")))
    return name or scale.name.rpartition("/")[2] or None, step, unit


def _spacing(
    attributes: dict[str, Any],
    axes: list[tuple[str | None, float | None, str | None]],
    kept: tuple[int, ...],
) -> tuple[tuple[float, ...] | None, tuple[str | None, ...] | None]:
    """Spacing and unit of the axes that are kept, from the first source that states them."""
    if any(step is not None for _, step, _ in axes):
        steps = tuple(axes[axis][1] or 1.0 for axis in kept)
        return steps, tuple(axes[axis][2] if axes[axis][1] else None for axis in kept)
    unit = plain_unit(attributes.get("unit", attributes.get("units", "")))
    stated = [("element_size_um", "µm"), *((key, unit) for key in SPACING_ATTRIBUTES)]
    for key, its_unit in stated:
        value = attributes.get(key)
        sizes: list[Any] = value if isinstance(value, list) else [value] * len(axes)
        if len(sizes) == len(axes) and all(
            isinstance(size, int | float) and size > 0 for size in sizes
        ):
            return tuple(float(sizes[axis]) for axis in kept), (its_unit,) * len(kept)
    return None, None
