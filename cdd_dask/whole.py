"""Arrays of which every chunk is there: what is missing Zarr would read as zeros."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import zarr
from zarr import AsyncArray
from zarr.abc.store import Store
from zarr.storage import StorePath, WrapperStore

from cdd_dask.errors import DamagedError

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

CHUNK = re.compile(r"(?:(.+)/)?c((?:/\d+)+)")
"""Keys of chunks and shards: the array's path, where it is not the root, and a place."""


class WholeStore(WrapperStore[Store]):
    """A store that raises `DamagedError` for a chunk or shard that is missing or empty."""

    def __init__(self, store: Store, remedy: str = "") -> None:
        super().__init__(store)
        self._remedy = remedy

    def _with_store(self, store: Store) -> WholeStore:
        return WholeStore(store, self._remedy)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await self._store.get(key, prototype, byte_range)
        chunk = CHUNK.fullmatch(key)
        if chunk is not None and not found:  # Zarr reads an empty one as zeros, too
            path, place = f"{chunk[1]}, " * bool(chunk[1]), tuple(map(int, chunk[2][1:].split("/")))
            problem = "is not there" if found is None else "is empty"
            raise DamagedError(f"{path}shard {place} {problem}{self._remedy}")
        return found


def whole_array(array: zarr.Array[Any], remedy: str = "") -> AsyncArray[Any]:
    """The same array, read through a `WholeStore`; it must have no other keys than ours."""
    place = StorePath(WholeStore(array.store, remedy), array.path)
    return AsyncArray(array.metadata, place, array.config)
