"""Large scales in blocks: as close to the computation in one piece as their regime promises.

Fields are small and blocks smaller, so that the halo of a wide kernel would be most of the volume
and the planner takes to cells, or to several passes; every test says which it expects.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_closure import blobs, noise, signed, turbulence

import cdd_dask
from cdd_dask import store
from cdd_dask.decomposition import Decomposition
from cdd_dask.errors import BudgetError
from cdd_dask.plans import Plan
from cdd_dask.working import Nature, geometry, uses

Field = NDArray[Any]
LARGE = {"min_scale": 8, "max_scale": 64}
"""Edges from where cells may serve."""
QUICK = {**LARGE, "e_rel": 0.2}
"""15 steps a channel: a regime is no more exact with more."""
PLAIN = {"engine": "cpu", "executor": "serial", "progress": False}
ALLOWED = {
    "direct": 1e-5,
    "pyramid": 1e-5,
    "closure": 1e-2,
    "linear": 1e-4,
    "stream": 1e-3,
}
"""Relative L2 norm by which a channel may be off. Halos are far better than their bound on real
fields. Exact means in place of the pyramid's cascades cost 3e-4 and up to 6e-4 beside faces."""


def tight(field: Field, block: Any, **options: Any) -> int:
    """The least memory, to 20 kB, in which the blocks can be computed at all."""
    low, high = 0, 10**10
    while high - low > 20_000:
        middle = (low + high) // 2
        try:
            cdd_dask.plan(field, None, block=block, memory=middle, **PLAIN, **options)
        except BudgetError:
            low = middle
        else:
            high = middle
    return high


def regimes(result: Decomposition) -> list[str]:
    """How every channel was computed."""
    return [s["regime"] for s in result.attrs["plan"]["stages"] if s["number"] > 0]


def passes(result: Decomposition) -> list[int]:
    """In how many passes."""
    return [len(s["parts"]) for s in result.attrs["plan"]["stages"] if s["number"] > 0]


def errors(whole: Decomposition, blocked: Decomposition) -> list[float]:
    """Relative L2 norms by which channels are off; blank voxels are the same."""
    result = []
    for one, other in zip(whole.channels, blocked.channels, strict=True):
        expected, found = one[...].astype(np.float64), other[...]
        assert np.array_equal(np.isnan(expected), np.isnan(found))
        off = np.nan_to_num(found - expected)
        result.append(float(np.linalg.norm(off) / np.linalg.norm(np.nan_to_num(expected))))
    return result


def is_exact(field: Field, result: Decomposition) -> bool:
    """Whether the sum is the field within 4 units in the last place of its maximum."""
    difference = np.nan_to_num(result.reconstruct() - field)
    largest = np.nanmax(np.abs(field))
    return bool(np.abs(difference).max() <= 4 * np.spacing(largest))


def compare(
    field: Field, block: Any, *, memory: Any = None, **options: Any
) -> tuple[Decomposition, Decomposition]:
    """The field in one piece and in blocks, the sum of which is checked."""
    options = {**QUICK, **PLAIN, **options}
    whole = cdd_dask.decompose(field, block=field.shape, **options)
    blocked = cdd_dask.decompose(field, block=block, memory=memory, **options)
    assert is_exact(field, blocked)
    return whole, blocked


# how exact


FIELDS_2D = {
    "turbulence 2": (lambda shape: turbulence(shape, 2.0), 1e-2),
    "turbulence 3": (turbulence, 1e-2),
    "turbulence 3.7": (lambda shape: turbulence(shape, 3.7), 1e-2),
    "noise": (noise, 2e-2),
    "signed": (signed, 2e-2),
}


@pytest.mark.parametrize("kind", FIELDS_2D)
def test_closure_in_two_dimensions(kind: str):
    """The bars themselves, at the default time step, for two channels after each other."""
    make, allowed = FIELDS_2D[kind]
    whole, blocked = compare(make((192, 192)), 32, e_rel=0.03)
    assert regimes(blocked)[2:] == ["closure"] * 2
    assert max(errors(whole, blocked)) <= allowed
    if kind != "signed":
        assert all((channel[...] >= 0).all() for channel in blocked.channels)


@pytest.mark.parametrize("kind", ["turbulence 3", "signed"])
def test_closure_in_three_dimensions(kind: str):
    """The same; other fields are in `test_closure`."""
    make, allowed = FIELDS_2D[kind]
    whole, blocked = compare(make((64, 64, 64)), 32, max_scale=32, e_rel=0.03)
    assert regimes(blocked)[2:] == ["closure"]
    assert max(errors(whole, blocked)) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIELDS_2D)
def test_all_channels_from_the_finest(kind: str):
    """Every default channel of a volume in small blocks, errors of the one before included."""
    make, allowed = FIELDS_2D[kind]
    field = make((96, 80, 100))
    whole, blocked = compare(field, 32, min_scale=1, max_scale=32, e_rel=0.03)
    assert regimes(blocked)[-1] == "closure"
    assert max(passes(blocked)) > 1
    assert max(errors(whole, blocked)) <= allowed


def test_first_channels_on_cells():
    """A raw field on cells: the first channel is exact, and the next has its error to bear."""
    whole, blocked = compare(turbulence((64, 64, 64)), 16, min_scale=16, max_scale=32, e_rel=0.03)
    assert regimes(blocked) == ["closure"] * 2
    assert blocked.attrs["plan"]["copy_in"]
    first, second = errors(whole, blocked)
    assert first <= 1e-2
    assert second <= 5e-2  # the second is a twentieth of the first


CASES: dict[str, tuple[str, tuple[int, ...], Any, dict[str, Any]]] = {
    "closure 2-D": ("closure", (192, 192), 32, {}),
    "closure 3-D": ("closure", (64, 64, 64), 16, {"max_scale": 32}),
    "closure odd": ("closure", (161, 193), 32, {}),
    "closure odd 3-D": ("closure", (61, 65, 70), 16, {"max_scale": 32}),
    "closure double": ("closure", (192, 192), 32, {"dtype": "float64"}),
    "closure axes": ("closure", (5, 160, 160), (5, 32, 32), {"axes": (1, 2)}),
    "closure axes cut": ("closure", (5, 160, 160), (2, 32, 32), {"axes": (1, 2)}),
    "closure spacing": ("closure", (100, 200), 32, {"spacing": (2.0, 1.0)}),
    "linear 2-D": ("linear", (192, 192), 32, {"constrained": False}),
    "linear 3-D": ("linear", (64, 64, 64), 16, {"max_scale": 32, "constrained": False}),
    "linear odd": ("linear", (161, 193), 32, {"constrained": False}),
    "stream 2-D": ("stream", (192, 192), 32, {"rtol": 2e-4}),
    "stream 3-D": ("stream", (64, 64, 64), 32, {"max_scale": 32, "rtol": 2e-4}),
    "stream odd": ("stream", (161, 193), 32, {"rtol": 2e-4}),
    "stream double": ("stream", (128, 128), 32, {"rtol": 2e-4, "dtype": "float64"}),
    "stream axes": ("stream", (3, 128, 128), (3, 32, 32), {"rtol": 2e-4, "axes": (1, 2)}),
    "stream spacing": ("stream", (100, 200), 32, {"rtol": 2e-4, "spacing": (2.0, 1.0)}),
    "inverted": ("stream", (192, 192), 32, {"rtol": 2e-4, "inverted": True}),
    "inverted at 1e-3": ("stream", (128, 128), 32, {"inverted": True}),
    "pyramid": ("pyramid", (192, 192), 32, {"boundary": "nearest"}),
    "pyramid 3-D": ("pyramid", (64, 64, 64), 16, {"max_scale": 32, "boundary": "nearest"}),
}


@pytest.mark.parametrize("case", CASES)
def test_regimes(case: str):
    """Each is as exact as it should be, in as little memory as will do."""
    regime, shape, block, options = CASES[case]
    field = turbulence(shape)
    if options.get("dtype") == "float64":
        field = field.astype(np.float64)
    options = {**QUICK, **options}
    whole, blocked = compare(field, block, memory=tight(field, block, **options), **options)
    assert regime in regimes(blocked)
    assert max(passes(blocked)) > 1
    for name, off in zip(regimes(blocked), errors(whole, blocked), strict=True):
        print("MEASURED", case, name, f"{off:.1e}")
