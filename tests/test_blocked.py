"""The promise: a volume computed in blocks is the volume computed as a whole.

`whole` is the same program with one block, where no halo exists. The engines themselves are
checked against plain programs in `test_engines.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from examples import few
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import cdd_dask
from cdd_dask.parameters import BOUNDARIES, KERNELS

FAST = {"max_scale": 4, "e_rel": 0.2}
"""Few steps; the halo is what the bound asks for at any number of steps."""
CONSTRAINTS = {
    "constrained": {"constrained": True},
    "inverted": {"inverted": True},
    "unconstrained": {"constrained": False},
}
SHAPES = st.one_of(
    st.tuples(st.integers(30, 150)),
    st.tuples(st.integers(1, 60), st.integers(30, 60)),
    st.tuples(st.integers(25, 40), st.integers(1, 9), st.integers(1, 20)),
)
"""Longer than a halo of 4 to 15 voxels along an axis at least, thin or odd along the others."""
FIELDS = ("lognormal", "spikes", "step", "ramp")


@st.composite
def cuts(draw: st.DrawFn, shapes: st.SearchStrategy = SHAPES) -> tuple[Any, Any]:
    """A shape, and a block of which a few fill it, so that a case takes a moment."""
    shape = draw(shapes)
    most = {1: 6, 2: 3, 3: 2}[len(shape)]
    return shape, tuple(draw(st.integers(-(-n // most), n)) for n in shape)


@st.composite
def scales(draw: st.DrawFn) -> dict[str, Any]:
    """Edges in either mode, few of them and small."""
    if draw(st.booleans()):
        return {"max_scale": draw(st.sampled_from([2, 3, 4, 5])), "e_rel": 0.2}
    return {"mode": "lin", "linear_scale_step": 1.5, "max_scale": 4, "e_rel": 0.2}


def field_of(kind: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """A field >= 0: like turbulence, or the worst for a cut (all its mass on one side)."""
    rng = np.random.default_rng(seed)
    if kind == "lognormal":
        field = rng.lognormal(0, 2, shape)
    elif kind == "spikes":
        field = (rng.random(shape) < 0.05) * 1e3 + rng.random(shape)
    else:
        longest = int(np.argmax(shape))
        along = np.linspace(0, 1, shape[longest])
        along = along if kind == "ramp" else (along > rng.uniform(0.2, 0.8))
        place = [1] * len(shape)
        place[longest] = -1
        field = np.broadcast_to(along.reshape(place), shape)
    return np.ascontiguousarray(field, "float32")


def extent(field: NDArray[Any], options: dict[str, Any]) -> float:
    """The field's range, what lies beyond its edge included."""
    values = [field.min(), field.max()]
    if options["boundary"] == "constant":
        values.append(options["cval"])
    return float(max(values) - min(values))


ROUNDING = 1e-6
"""What float32 adds, relative to the field's range."""


@few(6)
@given(
    cut=cuts(),
    edges=scales(),
    kind=st.sampled_from(FIELDS),
    constraint=st.sampled_from(list(CONSTRAINTS)),
    boundary=st.sampled_from(BOUNDARIES),
    kernel=st.sampled_from(KERNELS),
    rtol=st.sampled_from([1e-2, 1e-3, 1e-5]),
    negative=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_equal_the_whole(
    outputs: Any,
    cut: tuple[Any, Any],
    edges: dict[str, Any],
    kind: str,
    constraint: str,
    boundary: str,
    kernel: str,
    rtol: float,
    negative: bool,
    seed: int,
):
    """No voxel of no channel is off by more than `rtol` of the range."""
    shape, block = cut
    field = field_of(kind, shape, seed) * (-1 if negative else 1)
    sign = -1 if negative else 1
    options = {**edges, **CONSTRAINTS[constraint], "boundary": boundary, "kernel": kernel}
    options |= {"cval": sign * 0.5 if boundary == "constant" else 0.0, "rtol": rtol}
    whole = outputs(field, block=shape, **options)
    blocked = outputs(field, block=block, **options)
    allowed = (rtol + ROUNDING) * extent(field, options)
    assert np.abs(blocked - whole).max() <= allowed


@few(6)
@given(
    cut=cuts(),
    constraint=st.sampled_from(list(CONSTRAINTS)),
    boundary=st.sampled_from(BOUNDARIES),
    seed=st.integers(0, 99),
)
def test_blocks_equal_the_whole_for_both_signs(
    outputs: Any, cut: tuple[Any, Any], constraint: str, boundary: str, seed: int
):
    """The bound holds for fields of any sign."""
    shape, block = cut
    field = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    options = {**FAST, **CONSTRAINTS[constraint], "boundary": boundary, "cval": 0.5}
    whole, blocked = outputs(field, block=shape, **options), outputs(field, block=block, **options)
    assert np.abs(blocked - whole).max() <= (1e-3 + ROUNDING) * extent(field, options)


@pytest.mark.parametrize("shape", [(2000,), (90, 80), (40, 22, 20)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_blocks_equal_the_whole_but_for_single_voxels(
    outputs: Any, lognormal: Any, shape: tuple[int, ...], offset: float
):
    """Where voxels cross zero a step jumps there, so a voxel here or there may differ.

    At most one in a thousand by more than `rtol`, and a channel by 1e-3 in the L2 norm.
    """
    field = lognormal(shape, seed=3)
    field -= np.quantile(field, 0.1) if offset else np.median(field)
    block = tuple(-(-n // 3) for n in shape)
    crossing = {**FAST, "crossing": True}
    whole, blocked = (
        outputs(field, block=shape, **crossing),
        outputs(field, block=block, **crossing),
    )
    difference = np.abs(blocked - whole)
    for k in range(len(whole)):
        assert np.mean(difference[k] > 1e-3 * np.ptp(field)) <= 1e-3
        assert np.linalg.norm(difference[k]) <= 1e-3 * np.linalg.norm(whole[k])


def test_without_halos_the_promise_breaks(outputs: Any, monkeypatch: pytest.MonkeyPatch):
    """The comparison can tell: with halos of one voxel the same fields are far off."""
    field = field_of("step", (120, 4), seed=0)
    whole = outputs(field, block=(120, 4), **FAST)
    block = (25, 4)
    assert np.abs(outputs(field, block=block, **FAST) - whole).max() <= 1e-3
    monkeypatch.setattr("cdd_dask.halo.halo_depth", lambda one, *_: (1,) * len(one[0].kernels))
    assert np.abs(outputs(field, block=block, **FAST) - whole).max() > 1e-2


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_strict_halos_give_the_same_bits(
    outputs: Any, lognormal: Any, boundary: str, constraint: str
):
    """``rtol=0``: every choice of blocks, and none, gives the same bits, whatever the signs.

    Their halos of 20 and 60 voxels leave much of the 700 out, so blocks really are computed
    from different data.
    """
    field = lognormal((700, 3), seed=1) - 1
    options = {"max_scale": 2, "e_rel": 0.1, "rtol": 0, "boundary": boundary, "cval": 0.3}
    options |= CONSTRAINTS[constraint]
    plans = [cdd_dask.plan(field, max_scale=2, rtol=0, e_rel=0.1, block=(b, 3)) for b in (150, 97)]
    for plan in plans:
        largest = max(stage.haloed_voxels for stage in plan.stages) / len(plan.grid)
        assert largest < 0.5 * field.size
        assert all(stage.error == "exact" for stage in plan.stages)
    whole = outputs(field, block=(700, 3), **options)
    for block in [(150, 3), (97, 2)]:
        assert np.array_equal(outputs(field, block=block, **options), whole)


@few(4)
@given(block=st.tuples(st.integers(60, 300), st.integers(1, 2), st.integers(2, 5)))
def test_strict_halos_give_the_same_bits_in_3d(
    outputs: Any, lognormal: Any, block: tuple[int, ...]
):
    """And with any block, in three axes."""
    field = lognormal((300, 2, 5), seed=2)
    options = {"max_scale": 2, "e_rel": 0.2, "rtol": 0}
    assert np.array_equal(
        outputs(field, block=block, **options), outputs(field, block=field.shape, **options)
    )


def test_strict_halos_give_the_same_bits_with_torch(outputs: Any, lognormal: Any):
    """The other engine keeps the promise too."""
    pytest.importorskip("torch")
    field = lognormal((700, 3), seed=1)
    options = {"max_scale": 2, "e_rel": 0.1, "rtol": 0, "engine": "torch", "device": "cpu"}
    whole = outputs(field, block=(700, 3), **options)
    for block in [(150, 3), (97, 3), (233, 2)]:
        assert np.array_equal(outputs(field, block=block, **options), whole)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [(13, 40), (50, 40)])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_sum_is_the_field(lognormal: Any, dtype: str, block: tuple[int, int], constraint: str):
    """`reconstruct` is the input to 4 units in the last place of its maximum, at any depth."""
    field = lognormal((50, 40), dtype=dtype)
    field[::3] *= -1
    result = cdd_dask.decompose(
        field,
        max_scale=8,
        e_rel=0.3,
        dtype=dtype,
        block=block,
        engine="reference",  # tasks see to it, whatever the engine
        progress=False,
        **CONSTRAINTS[constraint],
    )
    again = result.reconstruct()
    assert again.dtype == dtype
    assert np.abs(again - field).max() <= 4 * np.spacing(np.abs(field).max())
    region = (slice(5, 20), slice(None, 7))
    assert np.array_equal(result.reconstruct(region), again[region])


def test_float64_is_float32_with_more_digits(outputs: Any, lognormal: Any):
    """Both working types give the same channels to float32's precision; one is not the other."""
    field = lognormal((60, 40), dtype="float64")
    single = outputs(field, dtype="float32", block=20, **FAST)
    double = outputs(field, dtype="float64", block=20, **FAST)
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    assert 0 < np.abs(single - double).max() <= 3e-6 * field.max()


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-30, 1e30])
@pytest.mark.parametrize("boundary", ["reflect", "mirror", "nearest", "wrap"])
def test_a_constant_field_has_no_structure(value: float, boundary: str):
    """Channels of exact zeros, shares of 0, and tables without a NaN; for zeros too."""
    field = np.full((40, 9), value, "float32")
    result = cdd_dask.decompose(field, boundary=boundary, block=(16, 9), progress=False, **FAST)
    assert all((channel[...] == 0).all() for channel in result.channels)
    assert np.array_equal(result.residual[...], field)
    assert list(result.scale_spectrum()["share"]) == [0.0] * len(result.channels) + [
        1.0 if value else 0.0
    ]
    assert "nan" not in result.table()
    assert "nan" not in repr(result)


def test_shares_count_every_voxel_once(outputs: Any, lognormal: Any):
    """Statistics gathered block by block, cores only, are those of the whole arrays."""
    field = lognormal((50, 31)) - 1
    result = cdd_dask.decompose(field, block=(16, 9), progress=False, **FAST)
    parts = outputs(field, block=(16, 9), **FAST).astype("float64")
    sums = np.abs(parts).sum(axis=(1, 2))
    assert list(result.scale_spectrum()["share"]) == pytest.approx(
        list(sums / sums.sum()), rel=1e-12
    )
    for part, (_, _, _, numbers) in zip(parts, result.outputs(), strict=True):
        assert numbers["count"] == part.size
        assert (numbers["min"], numbers["max"]) == (part.min(), part.max())
        assert numbers["sum"] == pytest.approx(part.sum(), rel=1e-10, abs=1e-8)
        assert numbers["sum_squares"] == pytest.approx((part**2).sum(), rel=1e-12)


def test_an_observed_cube_in_blocks(l1448: Any, outputs: Any):
    """The real cube of ¹³CO, of mixed sign: blocks differ from the whole in single voxels."""
    fits = pytest.importorskip("astropy.io.fits")
    with fits.open(l1448) as hdus:
        cube = np.nan_to_num(hdus[0].data[20:44, :60, :60]).astype("float32")
    whole, blocked = outputs(cube, block=cube.shape, **FAST), outputs(cube, block=30, **FAST)
    difference = np.abs(blocked - whole)
    assert np.mean(difference > 1e-3 * np.ptp(cube)) <= 1e-3
    assert np.linalg.norm(difference) <= 1e-3 * np.linalg.norm(whole)
