"""The CPU engine: what is done to a block before, between and after its steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.engines.base import Diffusion, Engine, Footprint
from cdd_dask.engines.cpu import library, steppers, thread_team
from cdd_dask.engines.cpu.steppers import Axis, StepContext, stepper_of
from cdd_dask.engines.cpu.thread_team import ThreadTeam


class CpuEngine(Engine):
    """Diffuses on the CPU, in the field's own dtype, on as many threads as it is allowed.

    All axes are smoothed and the constraint applied while a tile is in the cache. Wide kernels run
    on a coarser grid where `Diffusion.levels` says so, so that a step costs the same at every
    scale.

    1-D to 3-D fields, float64, a different kernel along each axis, every constraint and boundary
    run like this; so do fields with blank voxels, which are computed in float64. Four decomposed
    axes, and kernels of radii above 16, are smoothed along one axis after the other.
    """

    name = "cpu"
    voxel_steps_per_second = 5e8
    has_pyramid = True

    def __init__(self) -> None:
        self.instruction_set = library.instruction_set()

    def diffuse(self, field: NDArray[Any], diffusion: Diffusion) -> NDArray[Any]:
        none = (0,) * field.ndim
        levels, phases = diffusion.levels or none, diffusion.phase or none
        axes = [*map(Axis, field.shape, diffusion.steps.kernels, diffusion.faces, levels, phases)]
        alone = [i for i, axis in enumerate(axes) if axis.kernel.radius == 0]
        if len(axes) < 4 or not alone:
            return _diffused(field, axes, diffusion)
        # one that is left alone is gone through slice by slice: the shortest
        place = min(alone, key=field.shape.__getitem__)
        rest = axes[:place] + axes[place + 1 :]
        for part in np.moveaxis(field, place, 0):
            part[...] = _diffused(np.ascontiguousarray(part), rest, diffusion)
        return field

    def footprint(self, itemsize: int, blanks: bool = False, threads: int = 1) -> Footprint:
        # the field and its copy; with blanks the kernel's weight on the others and a mask, too
        working = 8 if blanks else itemsize
        return Footprint(
            host=itemsize,
            device=0,
            line=2 * threads * steppers.WIDTH * working,
            row=threads * steppers.LARGEST_ROW * working,
            tiles=threads * steppers.CACHE,
            copy=itemsize + 8 + 1 if blanks else itemsize,
            lanes=library.LINE // working,
            threads=threads,
        )

    def limit_threads(self, count: int) -> int:
        return thread_team.limit_threads(count)


def _diffused(field: NDArray[Any], axes: list[Axis], diffusion: Diffusion) -> NDArray[Any]:
    library.check(field, math.prod(axis.size for axis in axes))
    least, most = field.min(), field.max()
    blanks = diffusion.as_if_blank or bool(np.isnan(least))
    if np.isnan(least):
        least, most = (rule.reduce(field, axis=None) for rule in (np.fmin, np.fmax))
    working = np.dtype(np.float64) if blanks else field.dtype
    largest = max(-least, most, abs(diffusion.cval))
    # a power of two that keeps a + b - 2 c from overflowing; nearly always 1
    scale = 0.125 if largest >= np.finfo(field.dtype).max / 4 else 1.0
    with ThreadTeam(field.size) as team:
        # as the field could hold it, wherever it is computed with
        cval = float(field.dtype.type(diffusion.cval))
        context = StepContext(field.dtype, working, cval, scale, team)
        stepper = stepper_of(axes, context)
        return stepper.run(field, blanks, diffusion.constraint, diffusion.steps.count)
