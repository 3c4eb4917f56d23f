"""The closure on whole arrays: its cells, its groups, its kernels, and how exact a channel is.

`by_cells` puts the pieces together without blocks, files or a plan; what tasks make of them is
proven in `test_large_scales.py`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT
from cdd_dask.closure import (
    EXACT_VARIANCE,
    HALO,
    SNAPSHOTS,
    STENCIL,
    beyond_cells,
    cell_shape,
    closure_kernels,
    closure_levels,
    coarse_shape,
    doubled,
    group_borders,
    group_sizes,
    interpolated_mean,
)
from cdd_dask.engines import Diffusion, Engine, load_engine
from cdd_dask.engines.cells import (
    CellFaces,
    Cells,
    Evolution,
    by_cell,
    cell_means,
    evolved,
    gathered,
    group_weights,
    interpolated,
    move_groups,
    smoothed_cells,
)
from cdd_dask.engines.reference import constrain
from cdd_dask.kernels import IDENTITY, Kernel, smoothing_kernel
from cdd_dask.parameters import KERNELS, Parameters
from cdd_dask.pyramid import SMALLEST_VARIANCE, pyramid_level
from cdd_dask.time_stepping import Steps, channel_steps

Field = NDArray[Any]
RULES = ("reflect", "mirror", "wrap", "constant")
"""Boundary modes that cells know."""
NUMPY_MODES: dict[str, Any] = {
    "reflect": "symmetric",
    "mirror": "reflect",
    "wrap": "wrap",
    "constant": "constant",
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine("cpu")


def turbulence(shape: tuple[int, ...], slope: float = 3.0, seed: int = 0) -> Field:
    """A log-normal field, its logarithm with the power spectrum ``k**-slope`` per mode."""
    noise = np.fft.fftn(np.random.default_rng(seed).standard_normal(shape))
    squared = sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"))
    squared.flat[0] = np.inf
    logarithm = np.fft.ifftn(noise * squared ** (-slope / 4)).real
    return np.exp(logarithm / logarithm.std()).astype(np.float32)


def blobs(shape: tuple[int, ...]) -> Field:
    """25 Gaussians of amplitudes up to 1 and widths of 4 to 11 voxels."""
    rng = np.random.default_rng(3)
    places = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    field = np.zeros(shape)
    for _ in range(25):
        centre, width = rng.random(len(shape)) * shape, 2 ** (2 + 1.5 * rng.random())
        squared = sum((x - c) ** 2 for x, c in zip(places, centre, strict=True))
        field += rng.random() * np.exp(-squared / (2 * width**2))
    return field.astype(np.float32)


def noise(shape: tuple[int, ...]) -> Field:
    return np.random.default_rng(0).random(shape, np.float32)


def signed(shape: tuple[int, ...]) -> Field:
    """As much below zero as above."""
    return np.log(turbulence(shape))


def steps_of(first: float, last: float, ndim: int, **options: Any) -> Steps:
    """The steps of the channel between two scale edges."""
    return channel_steps(Parameters(**options), (first, last), ndim)[1]


def sign_of(field: Field, cval: float = 0.0) -> int:
    return int(min(field.min(), cval) >= 0) - int(max(field.max(), cval) <= 0)


def smoothed_by(engine: Engine) -> Any:
    """One unconstrained step on cells."""

    def smooth(cells: Field, kernels: tuple[Kernel, ...]) -> Field:
        faces, levels = ((CUT, CUT),) * cells.ndim, tuple(map(pyramid_level, kernels))
        step = Diffusion(
            Steps(1, kernels), "unconstrained", faces, levels=levels, phase=(0,) * cells.ndim
        )
        return engine.diffuse(cells.copy(), step)

    return smooth


def at_once(engine: Engine, field: Field, steps: Steps, rule: str = "reflect", **more: Any) -> Field:
    """The field after `steps` as the engine computes them, the pyramid's wide kernels included."""
    faces, levels = ((rule, rule),) * field.ndim, tuple(map(pyramid_level, steps.kernels))
    how = {"constraint": "constrained", **more}
    what = Diffusion(steps, faces=faces, levels=levels, phase=(0,) * field.ndim, **how)
    return engine.diffuse(field.copy(), what)


def by_cells(
    engine: Engine,
    field: Field,
    steps: Steps,
    rule: str = "reflect",
    cval: float = 0.0,
    constraint: str = "constrained",
    most: int = 9,
) -> Field:
    """The field after `steps` by gather, evolve and scatter; no blanks."""
    least = SMALLEST_VARIANCE if constraint == "constrained" else EXACT_VARIANCE
    levels = closure_levels(steps, (most,) * field.ndim, least)
    assert any(levels)
    cell, kernels = cell_shape(levels), closure_kernels(steps, levels)
    more = [(0, -n % f) for n, f in zip(field.shape, cell, strict=True)]
    beyond = {"constant_values": np.nan} if rule == "constant" else {}
    whole = np.pad(field, more, NUMPY_MODES[rule], **beyond)
    halo = tuple(HALO * (level > 0) for level in levels)
    faces = CellFaces((0,) * field.ndim, field.shape, levels, rule, cval)
    sign = sign_of(field, cval if rule == "constant" else 0.0)
    smooth = smoothed_by(engine)
    how = Evolution(faces, kernels, halo, constraint, sign, False, smooth, move_groups)
    means, share = cell_means(whole, cell)
    held = np.asarray(how.held(means.shape), means.dtype)
    means = means + held * means.dtype.type(cval)
    first = how.smoothed(means)
    groups = np.zeros((0, *means.shape), field.dtype)
    base = means.copy()
    if constraint == "constrained":
        groups, counts = gathered(whole, interpolated(first, levels), cell)
        base -= (group_weights(counts, math.prod(cell), field.dtype) * groups).sum(axis=0)
    state = Cells(base, groups, share if held.any() else None)
    fields = [s for _, s in evolved(state, first[None], how, range(steps.count))]
    inner = tuple(slice(0, n) for n in field.shape)
    if constraint == "unconstrained":
        return interpolated(fields[-1], levels)[inner]
    if sign:
        extreme = np.minimum if sign > 0 else np.maximum
        return extreme(field, interpolated(fields[-1], levels)[inner])
    moved, stride = field.copy(), -(-steps.count // (SNAPSHOTS - 1))
    kept = [*range(0, steps.count - 1, stride), steps.count - 1]
    for low, high in itertools.pairwise(kept):
        for step in range(low, high):
            part = np.float32((step - low) / (high - low))
            between = fields[low] + part * (fields[high] - fields[low])
            constrain(moved, interpolated(between, levels)[inner], constraint)
    constrain(moved, interpolated(fields[-1], levels)[inner], constraint)
    return moved


def off(field: Field, expected: Field, found: Field) -> float:
    """Relative L2 norm by which a channel that starts from `field` is off."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(field - expected))
