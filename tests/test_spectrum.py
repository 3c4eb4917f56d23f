"""Statistics for free: what tasks return, summed, is what a direct computation gives."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import cdd_dask
from cdd_dask import cli
from cdd_dask.errors import DiskSpaceError, StoreError
from cdd_dask.statistics import Statistics

NAMES = ("count", "sum", "sum_abs", "sum_squares", "min", "max")


def direct(values: Any) -> dict[str, float]:
    """The same numbers, in the plainest way."""
    valid = values[~np.isnan(values)].astype(np.longdouble)
    return {
        "count": valid.size,
        "sum": float(valid.sum()),
        "sum_abs": float(np.abs(valid).sum()),
        "sum_squares": float((valid**2).sum()),
        "min": float(valid.min()),
        "max": float(valid.max()),
    }


@pytest.fixture(params=["positive", "signed", "blank"])
def made(request: pytest.FixtureRequest, tmp_path: Path, lognormal: Any) -> Path:
    """A store in several blocks."""
    field = lognormal((40, 34, 21))
    if request.param == "signed":
        field -= np.median(field)
    elif request.param == "blank":
        field[:15, :20] = np.nan
    out = tmp_path / "out.zarr"
    options = {"executor": "threads", "workers": 2, "block": (15, 20, 21), "progress": False}
    cdd_dask.decompose(field, out, max_scale=4, e_rel=0.3, **options)
    return out


def test_the_table_is_what_a_direct_computation_gives(made: Path):
    """Every number of every output, to 1e-6 of itself (sums: of the sum of absolute values)."""
    result = cdd_dask.open_decomposition(made)
    spectrum = result.scale_spectrum()
    assert isinstance(spectrum, np.recarray)
    assert spectrum["output"].tolist() == ["channel_00", "channel_01", "channel_02", "residual"]
    total = 0.0
    for row, part in zip(spectrum, (*result.channels, result.residual), strict=True):
        expected = direct(part[:])
        assert row["count"] == expected["count"]
        total += expected["sum_abs"]
        for name in NAMES:
            scale = expected["sum_abs"] if name == "sum" else abs(expected[name])
            assert row[name] == pytest.approx(expected[name], rel=0, abs=1e-6 * scale), name
    assert spectrum["share"] == pytest.approx(spectrum["sum_abs"] / total, rel=1e-6)
    assert spectrum["share"].sum() == pytest.approx(1)
    assert spectrum["scale_from"].tolist() == [0, 1, 2, 4]
    assert spectrum["scale_to"].tolist() == [1, 2, 4, np.inf]


def test_nothing_but_attributes_is_read(made: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither by the method nor on the command line."""

    def refuse(*_: Any) -> None:
        raise AssertionError("an array was read")

    monkeypatch.setattr(zarr.Array, "__getitem__", refuse)
    with pytest.raises(AssertionError):
        cdd_dask.open_decomposition(made).channels[0][0]
    assert len(cdd_dask.open_decomposition(made).scale_spectrum()) == 4
    assert CliRunner().invoke(cli.cli, ["spectrum", str(made)]).exit_code == 0


def test_spectrum_on_the_command_line(made: Path, tmp_path: Path):
    """A table for people; all columns for programs, to a file or to standard output."""
    spectrum = cdd_dask.open_decomposition(made).scale_spectrum()
    table = CliRunner().invoke(cli.cli, ["spectrum", str(made)]).output
    assert f"{100 * spectrum['share'][1]:.2f}%" in table
    assert "> 4" in table
    file = tmp_path / "s.csv"
    assert CliRunner().invoke(cli.cli, ["spectrum", str(made), "--csv", str(file)]).exit_code == 0
    output = CliRunner().invoke(cli.cli, ["spectrum", str(made), "--csv", "-"]).output
    assert output.replace("\r\n", "\n") == file.read_text().replace("\r\n", "\n")
    rows = list(csv.DictReader(io.StringIO(output)))
    assert list(rows[0]) == list(spectrum.dtype.names)
    for row, expected in zip(rows, spectrum, strict=True):
        assert row["output"] == expected["output"]
        for name in (*NAMES, "scale_from", "scale_to", "share"):
            assert float(row[name]) == expected[name]


def test_a_file_that_cannot_be_written_stays_as_it_was(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And the message names it."""
    file = tmp_path / "s.csv"
    file.write_text("of yesterday")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = CliRunner().invoke(cli.cli, ["spectrum", str(made), "--csv", str(file)])
    assert isinstance(done.exception, DiskSpaceError)
    assert f"{file} cannot be written: No space left" in str(done.exception)
    assert [*tmp_path.glob("*s.csv*")] == [file]
    assert file.read_text() == "of yesterday"
    monkeypatch.undo()
    (tmp_path / "link.csv").symlink_to(file)
    file.chmod(0o600)
    for name in ("link.csv", "s.csv"):
        command = ["spectrum", str(made), "--csv", str(tmp_path / name)]
        assert CliRunner().invoke(cli.cli, command).exit_code == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert file.read_text().startswith("output,")
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_incomplete_store_has_no_spectrum(made: Path):
    """Said so, by the method and on the command line."""
    metadata = json.loads((made / "zarr.json").read_text())
    metadata["attributes"]["cdd_dask"]["complete"] = False
    (made / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="not complete"):
        cdd_dask.open_decomposition(made, allow_incomplete=True).scale_spectrum()
    done = CliRunner().invoke(cli.cli, ["spectrum", str(made)])
    assert isinstance(done.exception, StoreError)


@given(
    st.lists(
        st.floats(-(2.0**90), 2.0**90, width=32) | st.just(float("nan")), min_size=1, max_size=30
    ),
    st.data(),
)
def test_statistics_of_parts_add_up(values: list[float], data: Any):
    """However a field is cut, blanks or not; where all is blank there are no extremes."""
    field = np.array(values, "float32")
    cut = data.draw(st.integers(0, len(values)))
    parts = [part for part in (field[:cut], field[cut:]) if len(part)]
    total = Statistics.of(parts[0])
    for part in parts[1:]:
        total = total + Statistics.of(part)
    whole = Statistics.of(field)
    assert total.count == whole.count == np.isfinite(field).sum()
    assert (total.min, total.max) == (whole.min, whole.max)
    assert total.sum_squares == pytest.approx(whole.sum_squares, rel=1e-12)
    assert total.sum_abs == pytest.approx(whole.sum_abs, rel=1e-12)
    as_json = json.loads(json.dumps(whole.as_dict(), allow_nan=False))
    assert (as_json["min"] is None) == (whole.count == 0)
