"""Blank voxels take no part, whatever the blocks; what is blank or zero costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from examples import few, slowly
from hypothesis import given
from hypothesis import strategies as st

import cdd_dask
from cdd_dask import cli
from cdd_dask.errors import InputError, VerificationError
from cdd_dask.task import _diffuse

QUICK: dict[str, Any] = {"max_scale": 4, "e_rel": 0.2}


def blanked(field: Any, share: float, seed: int = 0) -> Any:
    """`field` with a share of its voxels blank, one by one and in lumps."""
    rng = np.random.default_rng(seed)
    field = field.copy()
    field[rng.random(field.shape) < share / 2] = np.nan
    corner = tuple(slice(0, int(n * share)) for n in field.shape)
    field[corner] = np.nan
    return field


@pytest.mark.parametrize("kind", ["lognormal", "noise"])
def test_a_straight_mask_edge_is_a_reflecting_wall(kind: str, lognormal: Any, outputs: Any):
    """A masked half equals the cropped array with reflection, to 1% of the maximum (0.2% here)."""
    field = lognormal((64, 48))
    if kind == "noise":
        field = np.random.default_rng(0).random((64, 48)).astype("float32")
    masked = field.copy()
    masked[:20] = np.nan
    ours = outputs(masked, max_scale=16)
    cropped = outputs(field[20:], max_scale=16)
    assert np.isnan(ours[:, :20]).all()
    assert np.abs(ours[:, 20:] - cropped).max() <= 2e-3 * field.max()


@pytest.mark.parametrize("block", [(96, 96), (24, 31)])
def test_one_blank_voxel_changes_nothing_beyond_its_surroundings(
    block: tuple[int, int], lognormal: Any, outputs: Any
):
    """Its neighbours change, but nothing four times the largest scale away."""
    field = lognormal((96, 96))
    other = field.copy()
    other[48, 48] = np.nan
    change = np.abs(outputs(field, max_scale=8, block=block) - outputs(other, max_scale=8,
                                                                      block=block))  # fmt: skip
    y, x = np.mgrid[:96, :96]
    distance = np.maximum(abs(y - 48), abs(x - 48))
    assert np.isnan(change).sum() == len(change)
    assert change[:, distance == 1].max() > 1e-4 * field.max()
    assert change[:, distance >= 32].max() <= 1e-6 * field.max()


@few(6)
@given(
    seed=st.integers(0, 99),
    share=st.sampled_from([0.01, 0.1, 0.5, 0.9]),
    block=st.tuples(st.integers(7, 40), st.integers(7, 40)),
    boundary=st.sampled_from(["reflect", "mirror", "nearest", "wrap", "constant"]),
    constraint=st.sampled_from([{}, {"inverted": True}, {"constrained": False}]),
)
def test_blocks_agree_with_the_whole(
    seed: int,
    share: float,
    block: Any,
    boundary: str,
    constraint: Any,
    lognormal: Any,
    outputs: Any,
):
    """Within `rtol`, and the same voxels are blank."""
    field = blanked(lognormal((40, 40), seed), share, seed)
    options = {**QUICK, **constraint, "boundary": boundary}
    whole, parts = outputs(field, **options), outputs(field, block=block, **options)
    assert np.array_equal(np.isnan(parts), np.broadcast_to(np.isnan(field), parts.shape))
    assert np.nanmax(np.abs(parts - whole)) <= 1e-3 * np.ptp(field[~np.isnan(field)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_without_tolerance_blocks_are_the_same_to_the_bit(
    engine: str, dtype: str, lognormal: Any, outputs: Any
):
    """``rtol=0`` with blanks: no layout shows, not even where some blocks have no blank voxel."""
    if engine == "torch":
        pytest.importorskip("torch")
    field = lognormal((90, 8))
    field[5:9, 3:] = np.nan
    options = {"max_scale": 2, "e_rel": 0.3, "rtol": 0, "engine": engine, "device": "cpu"}
    for constraint in ({}, {"constrained": False}):
        options = {**options, **constraint, "dtype": dtype}
        whole = outputs(field, **options)
        for block in ((90, 8), (17, 8), (40, 3)):
            assert np.array_equal(outputs(field, block=block, **options), whole, equal_nan=True)


@pytest.mark.parametrize("kind", ["array", *slowly("zarr", "npy")])
@pytest.mark.parametrize("executor", ["serial", "threads", "processes"])
def test_every_source_and_executor(
    tmp_path: Path, kind: str, executor: str, lognormal: Any, outputs: Any
):
    """The same blanks and the same channels, wherever the field comes from and is computed."""
    field = blanked(lognormal((40, 44)), 0.3)
    source: Any = field
    if kind == "zarr":
        source = zarr.create_array(tmp_path / "in.zarr", data=field, chunks=(16, 16))
    elif kind == "npy":
        source = tmp_path / "in.npy"
        np.save(source, field)
    expected = outputs(field, block=23, **QUICK)
    workers = None if executor == "serial" else 2
    options = {**QUICK, "block": 23, "executor": executor, "workers": workers}
    out = tmp_path / "out.zarr"
    assert np.array_equal(outputs(source, out, **options), expected, equal_nan=True)
    assert cdd_dask.verify(out, field, progress=False).worst_ulp <= 4
    result = cdd_dask.open_decomposition(out)
    assert np.array_equal(np.isnan(result.reconstruct()), np.isnan(field))
    assert result.attrs["error"] == "estimated"
    # NaN and Infinity are no JSON
    for file in out.rglob("zarr.json"):
        json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_verify_sees_a_blank_that_is_not_one(tmp_path: Path, lognormal: Any):
    """A blank voxel of the sum that the source has a value for, and the other way round."""
    field = blanked(lognormal((20, 20)), 0.3)
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(field, out, progress=False, **QUICK)
    for place in ((0, 0), (19, 19)):
        other = field.copy()
        other[place] = np.nan if np.isfinite(field[place]) else 1.0
        with pytest.raises(VerificationError, match=rf"at voxel \({place[0]}, {place[1]}\)"):
            cdd_dask.verify(out, other, progress=False)


@pytest.mark.parametrize(
    ("options", "empty"),
    [({}, 6), ({"inverted": True}, 6), ({"constrained": False}, 5)],
)
def test_empty_blocks_cost_nothing(
    options: dict[str, Any], empty: int, lognormal: Any, monkeypatch: pytest.MonkeyPatch
):
    """Blocks of zeros and blanks are counted and never reach the engine.

    Under the constraint the core decides: zeros stay zeros. Else the halo has to be empty too.
    """
    field = np.zeros((90, 10), "float32")
    field[60:] = lognormal((30, 10))
    field[5:25] = np.nan
    field[12] = 0
    diffused = []

    def counted(*args: Any) -> Any:
        diffused.append(args)
        return _diffuse(*args)

    monkeypatch.setattr("cdd_dask.task._diffuse", counted)
    result = cdd_dask.decompose(
        field, num_channels=1, e_rel=0.2, block=(10, 10), progress=False, **options
    )
    # 6 cores of 9 are empty; unconstrained, the one next to the field takes from it
    assert result.attrs["blocks"] == {"empty": empty, "computed": 9 - empty}
    assert len(diffused) == 9 - empty
    assert np.allclose(result.reconstruct(), field, rtol=0, atol=1e-6, equal_nan=True)


def test_the_summary_counts_empty_blocks(tmp_path: Path, lognormal: Any):
    """On the command line, when it is done and in `info`."""
    field = np.full((40, 10), np.nan, "float32")
    field[30:] = lognormal((10, 10))
    np.save(tmp_path / "in.npy", field)
    out = str(tmp_path / "out.zarr")
    arguments = ["decompose", str(tmp_path / "in.npy"), out, "--num-channels", "2", "--block", "10"]
    done = CliRunner().invoke(cli.cli, arguments)
    assert "6 of 8 blocks, counted for every channel, were blank or zero" in done.output
    assert (
        "6 of 8 blocks, counted for every channel, were blank"
        in CliRunner().invoke(cli.cli, ["info", out]).output
    )
    assert "is whole" in CliRunner().invoke(cli.cli, ["verify", out]).output


def test_fill_and_raise(lognormal: Any, outputs: Any):
    """Filled voxels take part with their value; refused ones are named."""
    field = blanked(lognormal((20, 20)), 0.3)
    for value in (0.0, 2.5):
        filled = outputs(field, nan="fill", fill_value=value, **QUICK)
        assert np.array_equal(filled, outputs(np.nan_to_num(field, nan=value), **QUICK))
    with pytest.raises(InputError, match=r"fill_value=1e\+39 is too large for dtype='float32'"):
        cdd_dask.plan(field, nan="fill", fill_value=1e39)
    first = tuple(map(int, np.argwhere(np.isnan(field))[0]))
    with pytest.raises(InputError, match=rf"is NaN at \({first[0]}, {first[1]}\)"):
        cdd_dask.decompose(field, nan="raise", progress=False, **QUICK)
    with pytest.raises(InputError, match=r"cval=1e\+39 is too large for dtype='float32'"):
        cdd_dask.plan(field, boundary="constant", cval=1e39)


@pytest.mark.parametrize("nan", ["mask", "raise", "fill"])
def test_infinities_are_refused(nan: str, lognormal: Any):
    """Whatever becomes of blanks."""
    field = blanked(lognormal((20, 20)), 0.2)
    field[19, 3] = np.inf
    if nan == "raise":
        field = np.nan_to_num(field, posinf=np.inf)
    with pytest.raises(InputError, match=r"is inf at \(19, 3\)"):
        cdd_dask.decompose(field, nan=nan, progress=False, **QUICK)


@pytest.mark.parametrize(("rtol", "boundary"), [(1e-3, "reflect"), (1e-3, "wrap"), (0.0, "mirror")])
def test_blocks_with_blanks_are_computed_in_tiles(
    rtol: float, boundary: str, tmp_path: Path, lognormal: Any, outputs: Any
):
    """Also along an axis that blocks do not cut; as in one piece, and at rtol=0 to the bit."""
    field = blanked(lognormal((160, 60, 50)), 0.2)
    field[:40] = np.nan_to_num(field[:40], nan=1.0)
    options = {**QUICK, "rtol": rtol, "boundary": boundary}
    tight = {**options, "block": (40, 60, 50), "memory": "17MB"}
    result = cdd_dask.decompose(field, tmp_path / "out.zarr", progress=False, **tight)
    stages = cdd_dask.plan(field, **tight).stages[1:]
    assert any(s.blank_tile[1] < 60 and s.blank_depth[1] > s.depth[1] == 0 for s in stages)
    whole = outputs(field, **options)
    error = np.abs(np.stack([part[...] for part in (*result.channels, result.residual)]) - whole)
    assert np.array_equal(np.isnan(error), np.isnan(whole))
    assert np.nanmax(error) <= rtol * np.nanmax(field)


def test_saying_that_there_are_no_blanks_saves_memory():
    """A plan for masked blocks needs more; integers cannot be blank."""
    masked = cdd_dask.plan((300,) * 3, max_scale=8, memory="200MB")
    sure = cdd_dask.plan((300,) * 3, max_scale=8, memory="200MB", nan="raise")
    assert masked.stages[-1].blank_depth > masked.stages[-1].depth
    assert sure.stages[-1].blank_depth == sure.stages[-1].depth
    assert masked.stages[-1].blank_tile != masked.block
    assert sure.stages[-1].blank_tile == sure.block
    assert "without blank voxels" in str(masked)
    assert "blank" not in str(sure)
    whole = cdd_dask.plan(np.ones((300, 300), "int16"), max_scale=8)
    assert whole.stages[-1].blank_depth == whole.stages[-1].depth
