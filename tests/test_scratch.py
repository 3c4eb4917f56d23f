"""Working fields on another disk: used, counted, and gone when the run is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import cdd_dask
from cdd_dask import store
from cdd_dask.cli import cli
from cdd_dask.errors import DiskSpaceError, InputError, OutputAccessError

OPTIONS: dict[str, Any] = {"max_scale": 8, "block": 16, "e_rel": 0.3, "progress": False}


def field() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).lognormal(size=(32, 24, 16)).astype(np.float32)


def test_working_fields_lie_there_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are made in a store of the run's own, never in the output, and removed at the end."""
    scratch, made = tmp_path / "scratch", []
    scratch.mkdir()
    create = store.create_work_array
    monkeypatch.setattr(
        store,
        "create_work_array",
        lambda address, *rest: made.append(address) or create(address, *rest),
    )
    there = cdd_dask.decompose(field(), tmp_path / "there.zarr", scratch=scratch, **OPTIONS)
    assert made
    assert {Path(address).parent for address in made} == {scratch}
    assert not list(scratch.iterdir())
    assert "work" not in zarr.open_group(there.path, mode="r")
    here = cdd_dask.decompose(field(), tmp_path / "here.zarr", **OPTIONS)
    for a, b in zip(here.channels, there.channels, strict=True):
        assert np.array_equal(a[:], b[:])


def test_the_plan_counts_it(tmp_path: Path):
    """What lies elsewhere is not counted for the output."""
    shape = (256, 256, 256)
    here = cdd_dask.plan(shape, memory="60MB", max_scale=8)
    there = cdd_dask.plan(shape, memory="60MB", max_scale=8, scratch=tmp_path)
    assert here.block == there.block
    assert there.disk_bytes < here.disk_bytes
    assert there.scratch_bytes >= 256**3 * 4
    assert "scratch up to" in str(there)
    assert "scratch" not in str(here)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A full scratch disk is told of before anything is written."""
    import shutil

    scratch, usage = tmp_path / "scratch", shutil.disk_usage
    scratch.mkdir()
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage(path)._replace(free=1000) if path == scratch else usage(path),
    )
    with pytest.raises(DiskSpaceError, match=r"scratch=.* needs up to .* has 1 kB free"):
        cdd_dask.decompose(field(), tmp_path / "out.zarr", scratch=scratch, **OPTIONS)
    assert not (tmp_path / "out.zarr").exists()


def test_places_that_cannot_be(tmp_path: Path):
    """No folder, a file, the output itself, and a result that stays in memory."""
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(OutputAccessError, match="no folder"):
            cdd_dask.decompose(field(), tmp_path / "out.zarr", scratch=place, **OPTIONS)
    done = cdd_dask.decompose(field(), tmp_path / "out.zarr", **OPTIONS)
    assert done.path is not None
    with pytest.raises(InputError, match="lies in out"):
        cdd_dask.decompose(field(), done.path, scratch=done.path, overwrite=True, **OPTIONS)
    with pytest.raises(InputError, match="stays in memory"):
        cdd_dask.decompose(field(), scratch=tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="scratch='' is no path"):
        cdd_dask.decompose(field(), tmp_path / "other.zarr", scratch="", **OPTIONS)


def test_on_the_command_line(tmp_path: Path):
    """The same option there."""
    np.save(tmp_path / "field.npy", field())
    (tmp_path / "scratch").mkdir()
    arguments = ["decompose", str(tmp_path / "field.npy"), str(tmp_path / "out.zarr")]
    options = ["--scratch", str(tmp_path / "scratch"), "--block", "16", "--max-scale", "8"]
    cli.main([*arguments, *options, "--e-rel", "0.3", "--quiet"], standalone_mode=False)
    assert cdd_dask.open_decomposition(tmp_path / "out.zarr").attrs["scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_channels_tell_how_they_were_computed(tmp_path: Path):
    """Regime, passes, levels, halo and error lie in every channel's attributes."""
    result = cdd_dask.decompose(field(), tmp_path / "out.zarr", **OPTIONS)
    root = zarr.open_group(result.path, mode="r")
    for k in range(len(result.channels)):
        known: Any = root[f"channel_{k:02d}"].attrs["cdd_dask"]
        assert known["regime"] in ("direct", "pyramid")
        assert known["passes"] >= 1
        assert len(known["levels"]) == len(known["halo"]) == 3
        assert known["error"]["kind"] in ("bounded", "exact")
        assert known["error"]["rtol"] == 1e-3
