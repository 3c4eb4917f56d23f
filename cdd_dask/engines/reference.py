"""The oracle: SciPy, short and plainly right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT
from cdd_dask.engines.base import Diffusion, Engine, Footprint


class ReferenceEngine(Engine):
    """Diffuses with `scipy.ndimage` on one thread of the host.

    A step is computed in float64 and rounded once to the field's dtype. So a constant float32
    field comes back to the bit, and a linear one is not worn down by rounding under ``min``.
    """

    name = "reference"
    voxel_steps_per_second = 1.2e7

    def diffuse(self, field: NDArray[Any], diffusion: Diffusion) -> NDArray[Any]:
        smooth = np.empty(field.shape, np.float64)
        blank = np.isnan(field)
        share = None
        if diffusion.as_if_blank or blank.any():
            # what is left of the kernel where blank voxels take no part
            share = np.empty(field.shape, np.float64)
            smooth_into((~blank).view(np.uint8), diffusion, 1.0, out=share)
            share[blank] = 1.0
            field[blank] = 0.0
        for _ in range(diffusion.steps.count):
            smooth_into(field, diffusion, diffusion.cval, out=smooth)
            if share is not None:
                smooth /= share
                smooth[blank] = 0.0
            constrain(field, smooth, diffusion.constraint)
        if share is not None:
            field[blank] = np.nan
        return field

    def footprint(self, itemsize: int, blanks: bool = False, threads: int = 1) -> Footprint:
        # the field, its smooth copy, where it is blank, and what `constrain` holds; with blanks,
        # what is left of the kernel; SciPy holds two lines in float64
        return Footprint(host=2 * itemsize + 8 + 1 + (8 if blanks else 0), device=0, line=16)

    def limit_threads(self, count: int) -> int:
        return 1  # `scipy.ndimage` runs on the caller's thread alone


def smooth_into(
    field: NDArray[Any], diffusion: Diffusion, cval: float, out: NDArray[np.float64]
) -> None:
    """``S = G_sigma * I``, one axis after the other, into `out`."""
    from scipy.ndimage import correlate1d

    source: NDArray[Any] = field
    for axis, (kernel, rules) in enumerate(
        zip(diffusion.steps.kernels, diffusion.faces, strict=True)
    ):
        if kernel.radius == 0:
            continue
        # SciPy takes one mode for both faces of an axis; a cut face takes any
        mode = next((rule for rule in rules if rule != CUT), "nearest")
        correlate1d(source, kernel.weights, axis, output=out, mode=mode, cval=cval)
        source = out
    if source is field:  # no kernel reaches any neighbour
        out[...] = field


def constrain(field: NDArray[Any], smooth: NDArray[np.float64], constraint: str) -> None:
    """Move `field` to `smooth`, which is used up, as far as the sign constraint lets it."""
    if constraint == "unconstrained":
        field[...] = smooth
        return
    if constraint == "constrained":
        low = np.minimum(field, 0)
        np.minimum(smooth, np.maximum(field, 0, out=field), out=smooth)
        np.maximum(smooth, low, out=field, casting="same_kind")
        return
    positive, negative = field > 0, field < 0
    lower, upper = (np.minimum, np.maximum)[:: -1 if constraint == "inverted" else 1]
    lower(field, smooth, out=field, where=positive, casting="same_kind")
    upper(field, smooth, out=field, where=negative, casting="same_kind")
