"""Reading a region of an array, wherever it lies."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.blocks import Region, pieces


def read_region(array: Any, region: Region) -> NDArray[Any]:
    """The values of `region`, one shard at a time, modulo the array's shape.

    Parameters
    ----------
    array
        Anything with a `shape` that slices to NumPy arrays. If it has `shards` as a Zarr array
        has, no more than one of them is held encoded at a time.
    region
        Slices with start and stop, which may lie beyond the array.
    """
    units = getattr(array, "shards", None) or array.shape
    cuts = [
        pieces(s.start, s.stop, n, unit)
        for s, n, unit in zip(region, array.shape, units, strict=True)
    ]
    if all(len(cut) == 1 for cut in cuts):
        return np.asarray(array[tuple(cut[0][1] for cut in cuts)])
    result: NDArray[Any] | None = None
    for piece in itertools.product(*cuts):
        values = np.asarray(array[tuple(source for _, source in piece)])
        if result is None:
            result = np.empty([s.stop - s.start for s in region], values.dtype)
        result[tuple(target for target, _ in piece)] = values
    assert result is not None  # no region is empty
    return result
