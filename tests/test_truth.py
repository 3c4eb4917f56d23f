"""The decomposition against the truth: the same flow on a grid six times finer.

Everything is computed here, by the package's own taps on one side and on the other; nothing is
compared with stored results. The recipe is that of the design's table of accuracies: 96 x 96
voxels, 25 Gaussian blobs, channels with the edges 1, 2, 4, 8, 16. Coordinates count voxels, the
first voxel's centre at 0, and the coarse grid samples the field there.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cdd_dask.engines.base import Diffusion
from cdd_dask.engines.reference import ReferenceEngine
from cdd_dask.parameters import Parameters
from cdd_dask.time_stepping import channel_steps

Field = NDArray[np.float64]

SIZE = 96
FINER = 6
EDGES = (1.0, 2.0, 4.0, 8.0, 16.0)
DESIGN = np.array([4.2e-2, 2.3e-2, 1.9e-2, 8.7e-3, 4.2e-3])
"""Relative L2 error of each channel, the design's row for the discrete kernel."""


def blobs(finer: int) -> Field:
    """The 25 blobs sampled at the centres of cells, `finer` of them to a voxel's side."""
    x = (np.arange(SIZE * finer) + 0.5) / finer - 0.5
    field = np.zeros((x.size, x.size))
    rng = np.random.default_rng(3)
    for _ in range(25):
        amplitude, *centre = rng.random(), SIZE * rng.random(), SIZE * rng.random()
        width = 2 ** (3.5 * rng.random())
        rows, columns = (np.exp(-(((x - c) / width) ** 2) / 2) for c in centre)
        field += amplitude * np.outer(rows, columns)
    return field


def channels(field: Field, finer: int, parameters: Parameters) -> list[Field]:
    """The channels of a field with `finer` cells to a voxel's side, edges in voxels."""
    result = []
    faces = (("reflect", "reflect"),) * 2
    for steps in channel_steps(parameters, tuple(finer * edge for edge in EDGES), ndim=2):
        before = field.copy()
        field = ReferenceEngine().diffuse(field, Diffusion(steps, "constrained", faces))
        result.append(before - field)
    return result


@pytest.fixture(scope="module")
def truth() -> list[Field]:
    """The channels on the fine grid, each voxel the mean of the four cells about its centre."""
    fine = channels(blobs(FINER), FINER, Parameters(e_rel=0.01))
    cells = [channel.reshape(SIZE, FINER, SIZE, FINER) for channel in fine]
    middle = slice(FINER // 2 - 1, FINER // 2 + 1)
    return [cell[:, middle, :, middle].mean(axis=(1, 3)) for cell in cells]


def errors(parameters: Parameters, truth: list[Field]) -> Field:
    """Relative L2 error of every channel on the native grid."""
    ours = channels(blobs(1), 1, parameters)
    pairs = zip(ours, truth, strict=True)
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])


def test_default_kernel_is_as_accurate_as_the_design_says(truth: list[Field]):
    """No channel is more than 10% worse than the design's row, from the first octave on."""
    measured = errors(Parameters(), truth)
    assert (measured <= 1.1 * DESIGN).all(), measured


def test_a_sampled_kernel_misses_the_first_channels(truth: list[Field]):
    """The comparison can tell: sampling the kernel gives the table's row for software that does.

    Its channels below 2 voxels are empty, and the next two miss half.
    """
    measured = errors(Parameters(kernel="sampled"), truth)
    assert measured == pytest.approx([1, 1, 0.63, 0.48, 0.094], rel=0.02)
