"""How the CPU engine takes a step: fused, along one axis after the other, or by a pyramid."""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT, extension_index
from cdd_dask.engines.base import LARGEST_RADIUS, SAVED_ROWS
from cdd_dask.engines.cpu.library import (
    CONSTRAINTS,
    Record,
    aligned,
    function,
    integers,
    lanes,
    structures,
)
from cdd_dask.engines.cpu.thread_team import ThreadTeam
from cdd_dask.kernels import IDENTITY, Kernel
from cdd_dask.pyramid import can_extend_cells, coarse_kernel, margin

BATCH = 4
"""Rows, or planes, that compiled code smooths at once."""
MOST_ROWS = 32
"""Rows of a tile, at most."""
CACHE = 1_500_000
"""Bytes that a tile's planes may take in all steps of a visit, to stay in the cache."""
WIDTH, CHUNK = 64, 512
"""Lines smoothed together and values summed at once, as in ``separable_step.hpp``."""
LARGEST_ROW = (2 * LARGEST_RADIUS + BATCH) * LARGEST_RADIUS + 4 * BATCH
"""Values of the smallest tiles, for a thread and a voxel of a row; half as many again where they
wrap around."""


@dataclass(frozen=True)
class Axis:
    """One axis of a block."""

    size: int
    kernel: Kernel
    rules: tuple[str, str]
    level: int = 0
    phase: int = 0

    @property
    def kernel_on_cells(self) -> Kernel:
        """The kernel on the coarsest cells."""
        return coarse_kernel(self.kernel, self.level) if self.level else self.kernel


@dataclass(frozen=True)
class StepContext:
    """What a stepper computes with."""

    field: np.dtype[Any]
    """Type of the field."""
    working: np.dtype[Any]
    """Type of what is computed from it."""
    cval: float
    scale: float
    """Factor of all values while they are computed with."""
    team: ThreadTeam


def stepper_of(axes: list[Axis], context: StepContext) -> _Striped | Separable:
    """What smooths these axes best."""
    widest = max(axis.kernel_on_cells.radius for axis in axes)
    if len(axes) > 3 or widest > LARGEST_RADIUS:
        return Separable(axes, context)
    three = [Axis(1, IDENTITY, (CUT, CUT))] * (3 - len(axes)) + axes
    return (Pyramid if any(axis.level for axis in axes) else Fused)(three, context)


def _weights(kernel: Kernel, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Weights at distances 1 to the kernel's radius."""
    return np.array(kernel.wings, np.float64).astype(dtype)


def _extended(axis: Axis, before: int, after: int) -> NDArray[np.intp]:
    """Where the values of an axis at ``-before … n + after - 1`` come from."""
    places = extension_index(axis.rules[1], axis.size, -before, axis.size + after)
    places[:before] = extension_index(axis.rules[0], axis.size, -before, 0)
    return places


class _Striped(ABC):
    """Diffuses a striped copy of the field (see ``striped.hpp``)."""

    shape: tuple[int, int, int]
    length: int
    """Vectors of a row."""
    first: int
    """Place of a row's first voxel."""

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.types = structures(context.working)

    @abstractmethod
    def steps(self, copy: NDArray[Any], move: Record, count: int, cval: float) -> None:
        """Take `count` steps of the striped `copy`; `cval` lies beyond ``constant`` faces."""

    def run(self, field: NDArray[Any], blanks: bool, constraint: str, count: int) -> NDArray[Any]:
        """The `field` after `count` steps; it is overwritten.

        With `blanks` voxels that are NaN take no part.
        """
        context, rows = self.context, self.shape[0] * self.shape[1]
        width = self.length * lanes(context.working)
        kinds, team = (context.field, context.working), context.team
        copy = aligned((rows, width), context.field)
        scratch = aligned(team.size * (width + lanes(context.working)), context.working)

        def transfer(name: str, mask: bool = False) -> None:
            record = self.types.Rows(
                field=field, copy=copy, count=rows, size=self.shape[2], length=self.length,
                first=self.first, scale=context.scale, mask=mask, scratch=scratch,
            )  # fmt: skip
            team.call(function(name, *kinds), record)

        move = self.types.Move(constraint=CONSTRAINTS[constraint])
        if blanks:
            # the kernel's weight on what is not blank; beyond a ``constant`` face all is data
            transfer("to_striped", mask=True)
            share = aligned((rows, width), context.working)
            share[:] = copy
            self.steps(share, self.types.Move(constraint=CONSTRAINTS["unconstrained"]), 1, 1.0)
            share[copy == 0] = np.inf
            if context.field != context.working:
                np.divide(1.0, share, out=share)
            move.set("share", share)
        transfer("to_striped")
        self.steps(copy, move, count, context.cval * context.scale)
        transfer("to_plain")
        return field

    def fused(
        self,
        axes: list[Axis],
        length: int,
        copy: NDArray[Any],
        count: int,
        cval: float,
        team: Record,
    ) -> Record:
        """All but the move of fused steps of the striped `copy` along three axes."""
        working, types, kinds = self.context.working, self.types, (copy.dtype, self.context.working)
        nz, ny, _ = (axis.size for axis in axes)
        radii = [axis.kernel.radius for axis in axes]
        wraps = ["wrap" in axis.rules and axis.kernel.radius > 0 for axis in axes[:2]]
        skew = max(BATCH, -(-radii[1] // BATCH) * BATCH)
        # planes of a tile in all steps of a visit: the ring, and those that have moved since
        planes = 2 * radii[0] + BATCH + -(-radii[0] // BATCH) * BATCH
        row = planes * length * lanes(working) * working.itemsize
        threads = self.context.team.size
        # two tiles for each thread
        most = min(MOST_ROWS, CACHE // row, -(-ny // (2 * threads)) if threads > 1 else MOST_ROWS)
        rows = max(1, most // skew) * skew
        depth = 1 if any(wraps) else SAVED_ROWS // max(1, radii[1])
        depth = max(1, min(depth, CACHE // (row * rows), count))
        record: Record = types.FusedSteps(
            nz=nz, ny=ny, ends=self.ends(axes[2], length, 0, radii[2], cval),
            z_from=integers(_extended(axes[0], radii[0], radii[0])),
            y_from=integers(_extended(axes[1], radii[1], radii[1])),
            radius=radii, taps=[self.taps(axis.kernel) for axis in axes],
            count=count, depth=depth, skew=skew, rows=rows, wraps=wraps, team=team, field=copy,
        )  # fmt: skip
        at = ctypes.byref(record)
        sizes = [
            function(f"fused_{name}", *kinds)(at, 0, 1) for name in ("scratch", "saved", "tiles")
        ]
        record.set("scratch", aligned(threads * sizes[0], working))
        record.set("saved", aligned(sizes[1], copy.dtype))
        record.set("progress", np.zeros(sizes[2], np.int64))
        return record

    def taps(self, kernel: Kernel) -> NDArray[Any]:
        """Factors of the differences at distances 1 to the radius, each in a whole vector."""
        weights = _weights(kernel, self.context.working)
        weights[::2] *= 2
        taps = aligned((len(weights), lanes(weights.dtype)), weights.dtype)
        taps[:] = weights[:, None]
        return taps

    def ends(
        self, axis: Axis, length: int, first: int, radius: int, cval: float, after: int = 0
    ) -> Record:
        """What lies beyond a row: ``first + radius`` places before, ``after + radius`` behind."""
        vector, last = lanes(self.context.working), first + axis.size
        end, its_own = last + after + radius, slice(first + radius, last + radius)
        places = np.delete(np.arange(-radius, end), its_own)
        beyond = np.delete(_extended(axis, first + radius, after + radius), its_own)

        def striped(place: NDArray[np.intp]) -> NDArray[np.int64]:
            return integers(place % length * vector + place // length)

        ends: Record = self.types.Ends(
            length=length, first=first, last=last, begin=-radius, end=end, outside=cval,
            to=striped(places), source=np.where(beyond < 0, -1, striped(beyond + first)),
        )  # fmt: skip
        return ends


class Fused(_Striped):
    """All axes in one visit; radii up to `LARGEST_RADIUS`."""

    def __init__(self, axes: list[Axis], context: StepContext) -> None:
        super().__init__(context)
        self._axes = axes
        nz, ny, nx = (axis.size for axis in axes)
        self.shape, self.first = (nz, ny, nx), 0
        self.length = -(-nx // lanes(context.working))

    def steps(self, copy: NDArray[Any], move: Record, count: int, cval: float) -> None:
        team = self.types.Team(size=self.context.team.size)
        record = self.fused(self._axes, self.length, copy, count, cval, team)
        record.set("move", move)
        call = function("fused", copy.dtype, self.context.working)
        self.context.team.call(call, record, meeting=team)


class Pyramid(_Striped):
    """Down to cells, a small kernel there, and back."""

    def __init__(self, axes: list[Axis], context: StepContext) -> None:
        super().__init__(context)
        self._ways = [_Way(axis) for axis in axes]
        self._depth = max(axis.level for axis in axes)
        self._shapes = [tuple(way.size(i) for way in self._ways) for i in range(self._depth + 1)]
        nz, ny, nx = (axis.size for axis in axes)
        self.shape, self.first = (nz, ny, nx), self._ways[2].before
        self._lengths = [-(-self._ways[2].whole // lanes(context.working))]
        if axes[2].level:  # even: so rows need not be striped anew to be halved
            self._lengths[0] += self._lengths[0] % 2
        for level in range(self._depth):
            length = self._lengths[-1]
            self._lengths.append(-(-length // 2) if axes[2].level > level else length)
        self.length = self._lengths[0]

    def _rows(self, level: int) -> NDArray[Any]:
        nz, ny, _ = self._shapes[level]
        working = self.context.working
        return aligned((nz * ny, self._lengths[level] * lanes(working)), working)

    def steps(self, copy: NDArray[Any], move: Record, count: int, cval: float) -> None:
        types, kinds = self.types, (copy.dtype, self.context.working)
        values = [copy] + [self._rows(level) for level in range(1, self._depth + 1)]
        levels = [self._level(level, values[level], cval) for level in range(self._depth + 1)]
        team = self.types.Team(size=self.context.team.size)
        coarsest = [way.coarsest() for way in self._ways]
        smoothing = self.fused(coarsest, self._lengths[-1], values[-1], 1, cval, team)
        smoothing.set("move", types.Move(constraint=CONSTRAINTS["unconstrained"]))
        # planes of voxels that each plane of cells is made of
        way = self._ways[0]
        stride, size = (2, 4) if way.level else (1, 1)
        index, count_z = way.down(0), stride * self._shapes[1][0]
        sources = np.stack([index[i : i + count_z : stride] for i in range(size)])
        first = np.where(sources < 0, self.shape[0], sources).min(axis=0)
        last = sources.max(axis=0)
        order = np.argsort(last, kind="stable")
        ready = np.searchsorted(last[order], np.arange(self.shape[0] + 1))
        table = (types.Level * len(levels))(*levels)
        record = types.Pyramid(
            levels=table, depth=self._depth,
            next=self._rows(1), smoothing=smoothing, move=move, count=count,
            order=integers(order), ready=integers(ready), first=integers(first),
            last=integers(last), team=team,
        )  # fmt: skip
        at = ctypes.byref(record)
        size = function("pyramid_scratch", *kinds)(at, 0, 1)
        record.set("scratch", aligned(self.context.team.size * size, self.context.working))
        self.context.team.call(function("pyramid", *kinds), record, meeting=team)

    def _level(self, level: int, values: NDArray[Any], cval: float) -> Record:
        z, y, x = self._ways
        length = self._lengths[level]
        nz, ny, nx = self._shapes[level]
        row = Axis(nx, IDENTITY, (x.rule, x.rule)) if level else x.axis
        first, after = (0, 0) if level or not x.level else (x.before, x.after)
        ends, even_ends = (
            self.ends(row, vectors, first, min(x.level, 1), cval, after)
            for vectors in (length, length + length % 2)
        )
        z_near, z_far = map(integers, z.up(level))
        y_near, y_far = map(integers, y.up(level))
        record: Record = self.types.Level(
            values=values, nz=nz, ny=ny, ends=ends, even_ends=even_ends,
            halved=[way.level > level for way in self._ways],
            z_from=integers(z.down(level)), y_from=integers(y.down(level)),
            z_near=z_near, z_far=z_far, y_near=y_near, y_far=y_far,
        )  # fmt: skip
        return record


class _Way:
    """One axis of a pyramid, from the voxels to the coarsest cells.

    Where a face's rule may not be applied to cells, cells beyond the face are made of voxels that
    the rule gives::

        |<-- before -->|<------ voxels ------>|<-- after -->|
        |<----- level 0, a whole number of coarsest cells ----->|
    """

    def __init__(self, axis: Axis) -> None:
        level, cell = axis.level, 2**axis.level
        self.axis, self.level = axis, level
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
        self.whole = -(-(self.before + axis.size + after) // cell) * cell
        self.after = self.whole - self.before - axis.size
        # beyond the cells: right for wrap and reflect; else nothing there matters
        self.rule = "wrap" if axis.rules[0] == "wrap" and self.whole == axis.size else "reflect"

    def size(self, level: int) -> int:
        """Length at `level`: the voxels at 0, then cells."""
        level = min(level, self.level)
        return self.whole >> level if level else self.axis.size

    def coarsest(self) -> Axis:
        """The axis as its small kernel sees it."""
        if self.level == 0:
            return self.axis
        return Axis(self.size(self.level), self.axis.kernel_on_cells, (self.rule, self.rule))

    def down(self, level: int) -> NDArray[np.intp]:
        """Where the values come from of which the cells of ``level + 1`` are made.

        Along a halved axis, cell `i` is made of those at ``2 i … 2 i + 3``.
        """
        size = self.size(level)
        if self.level <= level:
            return np.arange(size)
        if level == 0:
            return _extended(self.axis, self.before + 1, self.after + 1)
        return extension_index(self.rule, size, -1, size + 1)

    def up(self, level: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The cells between which the values lie, near and far."""
        size = self.size(level)
        if self.level <= level:
            return np.arange(size), np.arange(size)
        place = np.arange(size) + (0 if level else self.before)
        near, count = place // 2, self.size(level + 1)
        cells = extension_index(self.rule, count, -1, count + 1)  # from cell -1 on
        return near, cells[near + 2 * (place % 2)]


class Separable:
    """One axis after the other; any number of them, any radius."""

    def __init__(self, axes: list[Axis], context: StepContext) -> None:
        self._shape = tuple(axis.size for axis in axes)
        self._axes = [(i, axis) for i, axis in enumerate(axes) if axis.kernel.radius]
        self._context = context
        self._smooth = aligned(self._shape, context.working)

    def run(self, field: NDArray[Any], blanks: bool, constraint: str, count: int) -> NDArray[Any]:
        """As `_Striped.run`."""
        context, share = self._context, None
        kinds = (context.field, context.working)
        if blanks:
            blank = np.isnan(field).reshape(self._shape)
            self._smooth_all((~blank).astype(context.field), 1.0)
            share = self._smooth.copy()
            share[blank] = np.inf
            field.reshape(self._shape)[blank] = 0.0
        field *= context.scale
        move = structures(context.field).MovePlain(
            field=field, smooth=self._smooth, constraint=CONSTRAINTS[constraint], count=field.size
        )
        if share is not None:
            move.set("share", share)
        for _ in range(count):
            self._smooth_all(field, context.cval * context.scale)
            context.team.call(function("move", *kinds), move)
        field /= context.scale
        if blanks:
            field.reshape(self._shape)[blank] = np.nan
        return field

    def _smooth_all(self, field: NDArray[Any], cval: float) -> None:
        source, working, team = field, self._context.working, self._context.team
        for i, axis in self._axes:
            radius, inner = axis.kernel.radius, math.prod(self._shape[i + 1 :])
            record = structures(source.dtype).SmoothAxis(
                field=source, out=self._smooth, n=axis.size, inner=inner, radius=radius,
                weights=_weights(axis.kernel, working), outside=cval,
                scratch=aligned(team.size * (axis.size + 2 * radius) * WIDTH, source.dtype),
                sums=aligned(team.size * CHUNK, working), lines=source.size // axis.size,
                source=integers(_extended(axis, radius, radius)),
            )  # fmt: skip
            team.call(function("smooth_axis", source.dtype, working), record)
            source = self._smooth
