"""Scale edges, time steps and the bounds of every parameter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdd_dask.errors import InputError
from cdd_dask.parameters import Parameters
from cdd_dask.scales import scale_edges
from cdd_dask.time_stepping import channel_steps

OCTAVES = (1.0, 2.0, 4.0, 8.0, 16.0)

OUT_OF_BOUNDS = [
    ("min_scale", 0.0),
    ("min_scale", -1.0),
    ("max_scale", 0),
    ("max_scale", 10**400),
    ("log_scale_base", 1.0),
    ("log_scale_base", 0.5),
    ("log_scale_base", -2),
    ("e_rel", 0.0),
    ("e_rel", -0.03),
    ("num_channels", 0),
    ("num_channels", -3),
    ("num_channels", 2.5),
    ("num_channels", True),
    ("rtol", -1e-3),
    ("mode", "sqrt"),
    ("mode", None),
    ("kernel", "box"),
    ("boundary", "periodic"),
    ("dtype", "float16"),
    ("constrained", "yes"),
    ("inverted", 1),
]
NUMBERS = ("min_scale", "max_scale", "log_scale_base", "e_rel", "cval", "rtol", "num_channels")
NO_NUMBERS = (math.nan, math.inf, -math.inf, "3", "large", True, [1.0])


def test_defaults():
    """Octaves from 1 voxel to half of the *largest* axis, whichever axis that is."""
    assert scale_edges(Parameters(), (10, 64, 33)) == (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    assert scale_edges(Parameters(), (63,)) == OCTAVES
    assert scale_edges(Parameters(min_scale=2), (8, 64)) == (2.0, 4.0, 8.0, 16.0, 32.0)


@pytest.mark.parametrize(
    ("given_", "edges"),
    [
        ({"max_scale": 15.999}, (1.0, 2.0, 4.0, 8.0)),
        ({"max_scale": 16}, OCTAVES),
        ({"max_scale": 0.9, "min_scale": 0.1, "log_scale_base": 3}, (0.1, 0.3, 0.9)),
        ({"max_scale": 1000, "log_scale_base": 10}, (1.0, 10.0, 100.0, 1000.0)),
        ({"num_channels": 3}, (1.0, 2.0, 4.0)),
        ({"num_channels": 3, "max_scale": 100}, (1.0, 2.0, 4.0)),
        ({"num_channels": 1}, (1.0,)),
        ({"mode": "lin", "max_scale": 6, "linear_scale_step": 2}, (1.0, 3.0, 5.0)),
        ({"mode": "lin", "linear_scale_step": 15.5}, (1.0, 16.5, 32.0)),
        ({"mode": "lin", "max_scale": 2, "linear_scale_step": 1.5}, (1.0,)),
    ],
)
def test_edges(given_: dict[str, object], edges: tuple[float, ...]):
    """The formulae of both modes; `num_channels` wins over `max_scale`."""
    assert scale_edges(Parameters(**given_), (64, 64)) == pytest.approx(edges, rel=1e-12)


@settings(deadline=None)
@given(
    low=st.floats(0.1, 10), ratio=st.floats(1.5, 500), base=st.floats(1.1, 5), size=st.integers(1)
)
def test_log_edges_fill_the_range(low: float, ratio: float, base: float, size: int):
    """Whatever the numbers: from `min_scale`, by `base`, up to `max_scale` and not one short."""
    parameters = Parameters(min_scale=low, max_scale=low * ratio, log_scale_base=base)
    edges = np.array(scale_edges(parameters, (size,)))
    assert edges[0] == low
    assert np.allclose(edges[1:] / edges[:-1], base, rtol=1e-12)
    assert edges[-1] <= low * ratio * (1 + 1e-8) < edges[-1] * base * (1 + 1e-7)


@pytest.mark.parametrize("mode", ["log", "lin"])
def test_no_room_for_an_edge(mode: str):
    """A volume too small for its smallest scale is refused, and the message says what to change."""
    step = {"linear_scale_step": 1} if mode == "lin" else {}
    for shape, parameters in [
        ((2, 1), Parameters(mode=mode, **step)),
        ((16, 16), Parameters(mode=mode, min_scale=8, **step)),
    ]:
        with pytest.raises(InputError, match=r"max_scale=.*min_scale="):
            scale_edges(parameters, shape)
    assert scale_edges(Parameters(num_channels=2), (1,)) == (1.0, 2.0)


@pytest.mark.parametrize(
    "given_",
    [
        {"num_channels": 10**9},
        {"num_channels": 60},
        {"max_scale": 1e300},
        {"min_scale": 1e-308},
        {"max_scale": 10, "log_scale_base": 1 + 1e-9},
        {"mode": "lin", "max_scale": 10, "linear_scale_step": 1e-300},
        {"mode": "lin", "max_scale": 10, "linear_scale_step": 1e-310},
        {"mode": "lin", "max_scale": 1e300, "linear_scale_step": 1e299},
    ],
)
def test_absurd_edges_are_refused(given_: dict[str, object]):
    """Millions of channels, or scales beyond any volume, end in a message and not in a hang."""
    with pytest.raises(InputError, match=r"at most|exceed"):
        scale_edges(Parameters(**given_), (64, 64))


def test_octaves_at_the_default_step():
    """`e_rel = 0.03`: 33 steps, then 100 for each octave, ``sigma`` about 0.17 ``l_{k-1}``."""
    steps = channel_steps(Parameters(), OCTAVES, ndim=3)
    assert [s.count for s in steps] == [33, 100, 100, 100, 100]
    assert all(s.kernels == (s.kernels[0],) * 3 for s in steps)
    sigma = np.array([s.kernels[0].sigma for s in steps])
    assert sigma[0] == pytest.approx(0.174, abs=5e-4)
    assert sigma[1:] == pytest.approx(0.1732 * np.array(OCTAVES[:-1]), rel=1e-3)


@settings(deadline=None)
@given(
    edges=st.lists(st.floats(0.3, 40), min_size=1, max_size=5, unique=True).map(sorted),
    e_rel=st.floats(0.01, 3),
)
def test_steps_add_up_to_the_scale(edges: list[float], e_rel: float):
    """At its end every channel has smoothed by exactly ``l_k**2``, in steps near ``e_rel * t``."""
    edges = [edge for i, edge in enumerate(edges) if i == 0 or edge > 1.05 * edges[i - 1]]
    before = variance = 0.0
    stepping = channel_steps(Parameters(e_rel=e_rel), tuple(edges), ndim=1)
    for steps, edge in zip(stepping, edges, strict=True):
        sigma = steps.kernels[0].sigma
        dt, allowed = sigma**2 / 2, e_rel * (before or edge**2 / 2)
        variance += steps.count * sigma**2
        assert variance == pytest.approx(edge**2, rel=1e-9)
        assert steps.count >= 1
        # the count is rounded to the nearest: at most half a step too few, unless it is 1
        assert dt <= allowed * 1.5 * (1 + 1e-9)
        assert dt >= allowed * (2 / 3) * (1 - 1e-9) or steps.count == 1
        before = edge**2 / 2


@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS, ids=lambda value: repr(value)[:12])
def test_out_of_bounds(name: str, value: object):
    """Each bad value is a `ValueError` that names the argument and the value it got."""
    with pytest.raises(InputError) as caught:
        Parameters(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number(name: str, value: object):
    """NaN, infinity, text and lists are no numbers, for every numeric argument alike."""
    with pytest.raises(InputError, match=name):
        Parameters(**{name: value})


@pytest.mark.parametrize("step", [0, -1.0, math.nan, "2", None])
def test_linear_step(step: object):
    """Lin mode needs a step above 0."""
    with pytest.raises(InputError, match="linear_scale_step"):
        Parameters(mode="lin", max_scale=9, linear_scale_step=step)


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        ({"max_scale": 1.0}, ["max_scale=1", "min_scale=1"]),
        ({"max_scale": 3, "min_scale": 4.5}, ["max_scale=3", "min_scale=4.5"]),
        (
            {"mode": "lin", "linear_scale_step": 1, "num_channels": 4},
            ["num_channels=4", "mode='lin'"],
        ),
        ({"linear_scale_step": 2.0}, ["linear_scale_step=2.0", "mode='log'"]),
    ],
)
def test_arguments_that_contradict(given_: dict[str, object], named: list[str]):
    """Two arguments that cannot both count are refused by both names, not silently ranked."""
    with pytest.raises(InputError) as caught:
        Parameters(**given_)
    assert all(part in str(caught.value) for part in named)


def test_numpy_numbers_are_numbers():
    """Values straight from an array serve as well as Python's own."""
    parameters = Parameters(
        min_scale=np.float32(0.5),
        max_scale=np.int64(9),
        num_channels=np.int32(3),
        rtol=np.float64(0),
    )
    assert (parameters.min_scale, parameters.max_scale) == (0.5, 9.0)
    assert parameters.num_channels == 3
