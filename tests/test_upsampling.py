"""The finest channels on a refined grid: exact sums, signs kept, boundaries where they are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from examples import few
from hypothesis import given
from hypothesis import strategies as st

import cdd_dask
from cdd_dask import cli
from cdd_dask.engines import Diffusion, load_engine
from cdd_dask.errors import InputError
from cdd_dask.halo import channel_passes, error_bound, rounding, tail_probability
from cdd_dask.kernels import discrete_gaussian
from cdd_dask.memory import TASK_OVERHEAD
from cdd_dask.parameters import BOUNDARIES, Parameters
from cdd_dask.refinement import Refinement, range_growth
from cdd_dask.time_stepping import channel_steps

QUICK: dict[str, Any] = {"max_scale": 4, "e_rel": 0.2, "upsample": 2}
EXTENSIONS = {"reflect": "symmetric", "mirror": "reflect", "wrap": "wrap"}


def refinement(ndim: int, factor: int = 2, rule: str = "reflect", axes: Any = None) -> Refinement:
    """All faces by one rule."""
    return Refinement(factor, axes or tuple(range(ndim)), ((rule, rule),) * ndim)


def spiky(shape: tuple[int, ...], seed: int = 0) -> Any:
    """Twenty orders of magnitude side by side, with zeros."""
    rng = np.random.default_rng(seed)
    return 10.0 ** rng.uniform(-10, 10, shape) * (rng.random(shape) > 0.2)


# to the cells and back


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("shape", [(1,), (17,), (1, 9), (8, 11), (5, 6, 7), (3, 4, 2, 5)])
def test_cells_average_to_their_voxel_and_keep_its_sign(
    shape: tuple[int, ...], factor: int, dtype: str
):
    """There and back is the field to rounding; no cell has another sign than its voxel."""
    rng = np.random.default_rng(1)
    for rule, values in itertools.product(
        BOUNDARIES, (rng.normal(size=shape), spiky(shape), -spiky(shape))
    ):
        field = values.astype(dtype)
        there = refinement(len(shape), factor, rule)
        cells = there.refine(field)
        assert cells.dtype == dtype
        back = there.coarsen(cells, shape)
        assert np.abs(back - field).max() <= 2 * np.spacing(np.abs(field).max())
        if rule != "mirror":  # whose outermost cells are left out
            each = field
            for axis in range(len(shape)):
                each = np.repeat(each, factor, axis)
            assert (cells * np.sign(each) >= 0).all()
            assert (cells[each == 0] == 0).all()


@pytest.mark.parametrize("factor", [2, 4])
def test_smooth_fields_are_interpolated(factor: int):
    """Polynomials of degree 4 come out right in the cells that have all their voxels."""
    x = np.arange(20.0)
    fine = (np.arange(20 * factor) + 0.5) / factor - 0.5
    curve = np.polynomial.Polynomial([400, 3, -1, 0.2, 0.01])
    cells = refinement(1, factor).refine(curve(x))
    # the central mean is the voxel's value, not the interpolant's mean: a constant off per voxel
    off = (cells - curve(fine)).reshape(20, factor)[2:-2]
    assert np.ptp(off, axis=1).max() <= 1e-9
    assert np.abs(off).max() <= 0.02 * np.ptp(curve(x)) / 20


def test_only_the_decomposed_axes_are_refined():
    """Slices are refined by themselves."""
    field = np.random.default_rng(0).lognormal(size=(4, 9, 5))
    cells = refinement(3, 2, axes=(0, 2)).refine(field)
    assert cells.shape == (8, 9, 10)
    for i in range(9):
        alone = refinement(2, 2).refine(np.ascontiguousarray(field[:, i]))
        assert np.array_equal(cells[:, i], alone)


def test_blank_voxels_are_blank_cells():
    """And nothing of them reaches others: a voxel that depends on one has cells all alike."""
    field = np.random.default_rng(0).lognormal(size=(15, 16))
    field[7, 8] = np.nan
    cells = refinement(2).refine(field)
    parts = cells.reshape(15, 2, 16, 2)
    assert np.array_equal(np.isnan(parts).all((1, 3)), np.isnan(field))
    assert np.isnan(cells).sum() == 4
    assert np.ptp(parts, axis=(1, 3))[7, 6] == 0 < np.ptp(parts, axis=(1, 3))[7, 5]
    assert np.allclose(refinement(2).coarsen(cells, field.shape), field, equal_nan=True)


@pytest.mark.parametrize("factor", [2, 4])
def test_the_range_grows_no_more_than_promised(factor: int):
    """Adversarial fields, the signs of the weights, come near the bound and stay below."""
    rng = np.random.default_rng(0)
    for ndim in (1, 2):
        worst = 0.0
        for _ in range(400):
            field = rng.choice([1.0, 2.0], (9,) * ndim)
            cells = refinement(ndim, factor, "wrap").refine(field)
            worst = max(worst, np.ptp(cells) / np.ptp(field) if np.ptp(field) else 0)
        assert 1.0 < worst <= range_growth(factor, ndim)
        assert range_growth(factor, ndim) < 4 * worst


# the sum, the sign, the symmetry


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_sum_is_exact_and_channels_have_a_sign(
    factor: int, boundary: str, dtype: str, lognormal: Any, outputs: Any
):
    """Whatever the boundary; the existing way of upsampling loses up to a fifth of noise."""
    options = {**QUICK, "upsample": factor, "boundary": boundary, "dtype": dtype}
    noise = np.random.default_rng(0).random((24, 20))
    for field in (lognormal((24, 20)), noise, noise * (noise > 0.5)):
        field = field.astype(dtype)
        parts = outputs(field, **options)
        off = np.abs(parts.sum(axis=0, dtype="float64") - field)
        assert off.max() <= 4 * np.spacing(field.max())
        assert parts.min() >= 0


def test_symmetries(lognormal: Any, outputs: Any):
    """Mirrored, negated and scaled input give mirrored, negated and scaled output."""
    field = lognormal((22, 25)).astype("float64")
    signed = field - np.median(field)
    options = {**QUICK, "dtype": "float64"}
    expected = outputs(field, **options)
    slack = {"rtol": 0, "atol": 1e-13 * field.max()}
    assert np.allclose(outputs(field[::-1].copy(), **options), expected[:, ::-1], **slack)
    assert np.allclose(outputs(field.T.copy(), **options), expected.transpose(0, 2, 1), **slack)
    # with both signs to the bit, or not at all: a step is discontinuous at 0
    expected = outputs(signed, **options)
    assert np.array_equal(outputs(-signed, **options), -expected)
    assert np.array_equal(outputs(8 * signed, **options), 8 * expected)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("rule", EXTENSIONS)
def test_the_boundary_is_at_its_physical_place(
    rule: str, factor: int, lognormal: Any, outputs: Any
):
    """The field extended by the rule beforehand gives the same inside."""
    field = lognormal((20, 18)).astype("float64")
    options = {**QUICK, "upsample": factor, "dtype": "float64"}
    wide = np.pad(field, 17, EXTENSIONS[rule])
    inside = outputs(wide, **options)[:, 17:-17, 17:-17]
    ours = outputs(field, boundary=rule, **options)
    # what lies beyond the extension still shows, as far as it is from a halo of 17 voxels
    assert np.abs(ours - inside).max() <= 1e-5 * np.ptp(field)


def test_time_goes_on(lognormal: Any, outputs: Any):
    """By hand: refine once, diffuse, average after each edge; then the native grid, from there."""
    field = lognormal((24, 20)).astype("float64")
    parameters = Parameters(e_rel=0.2, upsample=4, switch_scale=2, dtype="float64")
    edges = (1.0, 2.0, 4.0, 8.0)
    steps = channel_steps(parameters, edges, 2)
    assert [part.refinement for part in steps] == [4, 4, 1, 1]
    assert [part.count for part in steps] == [
        part.count for part in channel_steps(Parameters(e_rel=0.2), edges, 2)
    ]
    engine, there = load_engine("reference"), refinement(2, 4)
    cells, fields = there.refine(field), [field]
    for part in steps:
        what = Diffusion(part, "constrained", (("reflect", "reflect"),) * 2)
        if part.refinement > 1:
            cells = engine.diffuse(cells, what)
            fields.append(there.coarsen(cells, field.shape))
        else:
            fields.append(engine.diffuse(fields[-1].copy(), what))
    expected = np.stack([*(a - b for a, b in itertools.pairwise(fields)), fields[-1]])
    ours = outputs(field, e_rel=0.2, upsample=4, switch_scale=2, num_channels=4, dtype="float64")
    assert np.allclose(ours, expected, rtol=0, atol=1e-13 * field.max())


# blocks and tiles


@few(7)
@given(
    seed=st.integers(0, 99),
    block=st.tuples(st.integers(9, 40), st.integers(9, 40)),
    boundary=st.sampled_from(BOUNDARIES),
    share=st.sampled_from([0.0, 0.1]),
    options=st.sampled_from([{}, {"inverted": True}, {"constrained": False}, {"axes": (1,)}]),
)
def test_blocks_agree_with_the_whole(seed: int, block: Any, boundary: str, share: float,
                                     options: Any, lognormal: Any, outputs: Any):  # fmt: skip
    """Within `rtol`, also where some voxels are blank."""
    field = lognormal((40, 36), seed)
    field[np.random.default_rng(seed).random(field.shape) < share] = np.nan
    options = {**QUICK, "boundary": boundary, **options}
    whole, parts = outputs(field, **options), outputs(field, block=block, **options)
    assert np.array_equal(np.isnan(whole), np.isnan(parts))
    assert np.nanmax(np.abs(parts - whole)) <= 1e-3 * np.ptp(field[~np.isnan(field)])


@pytest.mark.parametrize("boundary", ["reflect", "mirror", "wrap"])
def test_without_tolerance_blocks_and_tiles_do_not_show(
    boundary: str, lognormal: Any, outputs: Any, monkeypatch: pytest.MonkeyPatch
):
    """``rtol=0`` is the same to the bit for every layout of blocks, and of tiles in them."""
    field = lognormal((90, 12))
    options = {"max_scale": 2, "e_rel": 0.5, "upsample": 2, "rtol": 0, "boundary": boundary}
    whole = outputs(field, **options)
    assert np.array_equal(outputs(field, block=(37, 12), **options), whole)
    for tile in ((11, 12), (30, 5)):
        monkeypatch.setattr("cdd_dask.drafts.Draft.largest_tile", lambda *_, tile=tile: tile)
        made = cdd_dask.plan(field, block=(50, 12), **options)
        assert made.stages[-1].tile == tile
        assert np.array_equal(outputs(field, block=(50, 12), **options), whole)


def test_tiles_keep_a_small_memory(tmp_path: Path, lognormal: Any, outputs: Any):
    """Cells 8 times as many as voxels do not fit: the block is computed tile by tile."""
    field = lognormal((40, 40, 40))
    options = {"max_scale": 2, "e_rel": 1, "upsample": 2, "block": 40}
    made = cdd_dask.plan(field, memory="21MB", **options)
    assert len(made.grid) == 1
    assert made.stages[0].tile < (40, 40, 40)
    assert made.peak_memory <= 21e6
    tiled = outputs(field, tmp_path / "out.zarr", memory="21MB", **options)
    assert np.abs(tiled - outputs(field, **options)).max() <= 1e-3 * np.ptp(field)


def test_in_other_processes(tmp_path: Path, lognormal: Any, outputs: Any):
    """A refined pass writes all its channels and one field, which the next one starts from."""
    field = lognormal((40, 36))
    options = {**QUICK, "switch_scale": 2, "block": 20}
    pool = {"executor": "processes", "workers": 2}
    parts = outputs(field, tmp_path / "out.zarr", **pool, **options)
    assert np.array_equal(parts, outputs(field, **options))
    assert not (tmp_path / "out.zarr" / "work").exists()


# halos


def test_a_walk_of_several_kernels():
    """Its tails against the convolution of all draws, one by one."""
    draws = ((discrete_gaussian(0.35), 7), (discrete_gaussian(0.7), 5), (discrete_gaussian(1.4), 3))
    walk = np.ones(1, np.longdouble)
    for kernel, count in draws:
        for _ in range(count):
            walk = np.convolve(walk, kernel.weights.astype(np.longdouble))
    exact = np.cumsum(walk[: len(walk) // 2 : -1])[::-1]
    tails = tail_probability(draws)
    assert np.abs(tails - exact[: len(tails)]).max() <= rounding(15)
    assert (exact[len(tails) :] <= rounding(15)).all()


def test_the_bound_of_a_pass_is_not_exceeded():
    """Two cell fields alike but for what lies beyond a cut: nowhere are they further apart."""
    steps = channel_steps(Parameters(e_rel=0.2, upsample=2), (1.0, 2.0, 4.0), 1)
    assert channel_passes(steps) == (range(0, 3),)
    engine = load_engine("reference")
    for depth in (3, 8, 15, 25):
        low, high = np.ones(400), np.ones(400)
        high[:100] = 2.0  # the core begins at 100 + depth
        for part in steps:
            what = Diffusion(part, "unconstrained", (("cut", "cut"),))
            low, high = engine.diffuse(low, what), engine.diffuse(high, what)
        apart = float((high - low)[100 + depth])
        assert 0 < apart <= error_bound(steps, (depth,))


# plans, arguments


@pytest.mark.parametrize(
    ("shape", "options", "cells"),
    [
        ((50, 50, 50), {}, 8),
        ((50, 50, 50), {"upsample": 4}, 64),
        ((50, 50), {"upsample": 4}, 16),
        ((50, 50, 50), {"upsample": 4, "axes": (1, 2)}, 16),
    ],
)
def test_the_plan_shows_the_cost(shape: tuple[int, ...], options: Any, cells: int):
    """Before anyone pays it: in numbers, and in words."""
    plan = cdd_dask.plan(shape, **{**QUICK, "max_scale": 8, **options})
    native = cdd_dask.plan(shape, max_scale=8, e_rel=0.2)
    assert len(plan.grid) == 1
    for stage, plain in zip(plan.stages, native.stages, strict=True):
        refined = stage.scale_to <= 5
        assert stage.haloed_voxels == plain.haloed_voxels * (cells if refined else 1)
        assert stage.refinement == (plan.parameters.upsample if refined else 1)
        assert stage.steps == plain.steps
    assert f"channels 0 - 2 on {cells} cells a voxel" in str(plan)
    assert f"refined ×{plan.parameters.upsample}" in str(plan)
    fixed = TASK_OVERHEAD
    assert plan.peak_memory - fixed > 2 * (native.peak_memory - fixed)


def test_a_refined_pass_reads_once():
    """Its stages share a halo; only the first reads, only the last writes a field."""
    plan = cdd_dask.plan((100, 100), block=40, **{**QUICK, "max_scale": 8})
    first, second, third, native = plan.stages
    assert first.depth == second.depth == third.depth
    assert first.bytes_read > 0 == second.bytes_read == third.bytes_read
    assert first.bytes_written == second.bytes_written == third.bytes_written / 2
    assert [one.stages for one in plan.passes] == [(1, 2, 3), *[(4,)] * len(native.parts)]
    assert native.bytes_read > 0


@pytest.mark.parametrize(
    ("options", "refined"),
    [
        ({}, 3),
        ({"switch_scale": 5}, 3),
        ({"switch_scale": 4}, 3),
        ({"switch_scale": 3.9}, 2),
        ({"switch_scale": 0.5}, 0),
        ({"switch_scale": 100}, 5),
        ({"upsample": 1, "switch_scale": 100}, 0),
        ({"spacing": 0.1}, 3),
        ({"spacing": 0.1, "switch_scale": 0.2}, 2),
    ],
)
def test_which_channels_are_refined(options: Any, refined: int):
    """Edges up to `switch_scale`, in the unit of scales; 5 voxels unless given."""
    plan = cdd_dask.plan((64, 64), **{"num_channels": 5, "upsample": 2, **options})
    assert [stage.refinement > 1 for stage in plan.stages] == [k < refined for k in range(5)]


@pytest.mark.parametrize("upsample", [1, 2])
def test_a_sampled_kernel_that_reaches_nothing(upsample: int, lognormal: Any, outputs: Any):
    """At a small `e_rel` its radius is 0: nothing diffuses, but cells are there all the same."""
    options = {"kernel": "sampled", "e_rel": 1e-3, "num_channels": 1, "upsample": upsample}
    plan = cdd_dask.plan((40, 40), **options)
    assert plan.stages[0].radius == 0
    assert plan.stages[0].haloed_voxels == 40 * 40 * upsample**2
    field = lognormal((40, 40))
    parts = outputs(field, block=15, **options)
    assert np.abs(parts.sum(0) - field).max() <= 4 * np.spacing(field.max())
    assert np.abs(parts[0]).max() <= 4 * np.spacing(field.max())


@pytest.mark.parametrize("upsample", [0, 3, 8, -2, 2.5, "2", None, True])
def test_upsamplings_that_are_none(upsample: Any):
    """Only 1, 2 and 4."""
    with pytest.raises(InputError, match=r"upsample=.* must be 1, 2 or 4"):
        cdd_dask.plan((64, 64), upsample=upsample)


def test_on_the_command_line(tmp_path: Path, lognormal: Any):
    """The same options; `verify` finds the sum right."""
    np.save(tmp_path / "in.npy", lognormal((30, 32)))
    out = str(tmp_path / "out.zarr")
    options = ["--upsample", "2", "--switch-scale", "3", "--max-scale", "4", "--block", "17"]
    done = CliRunner().invoke(cli.cli, ["decompose", str(tmp_path / "in.npy"), out, *options])
    assert done.exit_code == 0, done.output
    assert "is whole" in CliRunner().invoke(cli.cli, ["verify", out]).output
    stages = cdd_dask.open_decomposition(out).attrs["plan"]["stages"]
    assert [stage["refinement"] for stage in stages if stage["number"]] == [2, 2, 1]
