"""The pyramid and the CPU engine's threads: what a coarser grid costs, and what it must not."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from test_engines import CONSTRAINTS, diffusion, positive

from cdd_dask.boundaries import CUT
from cdd_dask.engines import Engine, load_engine
from cdd_dask.engines.base import Diffusion
from cdd_dask.halo import error_bound, halo_depth
from cdd_dask.kernels import IDENTITY, Kernel, smoothing_kernel
from cdd_dask.parameters import BOUNDARIES, KERNELS, Parameters
from cdd_dask.pyramid import (
    SMALLEST_VARIANCE,
    chain_kernel,
    coarse_kernel,
    coarse_levels,
    computed_steps,
    pyramid_level,
)
from cdd_dask.time_stepping import Steps, channel_steps

Field = NDArray[np.floating]
WIDE = (2.8, 5.54, 11.1)
"""Standard deviations that take 1, 2 and 3 halvings."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine("cpu")


def turbulence(shape: tuple[int, ...]) -> Field:
    """A log-normal field with a power-law spectrum of its logarithm."""
    rng = np.random.default_rng(5)
    frequencies = np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij")
    k = np.sqrt(sum(f**2 for f in frequencies))
    k.flat[0] = 1
    spectrum = np.fft.fftn(rng.normal(size=shape)) * k ** (-0.5 * (len(shape) + 1))
    spectrum.flat[0] = 0
    rough = np.fft.ifftn(spectrum).real
    return np.exp(rough / rough.std())


def levelled(what: Diffusion, *phase: int) -> Diffusion:
    """The same on as coarse a grid as its kernels allow."""
    levels = tuple(map(pyramid_level, what.steps.kernels))
    return replace(what, levels=levels, phase=phase or (0,) * len(levels))


def cumulants(kernel: Kernel) -> tuple[float, float]:
    x = np.arange(-kernel.radius, kernel.radius + 1)
    second = float((kernel.weights * x**2).sum())
    return second, float((kernel.weights * x**4).sum()) - 3 * second**2


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("sigma", [2.6, *WIDE, 22.2, 41.0])
def test_chain_has_the_kernels_cumulants(kind: str, sigma: float):
    """Variance and fourth cumulant of the whole chain, and weights that keep it monotone."""
    kernel = smoothing_kernel(kind, sigma)
    level = pyramid_level(kernel)
    small = coarse_kernel(kernel, level)
    assert level >= 1
    assert SMALLEST_VARIANCE <= cumulants(small)[0] <= 6.3
    assert min(small.weights) > 0
    assert all(np.diff(small.wings) < 0)
    second, fourth = cumulants(chain_kernel(kernel, level))
    wanted = cumulants(kernel)
    assert second == pytest.approx(wanted[0], rel=1e-10)
    assert fourth == pytest.approx(wanted[1], abs=1e-9 * sigma**4)


@pytest.mark.parametrize("sigma", WIDE)
def test_chain_kernel_is_what_the_engine_does(engine: Engine, sigma: float):
    """Its response to an impulse, averaged over where in a cell that lies."""
    what = levelled(diffusion(1, sigma, 1, "unconstrained", "wrap"))
    kernel, cell = chain_kernel(what.steps.kernels[0], what.levels[0]), 2 ** what.levels[0]
    size = 2 * (kernel.radius // cell + 2) * cell
    mean = np.zeros(size)
    for i in range(cell):
        impulse = np.zeros(size)
        impulse[size // 2 + i] = 1
        mean += np.roll(engine.diffuse(impulse, what), -i) / cell
    expected = np.zeros(size)
    expected[size // 2 - kernel.radius : size // 2 + kernel.radius + 1] = kernel.weights
    assert np.abs(mean - expected).max() < 1e-15


def test_rtol_decides():
    """Full kernels where they are asked for, and at faces where cells would be far off."""
    *_, wide = channel_steps(Parameters(), (16.0, 32.0, 64.0), ndim=2)
    for options, levels in (
        ({}, (2, 2)),
        ({"rtol": 1e-4}, (2, 2)),
        ({"rtol": 9e-5}, (0, 0)),
        ({"rtol": 0.0}, (0, 0)),
        ({"boundary": "constant"}, (2, 2)),
        ({"boundary": "constant", "cval": 1.0}, (0, 0)),
        ({"boundary": "constant", "inverted": True, "rtol": 1.0}, (0, 0)),
        ({"boundary": "constant", "cval": 1.0, "rtol": 1e-2}, (2, 2)),
    ):
        assert coarse_levels(Parameters(**options), wide) == levels, options
    four = replace(wide, kernels=wide.kernels * 2)
    assert coarse_levels(Parameters(), four) == (0,) * 4


@pytest.mark.parametrize("rule", BOUNDARIES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("shape", [(331,), (90, 101), (64, 96), (37, 41, 45)])
def test_a_channel_hardly_differs(
    engine: Engine, shape: tuple[int, ...], constraint: str, rule: str
):
    """The relative L2 norm that `coarse_levels` states, at any shape and boundary."""
    for double in (turbulence(shape), np.random.default_rng(1).lognormal(size=shape)):
        field = double.astype(np.float32)
        what = diffusion(len(shape), 2.8, 100, constraint, rule)
        full = engine.diffuse(field.copy(), what)
        coarse = engine.diffuse(field.copy(), levelled(what))
        allowed = 2e-4
        if constraint == "inverted":
            allowed = 4e-3 if rule == "constant" else 1e-3
        assert np.linalg.norm(coarse - full) <= allowed * np.linalg.norm(field - full)


def test_beyond_faces_of_another_value(engine: Engine):
    """The largest exception: `constant` with a `cval` that the field stays away from."""
    field = turbulence((64, 75))
    what = diffusion(2, 2.8, 100, "constrained", "constant", cval=20.0)
    full = engine.diffuse(field.copy(), what)
    coarse = engine.diffuse(field.copy(), levelled(what))
    assert np.linalg.norm(coarse - full) <= 4e-3 * np.linalg.norm(field - full)


def test_wide_along_one_axis_only(engine: Engine):
    """Levels differ from axis to axis; an axis may be left alone."""
    field = turbulence((30, 70, 66))
    kernels = (IDENTITY, smoothing_kernel("discrete", 5.6), smoothing_kernel("discrete", 0.7))
    what = Diffusion(Steps(60, kernels), "constrained", (("nearest", "nearest"),) * 3)
    full = engine.diffuse(field.copy(), what)
    coarse = engine.diffuse(field.copy(), levelled(what))
    assert levelled(what).levels == (0, 2, 0)
    assert 0 < np.linalg.norm(coarse - full) <= 2e-4 * np.linalg.norm(field - full)


@pytest.mark.parametrize("rule", ["reflect", "wrap", "nearest", "constant"])
def test_blank_voxels_on_a_coarse_grid(engine: Engine, rule: str):
    """Divided by the same chain of what is valid, blanks cost little more."""
    field = turbulence((96, 83))
    y, x = np.indices(field.shape)
    field[(y - 40) ** 2 + (x - 45) ** 2 > 38**2] = np.nan
    what = diffusion(2, 2.8, 60, "constrained", rule)
    full = engine.diffuse(field.copy(), what)
    coarse = engine.diffuse(field.copy(), levelled(what))
    assert np.array_equal(np.isnan(coarse), np.isnan(field))
    lost = np.nan_to_num(field - full)
    assert np.linalg.norm(np.nan_to_num(coarse - full)) <= 5e-4 * np.linalg.norm(lost)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [1 / 3, -7.7, 3e38, 1e-39])
def test_a_constant_field_comes_back_to_the_bit(engine: Engine, value: float, dtype: type):
    """Whatever its cells' phase, its boundary and its value."""
    field = np.full((45, 70), value, dtype)
    for sigma, rule in zip(
        (2.8, 5.54, 11.1, 5.54), ("reflect", "mirror", "constant", CUT), strict=True
    ):
        for constraint in CONSTRAINTS:
            what = levelled(diffusion(2, sigma, 3, constraint, rule, float(field[0, 0])), 1, 3)
            assert np.array_equal(engine.diffuse(field.copy(), what), field), (sigma, rule)


@pytest.mark.parametrize("first", [96, 101, 103])
def test_cells_are_those_of_the_volume(engine: Engine, first: int):
    """A block has the same cells as the whole, wherever it starts: the same bits out of reach."""
    field = positive((400, 40), np.float32)
    what = levelled(diffusion(2, 5.54, 3))
    reach = 3 * chain_kernel(what.steps.kernels[0], 2).radius
    whole = engine.diffuse(field.copy(), what)
    faces = ((CUT, "reflect"), ("reflect", "reflect"))
    block = replace(what, faces=faces, phase=(first % 4, 0))
    cut = engine.diffuse(field[first:].copy(), block)
    assert np.array_equal(cut[reach:], whole[first + reach :])
    wrong = replace(block, phase=((first + 1) % 4, 0))
    assert not np.array_equal(engine.diffuse(field[first:].copy(), wrong)[reach:], cut[reach:])


@pytest.mark.parametrize("count", [1, 3, 30])
def test_halo_of_the_chain_bounds_its_error(engine: Engine, count: int):
    """Fields that agree to the halo's end and differ as they can beyond, for every phase."""
    what = levelled(diffusion(1, 2.8, count, "constrained"))
    steps = computed_steps(what.steps, what.levels)
    (depth,) = halo_depth((steps,), 1e-2, 1)
    for phase in range(4):
        low = np.zeros(2 * depth + 9)
        high = low.copy()
        low[depth:-depth] = high[depth:-depth] = 1
        low[:depth] = high[:depth] = 1
        low[-depth:] = high[-depth:] = 1
        # what lies beyond the cut: nothing, or as much as can be
        around = [np.concatenate([np.full(99, v), low, np.full(99, v)]) for v in (0.0, 1.0)]
        ends = [engine.diffuse(a, replace(what, phase=(phase,))) for a in around]
        core = slice(99 + depth, 99 + depth + 9)
        worst = np.abs(ends[1] - ends[0])[core].max()
        assert worst <= error_bound((steps,), (depth,)) + 1e-13
        assert depth <= steps.reach[0]


@pytest.mark.parametrize("sigma", [0.35, 1.39, 2.8, 6.0])
def test_any_number_of_threads_gives_the_same_bits(engine: Engine, sigma: float):
    """Parts meet at other rows, and nothing shows."""
    field = positive((70, 61, 83), np.float32)
    for what in (diffusion(3, sigma, 3), levelled(diffusion(3, sigma, 3, rule="mirror"))):
        before = engine.limit_threads(1)
        try:
            alone = engine.diffuse(field.copy(), what)
            for threads in (2, 3, 5):
                engine.limit_threads(threads)
                assert np.array_equal(engine.diffuse(field.copy(), what), alone), threads
        finally:
            engine.limit_threads(before)


def test_eight_tasks_at_once(engine: Engine):
    """In one process, each with threads of its own: none disturbs another."""
    field = positive((64, 50, 70), np.float32)
    what = [diffusion(3, 0.7, 5), levelled(diffusion(3, 2.8, 5))] * 4
    before = engine.limit_threads(2)
    try:
        alone = [engine.diffuse(field.copy(), one) for one in what]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda one: engine.diffuse(field.copy(), one), what * 3))
    finally:
        engine.limit_threads(before)
    assert all(map(np.array_equal, together, alone * 3))


@pytest.mark.parametrize("rule", [*BOUNDARIES, CUT])
@pytest.mark.parametrize("threads", [1, 3])
def test_several_steps_in_one_visit(engine: Engine, threads: int, rule: str):
    """The same bits as one step after the other, for each constraint, with blanks and without."""
    field = positive((90, 75, 33), np.float32)
    blanks = field.copy()
    blanks[20:24, 30, 3:9] = np.nan
    before = engine.limit_threads(threads)
    try:
        for sigma, constraint in itertools.product((0.2, 0.9), CONSTRAINTS):
            what = diffusion(3, sigma, 7, constraint, rule, 0.5)
            one = replace(what, steps=replace(what.steps, count=1))
            for start in (field, blanks):
                expected = start.copy()
                for _ in range(7):
                    expected = engine.diffuse(expected, one)
                result = engine.diffuse(start.copy(), what)
                assert np.array_equal(result, expected, equal_nan=True), (sigma, constraint)
    finally:
        engine.limit_threads(before)
