"""Arrays in this process (NumPy, torch, dask, xarray, Zarr) and `.npy` files."""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Region
from cdd_dask.errors import InputError, SourceReadError
from cdd_dask.readers.base import Source, even_spacing
from cdd_dask.readers.regions import read_region
from cdd_dask.readers.units import plain_unit

_numbers = itertools.count()
_sources: weakref.WeakValueDictionary[str, Source] = weakref.WeakValueDictionary()


def open_array(array: Any) -> Source:
    """A source that reads from `array`, which stays in this process.

    Parameters
    ----------
    array
        A NumPy array or anything that slices to one: a torch tensor, a dask or xarray object.
    """
    kind = type(array).__module__.split(".")[0]
    names, spacing, units = None, None, None
    if kind == "xarray":
        if not hasattr(array, "dims") or not hasattr(array, "dtype"):
            raise InputError(
                f"source is an xarray {type(array).__name__}: choose one of its variables"
            )
        names = tuple(map(str, array.dims))
        spacing, units = _coordinates(array)
        # the variable beneath reads a region only when it is asked for; `.data` would load it all
        array = getattr(array, "variable", array)
    elif kind == "torch":
        array = _from_torch(array)
    elif isinstance(array, np.ma.MaskedArray):
        array = _Masked(array)
    elif not hasattr(array, "dtype") or not hasattr(array, "shape"):
        array = _from_numbers(array)
    if not all(isinstance(n, Integral) for n in array.shape):
        raise InputError(
            f"source is a {kind} array of unknown shape {array.shape}: have it computed first, "
            "source.compute_chunk_sizes()"
        )
    source = Source(
        description=f"a {kind} array" if kind != "builtins" else "a list of numbers",
        address=f"object:{next(_numbers)}",
        portable=False,
        lazy=not isinstance(getattr(array, "_data", array), np.ndarray),
        is_zarr=False,
        shape=tuple(map(int, array.shape)),
        dtype=np.dtype(array.dtype),
        fetch=partial(read_region, array),
        dimension_names=names,
        chunk=_chunk(array),
        spacing=spacing,
        units=units,
    )
    _sources[source.address] = source
    return source


class _Masked:
    """A masked array whose masked voxels are NaN."""

    def __init__(self, array: Any) -> None:
        self._data, self.shape = array, array.shape
        self.dtype = array.dtype if array.dtype.kind not in "biu" else np.dtype(np.float64)

    def __getitem__(self, region: Region) -> NDArray[Any]:
        values: NDArray[Any] = np.ma.filled(self._data[region].astype(self.dtype), np.nan)
        return values


def _coordinates(
    array: Any,
) -> tuple[tuple[float, ...] | None, tuple[str | None, ...] | None]:
    """Spacing and unit per axis of an xarray object, from its evenly spaced coordinates."""
    steps: list[float | None] = []
    units = []
    for name in array.dims:
        known = name in getattr(array, "coords", ())
        step = even_spacing(np.asarray(array.coords[name])) if known else None
        steps.append(step)
        units.append(plain_unit(array.coords[name].attrs.get("units", "")) if step else None)
    if not any(steps):
        return None, None
    return tuple(step or 1.0 for step in steps), tuple(units)


def known_array(address: str) -> Source:
    """The source that `open_array` gave `address`, while it is in use."""
    return _sources[address]


def _chunk(array: Any) -> tuple[int, ...] | None:
    """Shape of what a lazy array computes at once: its largest chunk."""
    sides = getattr(array, "chunks", None)
    if not sides:  # none, or Zarr's and dask's empty tuple for no axes
        return None
    return tuple(max(side) if isinstance(side, tuple) else int(side) for side in sides)


def _from_numbers(source: Any) -> NDArray[Any]:
    """A NumPy array of a number, or of numbers in lists."""
    shown = f"source={source!r:.60} ({type(source).__name__})"
    if not isinstance(source, list | tuple | int | float | complex):
        raise InputError(f"{shown} is no field: give a path or an array")
    try:
        return np.asarray(source)
    except ValueError as error:
        raise InputError(f"{shown} is no array: {error}") from error


def _from_torch(tensor: Any) -> NDArray[Any]:
    import torch

    if tensor.is_meta:
        raise InputError("source is a meta tensor, which holds no values: give one that does")
    if tensor.is_sparse:
        raise InputError("source is a sparse tensor: give source.to_dense()")
    tensor = tensor.detach().cpu()
    # NumPy knows neither bfloat16 nor a lazily conjugated tensor
    values = tensor.float() if tensor.dtype == torch.bfloat16 else tensor.resolve_conj()
    array: NDArray[Any] = values.numpy()
    return array


def open_npy(path: Path) -> Source:
    """A source that maps a `.npy` file.

    Raises
    ------
    SourceReadError
        If the file is damaged, truncated, or holds pickled objects.
    """
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise SourceReadError(f"{path} is no readable .npy file: {error}") from error
    return Source(
        description=str(path),
        address=str(path),
        portable=True,
        lazy=False,
        is_zarr=False,
        shape=mapped.shape,
        dtype=mapped.dtype,
        fetch=partial(read_region, mapped),
    )
