"""Calibration: kept, found again, used by plans, and without effect on results."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import cdd_dask
from cdd_dask import calibration, cli
from cdd_dask.calibration import Calibration, cache_file, load, measure, save
from cdd_dask.errors import CalibrationError, CddError, InputError
from cdd_dask.plans import Speeds

SPEEDS = Speeds(8e8, 6e8, 4e8, 7e8, read=3e8, written=1e8, calibrated=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, not made yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of next to nothing."""
    monkeypatch.setattr(calibration, "SIDE", 20)
    monkeypatch.setattr(calibration, "SECONDS", 1e-3)


def example(engine: str = "cpu", **changes: Any) -> Calibration:
    """A calibration of this machine."""
    made = Calibration(
        host=calibration.platform.node(),
        cpu=calibration.cpu_name(),
        cores=4,
        engine=engine,
        device="cpu",
        measured="2026-01-01T00:00:00+00:00",
        speeds=SPEEDS,
        gain=2.5,
    )
    return replace(made, **changes)


# kept and found again


def test_what_is_kept_is_found_again(cache: Path):
    """One entry for every engine and device; the latest counts, and nothing else is left."""
    assert load("cpu", "cpu") is None
    assert save(example()) == cache / "cdd-dask" / "calibration.json"
    save(example("reference", gain=1.0))
    save(example(gain=3.0))
    assert load("cpu", "cpu") == example(gain=3.0)
    assert load("reference", "cpu") == example("reference", gain=1.0)
    assert load("torch", "cuda:0") is None
    assert [path.name for path in (cache / "cdd-dask").iterdir()] == ["calibration.json"]
    assert len(json.loads(cache_file().read_text())["calibrations"]) == 2


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"cpu": "another"}])
def test_another_machine_is_no_matter(other: dict[str, str]):
    """A home folder is shared by hosts, and a host may get another processor."""
    save(example(**other))
    assert load("cpu", "cpu") is None
    save(example())
    assert load("cpu", "cpu") == example()


def test_hosts_keep_each_other():
    """What another host measured stays when this one measures."""
    save(example(host="elsewhere"))
    save(example())
    kept = json.loads(cache_file().read_text())["calibrations"]
    assert {entry["host"] for entry in kept} == {"elsewhere", example().host}


def damaged(**changes: Any) -> str:
    """A file with one entry, something in it changed."""
    save(example())
    content = json.loads(cache_file().read_text())
    content["calibrations"][0] |= changes
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        lambda: "",
        lambda: '{"format_version": 1, "calibr',
        lambda: "[1, 2]",
        lambda: '{"name": "of another program"}',
        lambda: damaged().replace('"format_version": 1', '"format_version": 99'),
        lambda: damaged(unknown=1),
        lambda: damaged(gain=0),
        lambda: damaged(cores="all"),
        lambda: damaged(speeds=3),
        lambda: damaged(speeds={"narrow": 1.0}),
        lambda: damaged().replace("800000000.0", "0"),
        lambda: damaged().replace("800000000.0", "NaN"),
        lambda: damaged().replace("800000000.0", '"fast"'),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(
    text: Callable[[], str], caplog: pytest.LogCaptureFixture
):
    """It is said, it stops nobody, and the next calibration takes its place."""
    content = text()
    cache_file().parent.mkdir(parents=True, exist_ok=True)
    cache_file().write_text(content)
    with caplog.at_level(logging.WARNING, "cdd_dask"):
        assert "(rough)" in str(cdd_dask.plan((64, 64), engine="cpu"))
    assert str(cache_file()) in caplog.text
    save(example())
    caplog.clear()
    assert load("cpu", "cpu") == example()
    assert not caplog.records


def test_a_file_that_is_no_text_is_ignored(caplog: pytest.LogCaptureFixture):
    """Bytes of any kind may lie there, or a folder."""
    cache_file().parent.mkdir(parents=True)
    cache_file().write_bytes(b"\xff\xfe\x00")
    assert load("cpu", "cpu") is None
    cache_file().unlink()
    cache_file().mkdir()
    assert load("cpu", "cpu") is None
    assert len(caplog.records) == 2


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path, cache: Path):
    """The error names the place and the remedy."""
    cache.write_text("a file where the folder should be")
    with pytest.raises(CalibrationError, match="XDG_CACHE_HOME") as raised:
        save(example())
    assert isinstance(raised.value, CddError)
    assert isinstance(raised.value, OSError)
    assert str(cache) in str(raised.value)


@pytest.mark.parametrize(
    ("system", "place"),
    [
        ("linux", ".cache"),
        ("darwin", "Library/Caches"),
        ("win32", "AppData/Local"),
    ],
)
def test_the_systems_own_cache_folder(
    system: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where each system has such files, unless XDG_CACHE_HOME says otherwise."""
    monkeypatch.setattr(calibration.sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_file() == tmp_path / "cache/cdd-dask/calibration.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert cache_file() == tmp_path / place / "cdd-dask/calibration.json"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    if system == "win32":
        assert cache_file() == tmp_path / "local/cdd-dask/calibration.json"


# measured


@pytest.mark.usefixtures("quick")
def test_measuring(tmp_path: Path):
    """Everything is measured, of the engine asked for, and no file is left."""
    made = measure("reference", None, tmp_path)
    assert (made.engine, made.device) == ("reference", "cpu")
    assert (made.host, made.cpu, made.cores) == (
        calibration.platform.node(),
        calibration.cpu_name(),
        calibration.cores(),
    )
    assert made.speeds.calibrated
    assert made.gain > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_threads_are_as_before():
    """Measuring changes how many threads compute; afterwards nothing has changed."""
    from cdd_dask.engines import load_engine

    engine = load_engine("cpu")
    before = engine.limit_threads(3)
    try:
        measure("cpu", None, None)
        assert engine.limit_threads(before) == 3
    finally:
        engine.limit_threads(before)


@pytest.mark.usefixtures("quick")
def test_a_disk_that_cannot_be_written_is_a_clear_error(tmp_path: Path):
    """The error names the folder and the remedy."""
    with pytest.raises(CalibrationError, match=r"missing.*another folder.*out="):
        measure("reference", None, tmp_path / "missing")


# used


def test_a_tasks_share():
    """All cores together gain what was measured; more tasks than cores share it, and the disk."""
    made = example()
    assert made.per_task(1, 1, 4) == SPEEDS
    assert made.per_task(1, 4, 4).narrow == pytest.approx(2.5 * 8e8)
    assert made.per_task(4, 1, 4).narrow == pytest.approx(2.5 * 8e8 / 4)
    assert made.per_task(8, 1, 4).pyramid == pytest.approx(2.5 * 7e8 / 8)
    assert made.per_task(2, 1, 4).wide == pytest.approx(1.5 * 4e8 / 2)
    assert made.per_task(1, 1, 8).medium == pytest.approx(6e8 / 2)
    assert made.per_task(2, 1, 4).written == SPEEDS.written / 2
    assert replace(made, cores=1, gain=1.0).per_task(1, 1, 4) == SPEEDS


def test_rough_speeds_know_no_kernel():
    """Without a calibration a step takes the same time with every kernel."""
    rough = Speeds.rough(5e8)
    assert not rough.calibrated
    steps = {rough.per_step(radius, pyramid) for radius in (1, 3, 5, 40) for pyramid in (0, 1)}
    assert steps == {1 / 5e8}


@pytest.mark.usefixtures("free_passes")
@pytest.mark.parametrize(("rtol", "wide"), [(5e-4, "pyramid"), (1e-3, "closure")])
def test_a_plan_takes_its_times_from_the_calibration(rtol: float, wide: str):
    """Every channel's time is that of its kernel, and of what it reads and writes.

    Work on cells is counted in steps of the pyramid's.
    """
    options = {"engine": "cpu", "executor": "serial", "nan": "raise", "rtol": rtol}
    rough = cdd_dask.plan((256, 256, 256), max_scale=128, block=128, **options)
    assert "(rough)" in str(rough)
    save(example(cores=1, gain=1.0))
    made = cdd_dask.plan((256, 256, 256), max_scale=128, block=128, **options)
    assert "(calibrated)" in str(made)
    assert made.resources.speeds == SPEEDS
    radii = {2: 8e8, 3: 2 / (1 / 8e8 + 1 / 6e8), 4: 6e8, 7: 4e8}
    for stage in made.stages:
        speed = 7e8 if any(stage.levels) else radii[stage.radius]
        moved = stage.bytes_read / SPEEDS.read + stage.bytes_written / SPEEDS.written
        assert stage.seconds == pytest.approx(stage.voxel_steps / speed + moved)
    assert wide in {stage.regime for stage in made.stages}
    same = [(s.block, s.peak_memory, s.disk_bytes) for s in (rough, made)]
    assert same[0] == same[1]


def test_in_memory_the_disk_does_not_count():
    """A disk that creeps costs nothing where nothing is written to it."""
    save(example(speeds=replace(SPEEDS, read=1.0, written=1.0)))
    assert cdd_dask.plan((64, 64), engine="cpu", out=None).seconds < 1
    assert cdd_dask.plan((64, 64), engine="cpu").seconds > 1000


@pytest.mark.usefixtures("quick")
def test_calibrating_while_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The plan that calibrates and all after it are calibrated; the outputs' folder is clean."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    options = {"engine": "reference", "max_scale": 4}
    assert "(rough)" in str(cdd_dask.plan((24, 24), **options))
    made = cdd_dask.plan((24, 24), folder / "deep/er/out.zarr", calibrate=True, **options)
    assert "(calibrated)" in str(made)
    assert "(calibrated)" in str(cdd_dask.plan((24, 24), **options))
    assert "(rough)" in str(cdd_dask.plan((24, 24), engine="cpu", max_scale=4))
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("quick")
def test_calibrating_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`--calibrate` belongs to `plan`; what it says goes to standard error."""
    monkeypatch.chdir(tmp_path)
    words = ["plan", "24,24", "--engine", "reference", "--max-scale", "4", "--json"]
    assert not json.loads(CliRunner().invoke(cli.cli, words).stdout)["resources"]["speeds"][
        "calibrated"
    ]
    done = CliRunner().invoke(cli.cli, [*words, "--calibrate"])
    assert json.loads(done.stdout)["resources"]["speeds"]["calibrated"]
    assert "measuring" in done.stderr
    assert CliRunner().invoke(cli.cli, ["decompose", "a", "b", "--calibrate"]).exit_code == 2


def test_a_refused_plan_is_not_measured_for(monkeypatch: pytest.MonkeyPatch):
    """What is wrong with a request is said at once."""
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match="max_scale"):
        cdd_dask.plan((24, 24), max_scale=0.5, calibrate=True)
    with pytest.raises(InputError, match="client"):
        cdd_dask.plan((24, 24), client=object(), calibrate=True)


def test_a_clusters_workers_are_other_machines():
    """With a client this machine's calibration says nothing."""
    distributed = pytest.importorskip("distributed")
    save(example())
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        made = cdd_dask.plan((64, 64), engine="cpu", memory="1GB", client=client)
    assert "(rough)" in str(made)


def test_results_do_not_depend_on_it(
    lognormal: Callable[..., NDArray[Any]], outputs: Callable[..., NDArray[Any]]
):
    """The same bits and the same blocks."""
    field = lognormal((40, 44))
    options = {"engine": "cpu", "max_scale": 4, "memory": "30MB"}
    before = outputs(field, **options)
    save(example(speeds=Speeds(1.0, 1e12, 1.0, 1e12, calibrated=True)))
    np.testing.assert_array_equal(outputs(field, **options), before)
