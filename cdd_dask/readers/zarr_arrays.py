"""Zarr arrays, format 2 and 3: by path, by URL, or as objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr import AsyncArray
from zarr.abc.store import Store
from zarr.storage import StorePath, WrapperStore

from cdd_dask.errors import InputError, SourceNotFoundError, SourceReadError
from cdd_dask.marks import KEY, read_copy
from cdd_dask.objects import read_attributes, store_of
from cdd_dask.readers.base import Source
from cdd_dask.readers.regions import read_region
from cdd_dask.readers.units import plain_unit
from cdd_dask.whole import whole_array

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

OUTPUT = re.compile(r"/(?:channel_\d{2,}|residual)/scale0/image$")
"""Where an output of ours lies in its store."""
DEEPEST = 5
"""How far below a group arrays are looked for, to be named; links may lead back to it."""
LEVELS_ABOVE = 3
"""How far above an array the group may be whose metadata tell of it."""


def open_zarr(address: str) -> Source:
    """A source that reads the Zarr array at a path or URL.

    Raises
    ------
    SourceNotFoundError
        If there is nothing.
    InputError
        If there is a group; the message lists its arrays.
    SourceReadError
        If there is something else.
    """
    from zarr.errors import BaseZarrError

    try:
        node = zarr.open(store_of(address, read_only=True), mode="r")
    except FileNotFoundError as error:
        if "://" not in address and Path(address).exists():
            raise SourceReadError(f"source {address} is a folder without a Zarr array") from error
        raise SourceNotFoundError(f"source {address} does not exist") from error
    except (BaseZarrError, ValueError, KeyError, OSError, ImportError) as error:
        raise SourceReadError(f"source {address} is no readable Zarr array: {error}") from error
    if isinstance(node, zarr.Group):
        arrays = [name for name, item in node.members(max_depth=DEEPEST) if hasattr(item, "dtype")]
        listed = ", ".join(f"{address}/{name}" for name in arrays[:8]) or "it holds none"
        raise InputError(f"source {address} is a Zarr group: name one of its arrays ({listed})")
    return zarr_source(node, address)


def zarr_source(array: zarr.Array[Any], address: str | None = None) -> Source:
    """A source that reads a Zarr array object.

    Other processes open it by its path, where it has one on a file system.
    """
    from zarr.storage import LocalStore

    if address is None and isinstance(array.store, LocalStore):
        address = str(Path(array.store.root).absolute() / array.path)
    if address is None:
        # other stores may hold secrets that must not travel: this process reads them
        from cdd_dask.readers.arrays import open_array

        return open_array(array)
    names: Any = getattr(array.metadata, "dimension_names", None)
    if names is None:  # format 2, as xarray writes it
        names = array.attrs.get("_ARRAY_DIMENSIONS")
    known = isinstance(names, list | tuple) and len(names) == array.ndim and all(names)
    array = _whole(array, address)
    spacing, units, ome_names = _ome_axes(address, array.ndim)
    return Source(
        description=address,
        address=address,
        portable=True,
        lazy=False,
        is_zarr=True,
        shape=array.shape,
        dtype=np.dtype(array.dtype),
        fetch=partial(read_region, array),
        chunk=tuple(array.chunks),
        dimension_names=tuple(map(str, names)) if known else ome_names,
        spacing=spacing,
        units=units,
    )


class _NoEmpty(WrapperStore[Store]):
    """A store that refuses empty objects, which a lost machine may leave; Zarr reads zeros."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await self._store.get(key, prototype, byte_range)
        if found is not None and not found:
            raise SourceReadError(f"{self._store}/{key} is empty")
        return found


def _whole(array: zarr.Array[Any], address: str) -> zarr.Array[Any]:
    """The same array, whose lost chunks are no zeros if it is an output of ours.

    In general a chunk that is not there is one that was never written.
    """
    if OUTPUT.search(address.rstrip("/")):
        *_, root = _parents(address)
        if (known := _decomposition(root)) is not None:
            if known.get("complete") is not True:
                raise InputError(
                    f"{address} is part of a decomposition that is not complete: let it end first"
                )
            return zarr.Array(whole_array(array))
    place = StorePath(_NoEmpty(array.store), array.path)
    return zarr.Array(AsyncArray(array.metadata, place, array.config))


def _decomposition(root: str) -> dict[str, Any] | None:
    """What a store of ours remembers at `root`, as well as its copy; None where there is none."""
    try:
        held = (read_attributes(root, "") or {}).get(KEY)
        found = held or read_copy(root).get("")
    except OSError:  # it may not be looked at, as on S3 without the right to list
        return None
    return found if isinstance(found, dict) and "format_version" in found else None


def _parents(address: str) -> Iterator[str]:
    """Addresses of the folders in which an array lies, the nearest first."""
    parent = address.rstrip("/")
    for _ in range(LEVELS_ABOVE):
        parent = parent.rpartition("/")[0]
        if not parent or parent.endswith(":/"):
            return
        yield parent


Axes = tuple[tuple[float, ...] | None, tuple[str | None, ...] | None, tuple[str, ...] | None]


def _ome_axes(address: str, ndim: int) -> Axes:
    """Spacing, units and names of the axes by the OME metadata of a group above an array."""
    for parent in _parents(address):
        path = address.rstrip("/").removeprefix(f"{parent}/")
        try:
            group = zarr.open_group(store_of(parent, read_only=True), mode="r")
            attributes = group.attrs.asdict()
            return _transformed(attributes, path, ndim)
        except Exception:  # no group, or odd metadata, which must not keep us from reading
            continue
    return None, None, None


def _transformed(attributes: Any, path: str, ndim: int) -> Axes:
    """What an image's ``multiscales`` say of the dataset at `path`.

    Raises
    ------
    KeyError
        If they say nothing of it.
    """
    for image in attributes.get("ome", attributes)["multiscales"]:
        for dataset in image["datasets"]:
            if dataset["path"].strip("/") != path or len(image["axes"]) != ndim:
                continue
            scale = np.ones(ndim)
            for transformation in (
                *dataset.get("coordinateTransformations", ()),
                *image.get("coordinateTransformations", ()),
            ):
                if transformation["type"] == "scale":
                    scale = scale * np.array(transformation["scale"], float)
            if not (np.isfinite(scale).all() and (scale > 0).all()):
                raise KeyError(path)
            units = tuple(plain_unit(axis.get("unit", "")) for axis in image["axes"])
            names = tuple(str(axis["name"]) for axis in image["axes"])
            if not any(units) and (scale == 1).all():  # voxels, which states nothing
                return None, None, names
            return tuple(scale.tolist()), units, names
    raise KeyError(path)
