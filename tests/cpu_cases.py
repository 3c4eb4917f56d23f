"""Fields diffused by the CPU engine, as checksums that are the same on every machine.

    python tests/cpu_cases.py > tests/data/cpu_checksums.json    # where results shall change

All numbers that go in are exact: no library of functions that may round otherwise elsewhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np

from cdd_dask import pyramid
from cdd_dask.engines import Diffusion
from cdd_dask.engines.cpu import CpuEngine, steppers, thread_team
from cdd_dask.kernels import IDENTITY, Kernel
from cdd_dask.parameters import BOUNDARIES
from cdd_dask.time_stepping import Steps

CONSTRAINTS = ("crossing", "inverted", "unconstrained")
SHAPES = [(1,), (301,), (17, 2), (40, 37), (3, 1, 13), (13, 12, 50), (21, 40, 33), (2, 5, 3, 6)]
RADII = (1, 2, 3, 4, 7, 11, 16, 20)


def exact_kernel(radius: int) -> Kernel:
    """Weights that fall off evenly, in units of 2^-12."""
    wings = np.arange(radius, 0, -1) ** 2
    return Kernel(radius / 4, tuple((wings * (1500 // wings.sum()) / 4096).tolist()))


def exact_field(shape: tuple[int, ...], dtype: str, number: int) -> np.ndarray:
    """Multiples of 2^-20 of both signs, over four orders of magnitude, some 0."""
    rng = np.random.default_rng(number)
    values = rng.integers(-(2**20), 2**20, shape) / 2.0**20
    values *= 2.0 ** rng.integers(-12, 2, shape)
    return (values * (rng.integers(0, 10, shape) > 0)).astype(dtype)


def checksums(threads: int = 1) -> dict[str, str]:
    """A checksum of the results for each shape and radius."""
    engine = CpuEngine()
    engine.limit_threads(threads)
    thread_team.SMALLEST_PART = 100  # small fields are shared among threads, too
    pyramid.coarse_kernel = steppers.coarse_kernel = lambda kernel, level: exact_kernel(4)
    rules = itertools.cycle((*BOUNDARIES, "cut"))
    numbers, found = itertools.count(), {}
    for shape, radius, dtype, blanks, level in itertools.product(
        SHAPES, RADII, ("float32", "float64"), (False, True), (0, 1, 2)
    ):
        if level and (len(shape) > 3 or radius not in (11, 16)):
            continue
        number, ndim = next(numbers), len(shape)
        kernels = [exact_kernel(radius)] * ndim
        if number % 5 == 0 and ndim > 1:
            kernels[number % ndim] = IDENTITY
        field = exact_field(shape, dtype, number)
        if blanks:
            field[np.random.default_rng(number).integers(0, 5, shape) == 0] = np.nan
        levels = tuple(level if kernel.radius else 0 for kernel in kernels)
        what = Diffusion(
            Steps((1, 4, 9)[number % 3], tuple(kernels)),
            CONSTRAINTS[number % 3 if number % 2 else 0],
            tuple((rule, rule) for rule in itertools.islice(rules, ndim)),
            cval=0.25,
            levels=levels,
            phase=tuple(number % 4 if level else 0 for level in levels),
        )
        cases = {f"{shape} radius {radius}": what}
        if what.constraint == "crossing":
            cases[f"{shape} radius {radius}, sign kept"] = replace(what, constraint="constrained")
        for name, case in cases.items():
            result = engine.diffuse(field.copy(), case)
            # a zero may have either sign, and a blank any payload
            result = np.where(np.isnan(result), np.inf, result + 0.0)
            result = result.astype(f"<f{field.itemsize}")
            found.setdefault(name, hashlib.sha256()).update(result.tobytes())
    return {name: checksum.hexdigest()[:16] for name, checksum in found.items()}


if __name__ == "__main__":
    print(json.dumps(checksums(), indent=0))
