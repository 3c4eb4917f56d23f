"""The halo bound: that it is computed rightly, and that no field breaks it.

Each adversarial test diffuses two fields that agree around a core, out to the end of its halo,
and differ as much as they can beyond: whatever could be wrong beyond a cut, this is worse. How
far they differ in the core afterwards must stay under the bound.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from examples import few
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import erfc

from cdd_dask.boundaries import CUT
from cdd_dask.engines import Diffusion, load_engine
from cdd_dask.engines.reference import ReferenceEngine
from cdd_dask.halo import error_bound, halo_depth, rounding, tail_probability
from cdd_dask.kernels import Kernel, smoothing_kernel
from cdd_dask.parameters import Parameters
from cdd_dask.pyramid import coarse_levels, computed_steps
from cdd_dask.time_stepping import Steps, channel_steps

Field = NDArray[np.float64]

SLACK = 1e-13
"""Rounding of the two diffused fields themselves, relative to their range."""
OCTAVES = dict(
    zip(
        ("0->1", "1->2", "2->4", "4->8"),
        channel_steps(Parameters(), (1.0, 2.0, 4.0, 8.0), ndim=1),
        strict=True,
    )
)
FEW = {
    f"{n}x{sigma}": Steps(n, (smoothing_kernel("discrete", sigma),))
    for n in (1, 2, 3, 5)
    for sigma in (0.1, 0.7, 2.0)
}
SAMPLED = {"sampled": Steps(40, (smoothing_kernel("sampled", 0.6),))}
PASSES = {**OCTAVES, **FEW, **SAMPLED}


def exact_tails(kernel: Kernel, count: int) -> Field:
    """``P(X_n >= h + 1)`` by convolving `count` times: all terms positive, so no digit is lost."""
    walk = np.ones(1, np.longdouble)
    for _ in range(count):
        walk = np.convolve(walk, kernel.weights.astype(np.longdouble))
    return np.cumsum(walk[: len(walk) // 2 : -1])[::-1].astype(np.float64)


@pytest.mark.parametrize("kind", ["discrete", "sampled"])
@pytest.mark.parametrize(
    ("sigma", "count"),
    [(0.174, 1), (0.174, 33), (0.35, 100), (0.69, 100), (2.77, 30), (0.0316, 1000), (0.0174, 3333)],
)
def test_tails_against_brute_force(kind: str, sigma: float, count: int):
    """The FFT loses no more than `rounding`, which the bound adds; so the bound stays a bound.

    The last two are the first channels of ``e_rel=1e-3`` and ``3e-4``.
    """
    kernel = smoothing_kernel(kind, sigma)
    tails, exact = tail_probability(((kernel, count),)), exact_tails(kernel, count)
    assert len(tails) <= len(exact) == count * kernel.radius
    assert (exact[: len(tails)] <= tails + rounding(count)).all()
    assert (tails <= exact[: len(tails)] + 10 * rounding(count)).all()
    assert (exact[len(tails) :] <= rounding(count)).all()


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_tails_of_a_coin(count: int):
    """Weights 1/4, 1/2, 1/4 are two tosses of a coin: the tail is a sum of binomials, in integers.

    ``X_n = B(2n, 1/2) - n``, so ``P(X_n >= k) = sum_{j >= n + k} C(2n, j) / 4**n``.
    """
    tails = tail_probability(((Kernel(math.sqrt(0.5), (0.25,)), count),))
    binomials = [math.comb(2 * count, j) for j in range(2 * count + 1)]
    exact = [sum(binomials[count + k :]) / 4**count for k in range(1, count + 1)]
    assert tails == pytest.approx(exact, rel=1e-13, abs=rounding(count))


def test_small_steps_have_heavy_tails():
    """At octave 0->1 a Gaussian's tail would promise 30 times too much: 6e-7 instead of 1.8e-5."""
    bound = 2 * tail_probability(((OCTAVES["0->1"].kernels[0], 33),))[5]
    assert bound == pytest.approx(1.8e-5, rel=0.03)
    assert bound > 25 * erfc(5 / math.sqrt(2))


@pytest.mark.parametrize(
    ("sigma", "count", "within"), [(0.693, 103, 0.05), (1.386, 100, 0.02), (5.545, 100, 0.002)]
)
def test_large_scales_reach_the_gaussian_limit(sigma: float, count: int, within: float):
    """``2 P(X_n >= h + 1)`` nears ``erfc((h + 1/2) / (sqrt(2) s))``: 5% off at ``s = 7``.

    The half is the voxel's own width; ``erfc(h / (sqrt(2) s))`` lies above it.
    """
    s = sigma * math.sqrt(count)
    tails = 2 * tail_probability(((smoothing_kernel("discrete", sigma), count),))
    h = np.arange(int(3 * s))
    assert s >= 7
    assert tails[h] == pytest.approx(erfc((h + 0.5) / (math.sqrt(2) * s)), rel=within)
    assert (tails[h] <= erfc(h / (math.sqrt(2) * s))).all()


@pytest.mark.parametrize("steps", PASSES.values(), ids=PASSES)
def test_depth_grows_as_the_tolerance_falls(steps: Steps):
    """A deeper halo never promises less; the depth runs from 0 to ``n * r``, never beyond."""
    bounds = [error_bound((steps,), (h,)) for h in range(steps.reach[0] + 2)]
    assert all(
        deeper <= shallower + 4 * rounding(steps.count) for shallower, deeper in pairwise(bounds)
    )
    assert bounds[-2:] == [0.0, 0.0]
    depths = [halo_depth((steps,), rtol, 3)[0] for rtol in (100, 1e-2, 1e-4, 1e-8, 1e-12, 1e-200)]
    assert depths == sorted(depths)
    assert depths[0] == 0
    assert depths[-1] == steps.reach[0]


def test_no_tolerance_takes_the_strict_reach():
    """`rtol=0` is ``n * r`` on every axis, the kernels of the axes being what they are."""
    kernels = tuple(smoothing_kernel("discrete", sigma) for sigma in (0.1, 0.9, 3.0))
    assert halo_depth((Steps(7, kernels),), 0.0, 4) == (7 * 2, 7 * 5, 7 * 13)
    assert error_bound((Steps(7, kernels),), (14, 35, 91)) == 0.0


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("passes", [1, 5, 40])
def test_depth_is_the_smallest_that_keeps_the_promise(ndim: int, rtol: float, passes: int):
    """The bound at the depth chosen keeps ``rtol / (2 passes)``; one voxel less would break it."""
    for steps in PASSES.values():
        steps = Steps(steps.count, steps.kernels * ndim)
        depth = halo_depth((steps,), rtol, passes)
        assert error_bound((steps,), depth) <= rtol / (2 * passes)
        if min(depth) > 0:
            less = tuple(h - 1 for h in depth)
            assert error_bound((steps,), less) > rtol / (2 * passes)


def test_depths_of_the_design():
    """What a user sees at rtol 1e-3 in 3-D: about 6 voxels, 10, and about 4 ``l_k`` from there."""
    edges = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    depths = [
        halo_depth((steps,), 1e-3, len(edges))[0] for steps in channel_steps(Parameters(), edges, 3)
    ]
    assert depths[:2] == [pytest.approx(6, abs=1), pytest.approx(10, abs=1)]
    assert depths[2:] == pytest.approx([4 * edge for edge in edges[2:]], rel=0.15)


def bases(shape: tuple[int, ...]) -> dict[str, Field]:
    """What the two fields may hold where they agree; all within 0 … 1."""
    rng = np.random.default_rng(7)
    return {
        "zeros": np.zeros(shape),
        "tiny": np.full(shape, 1e-9),
        "ones": np.ones(shape),
        "random": rng.random(shape),
        "spikes": (rng.random(shape) > 0.8).astype(float),
        "logs": 10.0 ** rng.uniform(-9, 0, shape),
    }


def leak(
    base: Field, beyond: int, steps: Steps, constraint: str, low: float = 0.0, rule: str = CUT
) -> Field:
    """Difference left in `base` by `beyond` voxels before it on all axes that are `low` or 1."""
    pads = [(beyond, 0)] * base.ndim
    diffusion = Diffusion(steps, constraint, ((CUT, rule),) * base.ndim)
    ends = [
        ReferenceEngine().diffuse(np.pad(base, pads, constant_values=value), diffusion)
        for value in (low, 1.0)
    ]
    return np.abs(ends[1] - ends[0])[(slice(beyond, None),) * base.ndim]


def beyond_reach(steps: Steps) -> int:
    """Voxels beyond the cut that are as good as infinitely many."""
    kernel = steps.kernels[0]
    return min(steps.reach[0], int(9 * math.sqrt(steps.count) * kernel.sigma) + 20)


def per_face(steps: Steps, size: int) -> Field:
    """``2 P(X_n >= h + 1)`` for ``h = 0 … size - 1``."""
    tails = tail_probability(((steps.kernels[0], steps.count),))[:size]
    return 2 * (np.pad(tails, (0, size - len(tails))) + rounding(steps.count))


@pytest.mark.parametrize("constraint", ["constrained", "inverted", "unconstrained"])
@pytest.mark.parametrize("steps", PASSES.values(), ids=PASSES)
def test_no_step_beyond_the_halo_breaks_the_bound(steps: Steps, constraint: str):
    """0 against 1 beyond one cut face, every depth at once: never more than ``2 P`` of that depth.

    And the bound is not vacuous: under each constraint some field reaches half of it at every
    depth where it can be told from rounding, and from octave 4->8 on nine tenths of it.
    """
    beyond = beyond_reach(steps)
    size = 2 * beyond + 5
    allowed = per_face(steps, size)
    worst = np.zeros(size)
    for name, base in bases((size,)).items():
        difference = leak(base, beyond, steps, constraint)
        assert (difference <= allowed + SLACK).all(), name
        worst = np.maximum(worst, difference)
    ratio = (worst / allowed)[allowed > 1e-7]
    assert ratio.min() >= 0.49
    if steps is OCTAVES["4->8"] and constraint != "unconstrained":
        assert ratio.max() >= 0.9


@pytest.mark.parametrize("constraint", ["constrained", "inverted", "unconstrained"])
@pytest.mark.parametrize("steps", OCTAVES.values(), ids=OCTAVES)
def test_fields_of_both_signs(steps: Steps, constraint: str):
    """-1 against 1, and twice the range."""
    beyond = beyond_reach(steps)
    allowed = 2 * per_face(steps, 2 * beyond)
    for name, base in bases((2 * beyond,)).items():
        for signed in (-base, base * np.random.default_rng(1).choice([-1, 0, 1], base.size)):
            difference = leak(signed, beyond, steps, constraint, low=-1.0)
            assert (difference <= allowed + SLACK).all(), name


@few(25)
@given(
    values=st.lists(
        st.sampled_from((-1.0, -0.5, -1e-3, 0.0, 1e-9, 0.3, 1.0)), min_size=1, max_size=40
    ),
    hostile=st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    other=st.floats(-1, 1),
    name=st.sampled_from(["0->1", "4->8", "3x0.7", "5x2.0"]),
    coarse=st.booleans(),
)
def test_hostile_values_beyond_the_cut(
    values: list[float], hostile: list[float], other: float, name: str, coarse: bool
):
    """Of any sign, and of both: the bound of every depth holds, on coarse cells, too."""
    steps, engine, levels = PASSES[name], load_engine("cpu"), (0,)
    if coarse:
        (steps,) = channel_steps(Parameters(), (16.0, 32.0), ndim=1)[1:]
        levels = coarse_levels(Parameters(), steps)
        assert levels[0]
    computed = computed_steps(steps, levels)
    cell, beyond = 2 ** levels[0], 256
    field = np.resize(values, 256)
    ends = []
    for wrong in (np.resize(hostile, beyond), np.full(beyond, other)):
        whole = np.concatenate([wrong, field])
        what = Diffusion(steps, "constrained", ((CUT, "reflect"),), levels=levels, phase=(0,))
        ends.append(engine.diffuse(whole, what)[beyond:])
    depths = np.arange(len(field))
    allowed = [error_bound((computed,), (int(h),)) for h in depths[:: max(1, cell)]]
    leaked = np.abs(ends[0] - ends[1])[:: max(1, cell)]
    assert (leaked <= 2 * np.array(allowed) + SLACK).all()


@pytest.mark.parametrize("constraint", ["constrained", "inverted", "unconstrained"])
@pytest.mark.parametrize("name", ["0->1", "1->2", "3x0.7"])
def test_two_cut_faces_in_2d(name: str, constraint: str):
    """At a corner the faces' shares add up, whatever the two depths; and less would not do."""
    one = PASSES[name]
    steps = Steps(one.count, one.kernels * 2)
    beyond = beyond_reach(steps)
    share = per_face(one, beyond)
    allowed = share[:, None] + share[None, :]
    ratios = []
    for base_name, base in bases((beyond, beyond)).items():
        difference = leak(base, beyond, steps, constraint)
        assert (difference <= allowed + SLACK).all(), base_name
        ratios.append((difference / allowed)[allowed > 1e-7].max())
    assert max(ratios) >= 0.49


@pytest.mark.parametrize("rule", ["reflect", "mirror", "nearest", "constant"])
@pytest.mark.parametrize("steps", PASSES.values(), ids=PASSES)
def test_a_core_squeezed_between_a_cut_and_the_volumes_edge(steps: Steps, rule: str):
    """A wall throws the error back, as a second cut would: `error_bound` counts both faces.

    The core is the one voxel at the wall, so the block holds nothing else but its halo.
    """
    for depth in {0, 1, 2, 5, halo_depth((steps,), 1e-3, 3)[0]}:
        for constraint in ("constrained", "inverted", "unconstrained"):
            for name, base in bases((depth + 1,)).items():
                difference = leak(base, beyond_reach(steps), steps, constraint, rule=rule)
                assert difference[-1] <= error_bound((steps,), (depth,)) + SLACK, (name, depth)


def test_one_face_would_not_cover_the_wall():
    """Counting only the face that is cut, the bound would be wrong beside a reflecting wall."""
    steps = OCTAVES["4->8"]
    difference = leak(np.ones(17), beyond_reach(steps), steps, "constrained", rule="reflect")
    assert per_face(steps, 17)[16] < difference[-1] <= error_bound((steps,), (16,))


@pytest.mark.parametrize("constraint", ["constrained", "inverted", "unconstrained"])
@pytest.mark.parametrize("rtol", [1e-1, 1e-4])
def test_a_whole_plan_in_tiny_blocks_keeps_rtol(constraint: str, rtol: float):
    """Channels got block by block, 4 voxels a block, are within ``rtol`` of those got in one.

    The errors of four stages add up, and a channel is the difference of two fields.
    """
    for name, field in bases((100,)).items():
        whole = blocked = field
        for steps in OCTAVES.values():
            depth = halo_depth((steps,), rtol, len(OCTAVES))[0]
            whole_next = _diffuse(whole, steps, constraint, size=len(field), depth=0)
            blocked_next = _diffuse(blocked, steps, constraint, size=4, depth=depth)
            error = np.abs((blocked - blocked_next) - (whole - whole_next)).max()
            assert error <= rtol * np.ptp(field) + SLACK, name
            whole, blocked = whole_next, blocked_next


def _diffuse(field: Field, steps: Steps, constraint: str, size: int, depth: int) -> Field:
    """One pass over a 1-D field, in blocks of `size` with a halo of `depth`."""
    result = np.empty_like(field)
    for start in range(0, len(field), size):
        low, high = max(0, start - depth), min(len(field), start + size + depth)
        faces = ("reflect" if low == 0 else CUT, "reflect" if high == len(field) else CUT)
        block = field[low:high].copy()
        done = ReferenceEngine().diffuse(block, Diffusion(steps, constraint, (faces,)))
        result[start : start + size] = done[start - low : start - low + size]
    return result
