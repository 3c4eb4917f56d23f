"""What one worker does with one block of cells, or with a block's voxels and their cells.

::

    smooth    means of cells → the smooth field on the cells
    gather    voxels, smooth field → groups of deviations
    evolve    groups (or means) → smooth fields of later steps
    scatter   voxels, smooth fields → channel and next field
    relax     voxels, smooth field → their next state and its means; at last channel and next field
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import store
from cdd_dask.blocks import Grid, Region, shifted, starts
from cdd_dask.boundaries import CUT
from cdd_dask.cell_evolution import (
    CellFaces,
    Cells,
    Evolution,
    cell_means,
    evolved,
    gathered,
    group_weights,
    interpolated,
    normalised,
)
from cdd_dask.closure import cell_halo, cell_shape, closure_kernels, coarse_shape
from cdd_dask.engines import Diffusion, Engine
from cdd_dask.engines.reference import constrain
from cdd_dask.kernels import Kernel
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Pass, Stage
from cdd_dask.pyramid import pyramid_level
from cdd_dask.regimes import face_layers, group_count
from cdd_dask.time_stepping import Steps
from cdd_dask.working import (
    Nature,
    field_name,
    groups_name,
    kept_steps,
    means_name,
    smooth_name,
    snapshots_name,
)

PAD_MODES: dict[str, Any] = {
    "reflect": "symmetric",
    "mirror": "reflect",
    "wrap": "symmetric",
    "nearest": "edge",
}
"""How NumPy completes cells at a face. Where the volume wraps around its end is mirrored: a block
there does not have the volume's beginning."""


@dataclass(frozen=True)
class CellWork:
    """What all tasks on the cells of one channel share."""

    parameters: Parameters
    grid: Grid
    """The volume cut into blocks."""
    stage: Stage
    steps: Steps
    nature: Nature
    work: str
    """Address of the store with the working arrays."""
    engine: Engine

    @property
    def k(self) -> int:
        """Number of the channel."""
        return self.stage.number - 1

    @property
    def halo(self) -> tuple[int, ...]:
        """Cells around the volume's, per axis."""
        return cell_halo(self.stage.levels)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of cells beyond the volume's faces whose means are kept, per axis."""
        return face_layers(self.parameters, self.stage.levels)

    def smooth(self, block: int, number: int) -> None:
        """The smooth field on a block of cells, from their means before the pass of that number."""
        core, cells, how = self._block(block)
        means = self._read(means_name(self.k, number), self._in_means(cells))
        values = [how.smoothed(means[0])]
        if self.nature.masked:
            values.append(how.smoothed(means[1] + how.held(means[1].shape)))
        self._write(smooth_name(self.k, number), core, [self._core(core, cells, v) for v in values])

    def evolve(self, one: Pass, block: int) -> None:
        """Some steps of a block of cells."""
        core, cells, how = self._block(block)
        count = group_count(self.stage.regime, self.stage.levels)
        if one.number:
            values = self._read(groups_name(self.k, one.number), self._in_domain(cells))
        elif count:
            values = self._read(groups_name(self.k, 0), cells)
        else:
            values = self._read(means_name(self.k), self._in_means(cells))
        state, kept = Cells.of(values, count), kept_steps(self.stage, self.nature.sign)
        first = self._read(smooth_name(self.k), self._around(cells))
        for step, field in evolved(state, first, how, range(one.first, one.last)):
            if step in kept:
                values = self._core(core, cells, field)
                self._write(snapshots_name(self.k), core, [values], kept.index(step))
        if one.last < self.stage.steps:
            around = [(h, h) for h in self.halo]
            values = np.pad(state.stored(), [(0, 0), *around], "edge")
            parts = [self._core(core, cells, value) for value in values]
            self._write(groups_name(self.k, one.number + 1), core, parts)

    def gather(self, block: int) -> None:
        """The groups of the cells of a block of voxels."""
        core = self.grid.core(block)
        cells = cells_of(core, self.stage.levels)
        field = self.completed(
            store.read_block(self.work, store.work_path(field_name(self.k)), core)
        )
        smooth = self._interpolated(self._read(smooth_name(self.k), self._around(cells)))
        groups, counts = gathered(field, smooth, cell_shape(self.stage.levels))
        means = self._read(means_name(self.k), self._in_means(cells))
        weights = group_weights(counts, 2 ** sum(self.stage.levels), field.dtype)
        base = means[0] - (weights * groups).sum(axis=0)
        self._write(groups_name(self.k, 0), cells, [*groups, base, *means[1:]])

    def scatter(self, field: NDArray[Any], core: Region) -> NDArray[Any]:
        """The block's voxels after all steps of the channel."""
        around = self._around(cells_of(core, self.stage.levels))
        share = self._read(smooth_name(self.k), around)[1:]
        kept = kept_steps(self.stage, self.nature.sign)
        snapshots = self._read(snapshots_name(self.k), around)
        if len(kept) == 1:
            return self._moved(field, self._interpolated([snapshots[0], *share]))
        for (low, first), (high, second) in pairwise(zip(kept, snapshots, strict=True)):
            for step in range(low, high):
                part = (step - low) / (high - low)
                between = first + field.dtype.type(part) * (second - first)
                field = self._moved(field, self._interpolated([between, *share]))
        return self._moved(field, self._interpolated([snapshots[-1], *share]))

    def relax(self, field: NDArray[Any], core: Region, number: int) -> NDArray[Any]:
        """The block's voxels after the step of that number."""
        around = self._around(cells_of(core, self.stage.levels))
        smooth = self._read(smooth_name(self.k, number), around)
        return self._moved(field, self._interpolated(smooth))

    def completed(self, field: NDArray[Any]) -> NDArray[Any]:
        """A block's core with its last cells made whole beyond the volume's face."""
        cell = cell_shape(self.stage.levels)
        more = [(0, -n % f) for n, f in zip(field.shape, cell, strict=True)]
        if not any(after for _, after in more):
            return field
        mode = PAD_MODES.get(self.parameters.boundary)
        if mode is None:  # voxels there hold a value, and take no part
            return np.pad(field, more, constant_values=np.nan)
        return np.pad(field, more, mode)

    def write_means(self, core: Region, field: NDArray[Any], number: int = 0) -> None:
        """Write the means of the cells of a block's core, and the share that takes part.

        For the channel's pass over the cells of that number.
        """
        cells, field = cells_of(core, self.stage.levels), self.completed(field)
        if any(self.layers):
            cells, field = self._with_layers(cells, field)
        means, share = cell_means(field, cell_shape(self.stage.levels))
        held = self._evolution(starts(cells)).held(means.shape)
        values = [means + (held * self.parameters.cval if np.any(held) else 0), share]
        self._write(means_name(self.k, number), self._in_means(cells), values)

    def _with_layers(self, cells: Region, field: NDArray[Any]) -> tuple[Region, NDArray[Any]]:
        """The cells of a block and those beyond a face of the volume, which are like its voxels."""
        count = coarse_shape(self.grid.shape, self.stage.levels)
        sides = [
            (layer * (c.start == 0), layer * (c.stop == n))
            for c, n, layer in zip(cells, count, self.layers, strict=True)
        ]
        cell = cell_shape(self.stage.levels)
        width = [(low * f, high * f) for (low, high), f in zip(sides, cell, strict=True)]
        wider = tuple(
            slice(c.start - low, c.stop + high) for c, (low, high) in zip(cells, sides, strict=True)
        )
        return wider, np.pad(field, width, "edge")

    def _in_means(self, cells: Region) -> Region:
        """The places of cells in the array of means, where layers have blocks of their own."""
        block = coarse_shape(self.grid.block, self.stage.levels)
        return shifted(cells, tuple(map(mul, self.layers, block)))

    def _moved(self, field: NDArray[Any], smooth: NDArray[Any]) -> NDArray[Any]:
        """`field` after one step towards `smooth`, which reaches to the end of its cells."""
        smooth = smooth[tuple(slice(0, n) for n in field.shape)]
        sign, constraint = self.nature.sign, self.parameters.constraint
        if constraint == "unconstrained":
            moved: NDArray[Any] = np.where(np.isnan(field), field, smooth)
            return moved
        if constraint != "inverted" and sign:
            (np.minimum if sign > 0 else np.maximum)(field, smooth, out=smooth)
            return smooth
        field = field.copy()
        constrain(field, smooth, constraint)
        return field

    def _interpolated(self, smooth: Any) -> NDArray[Any]:
        """``U S``, normalised where there are blanks: values are the smooth field and share."""
        field = interpolated(smooth[0], self.stage.levels)
        if not self.nature.masked:
            return field
        return normalised(field, interpolated(smooth[1], self.stage.levels))

    def _block(self, block: int) -> tuple[Region, Region, Evolution]:
        """A block's core in the domain, the cells that it needs, and how they evolve."""
        domain = Grid(self.stage.cell_domain, self.stage.cell_block)
        core = domain.core(block)
        count = coarse_shape(self.grid.shape, self.stage.levels)
        along = zip(core, self.halo, self.stage.cell_depth, count, self.layers, strict=True)
        cells = tuple(
            slice(max(-layer, s.start - h - depth), min(n + layer, s.stop - h + depth))
            for s, h, depth, n, layer in along
        )
        return core, cells, self._evolution(starts(cells))

    def _evolution(self, start: tuple[int, ...]) -> Evolution:
        levels, rule = self.stage.levels, self.parameters.boundary
        return Evolution(
            CellFaces(start, self.grid.shape, levels, rule, self.parameters.cval, self.layers),
            closure_kernels(self.steps, levels),
            self.halo,
            self.nature.sign,
            self.parameters.constraint == "crossing",
            self.nature.masked,
            self._smooth_once,
        )

    def _smooth_once(self, cells: NDArray[Any], kernels: tuple[Kernel, ...]) -> NDArray[Any]:
        faces = ((CUT, CUT),) * cells.ndim
        levels = tuple(map(pyramid_level, kernels)) if self.engine.has_pyramid else ()
        phase = (0,) * cells.ndim
        step = Diffusion(Steps(1, kernels), "unconstrained", faces, levels=levels, phase=phase)
        return self.engine.diffuse(cells.copy(), step)

    def _core(self, core: Region, cells: Region, values: NDArray[Any]) -> NDArray[Any]:
        """A block's core from values of `cells` and `halo` more on every side."""
        return values[shifted(core, tuple(-n for n in starts(cells)))]

    def _around(self, cells: Region) -> Region:
        """The places in the domain of cells and those around them."""
        return tuple(slice(c.start, c.stop + 2 * h) for c, h in zip(cells, self.halo, strict=True))

    def _in_domain(self, cells: Region) -> Region:
        """The places in the domain of cells."""
        return shifted(cells, self.halo)

    def _read(self, name: str, cells: Region) -> NDArray[Any]:
        """All values of some cells."""
        return store.read_block(self.work, store.work_path(name), cells)

    def _write(self, name: str, cells: Region, values: Any, first: int = 0) -> None:
        """Write values of some cells, from the value numbered `first` on.

        The share comes last, and is left out where the array has no place for it: what was made
        before blanks were known has one.
        """
        values = values[: store.work_array(self.work, name).shape[0] - first]
        region = (slice(first, first + len(values)), *cells)
        store.write_block(self.work, store.work_path(name), region, np.stack(values))


def cells_of(core: Region, levels: tuple[int, ...]) -> Region:
    """The cells that a block's core is made of."""
    cell = cell_shape(levels)
    return tuple(slice(s.start // f, -(-s.stop // f)) for s, f in zip(core, cell, strict=True))
