"""Arrays of a finished store for its readers, to whom a lost or damaged chunk is an error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import zarr

from cdd_dask.blocks import Grid
from cdd_dask.errors import CddError, DamagedError
from cdd_dask.store import shard_damage, shards_of
from cdd_dask.whole import whole_array

REMEDY = ": `cdd-dask verify` lists all damage, `cdd-dask repair` mends it"

Place = tuple[int, ...]
"""Of a shard in its array."""


class Image(zarr.Array[Any]):
    """A Zarr array that names the shard and the chunk which it cannot read."""

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> Image:
        """The same array, whose chunks are all there."""
        return cls(whole_array(array, REMEDY))

    # what `array[…]`, `array.oindex[…]`, `array.vindex[…]` and `array.blocks[…]` come down to

    def get_basic_selection(self, selection: Any = Ellipsis, **options: Any) -> Any:
        return self._selected(super().get_basic_selection, selection, options)

    def get_orthogonal_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_orthogonal_selection, selection, options)

    def get_mask_selection(self, mask: Any, **options: Any) -> Any:
        return self._selected(super().get_mask_selection, mask, options, "points")

    def get_coordinate_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_coordinate_selection, selection, options, "points")

    def get_block_selection(self, selection: Any, **options: Any) -> Any:
        return self._selected(super().get_block_selection, selection, options, "chunks")

    def _selected(
        self,
        select: Callable[..., Any],
        selection: Any,
        options: dict[str, Any],
        how: str = "voxels",
    ) -> Any:
        """What is selected, along every axis or as ``points``; damage to a shard of it is told."""
        try:
            return select(selection, **options)
        except (CddError, IndexError, TypeError, MemoryError):
            raise
        except Exception as error:  # damaged shards make Zarr fail in any way
            plain = zarr.Array(self.async_array)
            for place in _shards_of(self, selection, how):
                if damage := shard_damage(plain, place):
                    raise DamagedError(f"{self.path}, {damage}{REMEDY}") from error
            raise


def _shards_of(array: zarr.Array[Any], selection: Any, how: str) -> Iterable[Place]:
    """Places of the shards that numbers, slices, lists or an ellipsis select voxels or chunks of.

    Of all shards for what cannot be understood, which Zarr refuses.
    """
    shards = shards_of(array)
    parts = list(selection) if isinstance(selection, tuple) else [selection]
    try:
        if how == "points" or getattr(parts[0], "ndim", 1) > 1:
            return _shards_of_points(array, shards, parts)
        if not any(part is Ellipsis for part in parts):
            parts.append(Ellipsis)
        gap = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[gap : gap + 1] = [slice(None)] * (array.ndim - len(parts) + 1)
        steps = array.chunks if how == "chunks" else (1,) * array.ndim
        along: list[Any] = [
            np.unique(np.arange(0, n, step)[part] // side).tolist()
            for part, n, side, step in zip(parts, array.shape, shards.block, steps, strict=True)
        ]
    except (ValueError, TypeError, IndexError):
        along = list(map(range, shards.counts))
    return itertools.product(*along)


def _shards_of_points(array: zarr.Array[Any], shards: Grid, parts: list[Any]) -> list[Place]:
    """Places of the shards of some voxels, given by a mask or by their indices along every axis."""
    first = np.asarray(parts[0])
    index = np.nonzero(first) if first.dtype == bool else np.broadcast_arrays(*parts)
    # as NumPy has it: from the end if negative, and an `IndexError` if there is no such voxel
    places = [
        np.arange(n)[i].ravel() // side
        for i, n, side in zip(index, array.shape, shards.block, strict=True)
    ]
    return [*map(tuple, np.unique(np.stack(places), axis=1).T.tolist())]
