"""Single steps for pytest-benchmark, to compare two states of the code; off by default.

    python -m pytest tests/test_speed.py --benchmark-only

Whole decompositions, beside other software, are `scripts/benchmark.py`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_engines import diffusion, positive

from cdd_dask.engines import load_engine
from cdd_dask.pyramid import pyramid_level

STEPS = 4


@pytest.mark.parametrize("sigma", [0.17, 0.35, 0.69, 1.39, 2.77, 11.1])
@pytest.mark.parametrize("shape", [(1024, 1024), (128, 128, 128)], ids=str)
def test_steps(benchmark: Any, shape: tuple[int, ...], sigma: float):
    engine = load_engine("cpu")
    what = diffusion(len(shape), sigma, STEPS)
    levels = tuple(map(pyramid_level, what.steps.kernels))
    what = replace(what, levels=levels, phase=(0,) * len(shape))
    field = positive(shape, np.float32)
    engine.diffuse(field.copy(), what)  # compiles
    result = benchmark(lambda: engine.diffuse(field.copy(), what))
    assert 0 < result.sum() < field.sum()
    benchmark.extra_info["voxel_steps"] = STEPS * field.size
