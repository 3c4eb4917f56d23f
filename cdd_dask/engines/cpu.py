"""The CPU engine: steps fused into one visit of the field, compiled with numba."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT, extension_index
from cdd_dask.engines import coarse, fused, separable
from cdd_dask.engines.base import Diffusion, Engine, Footprint
from cdd_dask.engines.rows import RULES
from cdd_dask.kernels import IDENTITY, Kernel
from cdd_dask.pyramid import can_extend_cells, coarse_kernel, margin

CHUNK = 64
"""Planes that are computed before the next tile: its neighbours find their rows in the cache."""
SMALLEST_PART = 30_000
"""Voxels; fewer are not worth a thread of their own."""
_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
"""Threads of one `CpuEngine.diffuse` in this process."""

Shape = tuple[int, ...]
Share = NDArray[Any] | tuple[()]
"""What blanks leave of the kernel, infinite where blank; ``()`` where nothing is blank."""


class CpuEngine(Engine):
    """Diffuses on the CPU, in the field's own dtype, on as many threads as it is allowed.

    A step reads and writes the field once: all axes are smoothed and the constraint applied while
    a tile is in the cache. Wide kernels run on a coarser grid where `Diffusion.levels` says so, so
    that a step costs the same at every scale.

    1-D to 3-D fields, float64, other kernels along other axes, every constraint and boundary run
    like this; so do blank voxels, which take float64 on the way. Four decomposed axes, and radii
    above 16 without a coarser grid, are smoothed along one axis after the other.
    """

    name = "cpu"
    voxel_steps_per_second = 5e8
    has_pyramid = True

    def diffuse(self, field: NDArray[Any], diffusion: Diffusion) -> NDArray[Any]:
        axes = _merged(field.shape, diffusion)
        alone = [i for i, axis in enumerate(axes) if axis.kernel.radius == 0]
        if len(axes) > 3 and alone:
            parts = np.moveaxis(field.reshape([axis.size for axis in axes]), alone[0], 0)
            rest = axes[: alone[0]] + axes[alone[0] + 1 :]
            for part in parts:
                part[...] = _diffuse(np.ascontiguousarray(part), rest, diffusion)
            return field
        return _diffuse(field, axes, diffusion).reshape(field.shape)

    def footprint(self, itemsize: int, blanks: bool = False) -> Footprint:
        # the field and its next state; with blanks, where they are, what is left of the kernel,
        # and one smoothed axis
        host = 2 * itemsize + (1 + 8 + 8 if blanks else 0)
        return Footprint(host=host, device=0, line=_threads * separable.WIDTH * 8)

    def limit_threads(self, count: int) -> int:
        global _threads
        before, _threads = _threads, count
        return before


@dataclass(frozen=True)
class _Axis:
    """One axis of a block, or several neighbouring ones that are left alone."""

    size: int
    kernel: Kernel
    rules: tuple[str, str]
    level: int = 0
    phase: int = 0


def _merged(shape: Shape, diffusion: Diffusion) -> list[_Axis]:
    """The axes, those merged that lie beside each other and are not smoothed along."""
    ndim = len(shape)
    levels, phases = diffusion.levels or (0,) * ndim, diffusion.phase or (0,) * ndim
    axes: list[_Axis] = []
    for axis in map(_Axis, shape, diffusion.steps.kernels, diffusion.faces, levels, phases):
        if axes and axis.kernel.radius == axes[-1].kernel.radius == 0:
            axis = _Axis(axes.pop().size * axis.size, IDENTITY, axis.rules)
        axes.append(axis)
    return axes


def _diffuse(field: NDArray[Any], axes: list[_Axis], diffusion: Diffusion) -> NDArray[Any]:
    values = field.reshape(-1)
    blank = np.isnan(values) if diffusion.as_if_blank or np.isnan(values.min()) else None
    working = field.dtype if blank is None else np.dtype(np.float64)
    with _Team(values.size) as team:
        share: Share = ()
        if blank is not None:
            share = _share(blank, axes, _Means(field.dtype, working, 1.0, team))
            values[blank] = 0.0
        scale = _scale(values, diffusion.cval)
        if scale != 1:
            values *= scale
        smoother = _smoother(axes, _Means(field.dtype, working, diffusion.cval * scale, team))
        rule = RULES[diffusion.constraint]
        other = values if smoother.in_place else fused.aligned(values.size, values.dtype)
        for _ in range(diffusion.steps.count):
            smoother.move(values, other, share, rule)
            values, other = other, values
    if scale != 1:
        values /= scale
    if blank is not None:
        values[blank] = np.nan
    return values.reshape(field.shape)


def _share(blank: NDArray[Any], axes: list[_Axis], means: _Means) -> Share:
    """What blanks leave of the kernel; beyond a ``constant`` face all is data."""
    valid = (~blank).astype(means.field)
    share = np.empty(blank.shape, means.working)
    _smoother(axes, means).move(valid, share, (), RULES["unconstrained"])
    share[blank] = np.inf
    return share


def _scale(values: NDArray[Any], cval: float) -> float:
    """A power of two that keeps the sum of two values from overflowing; nearly always 1."""
    largest = max(-float(values.min()), float(values.max()), abs(cval))
    return 1.0 if largest < np.finfo(values.dtype).max / 4 else 0.125


class _Team:
    """Threads that share the work of one block; our own, because numba's cannot be shared."""

    def __init__(self, voxels: int) -> None:
        self.size = max(1, min(_threads, voxels // SMALLEST_PART))
        self._pool = ThreadPoolExecutor(self.size) if self.size > 1 else None

    def __enter__(self) -> _Team:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def share(self, work: Callable[..., Any], shape: Shape, args: list[tuple[Any, ...]]) -> None:
        """Call ``work(region, *args)`` for parts of an array of rows, one part per thread."""
        count = self.size if math.prod(shape) >= 2 * SMALLEST_PART else 1
        planes, rows = shape[0], shape[1]
        along_z = planes >= fused.BATCH * count
        ends = _even(planes if along_z else rows, count)
        regions = [
            (a, b, 0, rows) if along_z else (0, planes, a, b)
            for a, b in zip(ends, ends[1:], strict=False)
            if b > a
        ]
        if self._pool is None or len(regions) == 1:
            for region in regions:
                work(region, *args[0])
        else:
            futures = [
                self._pool.submit(work, region, *own)
                for region, own in zip(regions[1:], args[1:], strict=False)
            ]
            work(regions[0], *args[0])
            for future in futures:
                future.result()


def _even(total: int, parts: int) -> list[int]:
    """Borders of nearly equal parts, at multiples of what is computed at once."""
    batches = -(-total // fused.BATCH)
    return [min(total, batches * i // parts * fused.BATCH) for i in range(parts + 1)]


@dataclass(frozen=True)
class _Means:
    """What a smoother computes with."""

    field: np.dtype[Any]
    """Type of the field."""
    working: np.dtype[Any]
    """Type of what is computed from it on the way."""
    cval: float
    team: _Team


class _Smoother(Protocol):
    in_place: bool
    """Whether `move` may write where it reads."""

    def move(self, field: NDArray[Any], out: NDArray[Any], share: Share, rule: Any) -> None:
        """One step of the flat `field`, written to `out`."""


def _smoother(axes: list[_Axis], means: _Means) -> _Smoother:
    """What smooths these axes best."""
    if len(axes) > 3:
        return _Separable(axes, means)
    axes = [_Axis(1, IDENTITY, (CUT, CUT))] * (3 - len(axes)) + axes
    if any(axis.level for axis in axes):
        return _Pyramid(axes, means)
    if any(axis.kernel.radius > fused.LARGEST_RADIUS for axis in axes):
        return _Separable(axes, means)
    return _Fused(axes, means)


def _twice(kernel: Kernel, radius: int, dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """Twice the weights of a kernel, with zeros up to `radius`; none if it has none."""
    if kernel.radius == 0:
        return ()
    wings = kernel.wings + (0.0,) * (radius - kernel.radius)
    return tuple(dtype.type(2 * weight) for weight in wings)


def _index(axis: _Axis, before: int, after: int) -> NDArray[np.intp]:
    """Where the values at ``-before … n + after - 1`` come from, each face by its rule."""
    low, high = axis.rules
    return np.concatenate(
        [
            extension_index(low, axis.size, -before, 0),
            np.arange(axis.size),
            extension_index(high, axis.size, axis.size, axis.size + after),
        ]
    )


class _Fused:
    """All axes in one visit; radii up to `fused.LARGEST_RADIUS`."""

    in_place = False

    def __init__(self, axes: list[_Axis], means: _Means) -> None:
        # one radius for all axes: what is compiled depends on it
        radius = max(axis.kernel.radius for axis in axes)
        self._shape = tuple(axis.size for axis in axes)
        self._weights = tuple(_twice(axis.kernel, radius, means.working) for axis in axes)
        self._index = tuple(
            _index(axis, len(weights), len(weights) + fused.BATCH)
            for axis, weights in zip(axes, self._weights, strict=True)
        )
        self._cval, self._team = means.working.type(means.cval), means.team
        arrays = len(self._weights[0]), means.field, means.working, means.cval
        self._scratch = [(fused.scratch_arrays(*arrays),) for _ in range(means.team.size)]

    def move(self, field: NDArray[Any], out: NDArray[Any], share: Share, rule: Any) -> None:
        def work(region: tuple[int, ...], scratch: Any) -> None:
            z0, z1, y0, y1 = region
            for z in range(z0, z1, CHUNK):
                part = (z, min(z + CHUNK, z1), y0, y1)
                fused.step(
                    field,
                    out,
                    share,
                    self._shape,
                    part,
                    self._index,
                    self._weights,
                    rule,
                    self._cval,
                    scratch,
                )

        self._team.share(work, self._shape, self._scratch)


class _Separable:
    """One axis after the other; any number of them, any radius."""

    in_place = True

    def __init__(self, axes: list[_Axis], means: _Means) -> None:
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

    def _smooth_axis(self, field: NDArray[Any], out: NDArray[Any], i: int, axis: _Axis) -> None:
        radius = axis.kernel.radius
        shape = (math.prod(self._shape[:i]), axis.size, math.prod(self._shape[i + 1 :]))
        index = _index(axis, radius, radius)
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


class _Pyramid:
    """Down to cells, a small kernel there, and back."""

    in_place = True

    def __init__(self, axes: list[_Axis], means: _Means) -> None:
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
        coarsest = [way.coarsest() for way in ways]
        self._kernel = _Fused(coarsest, replace(means, field=dtype))
        longest = max(len(index[2]) for index in self._down) + 2 * self._shapes[0][2]
        arrays = longest, means.field, dtype, means.cval
        self._scratch = [(coarse.row_arrays(*arrays),) for _ in range(means.team.size)]

    def move(self, field: NDArray[Any], out: NDArray[Any], share: Share, rule: Any) -> None:
        source = field
        for level, cells in enumerate(self._cells):
            self._gather(source, cells, level)
            source = cells
        self._kernel.move(source, self._smooth, (), RULES["unconstrained"])
        source = self._smooth
        for level in range(len(self._cells) - 1, 0, -1):
            cells = self._cells[level - 1]
            self._spread(source, cells, cells, (), RULES["unconstrained"], level)
            source = cells
        self._spread(source, field, out, share, rule, 0)

    def _gather(self, field: NDArray[Any], cells: NDArray[Any], level: int) -> None:
        shapes, before = self._shapes[level : level + 2], self._before[level]
        index, halve = self._down[level], self._halve[level]

        def work(region: tuple[int, ...], scratch: Any) -> None:
            coarse.gather(
                field,
                shapes[0],
                cells,
                shapes[1],
                region,
                index,
                before,
                halve,
                self._cval,
                scratch,
            )

        self._team.share(work, shapes[1], self._scratch)

    def _spread(
        self,
        cells: NDArray[Any],
        field: NDArray[Any],
        out: NDArray[Any],
        share: Share,
        rule: Any,
        level: int,
    ) -> None:
        shapes, index, halve = self._shapes[level : level + 2], self._up[level], self._halve[level]

        def work(region: tuple[int, ...], scratch: Any) -> None:
            coarse.spread(
                cells,
                shapes[1],
                field,
                out,
                share,
                shapes[0],
                region,
                index,
                halve,
                rule,
                scratch,
            )

        self._team.share(work, shapes[0], self._scratch)


class _Way:
    """One axis of a pyramid, from the voxels to the coarsest cells.

    Where a face's rule may not be applied to cells, cells beyond the face are made of voxels that
    the rule gives::

        |<-- before -->|<------ voxels ------>|<-- after -->|
        |<----- level 0, a whole number of coarsest cells ----->|
    """

    def __init__(self, axis: _Axis) -> None:
        level, cell = axis.level, 2**axis.level
        self._axis = axis
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

    def coarsest(self) -> _Axis:
        """The axis as its small kernel sees it."""
        axis = self._axis
        if axis.level == 0:
            return _Axis(axis.size, axis.kernel, axis.rules)
        kernel = coarse_kernel(axis.kernel, axis.level)
        return _Axis(self.size(axis.level), kernel, (self._rule, self._rule))

    def down(self, level: int) -> tuple[NDArray[np.intp], int]:
        """Where the voxels come from of which `coarse.gather` makes the cells of ``level + 1``.

        And how many of them lie before the field.
        """
        size = self.size(level)
        if self._axis.level <= level:
            return np.arange(size), 0
        if level == 0:
            return _index(self._axis, self.before + 1, self._after + 1), self.before + 1
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
