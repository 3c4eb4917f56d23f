"""Make a seeded log-normal turbulence cube: power-law noise, exponentiated.

python scripts/turbulence.py cube.npy --size 128
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray


def lognormal_turbulence(
    shape: tuple[int, ...], slope: float = 3.0, seed: int = 0
) -> NDArray[np.float32]:
    """A positive field whose logarithm is Gaussian with the power spectrum ``k**-slope``.

    Parameters
    ----------
    shape
        Shape in voxels.
    slope
        Exponent of the logarithm's power spectrum per mode.
    seed
        Seed of the random phases and amplitudes.

    Returns
    -------
    ndarray
        float32 of `shape`; its logarithm has mean 0 and standard deviation 1.
    """
    noise = np.fft.rfftn(np.random.default_rng(seed).standard_normal(shape))
    frequencies = [np.fft.fftfreq(n) for n in shape[:-1]] + [np.fft.rfftfreq(shape[-1])]
    squared = sum(f**2 for f in np.meshgrid(*frequencies, indexing="ij", sparse=True))
    amplitude = np.where(squared > 0, squared, np.inf) ** (-slope / 4)
    logarithm = np.fft.irfftn(noise * amplitude, s=shape, axes=tuple(range(len(shape))))
    return np.exp(logarithm / logarithm.std()).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="the .npy file to write")
    parser.add_argument("--size", type=int, default=128, help="voxels a side")
    parser.add_argument("--ndim", type=int, default=3, help="number of axes")
    parser.add_argument("--slope", type=float, default=3.0, help="slope of the power spectrum")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = (arguments.size,) * arguments.ndim
    np.save(arguments.out, lognormal_turbulence(shape, arguments.slope, arguments.seed))


if __name__ == "__main__":
    main()
