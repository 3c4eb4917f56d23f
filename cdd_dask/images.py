"""Arrays of a finished store for its readers, to whom a lost or damaged chunk is an error.

A chunk that is sound by itself may still be another one's, or have been written since: with the
checksums of done marks each shard is compared, whole, before anything of it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import zarr

from cdd_dask.errors import CddError, DamagedError
from cdd_dask.store import checksum, shard_damage
from cdd_dask.whole import Place, whole_array

REMEDY = ": `cdd-dask verify` lists all damage, `cdd-dask repair` mends it"


class Image(zarr.Array[Any]):
    """A Zarr array that names the shard and the chunk which it cannot read."""

    @classmethod
    def of(cls, array: zarr.Array[Any], checksums: Mapping[Place, str] | None = None) -> Image:
        """The same array, whose chunks are all there, and if given have these `checksums`."""
        prove = None if checksums is None else partial(_prove, array, checksums)
        return cls(whole_array(array, prove, REMEDY))

    # what `array[…]`, `array.oindex[…]`, `array.vindex[…]` and `array.blocks[…]` come down to

    def get_basic_selection(self, selection: Any = Ellipsis, **options: Any) -> Any:
        return self._selected(super().get_basic_selection, selection, options, selection)

    def get_orthogonal_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_orthogonal_selection, selection, options, selection)

    def get_mask_selection(self, mask: Any, **options: Any) -> Any:
        return self._selected(super().get_mask_selection, mask, options)

    def get_coordinate_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_coordinate_selection, selection, options)

    def get_block_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_block_selection, selection, options)

    def _selected(
        self,
        select: Callable[..., Any],
        selection: Any,
        options: dict[str, Any],
        within: Any = Ellipsis,
    ) -> Any:
        """What is selected; damage to the shards `within` which it lies is told."""
        try:
            return select(selection, **options)
        except (CddError, IndexError):
            raise
        except Exception as error:  # damaged shards make Zarr fail in any way
            plain = zarr.Array(self.async_array)
            for place in _shards_of(plain, within):
                if damage := shard_damage(plain, place):
                    raise DamagedError(f"{self.path}, {damage}{REMEDY}") from error
            raise


def _prove(array: zarr.Array[Any], checksums: Mapping[Place, str], place: Place) -> None:
    """Raise `DamagedError` for a shard that is not what its run wrote."""
    if damage := shard_damage(array, place):
        raise DamagedError(f"{array.path}, {damage}{REMEDY}")
    unit = array.shards or array.chunks
    region = tuple(
        slice(p * u, min((p + 1) * u, n)) for p, u, n in zip(place, unit, array.shape, strict=True)
    )
    if checksum(np.asarray(array[region])) != checksums.get(place):
        raise DamagedError(f"{array.path}, shard {place} is not what its run wrote{REMEDY}")


def _shards_of(array: zarr.Array[Any], selection: Any) -> list[Place]:
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
