"""Arrays of a finished store for its readers, to whom a lost or damaged chunk is an error.

A chunk that is sound by itself may still be another one's, or have been written since: with the
checksums of done marks each shard is compared, whole, before anything of it is read.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr import AsyncArray
from zarr.abc.store import Store
from zarr.storage import StorePath, WrapperStore

from cdd_dask.errors import CddError, DamagedError
from cdd_dask.store import checksum, shard_damage

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

CHUNKS = "/c/"
"""What keys of chunks and shards have in them, behind the array's path."""
REMEDY = "`cdd-dask verify` lists all damage, `cdd-dask repair` mends it"

Place = tuple[int, ...]
"""Of a shard in its array."""


class WholeStore(WrapperStore[Store]):
    """A store in which every chunk is there: what is missing Zarr would read as zeros.

    Before anything of a shard is read `prove` is called with its place, once, and raises if the
    shard is not what it should be.
    """

    def __init__(self, store: Store, prove: Callable[[Place], None] | None = None) -> None:
        super().__init__(store)
        self._prove = prove
        self._proven: set[Place] = set()
        self._one_by_one = asyncio.Lock()  # each takes the memory of a shard

    def _with_store(self, store: Store) -> WholeStore:
        return WholeStore(store, self._prove)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if CHUNKS not in key:
            return await self._store.get(key, prototype, byte_range)
        path, _, text = key.partition(CHUNKS)
        place = tuple(map(int, text.split("/")))
        if self._prove is not None:
            async with self._one_by_one:
                if place not in self._proven:
                    await asyncio.to_thread(self._prove, place)  # it waits for this event loop
                    self._proven.add(place)
        found = await self._store.get(key, prototype, byte_range)
        if not found:  # Zarr reads an empty one as zeros, too
            problem = "is not there" if found is None else "is empty"
            raise DamagedError(f"{path}, shard {place} {problem}: {REMEDY}")
        return found


class Image(zarr.Array[Any]):
    """A Zarr array that names the shard and the chunk which it cannot read."""

    @classmethod
    def of(cls, array: zarr.Array[Any], checksums: Mapping[Place, str] | None = None) -> Image:
        """The same array, whose chunks are all there, and if given have these `checksums`."""

        def prove(place: Place) -> None:
            unit = array.shards or array.chunks
            region = tuple(
                slice(p * u, min((p + 1) * u, n))
                for p, u, n in zip(place, unit, array.shape, strict=True)
            )
            if damage := shard_damage(array, place):
                raise DamagedError(f"{array.path}, {damage}: {REMEDY}")
            if checksum(np.asarray(array[region])) != (checksums or {}).get(place):
                raise DamagedError(
                    f"{array.path}, shard {place} is not what its run wrote: {REMEDY}"
                )

        whole = WholeStore(array.store, None if checksums is None else prove)
        place = StorePath(whole, array.path)
        opened: AsyncArray[Any] = AsyncArray(array.metadata, place, array.config)
        return cls(opened)

    def __getitem__(self, selection: Any) -> Any:
        try:
            return super().__getitem__(selection)
        except (CddError, IndexError):
            raise
        except Exception as error:  # damaged shards make Zarr fail in any way
            plain = zarr.Array(self.async_array)
            for place in _shards_of(plain, selection):
                if damage := shard_damage(plain, place):
                    raise DamagedError(f"{self.path}, {damage}: {REMEDY}") from error
            raise


def _shards_of(array: zarr.Array[Any], selection: Any) -> list[tuple[int, ...]]:
    """Places of the shards that numbers, slices or an ellipsis for each axis select of."""
    parts = list(selection) if isinstance(selection, tuple) else [selection]
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    gap = next(i for i, part in enumerate(parts) if part is Ellipsis)
    parts[gap : gap + 1] = [slice(None)] * (array.ndim - len(parts) + 1)
    unit = array.shards or array.chunks
    along = [
        np.unique(np.atleast_1d(np.arange(n)[part]) // u).tolist()
        for part, n, u in zip(parts, array.shape, unit, strict=True)
    ]
    return list(itertools.product(*along))
