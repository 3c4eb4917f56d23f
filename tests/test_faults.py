"""What may fail while a run is at work, and what becomes of the run.

Errors of libraries that reach stores are told by their looks, so here are things that look alike.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cdd_dask import faults
from cdd_dask.errors import (
    BlockError,
    BlocksFailedError,
    DiskFullError,
    InputError,
    RunError,
    StoreError,
)
from cdd_dask.executors import Executor, loop, start_executor
from cdd_dask.executors.processes import peak_memory
from cdd_dask.faults import (
    CALL_TRIES,
    Fault,
    fault_of,
    is_disk_full,
    is_expired_credentials,
    is_passing,
    wait_before,
)
from cdd_dask.retrying import tried

# errors of libraries


class Response:
    """What requests and httpx keep of an answer."""

    def __init__(self, status: int) -> None:
        self.status_code = status


def foreign(module: str, name: str, text: str = "", **attributes: Any) -> Exception:
    """An error of a library that need not be installed."""
    kind = type(name, (Exception,), {"__module__": module})
    error: Exception = kind(text)
    vars(error).update(attributes)
    return error


def botocore(status: int, code: str, text: str = "") -> Exception:
    answer = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}
    return foreign("botocore.exceptions", "ClientError", text, response=answer)


def caused(error: Exception, cause: Exception, by: str = "__cause__") -> Exception:
    setattr(error, by, cause)
    return error


def obstore(text: str) -> Exception:
    text = f"Generic S3 error: Error performing GET http://h:9000/b/x in 5.3ms - {text}"
    return foreign("obstore.exceptions", "GenericError", text)


FAULTS = [
    (TimeoutError(), "passing"),
    (ConnectionResetError(), "passing"),
    (OSError(5, "Input/output error"), "passing"),
    (OSError(116, "Stale file handle"), "passing"),
    (botocore(503, "SlowDown"), "passing"),
    (botocore(500, "InternalError"), "passing"),
    (botocore(200, "SlowDown"), "passing"),  # in the body of an answer that began well
    (botocore(429, "TooManyRequests"), "passing"),
    (foreign("botocore.exceptions", "EndpointConnectionError"), "passing"),
    (foreign("botocore.exceptions", "ReadTimeoutError"), "passing"),
    (foreign("aiohttp.client_exceptions", "ClientResponseError", status=502), "passing"),
    (foreign("aiohttp.client_exceptions", "ServerDisconnectedError"), "passing"),
    (foreign("aiohttp.client_exceptions", "ClientPayloadError"), "passing"),
    (foreign("requests.exceptions", "HTTPError", response=Response(504)), "passing"),
    (foreign("httpx", "HTTPStatusError", response=Response(429)), "passing"),
    (foreign("httpx", "RemoteProtocolError"), "passing"),
    (foreign("gcsfs.retry", "HttpError", code="503"), "passing"),
    (foreign("urllib.error", "HTTPError", code=503), "passing"),
    (obstore("Server returned non-2xx status code: 503 Service Unavailable: "), "passing"),
    (obstore("HTTP error: error sending request"), "passing"),
    (foreign("fsspec.exceptions", "FSTimeoutError"), "passing"),
    (caused(BlockError("block 3 failed"), botocore(503, "SlowDown")), "passing"),
    (caused(KeyError("c/0/0"), ConnectionError(), by="__context__"), "passing"),
    (botocore(400, "ExpiredToken"), "expired"),
    (caused(PermissionError("Access denied"), botocore(403, "ExpiredTokenException")), "expired"),
    (botocore(403, "InvalidAccessKeyId"), "expired"),
    (PermissionError("The provided token has expired."), "expired"),
    (foreign("aiohttp.x", "ClientResponseError", "Signature has expired", status=403), "expired"),
    (obstore("Server returned non-2xx status code: 400 Bad Request: ExpiredToken"), "expired"),
    (OSError(28, "No space left on device"), "full"),
    (OSError(122, "Disk quota exceeded"), "full"),
    (caused(BlockError("block 3 failed"), OSError(28, "No space left")), "full"),
    (InputError("values are infinite"), "fatal"),
    (caused(BlockError("block 3 failed"), StoreError("another run's")), "fatal"),
    (ValueError("not finite"), "staying"),
    (PermissionError(13, "Permission denied"), "staying"),
    (FileNotFoundError(2, "No such file"), "staying"),
    (botocore(403, "AccessDenied"), "staying"),
    (botocore(404, "NoSuchKey"), "staying"),
    (foreign("aiohttp.client_exceptions", "ClientResponseError", status=404), "staying"),
    (obstore("Server returned non-2xx status code: 403 Forbidden: AccessDenied"), "staying"),
    (foreign("mine", "ConnectionTable", "timed out of ideas"), "staying"),
]


@pytest.mark.parametrize(("error", "fault"), FAULTS, ids=lambda x: repr(x)[:60])
def test_faults_are_told_from_each_other(error: Exception, fault: str):
    """What passes, what has expired, what stops a run, and what is a block's own."""
    assert fault_of(error) == fault
    assert is_passing(error) == (fault == "passing")
    assert is_expired_credentials(error) == (fault == "expired")
    assert is_disk_full(error) == (fault == "full")


def test_a_handled_error_is_no_cause():
    """``raise … from None`` says that what came before has nothing to do with it."""
    error = caused(KeyError("c/0/0"), ConnectionError(), by="__context__")
    error.__suppress_context__ = True
    assert not is_passing(error)


def test_causes_in_a_circle_end():
    """Errors that claim to have caused each other are looked at once."""
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    assert fault_of(first) is Fault.STAYING


# calls to storage


def outcome(errors: Iterable[Exception], waits: list[float]) -> int:
    """What a call gives that raises one of `errors` after the other, then returns 9."""
    left = iter(errors)

    async def call() -> int:
        for error in left:
            raise error
        return 9

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    return asyncio.run(tried(call, sleep, draw=lambda: 1.0))


def test_calls_are_retried_with_growing_waits(caplog: pytest.LogCaptureFixture):
    """The longest wait doubles up to a limit; each retry is a warning."""
    waits: list[float] = []
    assert outcome([ConnectionError("down")] * (CALL_TRIES - 1), waits) == 9
    assert waits == [faults.FIRST_WAIT * 2**n for n in range(CALL_TRIES - 1)]
    assert len(caplog.records) == CALL_TRIES - 1
    assert wait_before(50, lambda: 1.0) == faults.LONGEST_WAIT


def test_waits_are_drawn_anew():
    """Full jitter: anything from none to the longest wait."""
    waits = [wait_before(3) for _ in range(1000)]
    assert 0 <= min(waits) < 0.1 * max(waits)
    assert max(waits) <= 4 * faults.FIRST_WAIT


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (ConnectionError("down"), CALL_TRIES),
        (botocore(400, "ExpiredToken"), 2),
        (OSError(28, "No space left on device"), 1),
        (ValueError("refused"), 1),
    ],
)
def test_the_last_error_is_raised(error: Exception, tries: int):
    """Expired credentials are tried once more, what stays not at all.

    Libraries' own classes become the one that all of storage's errors have.
    """
    waits: list[float] = []
    foreign = not isinstance(error, OSError | ValueError)
    with pytest.raises(OSError if foreign else type(error)) as raised:
        outcome([error] * 10, waits)
    assert (raised.value.__cause__ if foreign else raised.value) is error
    assert faults.fault_of(raised.value) == faults.fault_of(error)
    assert len(waits) == tries - 1


# blocks that fail


@dataclass(frozen=True)
class Job:
    """A number, and a folder where its starts are counted."""

    number: int
    folder: Path

    def count(self) -> int:
        for tries in itertools.count(1):
            with suppress(FileExistsError):
                (self.folder / f"{self.number}-{tries}").touch(exist_ok=False)
                return tries
        raise AssertionError


def starts(folder: Path, number: int | str = "*") -> int:
    return len(list(folder.glob(f"{number}-*")))


def describe(job: Job) -> str:
    return f"block {job.number} of channel 0, region [{job.number}:{job.number + 1}],"


def poison(job: Job) -> int:
    job.count()
    if job.number % 5 == 3:
        raise ValueError(f"value {job.number} is poison")
    return job.number


def disk_full_inside(job: Job) -> int:
    job.count()
    time.sleep(0.02)
    if job.number == 3:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise BlockError(f"{describe(job)} failed: OSError: {error}") from error
    return job.number


def another_run(job: Job) -> int:
    job.count()
    time.sleep(0.02)
    if job.number == 3:
        try:
            raise StoreError("the store was replaced by another run")
        except StoreError as error:
            raise BlockError(f"{describe(job)} failed: {error}") from error
    return job.number


def expired(job: Job) -> int:
    if job.number == 3:
        job.count()
        raise BlockError(f"{describe(job)} failed: the token") from botocore(400, "ExpiredToken")
    return job.number


def first_try_fails(job: Job) -> int:
    if job.number == 0 and job.count() == 1:
        raise ConnectionError("down")
    return job.number


def grow_and_die(job: Job) -> int:
    if job.number == 3:
        held = np.ones(30_000_000)  # 240 MB
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGKILL if held.size else 0)
    return job.number


def hang_once(job: Job) -> int:
    if job.number == 5 and job.count() == 1:
        time.sleep(300)
    return job.number


def hang(job: Job) -> int:
    if job.number == 5:
        job.count()
        time.sleep(300)
    return job.number


def take_long(job: Job) -> int:
    time.sleep(3 if job.number == 5 else 0)
    return job.number


def prepare() -> None:
    """Has a worker import this file before its first task, whose time is limited."""


POOLS = ("serial", "threads", "processes", "distributed")


@pytest.fixture(scope="module", params=POOLS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Every executor in turn, started once, with two workers where it has any."""
    with start_executor(request.param, workers=2, prepare=prepare) as started:
        yield started


IN_OTHERS = pytest.mark.parametrize("executor", ["processes", "distributed"], indirect=True)
"""Executors whose workers can be killed."""


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks may take a second, whatever their siblings took."""
    monkeypatch.setattr(loop, "LEAST_PATIENCE", 1.0)
    monkeypatch.setattr(loop, "PATIENCE", 1.0)


def test_a_poison_block_does_not_stop_the_others(
    executor: Executor, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """All others are computed, and the error lists the failed ones with region and reason."""
    results: list[int] = []
    jobs = [Job(n, tmp_path) for n in range(20)]
    with pytest.raises(BlocksFailedError) as raised:
        results.extend(executor.run(poison, jobs, "decompose-ch00", describe))
    assert sorted(results) == [n for n in range(20) if n % 5 != 3]
    assert starts(tmp_path) == 20
    message = str(raised.value)
    assert isinstance(raised.value, RunError)
    assert "4 of the blocks of decompose-ch00" in message
    assert "block 13 of channel 0, region [13:14], failed: ValueError: value 13 is" in message
    assert "run the same command again" in message
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 4
    assert all("Traceback" in record.getMessage() for record in errors)


def test_many_poison_blocks_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Ten are listed and logged, the others are a number."""
    with start_executor("serial", 1) as pool, pytest.raises(BlocksFailedError) as raised:
        list(pool.run(poison, [Job(n, tmp_path) for n in range(100)], "test", describe))
    assert str(raised.value).count("is poison") == loop.MOST_LISTED
    assert "and 10 more" in str(raised.value)
    assert caplog.text.count("Traceback") == loop.MOST_LISTED


def test_a_full_disk_stops_the_run(executor: Executor, tmp_path: Path):
    """At once, and the error says what is full, how full, and that the run can go on."""
    jobs = [Job(n, tmp_path) for n in range(100)]
    with pytest.raises(DiskFullError, match=r"block 3 of .*No space left.*again") as raised:
        list(executor.run(disk_full_inside, jobs, "test", describe, places=(str(tmp_path),)))
    assert re.search(rf"B free at {re.escape(str(tmp_path))}", str(raised.value))
    assert starts(tmp_path) < 4 + 2 * executor.window


def test_a_lost_store_stops_the_run(executor: Executor, tmp_path: Path):
    """What is wrong for every block is not met by each of them."""
    with pytest.raises(BlockError, match=r"^block 3 of .*replaced by another run$"):
        list(executor.run(another_run, [Job(n, tmp_path) for n in range(100)], "test", describe))
    assert starts(tmp_path) < 4 + 2 * executor.window


def test_expired_credentials_are_tried_once_more(executor: Executor, tmp_path: Path):
    """Another try takes fresh ones, a third one would not."""
    with pytest.raises(BlocksFailedError, match="the token"):
        list(executor.run(expired, [Job(n, tmp_path) for n in range(6)], "test", describe))
    assert starts(tmp_path, 3) == faults.EXPIRED_TRIES


def test_a_retry_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While one block waits for its next try the others run, and nothing runs meanwhile twice."""
    monkeypatch.setattr(loop, "wait_before", lambda tries: 0.5)
    before = time.monotonic()
    with start_executor("serial", 1) as pool:
        results = list(pool.run(first_try_fails, [Job(n, tmp_path) for n in range(5)], "test"))
    assert results == [1, 2, 3, 4, 0]
    assert 0.5 <= time.monotonic() - before < 5


# workers that are killed


@IN_OTHERS
def test_a_block_too_large_is_reported_with_its_peak(executor: Executor, tmp_path: Path):
    """The message names the block, what was planned, what was seen, and what to lower."""
    results: list[int] = []
    jobs = [Job(n, tmp_path) for n in range(8)]
    with pytest.raises(BlocksFailedError) as raised:
        results.extend(executor.run(grow_and_die, jobs, "test", describe, projected=123_000_000))
    assert sorted(results) == [0, 1, 2, 4, 5, 6, 7]
    message = str(raised.value)
    assert "block 3 of channel 0, region [3:4], lost its worker" in message
    assert "projected peak is 123 MB" in message
    seen = re.search(r"seen were (\d+) MB", message)
    assert seen
    assert 240 < int(seen[1]) < 2000
    assert "lower memory= or workers=, or give a smaller block=" in message


class FailingPool(Executor):
    """Its workers die of every task."""

    window = 1
    submitted = 0

    def submit(self, function: Any, task: Any, name: str, number: int) -> Any:
        self.submitted += 1
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future

    def wait(self, futures: Collection[Any], timeout: float | None = None) -> Iterable[Any]:
        return futures

    def worker_died(self, error: BaseException) -> bool:
        return isinstance(error, BrokenProcessPool)


def test_blocks_that_all_kill_are_not_all_tried(tmp_path: Path):
    """A memory limit that no block respects is found out after a few."""
    pool = FailingPool()
    with pytest.raises(BlocksFailedError, match=r"peak is unknown .* seen were unknown"):
        list(pool.run(poison, [Job(n, tmp_path) for n in range(1000)], "test", describe))
    assert pool.submitted == loop.MOST_KILLERS * loop.TRIES


def test_peaks_outlast_what_is_held():
    """The system keeps a process's largest memory, so that looking now and then is enough."""
    block = np.ones(20_000_000)  # 160 MB
    held = psutil.Process().memory_info().rss
    del block
    peak = peak_memory(os.getpid())
    assert peak is not None
    assert peak >= held - 1e6
    assert peak_memory(2**22 + 1) is None


# tasks that hang


@IN_OTHERS
@pytest.mark.usefixtures("patience")
def test_a_task_that_hangs_is_tried_elsewhere(
    executor: Executor, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Cancelled after a time that follows from its siblings', and done by another worker."""
    jobs = [Job(n, tmp_path) for n in range(20)]
    assert sorted(executor.run(hang_once, jobs, "test", describe)) == list(range(20))
    assert starts(tmp_path, 5) == 2
    assert re.search(r"block 5 of .* is not done after \d+ s, others took", caplog.text)


@pytest.mark.usefixtures("patience")
def test_a_task_that_always_hangs_has_failed(tmp_path: Path):
    """After as many tries as any other fault gets; the others are done."""
    results: list[int] = []
    jobs = [Job(n, tmp_path) for n in range(20)]
    with (
        start_executor("processes", 2, prepare=prepare) as pool,
        pytest.raises(BlocksFailedError) as raised,
    ):
        results.extend(pool.run(hang, jobs, "test", describe))
    assert sorted(results) == [n for n in range(20) if n != 5]
    assert starts(tmp_path, 5) == loop.TRIES
    assert re.search(r"block 5 of .* is not done after .* in each of 3 tries", str(raised.value))


@pytest.mark.usefixtures("patience")
def test_a_thread_that_hangs_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """It cannot be cancelled: one warning names its block."""
    with start_executor("threads", 2) as pool:
        results = list(pool.run(take_long, [Job(n, tmp_path) for n in range(20)], "t", describe))
    assert sorted(results) == list(range(20))
    assert len(re.findall(r"block 5 of .* it may hang, but cannot be cancelled", caplog.text)) == 1


def test_a_slow_task_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Less than the least patience is never taken for hanging, however quick the others were."""
    monkeypatch.setattr(loop, "LEAST_PATIENCE", 30.0)
    monkeypatch.setattr(loop, "PATIENCE", 1.0)
    with start_executor("processes", 2, prepare=prepare) as pool:
        monkeypatch.setattr(pool, "abandon", lambda *arguments: pytest.fail("abandoned"))
        results = list(pool.run(take_long, [Job(n, tmp_path) for n in range(8)], "t"))
    assert sorted(results) == list(range(8))


@pytest.mark.usefixtures("patience")
def test_a_user_s_cluster_restarts_the_worker_and_tells_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """There too a task that hangs is done by another worker; memory is what workers report."""
    distributed = pytest.importorskip("distributed")
    from cdd_dask.executors import dask

    monkeypatch.setattr(dask, "SECONDS_BETWEEN_REPORTS", 0.1)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        distributed.Client(cluster) as client,
        start_executor("distributed", 2, client, prepare) as pool,
    ):
        jobs = [Job(n, tmp_path) for n in range(20)]
        assert sorted(pool.run(hang_once, jobs, "test", describe)) == list(range(20))
        assert starts(tmp_path, 5) == 2
        assert len(client.scheduler_info()["workers"]) == 2
        address = next(iter(client.scheduler_info()["workers"]))
        while (seen := pool._peaks.of(address)) is None:  # type: ignore[attr-defined]
            time.sleep(0.05)
        assert seen > 1e7


# Ctrl-C and SIGTERM


def started(folder: Path, *options: str, marker: str = "-pass1:") -> subprocess.Popen[str]:
    """A decomposition of some minutes, a process group of its own, that has begun to compute."""
    np.save(folder / "in.npy", np.random.default_rng(0).lognormal(size=(96, 96, 96)))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cdd_dask", "decompose", "in.npy", "out.zarr"),
            *("--engine", "reference", "--num-channels", "4", *options),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr
    for line in process.stderr:
        if marker in line:
            return process
    raise AssertionError(process.wait())


def ended(process: subprocess.Popen[str], number: int) -> str:
    """What a process says that gets a signal, as its group does; all its children are gone."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    _, left = psutil.wait_procs(children, timeout=5)
    assert not left
    return said


SMALL = ("--block", "32")
STOPS = [
    (("--executor", "serial"), signal.SIGINT),
    (("--executor", "threads", "--workers", "2"), signal.SIGTERM),
    (("--executor", "processes", "--workers", "2"), signal.SIGINT),
    (("--executor", "distributed", "--workers", "2"), signal.SIGTERM),
    *(
        pytest.param(("--executor", pool, "--workers", "2"), number, marks=pytest.mark.slow)
        for pool, number in (("processes", signal.SIGTERM), ("distributed", signal.SIGINT))
    ),
]


@pytest.mark.parametrize(("options", "number"), STOPS)
def test_a_run_is_stopped_by_signals(tmp_path: Path, options: tuple[str, ...], number: int):
    """Whole groups get them, as from a terminal: one line, the right status, no process left."""
    process = started(tmp_path, *SMALL, *options)
    said = ended(process, number)
    assert process.returncode == 128 + number
    assert "stopped: run the same command again (without --overwrite) to go on" in said
    assert "Traceback" not in said
    assert "distributed." not in said


@pytest.mark.parametrize("name", ["processes", "distributed"])
def test_a_run_is_stopped_while_it_starts(tmp_path: Path, name: str):
    """Workers that are still loading their libraries say nothing either."""
    process = started(tmp_path, *SMALL, "--executor", name, "--workers", "2", marker="executor ")
    while len(psutil.Process(process.pid).children()) < 2:
        time.sleep(0.02)
    time.sleep(0.3)
    said = ended(process, signal.SIGINT)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "distributed." not in said


def scripted(folder: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process that runs `script` first, when it says so."""
    head = f"import subprocess, sys, time\nfrom cdd_dask import cli\nsys.argv[1:] = {arguments}\n"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{head}{script}\ncli.main()"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    return process


def test_a_second_signal_ends_at_once(tmp_path: Path):
    """Blocks in threads cannot be stopped, but nobody must wait for them; children end, too."""
    np.save(tmp_path / "in.npy", np.ones((16, 16)))
    script = (
        "from cdd_dask import run\nsubprocess.Popen(['sleep', '60'])\n"
        "run.run_task = lambda task: (print('up\\n', end='', flush=True), time.sleep(60))"
    )
    options = ("--executor", "threads", "--workers", "2", "--block", "8", "--max-scale", "2")
    process = scripted(tmp_path, script, "decompose", "in.npy", "out.zarr", *options)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert children
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_other_verbs_are_interrupted(tmp_path: Path):
    """Nothing of theirs could go on."""
    script = (
        "from cdd_dask import decomposition\n"
        "decomposition.open_decomposition = lambda *_, **__: (print('up', flush=True), "
        "time.sleep(60))"
    )
    process = scripted(tmp_path, script, "info", "out.zarr")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said.strip()) == (143, "interrupted")


@pytest.mark.parametrize("name", ["processes", "distributed"])
def test_workers_end_with_a_killed_run(tmp_path: Path, name: str):
    """SIGKILL to a run leaves nobody behind who would write or hold memory."""
    process = started(tmp_path, *SMALL, "--executor", name, "--workers", "2")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate(timeout=20)
    _, left = psutil.wait_procs(children, timeout=20)
    assert not left
