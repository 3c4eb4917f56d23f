"""The drop-in gives the results of constrained-diffusion 1.2.5, called as a black box, and more."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cdd_dask
from cdd_dask import constrained_diffusion_decomposition as ours
from cdd_dask.errors import DeviceError, InputError

Result = tuple[list[Any], Any]

TOLERANCE = 1e-5
"""Largest difference from the original in any voxel of any output, relative to max |data|."""

OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_scale": 7.9999999},
    {"num_channels": 4},
    {"num_channels": 2, "max_scale": 9},
    {"min_scale": 1.5},
    {"min_scale": 0.7},
    {"min_scale": 0.3, "log_scale_base": 1.5},
    {"log_scale_base": 3},
    {"mode": "lin", "linear_scale_step": 2},
    {"mode": "lin", "linear_scale_step": 1.7, "num_channels": 1, "log_scale_base": 0},
    {"mode": "lin", "linear_scale_step": 0.1, "max_scale": 1.7, "e_rel": 0.5},
    {"linear_scale_step": -1},
    {"e_rel": 0.1},
    {"e_rel": 5},
    {"inverted": True},
    {"constrained": False},
    {"constrained": False, "inverted": True},
    *(
        {"sm_mode": mode}
        for mode in (
            *("mirror", "nearest", "wrap", "constant"),
            *("grid-mirror", "grid-wrap", "grid-constant"),
        )
    ),
]
ENLARGED: list[dict[str, Any]] = [
    *({"zoom_factor": factor} for factor in (1, 1.1, 1.5, 2.7, 3, 4)),
    {"zoom_factor": 1, "min_scale": 0.3},
    *({"switch_scale": edge} for edge in (-1, 0.9, 1, 2, 1000, float("inf"))),
]
SHAPES = [(33,), (2,), (15, 18), (1, 23), (5, 6, 8)]


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()) or "defaults"


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Any]:
    package = pytest.importorskip("constrained_diffusion")
    function: Callable[..., Any] = package.constrained_diffusion_decomposition
    return function


def stack(result: tuple[Any, ...]) -> NDArray[Any]:
    """The channels and the residual of a result, as one array."""
    return np.stack([np.asarray(part) for part in (*result[0], result[1])])


def difference(one: tuple[Any, ...], other: tuple[Any, ...], data: Any) -> float:
    """Largest difference of two results relative to max |data|; both are finite and alike."""
    a, b = stack(one), stack(other)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.isfinite(a).all()
    return float(np.abs(a.astype(float) - b).max() / np.nanmax(np.abs(data)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"up_sample": False, **options} for options in OPTIONS] + OPTIONS + ENLARGED,
    ids=name,
)
def test_results_are_the_originals(options, shape, dtype, lognormal, theirs):
    """Every channel and the residual, of fields of one sign and of mixed sign."""
    options = {"max_scale": 6, "verbose": False, **options}
    if len(shape) == 3:  # a grid 64 times as large takes the original too long
        options.setdefault("zoom_factor", 2)
    field = lognormal(shape, seed=sum(shape), dtype=dtype)
    for data in (field, field - np.median(field)):
        assert difference(ours(data, **options), theirs(data, **options), data) <= TOLERANCE


@pytest.mark.parametrize("up_sample", [True, False])
def test_default_max_scale_is_the_originals(up_sample, lognormal, theirs):
    """Half of the longest axis."""
    data = lognormal((12, 34))
    options = {"up_sample": up_sample, "verbose": False, "return_scales": True}
    mine, original = ours(data, **options), theirs(data, **options)
    assert difference(mine, original, data) <= TOLERANCE
    assert mine[2].tolist() == original[2].tolist() == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("size", [22, 30])
def test_lost_last_voxels_are_the_originals(size, lognormal, theirs):
    """At such lengths rounding puts the last cell beyond the last voxel: it becomes 0."""
    data = lognormal((size,), dtype="float64")
    mine = ours(data, verbose=False)
    assert difference(mine, theirs(data, verbose=False), data) <= TOLERANCE
    assert stack(mine)[:, -1].max() == 0
    data[3] = np.nan  # nothing to agree with: then no voxel is lost
    assert stack(ours(data, verbose=False))[:, -1].sum() == pytest.approx(data[-1])


def test_signature_is_the_originals(theirs):
    """Names, order and defaults, so that positional calls work too."""
    mine, original = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(mine) == list(original)
    assert [p.default for p in mine.values()] == [p.default for p in original.values()]


@pytest.mark.parametrize("inverted", [False, True])
def test_observed_cube(inverted, l1448: Path, theirs):
    """All of L1448, as FITS gives it: big-endian and a tenth of it negative."""
    data = pytest.importorskip("astropy.io.fits").getdata(l1448)
    options = {"num_channels": 2, "inverted": inverted, "up_sample": False, "verbose": False}
    mine, original = stack(ours(data, **options)), stack(theirs(data, **options))
    assert mine.dtype == np.float32
    assert mine.dtype.isnative
    beyond = np.abs(mine - original) > TOLERANCE * np.abs(data).max()
    assert beyond.mean() <= 1e-4  # a step is discontinuous at 0


def test_observed_cube_enlarged(l1448: Path, theirs):
    """A piece of L1448 with the original's defaults."""
    data = pytest.importorskip("astropy.io.fits").getdata(l1448)[20:29, 30:50, 40:60]
    mine, original = ours(data, verbose=False), theirs(data, verbose=False)
    assert len(mine[0]) == 4
    assert difference(mine, (original[0], original[1].astype("float32")), data) <= TOLERANCE


def test_scales_are_one_per_channel(lognormal, theirs):
    """The original returns more scales than channels where small edges become one channel."""
    data = lognormal((24,))
    for min_scale, edges in ((0.3, [0.6, 1.2, 2.4]), (0.5, [1, 2, 4]), (0.7, [0.7, 1.4, 2.8])):
        options = {"min_scale": min_scale, "max_scale": 4.5, "verbose": False}
        channels, _, scales = ours(data, return_scales=True, **options)
        assert scales.tolist() == pytest.approx(edges)
        assert len(channels) == len(edges) == len(theirs(data, **options)[0])


def test_prints_a_line_per_channel_only_if_verbose(lognormal, capsys):
    """The original prints by default, so does the drop-in; nothing else in the package does."""
    data = lognormal((40,))
    channels, _ = ours(data)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(channels)
    assert [line.split(",")[0] for line in lines[-2:]] == [
        "channel 3: scale < 8",
        "channel 4: scale < 16",
    ]
    ours(data, verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("up_sample", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"log_scale_base": 1},
        {"log_scale_base": 0.5},
        {"mode": "lin"},
        {"mode": "lin", "linear_scale_step": 0},
        {"mode": "lin", "linear_scale_step": -2},
        {"max_scale": 1},
        {"max_scale": 0.5, "num_channels": 2},
        {"min_scale": 8},
        {"min_scale": 0},
        {"min_scale": -1},
        {"num_channels": 0},
        {"num_channels": 2.5},
        {"mode": "linear"},
        {"sm_mode": "periodic"},
        {"e_rel": 0},
        {"zoom_factor": 0},
        {"zoom_factor": 0.5},
    ],
    ids=name,
)
def test_bad_options_are_refused(options, up_sample):
    """All by `ValueError`, also those that crash the original otherwise; they name the option."""
    named = "scale_step" if options.get("mode") == "lin" else next(iter(options))
    with pytest.raises(InputError, match=named):
        ours(np.ones((16, 12)), up_sample=up_sample, verbose=False, **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros(0), "empty"),
        (np.zeros((0, 16)), "empty"),
        (np.float32(3), "empty"),
        (np.array([1.0, np.inf, -np.inf] * 5), "10 infinite voxels of 15"),
        (np.ones(16, complex), "complex"),
        (["a", "b"], "real numbers"),
        (None, "real numbers"),
    ],
)
def test_bad_data_is_refused(data, message):
    """Before anything is computed, with what is wrong."""
    with pytest.raises(ValueError, match=message):
        ours(data, max_scale=4, verbose=False)


@pytest.mark.parametrize(
    ("dtype", "working"),
    [
        *((kind, "float32") for kind in ("bool", "int8", "uint8", "int16", "uint16", "float16")),
        *((kind, "float64") for kind in ("int32", "uint32", "int64", "longdouble")),
        (">f4", "float32"),
        (">f8", "float64"),
    ],
)
@pytest.mark.parametrize("up_sample", [True, False])
def test_all_real_types_are_computed_as_floats(dtype, working, up_sample, theirs):
    """The original keeps integers, and so loses all that is below 1, or crashes."""
    data = np.random.default_rng(4).integers(0, 100, (12, 14)).astype(dtype)
    options = {"max_scale": 6, "up_sample": up_sample, "verbose": False}
    before = data.copy()
    mine = ours(data, **options)
    assert mine[1].dtype == working
    assert difference(mine, theirs(data.astype(working), **options), data) <= TOLERANCE
    assert np.array_equal(data, before)


def test_any_order_in_memory_lists_and_views(lognormal):
    """The values count."""
    data = lognormal((12, 14), dtype="float64")
    expected = ours(data, verbose=False)
    for same in (np.asfortranarray(data), data.tolist(), np.repeat(data, 2, axis=1)[:, ::2]):
        assert difference(ours(same, verbose=False), expected, data) == 0


@pytest.mark.parametrize("zoom_factor", [1.3, 2.7, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"constrained": False}, {"inverted": True}], ids=name)
def test_blank_voxels_take_no_part(options, dtype, zoom_factor, lognormal):
    """Around them a constant stays as it is, and all else adds up to what it does without them."""
    data = lognormal((19, 21), seed=2, dtype=dtype)
    blank = np.random.default_rng(3).random(data.shape) < 0.15
    blank[:7, :9] = True
    limit = 2e-6 if dtype == "float32" else 1e-12
    # no voxel next to a blank one shares in it on the way to the fine grid and back
    around = np.pad(blank, 1)
    near = np.any(
        [around[i : i + 19, j : j + 21] for i in range(3) for j in range(3)],
        axis=0,
    )
    assert 0 < (~near).sum() < (~blank).sum()
    for up_sample in (False, True):
        arguments = {"up_sample": up_sample, "zoom_factor": zoom_factor, "verbose": False}
        constant = stack(ours(np.where(blank, np.nan, data.dtype.type(7)), **options, **arguments))
        assert np.array_equal(np.isnan(constant), np.broadcast_to(blank, constant.shape))
        assert np.abs(constant[:-1, ~blank]).max() <= 7 * limit
        assert np.abs(constant[-1, ~blank] - 7).max() <= 7 * limit

        with_blanks = stack(ours(np.where(blank, np.nan, data), **options, **arguments))
        assert with_blanks.dtype == dtype
        assert np.array_equal(np.isnan(with_blanks), np.broadcast_to(blank, with_blanks.shape))
        total = with_blanks.sum(0)
        whole = stack(ours(data, **options, **arguments)).sum(0)
        checked = ~near if up_sample else ~blank
        assert np.abs(total - whole)[checked].max() <= limit * data.max()
        if not up_sample:
            assert np.abs(total - data)[checked].max() <= limit * data.max()


@pytest.mark.parametrize("up_sample", [True, False])
def test_far_from_blank_voxels_results_are_the_originals(up_sample, lognormal, theirs):
    """A channel at a small scale knows only what is near."""
    data = lognormal((12, 60), dtype="float64")
    options = {"num_channels": 3, "switch_scale": 2, "up_sample": up_sample, "verbose": False}
    blanked = data.copy()
    blanked[:, :3] = np.nan
    expected = stack(theirs(data, **options))
    error = np.abs(stack(ours(blanked, **options)) - expected)
    assert error[:, :, 40:].max() <= 1e-7 * data.max()
    assert np.nanmax(error) > 1e-3 * data.max()


def test_masked_and_all_blank(lognormal):
    """Masked voxels are blank, of any type; with no voxel left all is blank."""
    data = np.ma.masked_less((100 * lognormal((14, 11))).astype("int16"), 60)
    filled = data.astype("float32").filled(np.nan)
    assert 0 < data.mask.sum() < data.size
    for up_sample in (True, False):
        mine = stack(ours(data, up_sample=up_sample, verbose=False))
        expected = stack(ours(filled, up_sample=up_sample, verbose=False))
        assert type(mine) is np.ndarray
        assert np.array_equal(mine, expected, equal_nan=True)
        nothing = ours(np.full((14, 11), np.nan), up_sample=up_sample, verbose=False)
        assert np.isnan(stack(nothing)).all()


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    torch = pytest.importorskip("torch")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        *({"sm_mode": mode} for mode in ("reflect", "mirror", "wrap", "constant")),
        {"up_sample": False, "inverted": True},
        {"zoom_factor": 1.5, "constrained": False},
    ],
    ids=name,
)
@pytest.mark.parametrize("shape", [(33,), (1, 24, 25), (2, 9, 8), (24, 1)], ids=str)
def test_use_gpu_gives_the_results_of_the_cpu(options, shape, dtype, device, lognormal):
    """Also where an axis is thin; the original differs by tenths, and fails at thin axes."""
    data = lognormal(shape, seed=1, dtype=dtype)
    data.flat[::11] = np.nan
    options = {"max_scale": 6, "verbose": False, "zoom_factor": 2, **options}
    limit = 5e-5 if dtype == "float32" else 1e-11
    for given in (data, np.nan_to_num(data, nan=0.5)):
        mine = stack(ours(given, use_gpu=True, device=device, **options))
        expected = stack(ours(given, **options))
        assert mine.dtype == dtype
        assert np.array_equal(np.isnan(mine), np.isnan(expected))
        assert np.nanmax(np.abs(mine - expected)) <= limit * np.nanmax(data)


def test_best_device_is_the_default(lognormal):
    """Without a name."""
    pytest.importorskip("torch")
    data = lognormal((16, 17))
    mine, expected = ours(data, use_gpu=True, verbose=False), ours(data, verbose=False)
    assert difference(mine, expected, data) <= 5e-5


def test_absent_devices_are_refused_and_only_matter_with_use_gpu(lognormal):
    """Never a silent fallback."""
    pytest.importorskip("torch")
    data = lognormal((16,))
    for absent in ("cuda:99", "toaster"):
        with pytest.raises(DeviceError, match=absent):
            ours(data, use_gpu=True, device=absent, verbose=False)
        ours(data, device=absent, verbose=False)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32", "bool"])
def test_tensors(dtype, device, lognormal):
    """Tensors on the CPU come back with `use_gpu`, else arrays; the input is left alone."""
    torch = pytest.importorskip("torch")
    values = lognormal((12, 14)).astype(dtype)
    working = (
        "float32" if dtype in ("float16", "bool") else "float64" if dtype == "int32" else dtype
    )
    tensor = torch.from_numpy(values.copy()).to(device)
    if dtype == "float32":
        tensor.requires_grad_()
    expected = ours(values, verbose=False)
    channels, residual = ours(tensor, verbose=False)
    assert difference((channels, residual), expected, values) == 0
    assert all(type(part) is np.ndarray for part in (*channels, residual))

    chosen = torch.device(device)
    channels, residual, scales = ours(
        tensor, use_gpu=True, device=chosen, return_scales=True, verbose=False
    )
    assert isinstance(channels, list)
    assert isinstance(scales, np.ndarray)
    for part in (*channels, residual):
        assert isinstance(part, torch.Tensor)
        assert part.device.type == "cpu"
        assert str(part.dtype) == f"torch.{working}"
    assert difference((channels, residual), expected, values) <= 5e-5
    assert np.array_equal(tensor.detach().cpu().numpy(), values)


def test_is_on_the_public_face():
    """Under the name that users of the original know."""
    assert "constrained_diffusion_decomposition" in cdd_dask.__all__
    assert cdd_dask.constrained_diffusion_decomposition is ours
