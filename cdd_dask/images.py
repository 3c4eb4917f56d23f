"""Arrays of a finished store for its readers, to whom a lost or damaged chunk is an error."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr import AsyncArray
from zarr.abc.store import Store
from zarr.storage import StorePath, WrapperStore

from cdd_dask.errors import CddError, DamagedError
from cdd_dask.store import shard_damage

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

CHUNKS = "/c/"
"""What keys of chunks and shards have in them, behind the array's path."""
REMEDY = "`cdd-dask verify` lists all damage, `cdd-dask repair` mends it"


class WholeStore(WrapperStore[Store]):
    """A store in which every chunk is there: what is missing Zarr would read as zeros."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await self._store.get(key, prototype, byte_range)
        if CHUNKS in key and not found:  # Zarr reads an empty one as zeros, too
            path, _, place = key.partition(CHUNKS)
            shard = tuple(map(int, place.split("/")))
            problem = "is not there" if found is None else "is empty"
            raise DamagedError(f"{path}, shard {shard} {problem}: {REMEDY}")
        return found


class Image(zarr.Array[Any]):
    """A Zarr array that names the shard and the chunk which it cannot read."""

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> Image:
        """The same array, whose chunks are all there."""
        place = StorePath(WholeStore(array.store), array.path)
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
