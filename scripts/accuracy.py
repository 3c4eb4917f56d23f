"""Measure the accuracy of the kernels, and what the size of a step does.

    python scripts/accuracy.py            # both tables, about two minutes

The truth is the same flow on a grid six times finer: 96 × 96 voxels, 25 Gaussian blobs, scale
edges 1, 2, 4, 8, 16. Coordinates count voxels, the first voxel's centre at 0, and the coarse
grid samples the field there.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from turbulence import lognormal_turbulence

import cdd_dask

Field = NDArray[np.float64]

SIZE = 96
FINER = 6
CHANNELS = 5


def blobs(finer: int = 1) -> Field:
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


def channels(field: Field, finer: int = 1, **options: object) -> list[Field]:
    """The channels of a field with `finer` cells to a voxel's side, edges in voxels."""
    result = cdd_dask.decompose(
        field,
        min_scale=float(finer),
        num_channels=CHANNELS,
        dtype="float64",
        engine="reference",
        progress=False,
        **options,
    )
    return [channel[:] for channel in result.channels]


def true_channels() -> list[Field]:
    """The channels on the fine grid, each voxel the mean of the four cells about its centre."""
    fine = channels(blobs(FINER), FINER, e_rel=0.01)
    cells = [channel.reshape(SIZE, FINER, SIZE, FINER) for channel in fine]
    middle = slice(FINER // 2 - 1, FINER // 2 + 1)
    return [cell[:, middle, :, middle].mean(axis=(1, 3)) for cell in cells]


def relative_errors(ours: list[Field], theirs: list[Field]) -> NDArray[np.float64]:
    """Relative L2 error of every channel."""
    pairs = zip(ours, theirs, strict=True)
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])


def print_row(name: str, values: NDArray[np.float64]) -> None:
    print("| " + " | ".join([name, *(f"{value:.1e}" for value in values)]) + " |")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("Relative L2 error against the truth, channels 0 to 4")
    truth = true_channels()
    native = relative_errors(channels(blobs()), truth)
    print_row('`kernel="discrete"`', native)
    print_row('`kernel="sampled"`', relative_errors(channels(blobs(), kernel="sampled"), truth))
    for upsample in (2, 4):
        refined = relative_errors(channels(blobs(), upsample=upsample), truth)
        print_row(f"`upsample={upsample}`", refined)
        print_row(f"`upsample={upsample}`: times closer", native / refined)
    print("\nRelative L2 difference of e_rel=0.03 from e_rel=0.001, channels 0 to 4")
    noise = np.abs(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
    fields = {
        "smooth blobs": blobs(),
        "log-normal turbulence": lognormal_turbulence((SIZE, SIZE), slope=2.5),
        "white noise (absolute)": noise,
    }
    for name, field in fields.items():
        print_row(name, relative_errors(channels(field), channels(field, e_rel=0.001)))


if __name__ == "__main__":
    main()
