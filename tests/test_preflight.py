"""Preflight: every check fails when it should, on every executor, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import cdd_dask
from cdd_dask import cli, facts, probes
from cdd_dask import preflight as module
from cdd_dask.errors import PreflightError
from cdd_dask.executors import Executor, start_executor
from cdd_dask.preflight import CLIENT, Check, Preflight, Verdict, preflight
from cdd_dask.readers import Source, open_source
from cdd_dask.task import THREAD_LIMITS, limited_threads, prepare_process

THREADS = 2
"""What the workers of these tests are limited to."""


@pytest.fixture(scope="module", params=["serial", "processes", "distributed"])
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Executors of all kinds, started once, with two workers where there are any."""
    how = ("cpu", "cpu", THREADS)
    limits = limited_threads(*how) if request.param == "serial" else nullcontext()
    with limits, start_executor(request.param, 2, None, partial(prepare_process, *how)) as started:
        started.called = request.param  # type: ignore[attr-defined]
        yield started


APART = pytest.mark.parametrize("pool", ["processes", "distributed"], indirect=True)
"""Executors whose workers are other processes than the client."""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "in" / "field.npy"
    path.parent.mkdir()
    np.save(path, np.random.default_rng(0).lognormal(size=(20, 24)).astype("f4"))
    return open_source(path)


@pytest.fixture
def out(tmp_path: Path) -> str:
    """Where the output would go."""
    (tmp_path / "out").mkdir()
    return str(tmp_path / "out" / "out.zarr")


Find = Callable[..., Preflight]


@pytest.fixture
def find(pool: Executor, source: Source, out: str) -> Iterator[Find]:
    """The preflight of a small run; what is given replaces what the plan says."""
    name = pool.called  # type: ignore[attr-defined]
    count = None if name == "serial" else 2
    made = cdd_dask.plan(source.address, executor=name, workers=count, engine="cpu", max_scale=4)

    def look(address: str = out, resources: dict[str, Any] | None = None, **changes: Any):
        used = replace(made.resources, **{"threads": THREADS, **(resources or {})})
        plan = replace(made, resources=used, **changes)
        return preflight(plan, source, address, None, pool)

    yield look
    assert not os.listdir(os.path.dirname(out)), "something was left behind"


def found(result: Preflight, what: str, verdict: Verdict) -> list[Check]:
    return [check for check in result.checks if (check.what, check.verdict) == (what, verdict)]


def workers(result: Preflight) -> set[str]:
    return {check.where for check in result.checks} - {CLIENT}


def test_all_is_well(find: Find, pool: Executor):
    """Every worker is asked everything, the client what concerns it, and the verdict is: ready."""
    result = find()
    assert result.ok, str(result)
    assert str(result).endswith("\n\nready")
    serial = pool.called == "serial"  # type: ignore[attr-defined]
    assert len(workers(result)) == (1 if serial else 2)
    everything = {"packages", "source", "output", "memory", "threads", "device", "clock"}
    for where in workers(result):
        assert {check.what for check in result.checks if check.where == where} == everything
    own = {check.what for check in result.checks if check.where == CLIENT}
    assert own == (set() if serial else {"packages", "source", "output"})


def test_it_is_cheap(find: Find):
    """Far less than a run takes."""
    find()
    began = time.perf_counter()
    find()
    assert time.perf_counter() - began < 1


@APART
def test_other_versions(find: Find, monkeypatch: pytest.MonkeyPatch):
    """A worker with other packages is named, with both versions."""
    mine = {**facts.package_versions(), "scipy": "9.9"}
    monkeypatch.setattr(facts, "package_versions", lambda: mine)
    result = find()
    failed = found(result, "packages", "failed")
    assert {check.where for check in failed} == workers(result)
    assert all("scipy" in check.detail and "for 9.9" in check.detail for check in failed)
    assert "numpy" not in failed[0].detail


@APART
def test_a_worker_that_cannot_answer(find: Find, pool: Executor, monkeypatch: pytest.MonkeyPatch):
    """Also one that lacks this package is named."""
    error = ModuleNotFoundError("No module named 'cdd_dask'")
    answers = pool.everywhere
    monkeypatch.setattr(pool, "everywhere", lambda *args: {**answers(*args), "odd one": error})
    (check,) = found(find(), "packages", "failed")
    assert (check.where, "No module named" in check.detail) == ("odd one", True)


def everybody(result: Preflight) -> set[str]:
    """All who must reach source and output."""
    return {check.where for check in result.checks}


def test_unreadable_source(find: Find, source: Source):
    """Who cannot read the source says why."""
    os.remove(source.address)
    result = find()
    failed = found(result, "source", "failed")
    assert {check.where for check in failed} == everybody(result)
    assert all("does not exist" in check.detail for check in failed)


@APART
def test_another_source_at_the_same_path(find: Find, monkeypatch: pytest.MonkeyPatch):
    """A file of the same name on a disk of the worker's own is not the client's."""
    seen = {"source": "20 × 24 float32, content 0"}
    monkeypatch.setattr(facts, "_look_at_source", lambda address: seen)
    result = find()
    failed = found(result, "source", "failed")
    assert {check.where for check in failed} == workers(result)
    assert "another one at the same path" in failed[0].detail


def test_sources_in_memory_are_not_asked_of_workers(pool: Executor, out: str):
    """The client copies them."""
    array = open_source(np.ones((20, 24)))
    name = pool.called  # type: ignore[attr-defined]
    made = cdd_dask.plan((20, 24), executor=name, engine="cpu", max_scale=4)
    result = preflight(made, array, out, None, pool)
    assert result.ok
    assert "source" not in {check.what for check in result.checks}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that even root cannot write")
def test_unwritable_output(find: Find):
    """A folder that refuses files refuses the run."""
    (check,) = found(find("/proc/out.zarr"), "output", "failed")
    assert (check.where, "cannot be written" in check.detail) == (CLIENT, True)


def test_another_disk_under_the_same_path(find: Find, monkeypatch: pytest.MonkeyPatch):
    """Who does not find there what the client wrote, writes nothing."""

    @contextmanager
    def elsewhere(probe: probes.Probe) -> Iterator[None]:
        with probes.placed(replace(probe, token="another")):
            yield

    monkeypatch.setattr(module, "placed", elsewhere)
    result = find()
    failed = found(result, "output", "failed")
    assert {check.where for check in failed} == everybody(result)
    assert all("another disk" in check.detail for check in failed)


def test_a_url_is_tried_through_its_file_system(find: Find, pool: Executor):
    """A file system in the memory of each process is another one for each."""
    result = find("memory://preflight/out.zarr")
    failed = {check.where for check in found(result, "output", "failed")}
    assert failed == (set() if pool.called == "serial" else workers(result))  # type: ignore[attr-defined]
    fsspec = pytest.importorskip("fsspec")
    assert not fsspec.filesystem("memory").find("/preflight")


def test_low_disk(find: Find):
    """Both numbers are told."""
    result = find(disk_bytes=10**18)
    failed = found(result, "output", "failed")
    assert {check.where for check in failed} == everybody(result)
    assert all("free, 1e+03 PB needed" in check.detail for check in failed)


def test_low_memory(find: Find):
    """The tasks of all workers on a machine must fit together."""
    result = find(peak_memory=10**16)
    assert {check.where for check in found(result, "memory", "failed")} == workers(result)


def test_threads_uncapped(find: Find):
    """Workers limited to two threads a task are too many where one is planned: a warning."""
    result = find(resources={"threads": 1})
    assert result.ok
    warned = found(result, "threads", "warning")
    assert {check.where for check in warned} == workers(result)
    assert all("the engine takes 2" in check.detail for check in warned)
    assert str(result).endswith("ready, with 1 warning")


def test_threads_that_nobody_capped(source: Source, out: str, monkeypatch: pytest.MonkeyPatch):
    """A process without the environment that caps libraries is found."""
    for name in THREAD_LIMITS:
        monkeypatch.delenv(name, raising=False)
    made = cdd_dask.plan(source.address, executor="processes", workers=1, engine="cpu")
    with start_executor("processes", 1) as pool:
        (check,) = found(preflight(made, source, out, None, pool), "threads", "warning")
    assert "OMP_NUM_THREADS is not set" in check.detail


def test_absent_device(find: Find):
    """A device that a worker lacks is named."""
    result = find(resources={"engine": "torch", "device": "cuda:7"})
    failed = found(result, "device", "failed")
    assert {check.where for check in failed} == workers(result)
    assert all("torch on cuda:7" in check.detail for check in failed)


@APART
def test_clock_off(find: Find, monkeypatch: pytest.MonkeyPatch):
    """Workers whose clock differs from the client's are named, with the difference."""
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() - 100))
    result = find()
    assert result.ok
    warned = found(result, "clock", "warning")
    assert {check.where for check in warned} == workers(result)
    assert all("100 s ahead of the client's" in check.detail for check in warned)


def test_clock_of_the_disk_off(find: Find, monkeypatch: pytest.MonkeyPatch):
    """Files that were written in another time are a warning: leases depend on it."""
    monkeypatch.setattr(probes, "time", SimpleNamespace(time=lambda: time.time() + 100))
    result = find()
    (check,) = found(result, "output", "warning")
    assert check.where == (CLIENT if len(workers(result)) > 1 else "this process")
    assert "100 s behind this machine's clock" in check.detail


# where probes go


def test_probes_stay_out_of_stores_that_are_not_ours(tmp_path: Path):
    """Into the nearest folder that is there, unless it is another's Zarr hierarchy."""
    assert probes.probe_for(str(tmp_path / "a" / "b.zarr")).at == str(tmp_path)
    zarr.open_group(tmp_path / "theirs.zarr", mode="w")
    assert probes.probe_for(str(tmp_path / "theirs.zarr" / "sub" / "b.zarr")).at == str(tmp_path)
    cdd_dask.decompose(np.ones((8, 8)), tmp_path / "ours.zarr", max_scale=2, progress=False)
    ours = str(tmp_path / "ours.zarr")
    assert probes.probe_for(ours).at == ours
    assert probes.probe_for("s3://bucket/b.zarr").at == "s3://bucket/b.zarr"


def test_what_is_there_of_a_run_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that goes on needs less than all of its disk."""
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(np.ones((8, 8)), out, max_scale=2, progress=False)
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    access = probes.Access(free=1000)
    looks = []

    def stored() -> int:
        looks.append(out)
        return module._stored(str(out))

    assert module._judge_place(access, 1000, stored)[0] == "ok"
    assert not looks
    assert module._judge_place(access, there + 1000, stored)[0] == "ok"
    assert module._judge_place(access, there + 1001, stored)[0] == "failed"


# the verdict


def test_enforcing(caplog: pytest.LogCaptureFixture):
    """Warnings are logged once, failures raise with all that failed, alike workers in one line."""
    names = [f"tcp://{number}" for number in range(6)]
    warned = [Check(name, "clock", "warning", "9 s ahead") for name in names]
    Preflight(tuple(warned)).enforce()
    assert [record.getMessage() for record in caplog.records] == [
        "clock on tcp://0, tcp://1, tcp://2, tcp://3 and 2 more: 9 s ahead"
    ]
    failed = [Check(name, "packages", "failed", "numpy 1 for 2") for name in names[:2]]
    with pytest.raises(PreflightError, match="packages on tcp://0, tcp://1: numpy 1 for 2"):
        Preflight((*warned, *failed)).enforce()


def test_the_table_counts_workers_that_are_well():
    """A thousand workers are still one line."""
    fine = [Check(f"tcp://{n}", "memory", "ok", f"{n} GB free") for n in range(1000)]
    lines = str(Preflight(tuple(fine))).splitlines()
    assert lines[2].split() == ["memory", "1000", "workers", "ok", "0", "GB", "free"]
    assert lines[-1] == "ready"


# the verb


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, which stays empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.iterdir())


def doctor(*arguments: object) -> tuple[int, str]:
    """Exit status and output of ``cdd-dask doctor``."""
    done = CliRunner().invoke(cli.cli, ["doctor", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_doctor_without_a_source(here: Path):
    """This machine and the current folder."""
    status, said = doctor("--engine", "cpu")
    assert (status, said.splitlines()[-1]) == (0, "ready")
    assert "source" not in said


def test_doctor_of_a_run(here: Path, source: Source):
    """Arguments of `decompose`, and what it would be refused for."""
    out = here.parent / "out.zarr"
    assert doctor(source.address, out, "--max-scale", 4, "--scratch", here)[0] == 0
    (out).mkdir()
    (out / "precious").touch()
    status, said = doctor(source.address, out, "--max-scale", 4)
    assert (status, "no decomposition store" in said) == (1, True)
    status, said = doctor(source.address, "b.zarr", "--scratch", here / "missing")
    assert (status, "make it first" in said) == (1, True)
    status, said = doctor(here / "missing.npy")
    assert (status, "to be mended: source on client" in said) == (1, True)
    status, said = doctor("--engine", "torch", "--device", "cuda:77")
    assert (status, "failed" in said) == (1, True)
    assert cdd_dask.doctor(source.address, memory="1MB", max_scale=8).verdict.endswith("client")


def test_doctor_of_an_output_that_was_begun(tmp_path: Path):
    """It is as fit as the run that would go on with it."""
    np.save(tmp_path / "in.npy", np.random.default_rng(0).lognormal(size=(16, 16)))
    cdd_dask.decompose(tmp_path / "in.npy", tmp_path / "out.zarr", max_scale=4, progress=False)
    assert cdd_dask.doctor(tmp_path / "in.npy", tmp_path / "out.zarr", max_scale=4).ok
    found = cdd_dask.doctor(tmp_path / "in.npy", tmp_path / "out.zarr", max_scale=2)
    (failed,) = found.having("failed")
    assert "max_scale=4.0, and now max_scale=2" in failed.detail
    assert cdd_dask.doctor(
        tmp_path / "in.npy", tmp_path / "out.zarr", max_scale=2, overwrite=True
    ).ok


def test_doctor_of_a_cluster(here: Path):
    """Through the address of its scheduler; a worker that may not hold its tasks is found."""
    from distributed import Client, LocalCluster

    few = LocalCluster(
        n_workers=1, threads_per_worker=1, memory_limit="1GB", dashboard_address="127.0.0.1:0"
    )
    with few as cluster, Client(cluster) as client:
        command = [sys.executable, "-m", "cdd_dask", "doctor", "--scheduler"]
        done = subprocess.run([*command, cluster.scheduler_address], capture_output=True, text=True)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ready"), done
        made = cdd_dask.plan((400, 400, 400), client=client, memory="2GB", max_scale=4)
        assert made.peak_memory > 1e9
        with start_executor("distributed", 1, client) as pool:
            result = preflight(made, None, "out.zarr", None, pool)
        (check,) = found(result, "memory", "failed")
        assert "limited to 1 GB" in check.detail


def test_decompose_refuses_what_is_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And has then written nothing."""
    monkeypatch.setattr(facts, "_look_at_source", lambda question: {"source_error": "gone"})
    np.save(tmp_path / "field.npy", np.ones((8, 8), "float32"))
    with pytest.raises(PreflightError, match="gone"):
        cdd_dask.decompose(tmp_path / "field.npy", tmp_path / "out.zarr", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["field.npy"]


@APART
def test_contents_are_compared(find: Find, source: Source, monkeypatch: pytest.MonkeyPatch):
    """Not only what is seen of the first voxel."""
    other = np.load(source.address)
    other[-1, -1] += 1
    known = facts.content_of(source)
    np.save(source.address, other)
    monkeypatch.setattr(facts, "content_of", lambda source: known)
    failed = found(find(), "source", "failed")
    assert len(failed) == 2
    assert f"the client's has 20 × 24 float32, content {known[:12]}" in failed[0].detail


def test_probes_that_killed_processes_left(tmp_path: Path):
    """Go when the next one comes, but not those that may be in use."""
    names = [f"{probes.PREFIX}{number:012d}" for number in range(2)]
    for name in names:
        (tmp_path / name).write_bytes(b"token")
    os.utime(tmp_path / names[0], (1e9, 1e9))
    with probes.placed(probes.probe_for(str(tmp_path / "out.zarr"))):
        assert not (tmp_path / names[0]).exists()
    assert [path.name for path in tmp_path.iterdir()] == names[1:]
