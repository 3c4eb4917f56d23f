"""Arrays of which every chunk is there: what is missing Zarr would read as zeros."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
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

Place = tuple[int, ...]
"""Of a shard in its array."""
Prove = Callable[[Place], None]
"""Raises if a shard is not what it should be."""


class WholeStore(WrapperStore[Store]):
    """A store that raises `DamagedError` for a chunk or shard that is missing or empty.

    Before anything of a shard is read `prove` is called with its place, once.
    """

    def __init__(self, store: Store, prove: Prove | None = None, remedy: str = "") -> None:
        super().__init__(store)
        self._prove, self._remedy = prove, remedy
        self._proven: set[Place] = set()
        self._one_by_one = asyncio.Lock()  # each takes the memory of a shard

    def _with_store(self, store: Store) -> WholeStore:
        return WholeStore(store, self._prove, self._remedy)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        chunk = CHUNK.fullmatch(key)
        if chunk is None:
            return await self._store.get(key, prototype, byte_range)
        path, place = f"{chunk[1]}, " * bool(chunk[1]), tuple(map(int, chunk[2][1:].split("/")))
        if self._prove is not None:
            async with self._one_by_one:
                if place not in self._proven:
                    await asyncio.to_thread(self._prove, place)  # it waits for this event loop
                    self._proven.add(place)
        found = await self._store.get(key, prototype, byte_range)
        if not found:  # Zarr reads an empty one as zeros, too
            problem = "is not there" if found is None else "is empty"
            raise DamagedError(f"{path}shard {place} {problem}{self._remedy}")
        return found


def whole_array(
    array: zarr.Array[Any], prove: Prove | None = None, remedy: str = ""
) -> AsyncArray[Any]:
    """The same array, read through a `WholeStore`; it must have no other keys than ours."""
    place = StorePath(WholeStore(array.store, prove, remedy), array.path)
    return AsyncArray(array.metadata, place, array.config)
