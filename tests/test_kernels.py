"""The smoothing kernels: what they promise at every sigma, and why the taps matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d
from scipy.special import ive

from cdd_dask.engines.base import Diffusion
from cdd_dask.engines.reference import ReferenceEngine
from cdd_dask.kernels import Kernel, discrete_gaussian, sampled_gaussian, smoothing_kernel
from cdd_dask.parameters import KERNELS, Parameters
from cdd_dask.time_stepping import Steps, channel_steps

SIGMAS = st.floats(1e-3, 50)


@settings(deadline=None)
@given(sigma=SIGMAS)
@example(sigma=0.25)
@example(sigma=math.nextafter(0.25, 1))
@example(sigma=1e-3)
@example(sigma=50.0)
def test_discrete_gaussian(sigma: float):
    """At every sigma: a probability distribution of variance exactly ``sigma**2``.

    Non-negative weights make a step monotone, the sum 1 leaves a constant alone, the variance
    is the scale; and the radius has no special case at small sigma.
    """
    kernel = discrete_gaussian(sigma)
    x = np.arange(-kernel.radius, kernel.radius + 1)
    assert kernel.radius == math.ceil(4 * sigma) + 1
    assert kernel.weights @ x**2 == pytest.approx(sigma**2, rel=1e-13)
    assert kernel.weights.sum() == pytest.approx(1, abs=1e-15)
    assert (kernel.weights >= 0).all()
    assert (np.diff(kernel.weights[kernel.radius :]) <= 0).all()


@settings(deadline=None)
@given(sigma=SIGMAS)
def test_sampled_gaussian(sigma: float):
    """The sampled kernel is SciPy's own, which is what other software smooths with."""
    kernel = sampled_gaussian(sigma)
    assert kernel.radius == int(4 * sigma + 0.5)
    delta = np.zeros(2 * kernel.radius + 1)
    delta[kernel.radius] = 1
    assert kernel.weights == pytest.approx(gaussian_filter1d(delta, sigma, mode="constant"))
    assert kernel.weights.sum() == pytest.approx(1, abs=1e-15)
    assert (kernel.weights >= 0).all()


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("sigma", [0.05, 0.174, 1.0, 7.3])
def test_weights_are_the_wings_mirrored(kind: str, sigma: float):
    """`weights` is symmetric about its centre and holds the wings, in order of distance."""
    kernel = smoothing_kernel(kind, sigma)
    assert len(kernel.weights) == 2 * kernel.radius + 1
    assert np.array_equal(kernel.weights, kernel.weights[::-1])
    assert tuple(kernel.weights[kernel.radius + 1 :]) == kernel.wings


def test_sampling_does_not_diffuse_at_the_first_octaves():
    """Why the default is not to sample: at 0.17 voxels a sampled kernel is the identity."""
    assert sum(sampled_gaussian(0.174).wings) < 1e-7
    assert sum(discrete_gaussian(0.174).wings) == pytest.approx(0.174**2 / 2, rel=0.05)


def test_cutting_the_kernel_off_costs_nothing():
    """The radius is enough: channels lie within 2.5e-4 of those of the kernel cut nowhere.

    Noise, under the constraint, is the hardest field for it. The same kernel cut to radius 1 is
    off by 4e-3 and more, so the comparison can tell.
    """
    field = np.random.default_rng(0).random((64, 64))
    for steps in channel_steps(Parameters(), (1.0, 2.0, 4.0), ndim=2):
        sigma = steps.kernels[0].sigma
        whole = _channel(field, steps.count, _bessel(sigma, radius=int(12 * sigma) + 25))
        ours = _channel(field, steps.count, discrete_gaussian(sigma))
        short = _channel(field, steps.count, _bessel(sigma, radius=1))
        assert np.linalg.norm(ours - whole) <= 2.5e-4 * np.linalg.norm(whole)
        assert np.linalg.norm(short - whole) >= 4e-3 * np.linalg.norm(whole)


def _bessel(sigma: float, radius: int) -> Kernel:
    """Lindeberg's kernel by its formula, cut at `radius` and normalised."""
    one_sided = ive(np.arange(radius + 1), sigma**2)
    one_sided /= one_sided[0] + 2 * one_sided[1:].sum()
    return Kernel(sigma, tuple(one_sided[1:].tolist()))


def _channel(field: np.ndarray, count: int, kernel: Kernel) -> np.ndarray:
    diffusion = Diffusion(Steps(count, (kernel,) * 2), "constrained", (("reflect", "reflect"),) * 2)
    return field - ReferenceEngine().diffuse(field.copy(), diffusion)
