"""What engines do between voxels and the closure's cells (see `closure`), with NumPy.

Arrays of cells come with the cells around them that a step reads; beyond the volume's faces those
are made from the ones within, at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.closure import (
    beyond_cells,
    doubled,
    group_borders,
    group_sizes,
    interpolated_mean,
)
from cdd_dask.kernels import Kernel

Smooth = Callable[[NDArray[Any], tuple[Kernel, ...]], NDArray[Any]]
"""One unconstrained step of an engine, all faces being cut."""


def by_cell(field: NDArray[Any], cell: tuple[int, ...]) -> NDArray[Any]:
    """The voxels of a field of whole cells, a row per cell: shape ``(*cells, voxels of one)``."""
    ndim = field.ndim
    split = [part for n, f in zip(field.shape, cell, strict=True) for part in (n // f, f)]
    order = (*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2))
    rows = field.reshape(split).transpose(order)
    return rows.reshape(*rows.shape[:ndim], -1)


def interpolated(cells: NDArray[Any], levels: tuple[int, ...]) -> NDArray[Any]:
    """``U``: the voxels of all but the outermost cells along the axes that `levels` halve."""
    for axis, level in enumerate(levels):
        if level == 0:
            continue
        for _ in range(level):
            cells = doubled(cells, axis)
        cells = cells[(slice(None),) * axis + (slice(1, -1),)]
    return cells


def cell_means(field: NDArray[Any], cell: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sums of the voxels of every cell over their number, and the share of those that count.

    `field` is of whole cells, and NaN where voxels do not count.
    """
    rows = by_cell(field, cell)
    blank = np.isnan(rows)
    share = 1.0 - blank.mean(axis=-1, dtype=np.float64)
    means = np.where(blank, 0, rows).mean(axis=-1, dtype=np.float64)
    return means.astype(field.dtype), share.astype(field.dtype)


@dataclass(frozen=True)
class CellFaces:
    """The place of an array of cells in the volume's, and the rule at its faces."""

    start: tuple[int, ...]
    """Number of the first cell along each axis."""
    volume: tuple[int, ...]
    """Shape of the volume in voxels."""
    levels: tuple[int, ...]
    rule: str
    cval: float = 0.0
    layers: tuple[int, ...] = ()
    """Layers of cells beyond the volume's faces that are there, per axis; none where empty."""

    def extended(self, cells: NDArray[Any], by: tuple[int, ...]) -> NDArray[Any]:
        """`cells` with so many more on both sides of each axis.

        Beyond the volume's faces by its rule; what lies beyond a cut is anything.
        """
        for axis, more in enumerate(by):
            if more:
                sides = [self._beyond(cells, axis, more, high) for high in (False, True)]
                cells = np.concatenate([sides[0], cells, sides[1]], axis)
        return cells

    def _beyond(self, cells: NDArray[Any], axis: int, more: int, high: bool) -> NDArray[Any]:
        size, start, level = cells.shape[axis], self.start[axis], self.levels[axis]
        layer = self.layers[axis] if self.layers else 0
        count = -(-self.volume[axis] // 2**level)
        places = np.arange(more) + (size if high else -more) + start
        outside = (places < -layer) | (places >= count + layer)
        if layer:  # they are like the outermost layer
            places, outside = np.clip(places, -layer, count + layer - 1), outside & False
        numbers, weights = beyond_cells(self.rule, self.volume[axis], level, places)
        here = np.clip(numbers - start, 0, size - 1)
        at_cut = np.clip(places - start, 0, size - 1)  # anything will do
        here[~outside], weights[~outside] = at_cut[~outside, None], [1.0, 0.0, 0.0, 0.0]
        parts = np.moveaxis(cells, axis, 0)
        shape = (len(places),) + (1,) * (cells.ndim - 1)
        middle = parts[here[:, 1]]
        total = middle.copy()
        for node in (0, 2, 3):  # in differences, so that a constant stays one to the bit
            weight = weights[:, node].astype(cells.dtype).reshape(shape)
            if weight.any():
                total += weight * (parts[here[:, node]] - middle)
        if self.rule == "constant":
            total[outside] = self.cval
        return np.moveaxis(total, 0, axis)


def smoothed_cells(
    means: NDArray[Any],
    faces: CellFaces,
    kernels: tuple[Kernel, ...],
    halo: tuple[int, ...],
    smooth: Smooth,
) -> NDArray[Any]:
    """``G_c`` of the cells, and of `halo` more on every side."""
    radii = [kernel.radius for kernel in kernels]
    more = tuple(h + r for h, r in zip(halo, radii, strict=True))
    result = smooth(np.ascontiguousarray(faces.extended(means, more)), kernels)
    return result[tuple(slice(r, n - r) for r, n in zip(radii, result.shape, strict=True))]


def gathered(
    field: NDArray[Any], smooth: NDArray[Any], cell: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Deviations of a cell's voxels from the smooth field, sorted and averaged in groups.

    Parameters
    ----------
    field, smooth
        ``I_0`` and ``U S_0`` of whole cells; `field` is NaN where blank.
    cell
        Voxels of a cell along each axis.

    Returns
    -------
    groups
        Shape ``(K, *cells)``, 0 where a group is empty.
    count
        Voxels of every cell that are not blank.
    """
    deviations = by_cell(field - smooth, cell)
    deviations.sort(axis=-1)  # blanks come last
    voxels = deviations.shape[-1]
    shape = deviations.shape[:-1]
    counts = voxels - np.isnan(deviations).sum(axis=-1)
    groups = np.zeros((*shape, len(group_sizes(voxels))), field.dtype)
    for count in np.unique(counts):
        if count == 0:
            continue
        borders = group_borders(voxels, int(count))
        sizes = np.diff(borders)
        there = np.flatnonzero(sizes)
        chosen = counts == count
        rows = deviations if chosen.all() else deviations[chosen]
        sums = np.add.reduceat(rows[..., :count], borders[there], axis=-1, dtype=np.float64)
        means = np.zeros((*rows.shape[:-1], len(sizes)))
        means[..., there] = sums / sizes[there]
        if rows is deviations:
            groups[...] = means
        else:
            groups[chosen] = means
    return np.ascontiguousarray(np.moveaxis(groups, -1, 0)), counts


def group_weights(counts: NDArray[Any], voxels: int, dtype: Any) -> NDArray[Any]:
    """The share of a cell that each group has, shape ``(K, *cells)``, or ``(K, 1, …)`` if alike."""
    known, place = np.unique(counts, return_inverse=True)
    table = np.array([np.diff(group_borders(voxels, int(n))) / voxels for n in known], dtype)
    if len(known) == 1:
        alike: NDArray[Any] = table[0].reshape(-1, *(1,) * counts.ndim)
        return alike
    weights: NDArray[Any] = table[place.reshape(counts.shape)]
    return np.moveaxis(weights, -1, 0)


@dataclass(frozen=True)
class Evolution:
    """How cells evolve."""

    faces: CellFaces
    """Where the cells lie."""
    kernels: tuple[Kernel, ...]
    """A step's kernel on the cells."""
    halo: tuple[int, ...]
    """Cells around the others that voxels need, per axis: 1 where the grid is halved."""
    sign: int
    """1 or -1 where all voxels have that sign, 0 where both occur."""
    crossing: bool
    """Whether they may cross zero: none of a new run's do."""
    masked: bool
    """Whether there are blank voxels, so that the smooth field is normalised."""
    smooth: Smooth

    def smoothed(self, means: NDArray[Any]) -> NDArray[Any]:
        """``G_c`` of the cells and of those around them."""
        return smoothed_cells(means, self.faces, self.kernels, self.halo, self.smooth)

    def held(self, shape: tuple[int, ...]) -> NDArray[Any] | float:
        """The share of every cell that lies beyond a ``constant`` face."""
        if self.faces.rule != "constant":
            return 0.0
        within: NDArray[Any] = np.ones(shape)
        for axis, (start, size) in enumerate(zip(self.faces.start, shape, strict=True)):
            cell = 2 ** self.faces.levels[axis]
            voxels = self.faces.volume[axis] - cell * np.arange(start, start + size)
            part = np.clip(voxels / cell, 0, 1)
            within *= part.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return 1.0 - within


@dataclass
class Cells:
    """What is known of cells between two steps."""

    base: NDArray[Any]
    """What is left of a cell's mean without its groups; without groups, the mean."""
    groups: NDArray[Any]
    """Mean deviations of groups of voxels from the first smooth field, shape ``(K, *cells)``."""
    share: NDArray[Any] | None
    """The share of a cell's voxels that take part; None where all do."""

    @classmethod
    def of(cls, values: NDArray[Any], count: int) -> Cells:
        """From stored values: `count` groups, the base, and the share where there is one."""
        return cls(
            values[count],
            values[:count],
            values[count + 1] if len(values) > count + 1 else None,
        )

    def stored(self) -> NDArray[Any]:
        """All values, along a first axis."""
        parts = [*self.groups, self.base] + ([] if self.share is None else [self.share])
        return np.stack(parts)


def evolved(
    cells: Cells, first: NDArray[Any], how: Evolution, steps: range
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Let cells evolve, yielding every step's number and its smooth field, not normalised.

    Parameters
    ----------
    cells
        Changed in place.
    first
        The smooth field before the channel's first step, and the smooth share where there are
        blanks, shape ``(1 or 2, *cells)`` with `how.halo` more cells on every side.
    how, steps
        The rule, and the numbers of the steps to take.
    """
    voxels = 2 ** sum(how.faces.levels)
    dtype = cells.base.dtype
    held = np.asarray(how.held(cells.base.shape), dtype)
    counts = np.full(cells.base.shape, voxels)
    if cells.share is not None:
        counts = np.rint(cells.share.astype(np.float64) * voxels).astype(np.intp)
    weights = group_weights(counts, voxels, dtype) if len(cells.groups) else None
    means = cells.base.copy()
    if weights is not None:
        means += (weights * cells.groups).sum(axis=0)
    share = np.ones((), dtype) if cells.share is None else cells.share
    smooth_share = how.smoothed(share + held) if how.masked else None
    reference = normalised(first[0], smooth_share)
    spread = tuple(interpolated_mean(level) for level in how.faces.levels)
    inner = tuple(slice(h, n - h) for h, n in zip(how.halo, first[0].shape, strict=True))
    level = None
    if how.sign == 0 and weights is not None:  # what the groups deviate from, on average
        level = (cells.base - held * how.faces.cval) / np.maximum(share, dtype.type(1 / voxels))
    for step in steps:
        smooth = how.smoothed(means)
        yield step, smooth
        smooth = normalised(smooth, smooth_share)
        if weights is None:  # unconstrained: the mean of what the voxels become
            means[...] = share * how.smooth(smooth, spread)[inner] + held * how.faces.cval
            cells.base[...] = means
        else:
            change = how.smooth(smooth - reference, spread)[inner]
            means[...] = cells.base
            move_groups(cells.groups, weights, change, means, level, how)


def move_groups(
    groups: NDArray[Any],
    weights: NDArray[Any],
    change: NDArray[Any],
    means: NDArray[Any],
    level: NDArray[Any] | None,
    how: Evolution,
) -> None:
    """One step of the groups, in place, and their weighted sum added to `means`.

    Parameters
    ----------
    groups
        Deviations, shape ``(K, *cells)``.
    weights
        Of the same shape, or ``(K, 1, …)``.
    change
        How far the smooth field has moved since they were taken.
    means
        What is left of the cells' means without the groups.
    level
        What the groups deviate from, on average; None where all voxels have one sign.
    how
        Gives that sign, and the rule.
    """
    for group, weight in zip(groups, weights, strict=True):
        if level is None:
            (np.minimum if how.sign > 0 else np.maximum)(group, change, out=group)
        elif how.crossing:
            value = group + level
            np.minimum(group, change, out=group, where=value > 0)
            np.maximum(group, change, out=group, where=value < 0)
        else:
            np.clip(change, np.minimum(group, -level), np.maximum(group, -level), out=group)
        means += weight * group


def normalised(smooth: NDArray[Any], share: NDArray[Any] | None) -> NDArray[Any]:
    """The smooth field where blanks take no part, from that of means over whole cells."""
    if share is None:
        return smooth
    result: NDArray[Any] = np.zeros_like(smooth)
    np.divide(smooth, share, out=result, where=share > 0)
    return result
