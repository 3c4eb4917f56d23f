"""Measure the accuracy of the kernels, what the size of a step does, and fields of both signs.

    python scripts/accuracy.py                                       # all tables, three minutes
    python scripts/accuracy.py --only signs --cube l1448_13co.fits   # with a plane of a radio cube

The truth of the kernels is the same flow on a grid six times finer: 96 × 96 voxels, 25 Gaussian
blobs, scale edges 1, 2, 4, 8, 16. Coordinates count voxels, the first voxel's centre at 0, and the
coarse grid samples the field there.

The truth of fields of both signs is the limit of small steps, extrapolated from two small `e_rel`.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
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


def channels(
    field: Field, finer: int = 1, engine: str = "reference", **options: object
) -> list[Field]:
    """The channels of a field with `finer` cells to a voxel's side, edges in voxels."""
    result = cdd_dask.decompose(
        field,
        min_scale=float(finer),
        num_channels=CHANNELS,
        dtype="float64",
        engine=engine,
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


def print_kernels() -> None:
    print("Relative L2 error against the truth, channels 0 to 4")
    truth = true_channels()
    native = relative_errors(channels(blobs()), truth)
    print_row('`kernel="discrete"`', native)
    print_row('`kernel="sampled"`', relative_errors(channels(blobs(), kernel="sampled"), truth))
    for upsample in (2, 4):
        refined = relative_errors(channels(blobs(), upsample=upsample), truth)
        print_row(f"`upsample={upsample}`", refined)
        print_row(f"`upsample={upsample}`: times closer", native / refined)


def print_steps() -> None:
    print("\nRelative L2 difference of e_rel=0.03 from e_rel=0.001, channels 0 to 4")
    noise = np.abs(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
    fields = {
        "smooth blobs": blobs(),
        "log-normal turbulence": lognormal_turbulence((SIZE, SIZE), slope=2.5),
        "white noise (absolute)": noise,
    }
    for name, field in fields.items():
        print_row(name, relative_errors(channels(field), channels(field, e_rel=0.001)))


def both_signs(cube: str | None) -> dict[str, Field]:
    """Planes as radio astronomers and others have them; of the `cube`, its first one: noise."""
    shape, rng = (SIZE, SIZE), np.random.default_rng(0)
    noise = rng.standard_normal(shape)
    beam = gaussian_filter(rng.standard_normal(shape), 1.5, mode="reflect")
    fields = {
        "noise of a beam, and sources": beam / beam.std() + 10 * blobs(),
        "Gaussian field": np.log(lognormal_turbulence(shape).astype(np.float64)),
        "white noise": noise,
    }
    if cube is None:
        return fields
    from astropy.io import fits

    planes = np.asarray(fits.getdata(cube), np.float64)
    first = next(plane for plane in planes if np.isfinite(plane).all())
    return {"a cube's plane of noise": first} | fields


def print_signs(cube: str | None) -> None:
    """Distance from the limit of small steps, and the share of voxels of the wrong sign."""
    print("\nFields of both signs, channels 0 to 4: relative L2 distance from the limit of small")
    print("steps, and the share of voxels whose sign is not the field's\n")
    for name, field in both_signs(cube).items():
        coarse, fine = (channels(field, engine="cpu", e_rel=e_rel) for e_rel in (6e-4, 3e-4))
        limit = [2 * a - b for a, b in zip(fine, coarse, strict=True)]
        found = {
            "default": channels(field, engine="cpu"),
            "`crossing`": channels(field, engine="cpu", crossing=True),
        }
        if find_spec("constrained_diffusion"):  # a black box
            from constrained_diffusion import constrained_diffusion_decomposition

            theirs, *_ = constrained_diffusion_decomposition(
                field, num_channels=CHANNELS, up_sample=False, verbose=False
            )
            found["`constrained-diffusion`"] = list(theirs)
        for rule, parts in found.items():
            print_row(f"{name}, {rule}", relative_errors(parts, limit))
            wrong = [100 * np.mean(part * np.sign(field) < 0) for part in parts]
            print("|   wrong sign | " + " | ".join(f"{share:.1f}%" for share in wrong) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("kernels", "steps", "signs"), help="one table")
    parser.add_argument("--cube", help="a FITS cube, whose first plane is looked at, too")
    chosen = parser.parse_args()
    if chosen.only in (None, "kernels"):
        print_kernels()
    if chosen.only in (None, "steps"):
        print_steps()
    if chosen.only in (None, "signs"):
        print_signs(chosen.cube)


if __name__ == "__main__":
    main()
