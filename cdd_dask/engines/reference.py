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
        for _ in range(diffusion.steps.count):
            _smooth(field, diffusion, out=smooth)
            _constrain(field, smooth, diffusion.constraint)
        return field

    def footprint(self, itemsize: int) -> Footprint:
        # the field, its smoothed copy in float64, and two masks for the signs; SciPy holds two
        # lines in float64
        return Footprint(host=itemsize + 8 + 2, device=0, line=16)

    def limit_threads(self, count: int) -> int:
        return 1  # `scipy.ndimage` runs on the caller's thread alone


def _smooth(field: NDArray[Any], diffusion: Diffusion, out: NDArray[np.float64]) -> None:
    """``S = G_sigma * I``, one axis after the other, into `out`."""
    from scipy.ndimage import correlate1d

    source: NDArray[Any] = field
    for axis, (kernel, rules) in enumerate(
        zip(diffusion.steps.kernels, diffusion.faces, strict=True)
    ):
        # SciPy takes one mode for both faces of an axis; a cut face takes any
        mode = next((rule for rule in rules if rule != CUT), "nearest")
        correlate1d(source, kernel.weights, axis, output=out, mode=mode, cval=diffusion.cval)
        source = out


def _constrain(field: NDArray[Any], smooth: NDArray[np.float64], constraint: str) -> None:
    """Move `field` to `smooth` as far as the sign constraint lets it."""
    if constraint == "unconstrained":
        field[...] = smooth
        return
    positive, negative = field > 0, field < 0
    rules = (np.minimum, np.maximum)
    for_positive, for_negative = reversed(rules) if constraint == "inverted" else rules
    for_positive(field, smooth, out=field, where=positive, casting="same_kind")
    for_negative(field, smooth, out=field, where=negative, casting="same_kind")
