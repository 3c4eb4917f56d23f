"""Zarr arrays, format 2 and 3: by path, by URL, or as objects."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdd_dask.errors import InputError, SourceNotFoundError, SourceReadError
from cdd_dask.readers.base import Source
from cdd_dask.readers.regions import read_region

if TYPE_CHECKING:
    import zarr


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
    import zarr
    from zarr.errors import BaseZarrError

    try:
        node = zarr.open(address, mode="r")
    except FileNotFoundError as error:
        if "://" not in address and Path(address).exists():
            raise SourceReadError(f"source {address} is a folder without a Zarr array") from error
        raise SourceNotFoundError(f"source {address} does not exist") from error
    except (BaseZarrError, ValueError, KeyError, OSError, ImportError) as error:
        raise SourceReadError(f"source {address} is no readable Zarr array: {error}") from error
    if isinstance(node, zarr.Group):
        arrays = [name for name, item in node.members(max_depth=None) if hasattr(item, "dtype")]
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
    names = getattr(array.metadata, "dimension_names", None)
    known = names is not None and all(names)
    return Source(
        description=address,
        address=address,
        portable=True,
        lazy=False,
        is_zarr=True,
        shape=array.shape,
        dtype=np.dtype(array.dtype),
        read=partial(read_region, array),
        chunk=tuple(array.chunks),
        dimension_names=tuple(map(str, names)) if names is not None and known else None,
    )
