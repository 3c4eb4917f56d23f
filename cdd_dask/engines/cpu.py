"""The CPU engine: steps fused into one visit of the field, compiled with numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.engines import separable, team
from cdd_dask.engines.base import Diffusion, Engine, Footprint
from cdd_dask.engines.groups import move_groups
from cdd_dask.engines.rows import RULES
from cdd_dask.engines.smoothers import Axis, Means, Share, smoother_of
from cdd_dask.kernels import IDENTITY


class CpuEngine(Engine):
    """Diffuses on the CPU, in the field's own dtype, on as many threads as it is allowed.

    All axes are smoothed and the constraint applied while a tile is in the cache, and in 3-D
    several steps are taken before it leaves. Wide kernels run on a coarser grid where
    `Diffusion.levels` says so, so that a step costs the same at every scale.

    1-D to 3-D fields, float64, other kernels along other axes, every constraint and boundary run
    like this; so do blank voxels, which take float64 on the way. Four decomposed axes, and radii
    above 16 without a coarser grid, are smoothed along one axis after the other.
    """

    name = "cpu"
    voxel_steps_per_second = 5e8
    has_pyramid = True
    move_groups = staticmethod(move_groups)

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
        return Footprint(host=host, device=0, line=team.threads * separable.WIDTH * 8)

    def limit_threads(self, count: int) -> int:
        return team.limit_threads(count)


def _merged(shape: tuple[int, ...], diffusion: Diffusion) -> list[Axis]:
    """The axes, those merged that lie beside each other and are not smoothed along."""
    ndim = len(shape)
    levels, phases = diffusion.levels or (0,) * ndim, diffusion.phase or (0,) * ndim
    axes: list[Axis] = []
    for axis in map(Axis, shape, diffusion.steps.kernels, diffusion.faces, levels, phases):
        if axes and axis.kernel.radius == axes[-1].kernel.radius == 0:
            axis = Axis(axes.pop().size * axis.size, IDENTITY, axis.rules)
        axes.append(axis)
    return axes


def _diffuse(field: NDArray[Any], axes: list[Axis], diffusion: Diffusion) -> NDArray[Any]:
    values = field.reshape(-1)
    blank = np.isnan(values) if diffusion.as_if_blank or np.isnan(values.min()) else None
    working = field.dtype if blank is None else np.dtype(np.float64)
    with team.Team(values.size) as threads:
        share: Share = ()
        if blank is not None:
            share = _share(blank, axes, Means(field.dtype, working, 1.0, threads))
            values[blank] = 0.0
        scale = _scale(values, diffusion.cval)
        if scale != 1:
            values *= scale
        smoother = smoother_of(axes, Means(field.dtype, working, diffusion.cval * scale, threads))
        values = smoother.run(values, share, RULES[diffusion.constraint], diffusion.steps.count)
    if scale != 1:
        values /= scale
    if blank is not None:
        values[blank] = np.nan
    return values.reshape(field.shape)


def _share(blank: NDArray[Any], axes: list[Axis], means: Means) -> Share:
    """What blanks leave of the kernel; beyond a ``constant`` face all is data."""
    valid = (~blank).astype(means.field)
    share = np.empty(blank.shape, means.working)
    smoother_of(axes, means).move(valid, share, (), RULES["unconstrained"])
    share[blank] = np.inf
    return share


def _scale(values: NDArray[Any], cval: float) -> float:
    """A power of two that keeps the sum of two values from overflowing; nearly always 1."""
    largest = max(-float(values.min()), float(values.max()), abs(cval))
    return 1.0 if largest < np.finfo(values.dtype).max / 4 else 0.125
