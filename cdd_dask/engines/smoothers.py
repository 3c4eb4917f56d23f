"""How the CPU engine takes a step: fused, along one axis after the other, or by a pyramid."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT, extension_index
from cdd_dask.engines import coarse, fused, separable
from cdd_dask.engines.rows import RULES
from cdd_dask.engines.team import Team
from cdd_dask.engines.vectors import BATCH
from cdd_dask.kernels import IDENTITY, Kernel
from cdd_dask.pyramid import can_extend_cells, coarse_kernel, margin

AT_ONCE = 8
"""Steps that a part of the field takes while it is in the cache; fewer where it recedes faster."""
DEEP = 16
"""Planes of such a part, in those that it recedes by each step."""
IN_FLIGHT = 4_000_000
"""Bytes of such a part, to stay in the cache."""
Region = tuple[int, int, int, int]
"""Planes and rows to compute, ``(z0, z1, y0, y1)``."""
CHUNK = 64
"""Planes that are computed before the next tile: its neighbours find their rows in the cache."""
PLANES = 16
"""Least planes of a pyramid's field that move before their cells are gathered."""
Share = NDArray[Any] | tuple[()]
"""What blanks leave of the kernel, infinite where blank; ``()`` where nothing is blank."""


@dataclass(frozen=True)
class Axis:
    """One axis of a block, or several neighbouring ones that are left alone."""

    size: int
    kernel: Kernel
    rules: tuple[str, str]
    level: int = 0
    phase: int = 0


@dataclass(frozen=True)
class Means:
    """What a smoother computes with."""

    field: np.dtype[Any]
    """Type of the field."""
    working: np.dtype[Any]
    """Type of what is computed from it on the way."""
    cval: float
    team: Team


class Smoother(ABC):
    """Takes steps of one block."""

    in_place: bool
    """Whether `move` may write where it reads."""

    @abstractmethod
    def move(self, field: NDArray[Any], out: NDArray[Any], share: Share, rule: Any) -> None:
        """One step of the flat `field`, written to `out`."""

    def run(self, field: NDArray[Any], share: Share, rule: Any, count: int) -> NDArray[Any]:
        """The flat `field` after `count` steps; it is overwritten."""
        other = field if self.in_place else fused.aligned(field.size, field.dtype)
        for _ in range(count):
            self.move(field, other, share, rule)
            field, other = other, field
        return field


def smoother_of(axes: list[Axis], means: Means) -> Smoother:
    """What smooths these axes best."""
    if len(axes) > 3:
        return _Separable(axes, means)
    axes = [Axis(1, IDENTITY, (CUT, CUT))] * (3 - len(axes)) + axes
    if any(axis.level for axis in axes):
        return Pyramid(axes, means)
    if any(axis.kernel.radius > fused.LARGEST_RADIUS for axis in axes):
        return _Separable(axes, means)
    return _Fused(axes, means)


def _twice(kernel: Kernel, radius: int, dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """Twice the weights of a kernel, with zeros up to `radius`; none if it has none."""
    if kernel.radius == 0:
        return ()
    wings = kernel.wings + (0.0,) * (radius - kernel.radius)
    return tuple(dtype.type(2 * weight) for weight in wings)


def _extended(axis: Axis, before: int, after: int) -> NDArray[np.intp]:
    """Where the values at ``-before … n + after - 1`` come from, each face by its rule."""
    low, high = axis.rules
    return np.concatenate(
        [
            extension_index(low, axis.size, -before, 0),
            np.arange(axis.size),
            extension_index(high, axis.size, axis.size, axis.size + after),
        ]
    )


class _Fused(Smoother):
    """All axes in one visit; radii up to `fused.LARGEST_RADIUS`."""

    in_place = False

    def __init__(self, axes: list[Axis], means: Means) -> None:
        # one radius for all axes: what is compiled depends on it
        radius = max(axis.kernel.radius for axis in axes)
        assert radius <= fused.LARGEST_RADIUS, radius
        self._shape = tuple(axis.size for axis in axes)
        self._weights = tuple(_twice(axis.kernel, radius, means.working) for axis in axes)
        self._index = tuple(
            _extended(axis, len(weights), len(weights) + BATCH)
            for axis, weights in zip(axes, self._weights, strict=True)
        )
        self._cval, self._team = means.working.type(means.cval), means.team
        arrays = len(self._weights[0]), means.field, means.working, means.cval
        self._scratch = [(fused.scratch_arrays(*arrays),) for _ in range(means.team.size)]
        nz, ny, nx = self._shape
        self._slope = -(-radius // BATCH) * BATCH
        self._deep = max(1, DEEP * self._slope)
        rows = IN_FLIGHT // ((self._deep + 2 * self._slope) * nx * 2 * means.field.itemsize)
        self._high = max(fused.TILE_ROWS, rows // fused.TILE_ROWS * fused.TILE_ROWS)
        # a step that recedes must not need what lies at the other end
        recedes = arrays[0] and min(nz, ny) > 4 * radius and "wrap" not in axes[0].rules
        if "wrap" in axes[1].rules:
            self._high = ny + AT_ONCE * self._slope
        fastest = AT_ONCE * BATCH // max(1, self._slope)
        # gaps between the parts of several threads are filled by few: keep them narrow
        narrow = 4 * means.team.size if means.team.size > 1 else 2
        room = nz // (narrow * max(1, self._slope))
        self._at_once = max(1, min(fastest, room)) if recedes else 1

    def move(self, field: NDArray[Any], out: NDArray[Any], share: Share, rule: Any) -> None:
        def work(region: Region, scratch: Any) -> None:
            z0, z1, y0, y1 = region
            for z in range(z0, z1, CHUNK):
                self._step(field, out, share, rule, (z, min(z + CHUNK, z1), y0, y1), scratch)

        self._team.share(work, self._shape, self._scratch)

    def run(self, field: NDArray[Any], share: Share, rule: Any, count: int) -> NDArray[Any]:
        other = fused.aligned(field.size, field.dtype)
        done = 0
        while done < count:
            steps = min(self._at_once, count - done)
            if steps > 1:
                self._visit((field, other), share, rule, steps)
            else:
                self.move(field, other, share, rule)
            if steps % 2:
                field, other = other, field
            done += steps
        return field

    def _visit(self, fields: tuple[NDArray[Any], ...], share: Share, rule: Any, steps: int) -> None:
        """Several steps in one visit of memory.

        A chunk takes all `steps` before the next one, each of them `slope` planes and rows further
        back: what it reads is there, and what it overwrites nobody needs any more. Threads take
        parts that recede from each other likewise, and at last fill the gaps::

            step 2   |   part 0   /\\   part 1   |
            step 1   |           /  \\           |
            step 0   |          /gap \\          |
        """
        nz, ny, _ = self._shape
        ends = self._team.borders(nz, 2 * steps * self._slope)
        back = [step * self._slope for step in range(steps)]

        def take(step: int, z: tuple[int, int], y: tuple[int, int], scratch: Any) -> None:
            if z[0] < z[1] and y[0] < y[1]:
                field, out = fields[step % 2], fields[(step + 1) % 2]
                self._step(field, out, share, rule, (*z, *y), scratch)

        def part(start: int, stop: int, scratch: Any) -> None:
            for z in range(start, stop + back[-1], self._deep):
                for y in range(0, ny + back[-1], self._high):
                    for step, behind in enumerate(back):
                        low = start + behind if start else 0
                        high = stop - behind if stop < nz else nz
                        take(
                            step,
                            (max(low, z - behind), min(high, z + self._deep - behind)),
                            (max(0, y - behind), min(ny, y + self._high - behind)),
                            scratch,
                        )

        def gap(border: int, scratch: Any) -> None:
            for step, behind in enumerate(back):
                take(step, (border - behind, border + behind), (0, ny), scratch)

        self._team.run(part, [*pairwise(ends)], self._scratch)
        self._team.run(gap, [(end,) for end in ends[1:-1]], self._scratch)

    def _step(
        self,
        field: NDArray[Any],
        out: NDArray[Any],
        share: Share,
        rule: Any,
        region: Region,
        scratch: Any,
    ) -> None:
        shape, index, weights = self._shape, self._index, self._weights
        fused.step(field, out, share, shape, region, index, weights, rule, self._cval, scratch)


class _Separable(Smoother):
    """One axis after the other; any number of them, any radius."""

    in_place = True

    def __init__(self, axes: list[Axis], means: Means) -> None:
        self._shape = tuple(axis.size for axis in axes)
        self._axes = [(i, axis) for i, axis in enumerate(axes) if axis.kernel.radius]
        self._dtype, self._cval, self._team = means.working, means.cval, means.team
        self._smooth = np.empty(math.prod(self._shape), self._dtype)

    def move(self, field: NDArray[Any], out: NDArray[Any], share: Share, rule: Any) -> None:
        source = field
        for i, axis in self._axes:
            self._smooth_axis(source, self._smooth, i, axis)
            source = self._smooth
        separable.move(source, field, out, share, field.size, rule)

    def _smooth_axis(self, field: NDArray[Any], out: NDArray[Any], i: int, axis: Axis) -> None:
        radius = axis.kernel.radius
        shape = (math.prod(self._shape[:i]), axis.size, math.prod(self._shape[i + 1 :]))
        index = _extended(axis, radius, radius)
        weights = np.array(_twice(axis.kernel, radius, self._dtype))
        cval = field.dtype.type(self._cval)

        def work(region: tuple[int, ...], tile: NDArray[Any], sums: NDArray[Any]) -> None:
            separable.smooth_axis(field, out, shape, region, index, weights, cval, tile, sums)

        size, many = (axis.size + 2 * radius) * min(separable.WIDTH, shape[2]), separable.CHUNK
        scratch = [
            (np.empty(size, field.dtype), np.empty(many, self._dtype))
            for _ in range(self._team.size)
        ]
        self._team.share(work, (shape[0], shape[2]), scratch)


class Pyramid(Smoother):
    """Down to cells, a small kernel there, and back."""

    in_place = True

    def __init__(self, axes: list[Axis], means: Means) -> None:
        self._cval, self._team, dtype = means.working.type(means.cval), means.team, means.working
        ways = [_Way(axis) for axis in axes]
        depth = max(axis.level for axis in axes)
        self._halve = [
            tuple((0,) if axis.level > level else () for axis in axes) for level in range(depth)
        ]
        levels = range(depth)
        self._down = [tuple(way.down(level)[0] for way in ways) for level in levels]
        self._before = [ways[2].down(level)[1] for level in levels]
        self._up = [(ways[0].up(i), ways[1].up(i), ways[2].ends(i)) for i in levels]
        self._shapes = [tuple(way.size(level) for way in ways) for level in range(depth + 1)]
        self._cells = [np.empty(math.prod(shape), dtype) for shape in self._shapes[1:]]
        self._smooth = fused.aligned(self._cells[-1].size, dtype)
        # the next step's cells are made while these are still needed
        self._next = np.empty(self._cells[0].size, dtype) if depth > 1 else self._cells[0]
        self._plain = [_Plain.of(*way.down(0), bool(way.level), way.size(1)) for way in ways[:2]]
        coarsest = [way.coarsest() for way in ways]
        self._kernel = smoother_of(coarsest, replace(means, field=dtype))
        longest = max(len(index[2]) for index in self._down) + 2 * self._shapes[0][2]
        arrays = longest, means.field, dtype, means.cval
        self._scratch = [(coarse.row_arrays(*arrays),) for _ in range(means.team.size)]

    @property
    def cells(self) -> int:
        """Cells that it holds."""
        more = 0 if self._next is self._cells[0] else self._next.size
        return sum(cells.size for cells in self._cells) + self._smooth.size + more

    def move(self, field: NDArray[Any], out: NDArray[Any], share: Share, rule: Any) -> None:
        self._gather(field, self._cells[0], 0)
        self._spread(self._smoothed(), field, out, share, rule, 0)

    def run(self, field: NDArray[Any], share: Share, rule: Any, count: int) -> NDArray[Any]:
        if len(self._team.borders(self._shapes[0][0], 2 * PLANES)) <= self._team.size:
            return super().run(field, share, rule, count)  # too few planes for all threads
        self._gather(field, self._cells[0], 0)
        for _ in range(count - 1):
            self._turn(self._smoothed(), field, share, rule)
            self._cells[0], self._next = self._next, self._cells[0]
        self._spread(self._smoothed(), field, field, share, rule, 0)
        return field

    def _smoothed(self) -> NDArray[Any]:
        """The smooth cells of the first level, from its cells."""
        for level in range(1, len(self._cells)):
            self._gather(self._cells[level - 1], self._cells[level], level)
        self._kernel.move(self._cells[-1], self._smooth, (), RULES["unconstrained"])
        source = self._smooth
        for level in range(len(self._cells) - 1, 0, -1):
            cells = self._cells[level - 1]
            self._spread(source, cells, cells, (), RULES["unconstrained"], level)
            source = cells
        return source

    def _turn(self, source: NDArray[Any], field: NDArray[Any], share: Share, rule: Any) -> None:
        """Move the field, and gather its next cells while it is in the cache.

        A cell is gathered as soon as the last of its voxels has moved; those with voxels of several
        threads' parts, or from beyond a face, when all have.
        """
        (nz, ny, nx), (mz, my, _) = self._shapes[:2]
        planes, lines = self._plain
        ends = self._team.borders(nz, 2 * PLANES)
        parts = [(start, stop, planes.first_after(start)) for start, stop in pairwise(ends)]

        rows = IN_FLIGHT // (nx * field.itemsize)
        deep, high = max(PLANES, rows // ny), max(BATCH, rows // PLANES)

        def part(start: int, stop: int, first: int, scratch: Any) -> None:
            line = lines.first
            for y in range(0, ny, high):
                y_stop = min(y + high, ny)
                next_line, plane = lines.ready(y_stop), first
                for z in range(start, stop, deep):
                    z_stop = min(z + deep, stop)
                    moved = (z, z_stop, y, y_stop)
                    self._spread_part(source, field, field, share, rule, 0, moved, scratch)
                    next_plane = max(plane, planes.ready(z_stop))
                    made = (plane, next_plane, line, next_line)
                    self._gather_part(field, self._next, 0, made, scratch)
                    plane = next_plane
                line = next_line

        self._team.run(part, parts, self._scratch)
        done = 0
        rest = []
        for _, stop, first in parts:
            rest += [(done, first, 0, my), (first, planes.ready(stop), 0, lines.first)]
            done = max(first, planes.ready(stop))
            rest.append((first, done, lines.ready(ny), my))
        rest.append((done, mz, 0, my))
        gather = partial(self._gather_part, field, self._next, 0)
        for z0, z1, y0, y1 in rest:
            if z0 < z1 and y0 < y1:
                shares = np.linspace(y0, y1, self._team.size + 1).astype(int).tolist()
                parts_of_it = [((z0, z1, a, b),) for a, b in pairwise(shares)]
                self._team.run(gather, parts_of_it, self._scratch)

    def _gather(self, field: NDArray[Any], cells: NDArray[Any], level: int) -> None:
        shapes = self._shapes[level : level + 2]
        # planes are read again for the next cells: few rows at a time stay in the cache until then
        high = max(1, coarse.CACHE // (2 * 4 * shapes[0][2] * field.itemsize))

        def work(region: Region, scratch: Any) -> None:
            z0, z1, y0, y1 = region
            for y in range(y0, y1, high):
                part = (z0, z1, y, min(y + high, y1))
                self._gather_part(field, cells, level, part, scratch)

        self._team.share(work, shapes[1], self._scratch)

    def _gather_part(
        self, field: NDArray[Any], cells: NDArray[Any], level: int, region: Region, scratch: Any
    ) -> None:
        shape, coarse_shape = self._shapes[level : level + 2]
        index, before, halve = self._down[level], self._before[level], self._halve[level]
        coarse.gather(
            field,
            shape,
            cells,
            coarse_shape,
            region,
            index,
            before,
            halve,
            self._cval,
            scratch,
        )

    def _spread(
        self,
        cells: NDArray[Any],
        field: NDArray[Any],
        out: NDArray[Any],
        share: Share,
        rule: Any,
        level: int,
    ) -> None:
        def work(region: Region, scratch: Any) -> None:
            self._spread_part(cells, field, out, share, rule, level, region, scratch)

        self._team.share(work, self._shapes[level], self._scratch)

    def _spread_part(
        self,
        cells: NDArray[Any],
        field: NDArray[Any],
        out: NDArray[Any],
        share: Share,
        rule: Any,
        level: int,
        region: Region,
        scratch: Any,
    ) -> None:
        shape, coarse_shape = self._shapes[level : level + 2]
        index, halve = self._up[level], self._halve[level]
        coarse.spread(
            cells,
            coarse_shape,
            field,
            out,
            share,
            shape,
            region,
            index,
            halve,
            rule,
            scratch,
        )


@dataclass(frozen=True)
class _Plain:
    """The cells along one axis whose voxels lie side by side in the field."""

    first: int
    starts: NDArray[np.intp]
    """Where the voxels begin of the first such cell and those that follow it."""
    size: int
    """Number of voxels of each."""

    @classmethod
    def of(cls, index: NDArray[np.intp], before: int, halved: bool, count: int) -> _Plain:
        """Those among `count` cells that `_Way.down` describes."""
        stride, size = (2, 4) if halved else (1, 1)
        cells = np.arange(count)
        starts = index[stride * cells]
        plain = (starts >= 0) & (starts == stride * cells - before)
        plain &= index[stride * cells + size - 1] == starts + size - 1
        found = np.flatnonzero(plain)
        return cls(int(found[0]) if len(found) else 0, starts[found], size)

    def first_after(self, voxel: int) -> int:
        """The first of them with no voxel before `voxel`."""
        return self.first + int(np.searchsorted(self.starts, voxel))

    def ready(self, voxel: int) -> int:
        """The cell behind those with no voxel from `voxel` on."""
        return self.first + int(np.searchsorted(self.starts + self.size, voxel, "right"))


class _Way:
    """One axis of a pyramid, from the voxels to the coarsest cells.

    Where a face's rule may not be applied to cells, cells beyond the face are made of voxels that
    the rule gives::

        |<-- before -->|<------ voxels ------>|<-- after -->|
        |<----- level 0, a whole number of coarsest cells ----->|
    """

    def __init__(self, axis: Axis) -> None:
        level, cell = axis.level, 2**axis.level
        self._axis, self.level = axis, level
        self.before, after = (axis.phase if level else 0), 0
        end = axis.phase + axis.size
        if level:
            beyond = margin(axis.kernel, level)
            wrapped = axis.rules[0] == "wrap"
            low, high = axis.phase % cell == 0, end % cell == 0
            if not can_extend_cells(axis.rules[0], low and (high or not wrapped)):
                self.before += beyond
            if not can_extend_cells(axis.rules[1], high and (low or not wrapped)):
                after = beyond
        whole = -(-(self.before + axis.size + after) // cell) * cell
        self._after, self._whole = whole - self.before - axis.size, whole
        # beyond the cells: right for wrap and reflect; else nothing there matters
        self._rule = "wrap" if axis.rules[0] == "wrap" and whole == axis.size else "reflect"

    def size(self, level: int) -> int:
        """Length at `level`: the voxels at 0, then cells."""
        level = min(level, self._axis.level)
        return self._whole >> level if level else self._axis.size

    def coarsest(self) -> Axis:
        """The axis as its small kernel sees it."""
        axis = self._axis
        if axis.level == 0:
            return Axis(axis.size, axis.kernel, axis.rules)
        kernel = coarse_kernel(axis.kernel, axis.level)
        return Axis(self.size(axis.level), kernel, (self._rule, self._rule))

    def down(self, level: int) -> tuple[NDArray[np.intp], int]:
        """Where the voxels come from of which `coarse.gather` makes the cells of ``level + 1``.

        And how many of them lie before the field.
        """
        size = self.size(level)
        if self._axis.level <= level:
            return np.arange(size), 0
        if level == 0:
            return _extended(self._axis, self.before + 1, self._after + 1), self.before + 1
        return extension_index(self._rule, size, -1, size + 1), 1

    def up(self, level: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The cells between which the voxels lie that `coarse.spread` makes, near and far."""
        size = self.size(level)
        if self._axis.level <= level:
            return np.arange(size), np.arange(size)
        place = np.arange(size) + (0 if level else self.before)
        near = place // 2
        return near, self._cells(level + 1)[near + 2 * (place % 2)]

    def ends(self, level: int) -> tuple[int, int, int]:
        """The same for the axis along rows.

        How many voxels lie before the field, and the cells that stand for those beyond the ends.
        """
        if self._axis.level <= level:
            return 0, 0, 0
        cells = self._cells(level + 1)
        return 0 if level else self.before, int(cells[0]), int(cells[-1])

    def _cells(self, level: int) -> NDArray[np.intp]:
        """The cells of `level`, with one more beyond each end."""
        return extension_index(self._rule, self.size(level), -1, self.size(level) + 1)
