"""The closure on whole arrays: its cells, its groups, its kernels, and how exact a channel is.

`by_cells` puts the pieces together without blocks, files or a plan; what tasks make of them is
proven in `test_large_scales.py`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from examples import slowly
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cdd_dask.boundaries import CUT
from cdd_dask.cell_evolution import (
    CellFaces,
    Cells,
    Evolution,
    by_cell,
    cell_means,
    evolved,
    gathered,
    group_weights,
    interpolated,
    smoothed_cells,
)
from cdd_dask.closure import (
    HALO,
    LEAST_VARIANCE,
    SNAPSHOTS,
    STENCIL,
    beyond_cells,
    cell_shape,
    closure_kernels,
    closure_levels,
    coarse_shape,
    doubled,
    group_borders,
    group_sizes,
    interpolated_mean,
)
from cdd_dask.engines import Diffusion, Engine, load_engine
from cdd_dask.engines.reference import constrain
from cdd_dask.kernels import IDENTITY, Kernel, smoothing_kernel
from cdd_dask.parameters import KERNELS, Parameters
from cdd_dask.pyramid import pyramid_level
from cdd_dask.time_stepping import Steps, channel_steps

Field = NDArray[Any]
RULES = ("reflect", "mirror", "wrap", "constant")
"""Boundary modes that cells know."""
NUMPY_MODES: dict[str, Any] = {
    "reflect": "symmetric",
    "mirror": "reflect",
    "wrap": "wrap",
    "constant": "constant",
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine("cpu")


def turbulence(shape: tuple[int, ...], slope: float = 3.0, seed: int = 0) -> Field:
    """A log-normal field, its logarithm with the power spectrum ``k**-slope`` per mode."""
    noise = np.fft.fftn(np.random.default_rng(seed).standard_normal(shape))
    squared = sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"))
    squared.flat[0] = np.inf
    logarithm = np.fft.ifftn(noise * squared ** (-slope / 4)).real
    return np.exp(logarithm / logarithm.std()).astype(np.float32)


def blobs(shape: tuple[int, ...]) -> Field:
    """25 Gaussians of amplitudes up to 1 and widths of 4 to 11 voxels."""
    rng = np.random.default_rng(3)
    places = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    field = np.zeros(shape)
    for _ in range(25):
        centre, width = rng.random(len(shape)) * shape, 2 ** (2 + 1.5 * rng.random())
        squared = sum((x - c) ** 2 for x, c in zip(places, centre, strict=True))
        field += rng.random() * np.exp(-squared / (2 * width**2))
    return field.astype(np.float32)


def noise(shape: tuple[int, ...]) -> Field:
    return np.random.default_rng(0).random(shape, np.float32)


def signed(shape: tuple[int, ...]) -> Field:
    """As much below zero as above."""
    return np.log(turbulence(shape))


def steps_of(first: float, last: float, ndim: int, **options: Any) -> Steps:
    """The steps of the channel between two scale edges."""
    return channel_steps(Parameters(**options), (first, last), ndim)[1]


def sign_of(field: Field, cval: float = 0.0) -> int:
    return int(min(field.min(), cval) >= 0) - int(max(field.max(), cval) <= 0)


def smoothed_by(engine: Engine) -> Any:
    """One unconstrained step on cells."""

    def smooth(cells: Field, kernels: tuple[Kernel, ...]) -> Field:
        faces, levels = ((CUT, CUT),) * cells.ndim, tuple(map(pyramid_level, kernels))
        step = Diffusion(
            Steps(1, kernels), "unconstrained", faces, levels=levels, phase=(0,) * cells.ndim
        )
        return engine.diffuse(cells.copy(), step)

    return smooth


def at_once(
    engine: Engine, field: Field, steps: Steps, rule: str = "reflect", **more: Any
) -> Field:
    """The field after `steps` as the engine computes them, the pyramid's wide kernels included."""
    faces, levels = ((rule, rule),) * field.ndim, tuple(map(pyramid_level, steps.kernels))
    how = {"constraint": "constrained", **more}
    what = Diffusion(steps, faces=faces, levels=levels, phase=(0,) * field.ndim, **how)
    return engine.diffuse(field.copy(), what)


def by_cells(
    engine: Engine,
    field: Field,
    steps: Steps,
    rule: str = "reflect",
    cval: float = 0.0,
    constraint: str = "constrained",
    most: int = 9,
) -> Field:
    """The field after `steps` by gather, evolve and scatter; no blanks."""
    levels = closure_levels(steps, (most,) * field.ndim)
    assert any(levels)
    cell, kernels = cell_shape(levels), closure_kernels(steps, levels)
    more = [(0, -n % f) for n, f in zip(field.shape, cell, strict=True)]
    beyond = {"constant_values": np.nan} if rule == "constant" else {}
    whole = np.pad(field, more, NUMPY_MODES[rule], **beyond)
    halo = tuple(HALO * (level > 0) for level in levels)
    faces = CellFaces((0,) * field.ndim, field.shape, levels, rule, cval)
    sign = sign_of(field, cval if rule == "constant" else 0.0)
    smooth = smoothed_by(engine)
    how = Evolution(faces, kernels, halo, sign, False, False, smooth)
    means, share = cell_means(whole, cell)
    held = np.asarray(how.held(means.shape), means.dtype)
    means = means + held * means.dtype.type(cval)
    first = how.smoothed(means)
    groups = np.zeros((0, *means.shape), field.dtype)
    base = means.copy()
    if constraint == "constrained":
        groups, counts = gathered(whole, interpolated(first, levels), cell)
        base -= (group_weights(counts, math.prod(cell), field.dtype) * groups).sum(axis=0)
    state = Cells(base, groups, share if held.any() else None)
    fields = [s for _, s in evolved(state, first[None], how, range(steps.count))]
    inner = tuple(slice(0, n) for n in field.shape)
    if constraint == "unconstrained":
        return interpolated(fields[-1], levels)[inner]
    if sign:
        extreme = np.minimum if sign > 0 else np.maximum
        return extreme(field, interpolated(fields[-1], levels)[inner])
    moved, stride = field.copy(), -(-steps.count // (SNAPSHOTS - 1))
    kept = [*range(0, steps.count - 1, stride), steps.count - 1]
    for low, high in itertools.pairwise(kept):
        for step in range(low, high):
            part = np.float32((step - low) / (high - low))
            between = fields[low] + part * (fields[high] - fields[low])
            constrain(moved, interpolated(between, levels)[inner], constraint)
    constrain(moved, interpolated(fields[-1], levels)[inner], constraint)
    return moved


def off(field: Field, expected: Field, found: Field) -> float:
    """Relative L2 norm by which a channel that starts from `field` is off."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(field - expected))


# groups


@given(level=st.integers(0, 12))
def test_groups_take_all_voxels_and_the_tails_alone(level: int):
    """Sizes are symmetric, double inwards from single voxels, and sum to the cell."""
    sizes = group_sizes(2**level)
    assert sum(sizes) == 2**level
    assert sizes == sizes[::-1]
    assert sizes[0] == 1
    half = sizes[: (len(sizes) + 1) // 2]
    assert all(b <= 2 * a and b >= a for a, b in itertools.pairwise(half))
    assert len(sizes) <= 2 * level + (level == 0)


@given(level=st.integers(0, 9), part=st.floats(0, 1))
def test_borders_cut_what_takes_part(level: int, part: float):
    """They begin at 0, end at the count and never fall; the whole cell gives the sizes."""
    voxels = 2**level
    count = round(part * voxels)
    borders = group_borders(voxels, count)
    assert (borders[0], borders[-1]) == (0, count)
    assert len(borders) == len(group_sizes(voxels)) + 1
    assert (np.diff(borders) >= 0).all()
    assert tuple(np.diff(group_borders(voxels, voxels))) == group_sizes(voxels)
    # a tail of a part of the cell is as much of it as of the whole, to a voxel
    whole = np.cumsum((0, *group_sizes(voxels)))
    assert np.abs(borders - whole * count / voxels).max() <= 0.5


@settings(max_examples=30)
@given(
    levels=st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(any),
    blanks=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_groups_keep_the_sum(levels: tuple[int, ...], blanks: float, seed: int):
    """Weighted, they give the mean deviation of what takes part, and they are sorted."""
    rng, cell = np.random.default_rng(seed), cell_shape(levels)
    shape = tuple(3 * f for f in cell)
    field, smooth = rng.normal(size=shape), rng.normal(size=shape)
    field[rng.random(shape) < blanks] = np.nan
    groups, counts = gathered(field, smooth, cell)
    weights = group_weights(counts, math.prod(cell), np.float64)
    expected = np.nansum(by_cell(field - smooth, cell), axis=-1) / math.prod(cell)
    assert np.allclose((weights * groups).sum(axis=0), expected, rtol=0, atol=1e-14)
    assert np.array_equal(counts, (~np.isnan(by_cell(field, cell))).sum(axis=-1))
    filled = np.broadcast_to(weights, groups.shape) > 0
    for at in np.ndindex(counts.shape):
        of_cell = groups[(slice(None), *at)][filled[(slice(None), *at)]]
        assert (np.diff(of_cell) >= 0).all()


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, 5), max_size=3), blank=st.booleans())
def test_gathering_in_blocks_is_gathering(cuts: list[int], blank: bool):
    """The same bits, wherever blocks of whole cells end."""
    levels, cell = (2, 1), (4, 2)
    rng = np.random.default_rng(len(cuts))
    field = rng.lognormal(size=(24, 16)).astype(np.float32)
    if blank:
        field[rng.random(field.shape) < 0.2] = np.nan
    cells = rng.normal(size=(8, 10)).astype(np.float32)  # one more on every side
    smooth = interpolated(cells, levels)
    groups, counts = gathered(field, smooth, cell)
    for low, high in itertools.pairwise(sorted({0, *cuts, 6})):
        part = slice(4 * low, 4 * high)
        near = interpolated(cells[low : high + 2], levels)
        assert np.array_equal(near, smooth[part])
        here, number = gathered(field[part], near, cell)
        assert np.array_equal(here, groups[:, low:high])
        assert np.array_equal(number, counts[low:high])


# cells


def test_cells_are_counted_up():
    """The last of an axis may reach beyond the volume."""
    assert coarse_shape((128, 129, 1), (3, 3, 0)) == (16, 17, 1)


def upsampled(line: Field, level: int) -> Field:
    """Zeros put between, then ``[1, 3, 3, 1] / 4``, once per level: all but the end cells."""
    n = (len(line) - 2) * 2**level
    for _ in range(level):
        stuffed = np.zeros(2 * len(line))
        stuffed[::2] = line
        line = np.convolve(stuffed, [0.25, 0.75, 0.75, 0.25])
    first = 2 ** (level + 1) - 1  # a cell at place p has its first half at 2 p + 1
    return line[first : first + n] if level else line


@pytest.mark.parametrize("levels", [(1,), (3,), (2, 0), (1, 2), (2, 1, 3)])
def test_interpolated_is_upsampling_and_averaging(levels: tuple[int, ...]):
    """``U``, said in another way."""
    cells = np.random.default_rng(2).normal(size=(5, 6, 7)[: len(levels)])
    expected = cells
    for axis, level in enumerate(levels):
        expected = np.apply_along_axis(upsampled, axis, expected, level)
    assert np.allclose(interpolated(cells, levels), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("level", range(5))
def test_interpolated_mean_is_the_mean_of_the_interpolated(level: int):
    """As a kernel on the cells."""
    cells = np.random.default_rng(3).normal(size=30)
    means = interpolated(cells, (level,)).reshape(-1, 2**level).mean(axis=1)
    expected = np.convolve(cells, interpolated_mean(level).weights, "same")
    assert np.allclose(means, expected[1:-1] if level else expected, rtol=0, atol=1e-14)


def test_halves_of_a_linear_field_are_linear():
    """Not only of a constant one; in whichever type."""
    for dtype in (np.float32, np.float64):
        halves = doubled(np.arange(5, dtype=dtype), 0)
        assert halves.dtype == dtype
        assert halves.tolist() == [0.25 + 0.5 * i for i in range(8)]


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("sigma", [2.8, 5.54, 11.1, 22.2])
def test_the_chain_has_the_kernels_cumulants(engine: Engine, kind: str, sigma: float):
    """Means of cells, `G_c` and `U` together: variance and fourth cumulant of the step's kernel."""
    kernel = smoothing_kernel(kind, sigma)
    steps = Steps(1, (kernel,))
    levels = closure_levels(steps, (9,))
    (small,) = closure_kernels(steps, levels)
    if not any(levels):
        assert small is kernel
        return
    assert small.weights @ np.arange(-small.radius, small.radius + 1) ** 2 >= LEAST_VARIANCE
    assert min(small.weights) > 0
    cell = cell_shape(levels)[0]
    size = 2 * (small.radius + 4) * cell
    halo, smooth = (HALO,), smoothed_by(engine)
    faces = CellFaces((0,), (size,), levels, "constant")
    x = np.arange(size)
    response = np.zeros(2 * size)
    for i in range(cell):  # on average over the places in a cell
        impulse = np.zeros(size)
        impulse[size // 2 + i] = 1
        means, _ = cell_means(impulse, cell_shape(levels))
        end = interpolated(smoothed_cells(means, faces, (small,), halo, smooth), levels)
        response[x - size // 2 - i + size] += end / cell
    x = np.arange(-size, size)
    assert response.sum() == pytest.approx(1, abs=1e-13)
    second = float((response * x**2).sum())
    fourth = float((response * x**4).sum()) - 3 * second**2
    r = np.arange(-kernel.radius, kernel.radius + 1)
    wanted = float((kernel.weights * r**2).sum())
    assert second == pytest.approx(wanted, rel=1e-10)
    assert fourth == pytest.approx(
        float((kernel.weights * r**4).sum()) - 3 * wanted**2, abs=1e-9 * sigma**4
    )


@settings(max_examples=60)
@given(
    rule=st.sampled_from(["reflect", "wrap"]),
    level=st.integers(0, 3),
    count=st.integers(4, 9),
    more=st.integers(1, 25),
)
def test_cells_beyond_a_border_are_those_of_the_fine_grid(
    rule: str, level: int, count: int, more: int
):
    """Where the size divides: extending cells is extending voxels, however far."""
    cell = 2**level
    line = np.random.default_rng(count).normal(size=count * cell)
    faces = CellFaces((0,), (line.size,), (level,), rule)
    extended = faces.extended(line.reshape(-1, cell).mean(axis=1), (more,))
    voxels = np.pad(line, more * cell, NUMPY_MODES[rule])
    assert np.allclose(extended, voxels.reshape(-1, cell).mean(axis=1), rtol=0, atol=1e-13)


@settings(max_examples=60)
@given(
    rule=st.sampled_from([*RULES, "nearest"]),
    shape=st.tuples(st.integers(1, 9), st.integers(4, 9)),
    by=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_cells_of_one_voxel_are_extended_like_voxels(
    rule: str, shape: tuple[int, int], by: tuple[int, int]
):
    """At level 0 every rule is NumPy's, whatever the size."""
    cells = np.random.default_rng(4).normal(size=shape)
    faces = CellFaces((0, 0), shape, (0, 0), rule, 2.5)
    more: dict[str, Any] = {"constant_values": 2.5} if rule == "constant" else {}
    mode = {**NUMPY_MODES, "nearest": "edge"}[rule]
    expected = np.pad(cells, [(n, n) for n in by], mode, **more)
    assert np.allclose(faces.extended(cells, by), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rule", ["reflect", "mirror", "wrap"])
@pytest.mark.parametrize("size", [61, 64, 67])
def test_cells_beyond_a_face_that_cuts_one(rule: str, size: int):
    """A smooth field's image lies between cells: a cubic finds it to a part in a thousand."""
    level, more = 2, 9
    cell, x = 2**level, np.arange(size)
    # smooth as the rule sees it
    period = {"reflect": size, "mirror": size - 1, "wrap": size}[rule]
    place = x + 0.5 if rule == "reflect" else x
    line = np.cos(2 * np.pi * place / period)
    after = -size % cell
    beyond = (more + 4) * cell
    voxels = np.pad(line, beyond, NUMPY_MODES[rule])
    means = voxels[beyond : beyond + size + after].reshape(-1, cell).mean(axis=1)
    found = CellFaces((0,), (size,), (level,), rule).extended(means, (more,))
    start = beyond - more * cell
    wanted = voxels[start : start + len(found) * cell].reshape(-1, cell).mean(axis=1)
    assert np.abs(found - wanted).max() <= 4e-3


def test_a_block_of_cells_meets_faces_only_where_it_lies_at_them():
    """At a face, a block's cells are extended as the whole's; at a cut by anything."""
    cells = np.random.default_rng(5).normal(size=20)
    whole = CellFaces((0,), (157,), (3,), "reflect").extended(cells, (3,))
    low = CellFaces((0,), (157,), (3,), "reflect").extended(cells[:9], (3,))
    high = CellFaces((9,), (157,), (3,), "reflect").extended(cells[9:], (3,))
    assert np.array_equal(low[:12], whole[:12])
    assert np.array_equal(high[3:], whole[12:])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_weights_beyond_sum_to_one(count: int):
    """Even where there are fewer cells than a cubic needs."""
    places = np.arange(-12, count + 12)
    for rule in ("reflect", "mirror", "wrap"):
        cells, weights = beyond_cells(rule, 8 * count - 3, 3, places)
        assert cells.shape == weights.shape == (len(places), STENCIL)
        assert (cells >= 0).all()
        assert (cells < count).all()
        assert np.allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-13)


# channels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 1 / 3, -7.7, 1e30, 1e-30])
def test_a_constant_field_stays(engine: Engine, value: float, dtype: type):
    """Through gather, evolve and scatter: to the bit where faces lie on borders of cells.

    Else to a rounding: weights of the cells that are interpolated sum to 1 only within one.
    """
    steps = steps_of(16, 32, 2, e_rel=0.1)
    for shape, rule in itertools.product([(64, 64), (61, 75)], RULES):
        field = np.full(shape, value, dtype)
        cval = float(field[0, 0]) if rule == "constant" else 0.0
        to_the_bit = shape == (64, 64) and rule != "mirror"
        allowed = 0.0 if to_the_bit else 4 * np.spacing(abs(field[0, 0]))
        for constraint in ("constrained", "unconstrained"):
            end = by_cells(engine, field, steps, rule, cval, constraint)
            assert np.abs(end - field).max() <= allowed, (shape, rule, constraint)


FIELDS = {
    "blobs": (blobs, 1e-3),
    "turbulence 2": (lambda shape: turbulence(shape, 2.0), 1e-2),
    "turbulence 3": (turbulence, 1e-2),
    "turbulence 3.7": (lambda shape: turbulence(shape, 3.7), 1e-2),
    "noise": (noise, 2e-2),
    "signed": (signed, 2e-2),
}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, (256, 256)) for kind in FIELDS),
        *((kind, (96, 96, 96)) for kind in ("blobs", "turbulence 3", "signed")),
        *(
            pytest.param(kind, (96, 96, 96), marks=pytest.mark.slow)
            for kind in ("turbulence 2", "turbulence 3.7", "noise")
        ),
    ],
)
def test_a_channel_is_close(engine: Engine, kind: str, shape: tuple[int, ...]):
    """Against the same steps on voxels, from the field that the finer channels leave."""
    make, allowed = FIELDS[kind]
    assert error_of_channel(engine, make(shape)) <= allowed


def error_of_channel(engine: Engine, field: Field, rule: str = "reflect") -> float:
    """The first channel on cells by default, 32 to 64."""
    for before in channel_steps(Parameters(), (16.0, 32.0), field.ndim):
        field = at_once(engine, field, before, rule)
    steps = steps_of(32, 64, field.ndim)
    expected = at_once(engine, field, steps, rule)
    found = by_cells(engine, field, steps, rule)
    return off(field, expected, found)


@pytest.mark.parametrize("shape", [(201, 187), *slowly((70, 61, 83))])
@pytest.mark.parametrize("rule", RULES)
def test_faces_cost_nothing(engine: Engine, rule: str, shape: tuple[int, ...]):
    """Every rule that groups know, at sizes that no cell divides."""
    assert error_of_channel(engine, turbulence(shape), rule) <= 1e-2


def test_a_negative_field_mirrors_the_positive_one(engine: Engine):
    """To rounding, groups being summed in the opposite order; and positive channels are >= 0."""
    field, steps = turbulence((101, 90)), steps_of(32, 64, 2)
    end = by_cells(engine, field, steps)
    assert (end <= field).all()
    assert (end > 0).all()
    assert np.abs(by_cells(engine, -field, steps) + end).max() <= 1e-6 * field.max()


def test_unconstrained_cells_are_exact(engine: Engine):
    """Nothing but means counts; what is left is 4e-5, and 2e-4 where a held value's face cuts a
    cell."""
    steps, field = steps_of(32, 64, 2), signed((199, 203))
    for rule in RULES:
        expected = at_once(engine, field, steps, rule, constraint="unconstrained")
        found = by_cells(engine, field, steps, rule, constraint="unconstrained")
        assert off(field, expected, found) <= (3e-4 if rule == "constant" else 1e-4), rule


def test_cells_along_one_axis_only(engine: Engine):
    """Axes that are not decomposed, or whose voxels are long, are left alone."""
    field = turbulence((6, 40, 150))
    kernels = (IDENTITY, smoothing_kernel("discrete", 1.0), smoothing_kernel("discrete", 5.6))
    steps = Steps(60, kernels)
    assert closure_levels(steps, (9, 9, 9)) == (0, 0, 1)
    expected = at_once(engine, field, steps)
    assert 0 < off(field, expected, by_cells(engine, field, steps)) <= 1e-2
