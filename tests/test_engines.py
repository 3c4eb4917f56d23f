"""One suite for every engine: what each owes its callers, and that all agree.

Needs numpy, scipy, pytest and, for torch's engine, torch; so it runs on any machine whose
device it is to prove. An engine that is not installed, or whose device is absent, skips. There::

    python -m pytest -c /dev/null --rootdir . tests/test_engines.py
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT
from cdd_dask.engines import ENGINES, Diffusion, Engine, load_engine
from cdd_dask.engines.reference import ReferenceEngine
from cdd_dask.errors import DeviceError, InputError, MissingDependencyError
from cdd_dask.kernels import IDENTITY, smoothing_kernel
from cdd_dask.parameters import BOUNDARIES, KERNELS, Parameters
from cdd_dask.time_stepping import Steps, channel_steps

Field = NDArray[np.floating]

UNDER_TEST = {
    "reference": ("reference", None),
    "cpu": ("cpu", None),
    "torch-cpu": ("torch", "cpu"),
    "torch-cuda": ("torch", "cuda"),
}
CONSTRAINTS = ("constrained", "inverted", "crossing", "unconstrained")
DTYPES = (np.float32, np.float64)
TOLERANCE = {np.float32: 1e-6, np.float64: 1e-12}
"""Largest difference of two results, relative to the field's maximum."""
NUMPY_MODE = {
    "reflect": "symmetric",
    "mirror": "reflect",
    "nearest": "edge",
    "wrap": "wrap",
    "constant": "constant",
}
"""What `numpy.pad` calls SciPy's boundary modes."""
SHAPES = [
    (1,),
    (2,),
    (29,),
    (1, 1),
    (1, 23),
    (17, 2),
    (19, 16),
    (3, 1, 13),
    (7, 8, 9),
    (2, 5, 3, 6),
]
"""Odd, thin and shorter than the kernels' radius; 1-D to 4-D."""
WIDE = {"discrete": 2.0, "sampled": 2.25}
"""A sigma for each kernel, both of radius 9: compiling for another one takes seconds."""


@pytest.fixture(scope="module", params=UNDER_TEST)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Every engine in turn, on one thread: small arrays lose more by sharing than they gain."""
    name, device = UNDER_TEST[request.param]
    threads = 0
    if name == "torch":
        torch = pytest.importorskip("torch")
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        threads = torch.get_num_threads()
    loaded = load_engine(name, device)
    loaded.limit_threads(1)
    yield loaded
    if threads:
        loaded.limit_threads(threads)


def positive(shape: tuple[int, ...], dtype: type = np.float64, seed: int = 0) -> Field:
    """A log-normal field with some zeros."""
    rng = np.random.default_rng(seed)
    field = np.exp(rng.normal(size=shape)) * (rng.random(shape) > 0.1)
    return field.astype(dtype)


def signed(shape: tuple[int, ...], dtype: type = np.float64, seed: int = 0) -> Field:
    """White noise with some zeros."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * (rng.random(shape) > 0.1)).astype(dtype)


def diffusion(
    ndim: int,
    sigma: float | tuple[float, ...] = 0.7,
    count: int = 4,
    constraint: str = "constrained",
    rule: str = "reflect",
    cval: float = 0.0,
    kind: str = "discrete",
) -> Diffusion:
    """`count` steps under one rule for all faces; one `sigma`, or one per axis."""
    sigmas = sigma if isinstance(sigma, tuple) else (sigma,) * ndim
    kernels = tuple(smoothing_kernel(kind, s) for s in sigmas)
    return Diffusion(Steps(count, kernels), constraint, ((rule, rule),) * ndim, cval)


def run(engine: Engine, field: Field, what: Diffusion) -> Field:
    """The field diffused, `field` itself being kept; checks the contract's shape and dtype."""
    result = engine.diffuse(field.copy(), what)
    assert isinstance(result, np.ndarray)
    assert (result.shape, result.dtype) == (field.shape, field.dtype)
    return result


def plain(field: Field, what: Diffusion) -> Field:
    """The contract written out with `numpy.pad` and nothing of the package's but the taps."""
    for _ in range(what.steps.count):
        smooth = field.astype(np.float64)
        for axis, kernel in enumerate(what.steps.kernels):
            rule, size = what.faces[axis][0], field.shape[axis]
            value = {"constant_values": what.cval} if rule == "constant" else {}
            width = [(kernel.radius,) * 2 if a == axis else (0, 0) for a in range(field.ndim)]
            wide = np.pad(smooth, width, NUMPY_MODE[rule], **value)
            smooth = sum(
                weight * np.take(wide, range(start, start + size), axis)
                for start, weight in enumerate(kernel.weights)
            )
        smooth = smooth.astype(field.dtype)
        field = plainly_moved(field, smooth, what.constraint)
    return field


def plainly_moved(field: Field, smooth: Field, constraint: str) -> Field:
    """The rules of the contract, written out."""
    lower, upper = np.minimum(field, smooth), np.maximum(field, smooth)
    zero = field.dtype.type(0)
    return {
        "constrained": np.where(
            field > 0, np.maximum(lower, zero), np.where(field < 0, np.minimum(upper, zero), zero)
        ),
        "inverted": np.where(field > 0, upper, np.where(field < 0, lower, zero)),
        "crossing": np.where(field > 0, lower, np.where(field < 0, upper, zero)),
        "unconstrained": smooth,
    }[constraint]


def assert_close(result: Field, expected: Field, field: Field, context: object = None) -> None:
    """Two results for one `field` agree within the tolerance of its dtype."""
    allowed = TOLERANCE[field.dtype.type] * np.abs(field).max()
    assert np.abs(result - expected).max() <= allowed, context


# agreement


@pytest.mark.parametrize("rule", sorted(NUMPY_MODE))
@pytest.mark.parametrize("size", [513, 600, 1101, 262145])
def test_rows_of_several_tiles(engine: Engine, size: int, rule: str):
    """Rows longer than what is computed at once, with ends that need what lies far away."""
    if engine.name != "cpu" and size > 2000:
        pytest.skip("no tiles, and slow")
    shape = (2, 3, size) if size < 2000 else (size,)
    field = positive(shape, np.float32)
    what = diffusion(len(shape), 0.9, 3, rule=rule, cval=0.5)
    assert_close(run(engine, field, what), plain(field, what), field)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize(
    ("rule", "cval"), [*((rule, 0.0) for rule in BOUNDARIES), ("constant", 0.7)]
)
def test_against_a_plain_program(
    engine: Engine, rule: str, cval: float, constraint: str, dtype: type
):
    """Each engine computes the equation: every boundary, both kernels, another sigma per axis.

    A swapped axis, a wrong mode or a wrong sign cannot pass; nor can an extension that is wrong
    only where the kernel is longer than the axis.
    """
    for shape, kind in itertools.product(SHAPES, KERNELS):
        sigma = (WIDE[kind], 0.4, 0.174, 1.1)[: len(shape)]
        what = diffusion(len(shape), sigma, 3, constraint, rule, cval, kind)
        field = positive(shape, dtype) + dtype(0.01)
        # what lies beyond the volume may be larger than all that is in it
        largest = field if rule != "constant" else np.append(field, dtype(cval))
        assert_close(run(engine, field, what), plain(field, what), largest, (shape, kind))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, np.float32) for shape in ((301,), (40, 37), (13, 12, 11), (5, 6, 7, 4))),
        # how many axes there are has nothing to do with the type
        ((13, 12, 11), np.float64),
    ],
)
def test_against_the_reference_over_channels(
    engine: Engine, shape: tuple[int, ...], constraint: str, dtype: type
):
    """Rounding does not add up: after three channels, 233 steps, all are within 1e-6."""
    field = ours = theirs = positive(shape, dtype, seed=1)
    for steps in channel_steps(Parameters(), (1.0, 2.0, 4.0), len(shape)):
        what = Diffusion(steps, constraint, (("reflect", "reflect"),) * len(shape))
        ours, theirs = run(engine, ours, what), run(ReferenceEngine(), theirs, what)
        assert_close(ours, theirs, field)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_single_precision_is_enough(engine: Engine, constraint: str):
    """In float32, slopes and bumps end within 1e-6 of what float64 gives, after 333 steps.

    Such fields show rounding best: under ``min`` it only ever takes away. Summing taps times
    values, instead of differences, is off by 2e-6 to 3e-6.
    """
    z, y, x = np.ogrid[:24, :22, :20]
    bump = 1 + np.exp(-((z - 9) ** 2 + y**2 + (x - 12) ** 2) / 200)
    for field in (0.1 * z + 0.03 * y + 0.01 * x + 100, bump):
        single = field.astype(np.float32)
        double = single.astype(np.float64)
        for steps in channel_steps(Parameters(), (1.0, 2.0, 4.0, 8.0), 3):
            what = Diffusion(steps, constraint, (("reflect", "reflect"),) * 3)
            single, double = run(engine, single, what), run(ReferenceEngine(), double, what)
        assert np.abs(single - double).max() <= 1e-6 * field.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_fields_of_both_signs(engine: Engine, constraint: str, dtype: type):
    """Fields of mixed sign agree too; where voxels cross zero, as far as they can.

    There a last bit decides whether a voxel just below 0 jumps to its surroundings' mean. So single
    voxels may differ; nearly all do not.
    """
    for shape in [(400,), (48, 45), (14, 15, 16)]:
        (steps,) = channel_steps(Parameters(), (1.0,), len(shape))
        what = Diffusion(steps, constraint, (("mirror", "mirror"),) * len(shape))
        field = signed(shape, dtype, seed=2)
        ours, theirs = run(engine, field, what), run(ReferenceEngine(), field, what)
        difference, allowed = np.abs(ours - theirs), TOLERANCE[dtype] * np.abs(field).max()
        if constraint == "crossing":
            assert np.mean(difference > allowed) <= 5e-3
            assert np.linalg.norm(difference) <= 2e-3 * np.linalg.norm(theirs)
        else:
            assert difference.max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", BOUNDARIES)
def test_no_voxel_changes_its_sign(engine: Engine, rule: str, dtype: type):
    """Constrained, a value stays between 0 and what it was, exactly, blanks and `cval` or not.

    Crossing zero, a third of white noise is on the other side after one channel.
    """
    for shape, share in [((300,), 0.0), ((40, 41), 0.0), ((13, 14, 15), 0.2), ((4, 5, 6, 3), 0.0)]:
        field = blanked(signed(shape, dtype, seed=4), share, seed=5)
        valid = field[~np.isnan(field)]
        for sigma in (0.174, WIDE["discrete"]):
            what = diffusion(len(shape), sigma, 12, rule=rule, cval=-0.8)
            after = run(engine, field, what)[~np.isnan(field)]
            assert ((np.minimum(valid, 0) <= after) & (after <= np.maximum(valid, 0))).all()
            crossed = run(engine, field, replace(what, constraint="crossing"))[~np.isnan(field)]
            assert np.mean(crossed * valid < 0) > 0.01


def test_one_rule_for_fields_of_one_sign(engine: Engine):
    """Whether voxels may cross zero makes no difference where they never do: not of a bit."""
    for sign, share in itertools.product((1, -1), (0.0, 0.2)):
        field = blanked(sign * positive((19, 16, 9), np.float32), share, seed=1)
        what = diffusion(3, WIDE["discrete"], 6)
        crossed = run(engine, field, replace(what, constraint="crossing"))
        assert np.array_equal(run(engine, field, what), crossed, equal_nan=True)


# faces


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("rule", ["reflect", "mirror", "wrap"])
def test_boundaries_are_what_an_extended_volume_does(engine: Engine, rule: str, constraint: str):
    """Extending the volume by the rule once, out to ``n * r``, gives what the rule gives.

    It holds for the rules under which an extended field stays extended.
    """
    for shape in [(11,), (1,), (6, 9), (5, 1, 4)]:
        what = diffusion(len(shape), WIDE["discrete"], 3, constraint, rule)
        reach = what.steps.reach[0]
        field = positive(shape) + 0.01
        cut = Diffusion(what.steps, constraint, ((CUT, CUT),) * len(shape))
        wide = run(engine, np.pad(field, reach, NUMPY_MODE[rule]), cut)
        inside = wide[(slice(reach, -reach),) * len(shape)]
        assert_close(run(engine, field, what), inside, field, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize(
    ("shape", "sigma"), [((400,), 0.9), ((61, 83), 0.7), ((31, 29, 34), 0.174), ((15,) * 4, 0.1)]
)
def test_a_cut_does_not_reach_beyond_its_reach(
    engine: Engine, shape: tuple[int, ...], sigma: float, constraint: str, dtype: type
):
    """Beyond ``n * r`` of its cut faces a block equals the whole volume, to the bit.

    So neither a block's size nor its place, nor what a processor does with the ends of its
    lines, can show in a result: the layout of blocks does not matter at ``rtol=0``.
    """
    whole = signed(shape, dtype, seed=3)
    what = diffusion(len(shape), sigma, 3, constraint, "mirror")
    expected = run(engine, whole, what)
    rng = np.random.default_rng(4)
    for _ in range(8):
        block, core, faces = [], [], []
        for size, reach in zip(shape, what.steps.reach, strict=True):
            # from one end, to one end, or neither; long enough to have an interior
            low = int(rng.integers(0, size - 2 * reach)) * int(rng.integers(2))
            high = int(rng.integers(min(size, low + 2 * reach + 1), size + 1))
            high = high if rng.integers(2) else size
            block.append(slice(low, high))
            core.append(slice(low + reach * (low > 0), high - reach * (high < size)))
            faces.append(("mirror" if low == 0 else CUT, "mirror" if high == size else CUT))
        piece = np.ascontiguousarray(whole[tuple(block)])
        result = run(engine, piece, Diffusion(what.steps, constraint, tuple(faces)))
        inside = tuple(
            slice(c.start - b.start, c.stop - b.start) for b, c in zip(block, core, strict=True)
        )
        assert expected[tuple(core)].size > 0
        assert np.array_equal(result[inside], expected[tuple(core)]), (block, faces)


# blank voxels


def blanked(field: Field, share: float, seed: int) -> Field:
    """`field` with a share of its voxels NaN."""
    field = field.copy()
    field[np.random.default_rng(seed).random(field.shape) < share] = np.nan
    return field


def plain_masked(field: Field, what: Diffusion) -> Field:
    """The contract for blank voxels: ``S = G(I M) / G(M)``, one step after the other."""
    valid = ~np.isnan(field)
    linear = Diffusion(Steps(1, what.steps.kernels), "unconstrained", what.faces, 1.0)
    share = plain(valid.astype(np.float64), linear)
    for _ in range(what.steps.count):
        filled = np.where(valid, field, 0).astype(np.float64)
        linear = Diffusion(linear.steps, "unconstrained", what.faces, what.cval)
        smooth = np.divide(plain(filled, linear), share, where=valid, out=np.zeros_like(filled))
        smooth = smooth.astype(field.dtype)
        field = plainly_moved(filled.astype(field.dtype), smooth, what.constraint)
    return np.where(valid, field, np.nan).astype(field.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize(
    ("rule", "cval"), [*((rule, 0.0) for rule in BOUNDARIES), ("constant", 0.7)]
)
def test_blank_voxels_take_no_part(
    engine: Engine, rule: str, cval: float, constraint: str, dtype: type
):
    """Each engine normalises by what blanks leave of the kernel; blanks, and only they, stay so."""
    # how many axes there are has nothing to do with the type
    shapes = [(29,), (1, 23), (19, 16), (7, 8, 9)] if dtype == np.float32 else [(7, 8, 9)]
    for shape, share in itertools.product(shapes, [0.1, 0.7]):
        sigma = (WIDE["discrete"], 0.4, 1.1)[: len(shape)]
        what = diffusion(len(shape), sigma, 3, constraint, rule, cval)
        field = blanked(positive(shape, dtype) + dtype(0.01), share, seed=7)
        result = run(engine, field, what)
        assert np.array_equal(np.isnan(result), np.isnan(field))
        allowed = TOLERANCE[dtype] * np.nanmax(field)
        assert np.nanmax(np.abs(result - plain_masked(field, what))) <= allowed, (shape, share)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_constant_field_with_blanks_stays(engine: Engine, constraint: str, dtype: type):
    """Blanks do not wear a constant field down, not by a bit in float32; nor do all of them."""
    for share in (0.02, 0.5, 0.95, 1.0):
        field = blanked(np.full((15, 16, 17), 0.1, dtype), share, seed=3)
        result = run(engine, field, diffusion(3, WIDE["discrete"], 20, constraint))
        if dtype == np.float32:
            assert np.array_equal(result, field, equal_nan=True), share
        else:
            assert np.array_equal(np.isnan(result), np.isnan(field))
            assert np.nanmax(np.abs(result - field), initial=0) <= 1e-14


def test_blanks_shield_nothing_but_themselves(engine: Engine):
    """A wall of blanks, wider than the kernel, parts a field into two that ignore each other."""
    field = positive((30, 12), np.float32) + 1
    field[10:20] = np.nan
    other = field.copy()
    other[20:] *= 7
    what = diffusion(2, 0.7, 10)
    left, right = run(engine, field, what)[:10], run(engine, other, what)[:10]
    assert np.array_equal(left, right)
    assert not np.array_equal(run(engine, field, what)[20:], run(engine, other, what)[20:])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_an_axis_that_is_not_decomposed(engine: Engine, share: float):
    """With the identity along an axis, every slice across it is diffused by itself."""
    field = blanked(signed((6, 13, 7)), share, seed=1)
    kernel = smoothing_kernel("discrete", WIDE["discrete"])
    for axis in range(3):
        kernels = tuple(IDENTITY if a == axis else kernel for a in range(3))
        whole = run(engine, field, Diffusion(Steps(5, kernels), "constrained",
                                             (("reflect", "reflect"),) * 3))  # fmt: skip
        two = Diffusion(Steps(5, (kernel,) * 2), "constrained", (("reflect", "reflect"),) * 2)
        slices = [
            run(engine, np.ascontiguousarray(np.take(field, i, axis)), two)
            for i in range(field.shape[axis])
        ]
        assert np.allclose(whole, np.stack(slices, axis), rtol=0, atol=1e-13, equal_nan=True)


# properties (DESIGN, section 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KERNELS)
def test_a_positive_field_only_shrinks(engine: Engine, kind: str, dtype: type):
    """Channels of a positive field are >= 0 in every voxel, exactly, and so is what remains.

    Inverted, it only grows.
    """
    for shape in [(200,), (30, 31), (11, 12, 13)] if dtype == np.float32 else [(11, 12, 13)]:
        for seed, exponent in enumerate((1, 8)):  # over 2 and over 20 orders of magnitude
            field = positive(shape, seed=seed) ** exponent
            for steps in channel_steps(Parameters(kernel=kind), (1.0, 2.0), len(shape)):
                faces = (("reflect", "reflect"),) * len(shape)
                before = field.astype(dtype)
                after = run(engine, before, Diffusion(steps, "constrained", faces))
                assert (after <= before).all()
                assert (after >= 0).all()
                assert (run(engine, before, Diffusion(steps, "inverted", faces)) >= before).all()
                field = after


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_order_is_kept_and_perturbations_do_not_grow(engine: Engine, constraint: str):
    """``I <= J`` gives ``I(t) <= J(t)``, and their largest difference does not grow.

    Blocks rest on it: an error in a halo can only fade. For fields of both signs, too, unless
    voxels cross zero, or leave it on either side.
    """
    makes = [positive] if constraint in ("crossing", "inverted") else [positive, signed]
    shapes = [(90,), (25, 24), (9, 10, 8)]
    for make, shape, rule in itertools.product(makes, shapes, BOUNDARIES):
        what = diffusion(len(shape), 0.5, 20, constraint, rule)
        lower = make(shape, seed=5) + 1e-3
        upper = lower + np.random.default_rng(6).random(shape) ** 8
        after, after_upper = run(engine, lower, what), run(engine, upper, what)
        assert (after <= after_upper + 1e-13).all()
        assert (after_upper - after).max() <= (upper - lower).max() + 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("rule", BOUNDARIES)
def test_symmetries_hold_to_the_bit(engine: Engine, rule: str, constraint: str, dtype: type):
    """Scaled by a power of two, negated or mirrored: so is the result, `cval` going along.

    To the bit, even for fields of mixed sign, where any difference could grow.
    """
    for shape in [(101,), (23, 30), (9, 8, 11), (4, 5, 6, 3)]:
        field = signed(shape, dtype, seed=7)
        what = diffusion(len(shape), WIDE["discrete"], 5, constraint, rule, cval=0.3)
        result = run(engine, field, what)
        for factor in (2.0**20, 0.125, -1.0):
            scaled = replace(what, cval=0.3 * factor)
            assert np.array_equal(
                run(engine, field * dtype(factor), scaled), result * dtype(factor)
            )
        for axis in range(len(shape)):
            mirrored = run(engine, np.ascontiguousarray(np.flip(field, axis)), what)
            assert np.array_equal(mirrored, np.flip(result, axis))


@pytest.mark.parametrize("kind", KERNELS)
def test_a_constant_field_is_left_alone(engine: Engine, kind: str):
    """No drift: a constant float32 field comes back to the bit, whatever its value and the taps.

    Summing taps times values loses 1.6e-5 of it, under ``min`` one way only.
    """
    constants = np.float32([1 / 3, 0.1, np.pi, -7.7, 1e-30, -1e30, 16777213, 3.4e38])
    sigmas = {  # whose kernels have the same radii, for which the CPU engine is compiled
        "discrete": (0.05, 0.1, 0.174, 0.35, 0.69, 0.9, 1.39, 2.77, 5.5),
        "sampled": (0.05, 0.4, 0.5, 0.7, 1.0, 1.25, 1.75, 3.2, 5.7),
    }
    for value, sigma in itertools.product(constants, sigmas[kind]):
        field = np.full((6, 7, 5), value, np.float32)
        for constraint, rule in zip(itertools.cycle(CONSTRAINTS), BOUNDARIES, strict=False):
            what = diffusion(3, sigma, 5, constraint, rule, float(value), kind)
            assert np.array_equal(run(engine, field, what), field), (value, sigma, rule)


@pytest.mark.parametrize("make", [positive, signed])
@pytest.mark.parametrize("constraint", ["constrained", "inverted", "crossing"])
def test_zero_stays_zero(engine: Engine, constraint: str, make: object):
    """A voxel that is 0 is 0 ever after, whatever surrounds it; a field of zeros is left alone."""
    field = make((21, 22), np.float32)
    what = diffusion(2, 1.0, 10, constraint)
    assert (field == 0).any()
    assert (run(engine, field, what)[field == 0] == 0).all()
    assert not run(engine, np.zeros((21, 22), np.float32), what).any()


# conduct


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_run_and_thread_count(engine: Engine, dtype: type):
    """A result depends on the field alone: not on the run, nor on how many threads computed it."""
    field = signed((70, 64, 65), dtype)  # large enough to be shared among threads
    what = diffusion(3, 0.35, 4)
    first, second = run(engine, field, what), run(engine, field, what)
    engine.limit_threads(2)
    on_two_threads = run(engine, field, what)
    engine.limit_threads(1)
    assert np.array_equal(first, second)
    assert np.array_equal(first, on_two_threads)


def test_footprint_is_stated(engine: Engine):
    """Each engine tells what it needs, more for float64, on the device where it has one."""
    small, large = engine.footprint(4), engine.footprint(8)
    assert small.host >= 4
    assert large.host + large.device > small.host + small.device
    assert (small.device > 0) == (engine.device != "cpu")


def test_engines_need_neither_zarr_nor_dask(engine: Engine):
    """An engine computes where zarr, dask and distributed cannot be imported."""
    program = f"""
import sys
for name in ("zarr", "dask", "distributed"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
from cdd_dask.engines import Diffusion, load_engine
from cdd_dask.kernels import IDENTITY, smoothing_kernel
from cdd_dask.time_stepping import Steps
steps = Steps(2, (smoothing_kernel("discrete", 0.5),))
what = Diffusion(steps, "constrained", (("cut", "reflect"),))
result = load_engine({engine.name!r}, {engine.device!r}).diffuse(np.eye(9)[4], what)
assert 0 < result.max() < 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("device", ["cuda:99", "warp"])
def test_an_absent_device_is_refused(name: str, device: str):
    """Never a silent fallback: the message names the device asked for and those present."""
    pytest.importorskip("torch")
    with pytest.raises(DeviceError, match=rf"{device}.*cpu"):
        load_engine(name, device)


def test_the_reference_has_no_device():
    """A device is refused by the engine that cannot use it, and the other one is named."""
    with pytest.raises(DeviceError, match=r"cuda.*torch"):
        load_engine("reference", "cuda")
    assert load_engine("reference", "cpu").name == "reference"


def test_an_unknown_engine_is_refused():
    """The message names the value and every choice there is."""
    with pytest.raises(InputError) as caught:
        load_engine("numpy")
    assert all(word in str(caught.value) for word in ("engine='numpy'", *ENGINES))


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_missing_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str):
    """Asked for a GPU where torch is not installed, one learns which extra is missing."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*cdd-dask\[torch\]"):
        load_engine(name, "cuda")


def test_auto_says_what_it_chose():
    """Left to choose, an engine and a device that are there come back, by name."""
    chosen = load_engine()
    assert chosen.name in ENGINES
    assert np.isfinite(run(chosen, positive((9, 9), np.float32), diffusion(2))).all()
    assert load_engine("auto", "cpu").device == "cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only torch knows of a GPU")
def test_torch_is_not_loaded_where_there_is_no_gpu():
    """It takes seconds, which every command and every worker would take to begin."""
    program = """
import sys
from cdd_dask import engines
engines.GPU_FILES = ()
assert engines.load_engine().name == "cpu" and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
