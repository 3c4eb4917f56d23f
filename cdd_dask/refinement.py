"""Upsampling: a block on a finer grid and back, so that the finest channels come out better.

Every voxel is refined into `factor` cells along each decomposed axis, cell-centred, so the
volume's faces stay where they are::

    voxels   |     a     |     b     |
    cells    | a0  a1 | a2  a3 | b0 …        a voxel is the mean of its central cells,
                 ^^^^^^^                     two along every axis: its value at its centre

Cells are interpolated by the polynomial of degree 4 through five voxels along each axis and then
drawn towards their voxel's value as far as it takes to keep its sign (the limiter of Zhang & Shu
2010, J. Comput. Phys. 229, 3091): the central mean of the cells is the voxel's value, and data
that are not negative stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT, OUTSIDE, extension_index

Faces = tuple[tuple[str, str], ...]

STENCIL = 2
"""Voxels on either side of one that decide its cells."""


@lru_cache
def interpolation_weights(factor: int) -> NDArray[np.float64]:
    """Weights of the five voxels about one for each of its cells, shape ``(factor, 5)``.

    Lagrange's, at the cells' centres ``(i + 1/2) / factor - 1/2``.
    """
    nodes = range(-STENCIL, STENCIL + 1)
    centres = (np.arange(factor) + 0.5) / factor - 0.5
    weights = [
        np.prod([(centres - m) / (node - m) for m in nodes if m != node], axis=0) for node in nodes
    ]
    return np.stack(weights, axis=1)


def range_growth(factor: int, axes: int) -> float:
    """How much larger than the field's range that of its cells can be, at most.

    A cell differs from its voxel by no more than the interpolant and its central mean differ,
    and each lies within the Lebesgue constant of its weights of the middle of the range.
    """
    if factor == 1 or axes == 0:
        return 1.0
    weights = interpolation_weights(factor)
    central = weights[factor // 2 - 1 : factor // 2 + 1].mean(axis=0)
    constants = np.abs(weights).sum(axis=1).max(), np.abs(central).sum()
    return 1.0 + float(sum(constant**axes for constant in constants))


@dataclass(frozen=True)
class Refinement:
    """The way of one block to the refined grid and back.

    A ``mirror`` face lies in the middle of the outermost voxels, which is between two cells: the
    cells beyond it are left out, and the rule for the rest is ``reflect``.
    """

    factor: int
    """Cells per voxel along a decomposed axis: 2 or 4."""
    axes: tuple[int, ...]
    """The decomposed axes."""
    faces: Faces
    """Rule of every face of the block."""
    cval: float = 0.0
    """Value beyond ``constant`` faces, in the field's unit."""

    def cell_faces(self, shape: tuple[int, ...]) -> Faces:
        """Rule of every face of the refined block of a block of `shape` voxels."""
        half = self._left_out(shape)
        return tuple(
            tuple("reflect" if out else rule for out, rule in zip(outs, rules, strict=True))  # type: ignore[misc]
            for outs, rules in zip(half, self.faces, strict=True)
        )

    def first_cell(self, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Where the refined block begins if the block of `shape` voxels begins at `start`."""
        return tuple(
            place * (self.factor if axis in self.axes else 1) + low
            for axis, (place, (low, _)) in enumerate(zip(start, self._left_out(shape), strict=True))
        )

    def refine(self, field: NDArray[Any]) -> NDArray[Any]:
        """The cells of a block, C-contiguous, in its dtype; those of blank voxels are NaN.

        Voxels with a blank one among those that decide their cells have them all alike.
        """
        cells = field
        for axis in self.axes:
            cells = self._interpolate(cells, axis)
        parts, inner = self._by_voxel(cells), self._inner_axes
        value = np.expand_dims(field, inner)
        parts -= self._central_mean(parts)
        parts[np.isnan(parts)] = 0.0
        # θ = min(1, |v| / largest step towards 0): cells keep the sign of their voxel
        towards = np.where(
            value < 0, parts.max(inner, keepdims=True), -parts.min(inner, keepdims=True)
        )
        size = np.abs(value)
        parts *= np.divide(size, towards, out=np.ones_like(size), where=towards > size)
        parts += value
        np.maximum(parts, 0, out=parts, where=value >= 0)
        np.minimum(parts, 0, out=parts, where=value <= 0)
        kept = tuple(
            slice(low, size - high)
            for (low, high), size in zip(self._left_out(field.shape), cells.shape, strict=True)
        )
        return np.ascontiguousarray(cells[kept])

    def states(
        self,
        field: NDArray[Any],
        start: tuple[int, ...],
        channels: Iterable[int],
        diffuse: Callable[[int, NDArray[Any], Faces, tuple[int, ...]], NDArray[Any]],
    ) -> Iterator[NDArray[Any]]:
        """The block before, between and after `channels`, computed on the refined grid.

        What the cells give back of the field is what the channels are counted from.

        Parameters
        ----------
        field
            The block, which begins at `start` of the volume.
        channels
            Their numbers, in order.
        diffuse
            Takes a channel's number, cells, the rules of their faces and where they begin, and
            returns the cells after that channel. It may overwrite those it is given.
        """
        cells, faces = self.refine(field), self.cell_faces(field.shape)
        first = self.first_cell(start, field.shape)
        yield self.coarsen(cells, field.shape)
        for k in channels:
            cells = diffuse(k, cells, faces, first)
            yield self.coarsen(cells, field.shape)

    def coarsen(self, cells: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The block of `shape` voxels whose cells are `cells`: every voxel its central mean."""
        left_out = self._left_out(shape)
        if any(map(any, left_out)):
            cells = np.pad(cells, left_out, "symmetric")
        return self._central_mean(self._by_voxel(cells)).reshape(shape)

    def _left_out(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Cells that lie beyond a mirror face, per face."""
        half = self.factor // 2
        return tuple(
            tuple(half if rule == "mirror" and axis in self.axes and n > 1 else 0 for rule in rules)  # type: ignore[misc]
            for axis, (n, rules) in enumerate(zip(shape, self.faces, strict=True))
        )

    def _interpolate(self, field: NDArray[Any], axis: int) -> NDArray[Any]:
        """`field` with `factor` cells in place of every voxel along `axis`."""
        n = field.shape[axis]
        extended = np.concatenate(
            [
                self._beyond(field, axis, self.faces[axis][0], -STENCIL, 0),
                field,
                self._beyond(field, axis, self.faces[axis][1], n, n + STENCIL),
            ],
            axis,
        )
        shape = list(field.shape)
        shape[axis] = n * self.factor
        cells = np.empty(shape, field.dtype)
        for i, weights in enumerate(interpolation_weights(self.factor)):
            place = (slice(None),) * axis + (slice(i, None, self.factor),)
            cells[place] = sum(
                weight * extended[(slice(None),) * axis + (slice(start, start + n),)]
                for start, weight in enumerate(weights.astype(field.dtype))
            )
        return cells

    def _beyond(
        self, field: NDArray[Any], axis: int, rule: str, start: int, stop: int
    ) -> NDArray[Any]:
        """The positions ``start … stop - 1`` beyond a face; a cut one may be extended anyhow."""
        index = extension_index("nearest" if rule == CUT else rule, field.shape[axis], start, stop)
        values = np.take(field, index, axis)
        if index[0] == OUTSIDE:
            values[...] = self.cval
        return values

    @property
    def _inner_axes(self) -> tuple[int, ...]:
        """Numbers of the axes within the voxels in a view by voxel."""
        return tuple(axis + 1 + i for i, axis in enumerate(self.axes))

    def _by_voxel(self, cells: NDArray[Any]) -> NDArray[Any]:
        """A view of `cells` with an axis within the voxels behind each decomposed one."""
        shape = list(cells.shape)
        for axis, inner in zip(self.axes, self._inner_axes, strict=True):
            shape[inner - 1 : inner] = [cells.shape[axis] // self.factor, self.factor]
        return cells.reshape(shape)

    def _central_mean(self, parts: NDArray[Any]) -> NDArray[Any]:
        """Mean of every voxel's central cells, with axes of length 1 within the voxels.

        Monotone in every cell, rounding included: the means of a field that shrinks shrink too.
        """
        half = self.factor // 2
        for inner in self._inner_axes:
            low, high = (
                parts[(slice(None),) * inner + (slice(h, h + 1),)] for h in (half - 1, half)
            )
            parts = 0.5 * (low + high)
        return parts
