"""Fields of both signs: no voxel changes its sign, and where a run lets them, it says so."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from examples import few
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import cdd_dask
from cdd_dask.cli import cli
from cdd_dask.errors import BudgetError, DifferentRunError

Field = NDArray[np.float64]

SMALL: dict[str, Any] = {"max_scale": 8, "e_rel": 0.2}


def kinds(shape: tuple[int, ...]) -> dict[str, Field]:
    """Fields of both signs as people have them, and worse."""
    rng = np.random.default_rng(5)
    noise = rng.standard_normal(shape)
    ramp = np.linspace(-1, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    sparse = noise * (rng.random(shape) < 0.1)
    return {
        "white noise": noise,
        "mostly positive": np.exp(noise) - 0.3,
        "a ramp and noise": ramp + 0.1 * noise,
        "sparse": sparse,
        "many orders of magnitude": np.sign(noise) * 10.0 ** rng.uniform(-12, 3, shape),
        "halves": np.where(np.arange(shape[0]).reshape(ramp.shape) % 16 < 8, 1.0, -1.0) + 0 * noise,
    }


REGIMES: dict[str, dict[str, Any]] = {
    "one piece": {"block": 96},
    "halos": {"block": 40},
    "pyramid": {"block": 48, "max_scale": 16, "min_scale": 8},
    "several passes": {"block": 20, "max_scale": 16, "min_scale": 8, "memory": "15MB"},
    "closure": {"block": 32, "max_scale": 32, "min_scale": 16, "e_rel": 0.4},
    "stream": {"block": 32, "max_scale": 32, "min_scale": 16, "e_rel": 0.4, "rtol": 2e-4},
    "refined": {"upsample": 2, "switch_scale": 2, "max_scale": 2},
}


@pytest.mark.parametrize(
    ("regime", "dtype"),
    [
        *((regime, "float32") for regime in REGIMES),
        *((regime, "float64") for regime in ("one piece", "halos", "pyramid", "refined")),
        *(
            pytest.param(regime, "float64", marks=pytest.mark.slow)
            for regime in ("several passes", "closure", "stream")
        ),
    ],
)
def test_every_output_has_the_fields_sign(outputs: Any, regime: str, dtype: str, tmp_path: Path):
    """Voxel by voxel, exactly, whatever computes it; and zeros stay."""
    for name, field in kinds((96, 90)).items():
        given = field.astype(dtype)
        found = outputs(
            given, tmp_path / f"{name}.zarr", dtype=dtype, **{**SMALL, **REGIMES[regime]}
        )
        assert (found * np.sign(given) >= 0).all(), name
        assert (found[:, given == 0] == 0).all(), name
        assert np.abs(found.sum(axis=0) - given).max() <= 4 * np.spacing(np.abs(given).max())


@few(5)
@given(
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-6, 1e-3]),
    kind=st.sampled_from(sorted(kinds((4,)))),
)
def test_perturbations_do_not_grow(outputs: Any, seed: int, size: float, kind: str):
    """What is left after any channel differs by no more than the fields did, up to rounding."""
    field = kinds((50, 41))[kind]
    noise = size * np.ptp(field) * np.random.default_rng(seed).uniform(-1, 1, field.shape)
    parts, others = (
        outputs(one, dtype="float64", **SMALL)[::-1].cumsum(axis=0)
        for one in (field, field + noise)
    )
    assert np.abs(parts - others).max() <= np.abs(noise).max() + 1e-13 * np.abs(field).max()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((300,), {"block": 90}),
        ((300,), {"boundary": "wrap"}),
        ((60, 52), {}),
        ((60, 52), {"block": 25}),
        ((60, 52), {"block": 25, "rtol": 0}),
        ((60, 52), {"block": 30, "boundary": "constant", "cval": 0.5, "dtype": "float64"}),
        ((60, 52), {"upsample": 2, "switch_scale": 2}),
        ((60, 52), {"kernel": "sampled", "axes": (1,)}),
        ((64, 70), {"max_scale": 32, "min_scale": 16}),
        ((20, 22, 24), {"block": 12}),
        ((20, 22, 24), {"engine": "torch"}),
        ((6, 9, 8, 10), {"max_scale": 2}),
    ],
)
@pytest.mark.parametrize("blank", [False, True])
def test_one_sign_is_computed_as_ever(
    outputs: Any, lognormal: Any, shape: tuple[int, ...], options: dict[str, Any], blank: bool
):
    """The rule of earlier versions gives the same bits, where it has the regime."""
    if options.get("engine") == "torch":
        pytest.importorskip("torch")
    field = lognormal(shape)
    if blank:
        field[field > np.quantile(field, 0.97)] = np.nan
    for sign in (1, -1):
        chosen = {**SMALL, **options, "cval": sign * options.get("cval", 0.0)}
        ours = outputs(sign * field, **chosen)
        assert np.array_equal(ours, outputs(sign * field, crossing=True, **chosen), equal_nan=True)


# crossing


def test_voxels_may_cross_zero(outputs: Any):
    """With the option a third of noise is of the other sign in the last channels."""
    field = kinds((96, 90))["white noise"]
    found = outputs(field, crossing=True, max_scale=8)
    assert np.mean(found[-1] * field < 0) > 0.05
    assert np.abs(found.sum(axis=0) - field).max() <= 1e-5


def test_the_option_is_everywhere(tmp_path: Path):
    """In a config file, on the command line, in the plan and in what the store remembers."""
    np.save(tmp_path / "field.npy", kinds((40, 30))["white noise"])
    (tmp_path / "options.yaml").write_text("crossing: true\nmax_scale: 4\nblock: 20\n")
    command = ["decompose", str(tmp_path / "field.npy")]
    config = ["--config", str(tmp_path / "options.yaml"), "--quiet"]
    for out, more in (("a.zarr", config), ("b.zarr", [*config, "--not-crossing"])):
        assert CliRunner().invoke(cli, [*command, str(tmp_path / out), *more]).exit_code == 0
    crossed, kept = (cdd_dask.open_decomposition(tmp_path / f"{name}.zarr") for name in "ab")
    assert crossed.parameters.crossing
    assert not kept.parameters.crossing
    assert crossed.attrs["error"] == "estimated"
    assert kept.attrs["error"] == "bounded"
    shown = CliRunner().invoke(cli, ["info", str(tmp_path / "b.zarr")]).output
    share = 100 * np.mean(np.load(tmp_path / "field.npy") < 0)
    assert f"voxels below zero: {share:.3g}%" in shown
    with pytest.raises(DifferentRunError, match="crossing=true, and now crossing=false"):
        cdd_dask.decompose(tmp_path / "field.npy", tmp_path / "a.zarr", max_scale=4, block=20)


def test_where_halos_do_not_fit_it_is_refused():
    """Nothing on coarse cells is known to be right then; the message says what to leave out."""
    options: dict[str, Any] = {"max_scale": 256, "memory": "12MB", "engine": "cpu"}
    made = cdd_dask.plan((1024, 1024), **options)
    assert {"closure", "stream"} & {stage.regime for stage in made.stages}
    with pytest.raises(BudgetError, match="leave crossing out"):
        cdd_dask.plan((1024, 1024), crossing=True, **options)


# stores of versions that had no choice


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """Outputs that the last version without `crossing` began, and their fields."""
    with zipfile.ZipFile(Path(__file__).parent / "data/stores_before_crossing.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


BEGUN: dict[str, Any] = {
    **{"max_scale": 2, "e_rel": 0.3, "block": 16, "engine": "cpu", "executor": "serial"},
    "progress": False,
}


def test_a_store_of_one_sign_goes_on(before: Path, outputs: Any):
    """Its voxels never crossed zero."""
    field = np.load(before / "fields.npz")["one"]
    result = cdd_dask.decompose(field, before / "one_sign.zarr", **BEGUN)
    parts = np.stack([part[...] for part in (*result.channels, result.residual)])
    assert np.array_equal(
        parts, outputs(field, **{k: v for k, v in BEGUN.items() if k != "progress"})
    )
    assert result.attrs["error"] == "bounded"
    cdd_dask.verify(before / "one_sign.zarr", field, sample=9, progress=False)
    cdd_dask.decompose(field, before / "one_sign.zarr", **BEGUN)  # nothing is left to do


@pytest.mark.parametrize("name", ["both_signs", "both_signs_finished"])
def test_a_store_of_both_signs_wants_the_option(before: Path, outputs: Any, name: str):
    """Refused by name; with the option it goes on to what one run gives."""
    field, out = np.load(before / "fields.npz")["both"], before / f"{name}.zarr"
    with pytest.raises(DifferentRunError, match="--crossing"):
        cdd_dask.decompose(field, out, **BEGUN)
    result = cdd_dask.decompose(field, out, crossing=True, **BEGUN)
    parts = np.stack([part[...] for part in (*result.channels, result.residual)])
    options = {k: v for k, v in BEGUN.items() if k != "progress"}
    assert np.array_equal(parts, outputs(field, crossing=True, **options))
    assert result.attrs["error"] == "estimated"
    assert result.parameters.crossing


def test_a_finished_store_is_taken_as_what_it_is(before: Path):
    """Verified by the rule that it was made by, sampled and repaired to the same bits."""
    field, out = np.load(before / "fields.npz")["both"], before / "both_signs_finished.zarr"
    expected = cdd_dask.open_decomposition(out).channels[1][...]
    assert CliRunner().invoke(cli, ["info", str(out)]).exit_code == 0
    cdd_dask.verify(out, field, sample=9, progress=False)
    shard = next((out / "channel_01/scale0/image/c").glob("*/*"))
    shard.write_bytes(b"none")
    cdd_dask.repair(out, field, progress=False)
    assert np.array_equal(cdd_dask.open_decomposition(out).channels[1][...], expected)
