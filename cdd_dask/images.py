"""Arrays of a finished store for its readers, to whom a lost or damaged chunk is an error.

A chunk that is sound by itself may still be another one's, or have been written since: with the
checksums of done marks each shard is compared, whole, before anything of it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import zarr

from cdd_dask.errors import CddError, DamagedError
from cdd_dask.store import checksum, shard_damage, shards_of
from cdd_dask.whole import whole_array

REMEDY = ": `cdd-dask verify` lists all damage, `cdd-dask repair` mends it"

Place = tuple[int, ...]
"""Of a shard in its array."""


class Image(zarr.Array[Any]):
    """A Zarr array that names the shard and the chunk which it cannot read."""

    _checksums: Mapping[Place, str] | None = None
    """Of what shards must be, by their place; None if they are not compared."""
    _proven: set[Place]
    """Those that were."""

    @classmethod
    def of(cls, array: zarr.Array[Any], checksums: Mapping[Place, str] | None = None) -> Image:
        """The same array, whose chunks are all there, and if given have these `checksums`."""
        image = cls(whole_array(array, REMEDY))
        image._checksums, image._proven = checksums, set[Place]()
        return image

    # what `array[…]`, `array.oindex[…]`, `array.vindex[…]` and `array.blocks[…]` come down to

    def get_basic_selection(self, selection: Any = Ellipsis, **options: Any) -> Any:
        return self._selected(super().get_basic_selection, selection, options, selection)

    def get_orthogonal_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_orthogonal_selection, selection, options, selection)

    def get_mask_selection(self, mask: Any, **options: Any) -> Any:
        return self._selected(super().get_mask_selection, mask, options, mask)

    def get_coordinate_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_coordinate_selection, selection, options, selection)

    def get_block_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_block_selection, selection, options, selection, True)

    def _selected(
        self,
        select: Callable[..., Any],
        selection: Any,
        options: dict[str, Any],
        where: Any,
        by_chunks: bool = False,
    ) -> Any:
        """What is selected; damage to a shard of it is told."""
        places = partial(_shards_of, self, where, by_chunks)
        plain = zarr.Array(self.async_array)
        if self._checksums is not None:
            # in the thread that asks: Zarr's must not wait for what they have to do themselves
            for place in places():
                if place not in self._proven:
                    _prove(plain, self._checksums, place)
                    self._proven.add(place)
        try:
            return select(selection, **options)
        except (CddError, IndexError, TypeError, MemoryError):
            raise
        except Exception as error:  # damaged shards make Zarr fail in any way
            for place in places():
                if damage := shard_damage(plain, place):
                    raise DamagedError(f"{self.path}, {damage}{REMEDY}") from error
            raise


def _prove(array: zarr.Array[Any], checksums: Mapping[Place, str], place: Place) -> None:
    """Raise `DamagedError` for a shard that is not what its run wrote."""
    try:
        found = checksum(np.asarray(array[shards_of(array).core_at(place)]))
    except Exception as error:
        if damage := shard_damage(array, place):
            raise DamagedError(f"{array.path}, {damage}{REMEDY}") from error
        raise
    if place not in checksums:
        raise DamagedError(f"{array.path}, shard {place} has no done mark{REMEDY}")
    if found != checksums[place]:
        raise DamagedError(f"{array.path}, shard {place} is not what its run wrote{REMEDY}")


def _shards_of(array: zarr.Array[Any], selection: Any, by_chunks: bool) -> Iterator[Place]:
    """Places of the shards that numbers, slices, lists or an ellipsis select voxels or chunks of.

    Of all shards for what cannot be understood, which Zarr refuses.
    """
    parts = list(selection) if isinstance(selection, tuple) else [selection]
    if getattr(parts[0], "ndim", 1) > 1:  # a mask
        parts = list(np.nonzero(parts[0]))
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    gap = next(i for i, part in enumerate(parts) if part is Ellipsis)
    parts[gap : gap + 1] = [slice(None)] * (array.ndim - len(parts) + 1)
    shards, steps = shards_of(array), array.chunks if by_chunks else (1,) * array.ndim
    along: list[Any]
    try:
        along = [
            np.unique(np.arange(0, n, step)[part] // side).tolist()
            for part, n, side, step in zip(parts, array.shape, shards.block, steps, strict=True)
        ]
    except (ValueError, TypeError, IndexError):
        along = list(map(range, shards.counts))
    return itertools.product(*along)
