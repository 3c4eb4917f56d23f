"""A step of the groups that stand for the voxels of cells, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.engines.rows import compiled

CHUNK = 4096
"""Cells that all groups move at once, to stay in the cache."""


@compiled
def _move(group, weight, change, means, level, sign, start, stop):  # type: ignore[no-untyped-def]
    step = len(weight) > 1
    for x in range(start, stop):
        old, new = group[x], change[x]
        if len(level):
            value = old + level[x]
            if (value > 0 and new < old) or (value < 0 and new > old):
                old = new
        elif (sign > 0 and new < old) or (sign < 0 and new > old):
            old = new
        group[x] = old
        means[x] += (weight[x] if step else weight[0]) * old


@compiled
def _move_all(groups, weights, change, means, level, sign):  # type: ignore[no-untyped-def]
    for start in range(0, len(change), CHUNK):
        stop = min(start + CHUNK, len(change))
        for g in range(len(groups)):
            _move(groups[g], weights[g], change, means, level, sign, start, stop)


def move_groups(
    groups: NDArray[Any],
    weights: NDArray[Any],
    change: NDArray[Any],
    means: NDArray[Any],
    level: NDArray[Any] | None,
    sign: int,
) -> None:
    """As `cells.move_groups`."""
    count = len(groups)
    flat = (np.ascontiguousarray(part).reshape(count, -1) for part in (groups, weights))
    levels = () if level is None else np.ascontiguousarray(level).reshape(-1)
    _move_all(*flat, np.ascontiguousarray(change).reshape(-1), means.reshape(-1), levels, sign)
