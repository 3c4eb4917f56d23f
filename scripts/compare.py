"""Compare the drop-in with the package constrained-diffusion, which must be installed.

    python scripts/compare.py cube.fits          # a few minutes: the original takes most of them

Prints the largest difference of any channel or residual, relative to the largest absolute value
of the data, and how far the original's and our sums are from the data.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

import cdd_dask

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "without upsampling": {"up_sample": False},
    "inverted": {"inverted": True},
    "unconstrained": {"constrained": False},
    "linear scales": {"mode": "lin", "linear_scale_step": 2},
}


def fields(cube: str | None) -> dict[str, NDArray[Any]]:
    """Seeded fields of 1 to 3 dimensions, and a piece of an observed cube."""
    rng = np.random.default_rng(0)
    made = {}
    for shape in ((200,), (60, 70), (12, 20, 24)):
        rough = gaussian_filter(rng.standard_normal(shape), 1.5, mode="wrap")
        made[f"log-normal, {len(shape)}-D"] = np.exp(4 * rough).astype("float32")
    made["noise of both signs, 2-D"] = rng.standard_normal((60, 70))
    if cube is not None:
        from astropy.io import fits

        made["observed cube, a piece"] = fits.getdata(cube)[20:32, 30:60, 30:60]
    return made


def main() -> None:
    from constrained_diffusion import constrained_diffusion_decomposition as theirs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cube", nargs="?", help="FITS cube to take a piece of")
    print("| field | options | largest difference | sum - data, original | decompose |")
    print("|---|---|---|---|---|")
    for name, field in fields(parser.parse_args().cube).items():
        top = np.abs(field).max()
        for case, options in CASES.items():
            options = {"max_scale": 8, "verbose": False, **options}
            mine = cdd_dask.constrained_diffusion_decomposition(field, **options)
            original = theirs(field, **options)
            pairs = zip((*mine[0], mine[1]), (*original[0], original[1]), strict=True)
            largest = max(np.abs(a - b).max() for a, b in pairs) / top
            lost = np.abs(sum(original[0]) + original[1] - field).max() / top
            result = cdd_dask.decompose(field, max_scale=8, dtype="float64", progress=False)
            ours = np.abs(result.reconstruct() - field).max() / top
            print(f"| {name} | {case} | {largest:.1e} | {lost:.1e} | {ours:.1e} |")


if __name__ == "__main__":
    main()
