"""One suite for every executor: what each owes a run, also when tasks and workers fail.

What happens in workers is counted through files, which outlive them.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest

import cdd_dask
from cdd_dask.errors import BlockError, BlocksFailedError, CddError, InputError
from cdd_dask.executors import Executor, start_executor
from cdd_dask.executors.base import TRIES
from cdd_dask.plans import Pass
from cdd_dask.progress import Progress
from cdd_dask.task import THREAD_LIMITS, Task, run_task
from cdd_dask.working import Nature

EXECUTORS = ("serial", "threads", "processes", "distributed")


@pytest.fixture(scope="module", params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Every executor in turn, started once, with two workers where it has any."""
    with start_executor(request.param, workers=2) as started:
        started.called = request.param  # type: ignore[attr-defined]
        yield started


LOSES_WORKERS = pytest.mark.parametrize("executor", ["processes", "distributed"], indirect=True)
"""Executors whose workers can die without taking the tests along."""


# what workers run: importable by name


@dataclass(frozen=True)
class Job:
    """A number, and a folder for what has to be counted."""

    number: int
    folder: Path | None = None

    def count(self) -> int:
        """Note that the job was started, and say how often it has been."""
        assert self.folder is not None
        for tries in itertools.count(1):
            try:
                (self.folder / f"{self.number}-{tries}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return tries
        raise AssertionError


def starts(folder: Path, number: int) -> int:
    """How often job `number` was started."""
    return len(list(folder.glob(f"{number}-*")))


def square(job: Job) -> int:
    return job.number**2


def fail_on_three(job: Job) -> int:
    if job.number == 3:
        raise InputError("number=3 is refused: take another")
    return job.number**2


def fail_twice(job: Job) -> int:
    if job.count() <= 2:
        raise ConnectionError("the network is down")
    return job.number**2


def fail_twice_inside(job: Job) -> int:
    """The way `run_task` fails: its error has the passing one as its cause."""
    try:
        return fail_twice(job)
    except ConnectionError as error:
        raise BlockError(f"block {job.number} failed: {error}") from error


def fail_always(job: Job) -> int:
    job.count()
    raise ConnectionError("the network is gone")


def refuse(job: Job) -> int:
    job.count()
    raise ValueError("this will never work")


def die_once(job: Job) -> int:
    if job.number == 2 and job.count() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number**2


def die_on_five(job: Job) -> int:
    job.count()
    if job.number == 5:
        os._exit(1)
    time.sleep(0.01)
    return job.number**2


def fail_first_then_linger(job: Job) -> int:
    assert job.folder is not None
    if job.number == 0:
        while not list(job.folder.glob("begun-*")):  # another one must be running
            time.sleep(0.01)
        raise InputError("the first one fails")
    (job.folder / f"begun-{job.number}").touch()
    time.sleep(1)
    (job.folder / f"ended-{job.number}").touch()
    return job.number


def describe(job: Job) -> str:
    return f"job number {job.number}"


# the contract


@pytest.mark.parametrize("count", [0, 1, 57])
def test_every_task_runs_once(executor: Executor, count: int):
    """All results arrive, each once, in whatever order."""
    results = list(executor.run(square, map(Job, range(count)), "test"))
    assert sorted(results) == [n**2 for n in range(count)]


def test_tasks_are_read_as_they_are_submitted(executor: Executor):
    """A run of a million blocks is never a list: at most a window is read ahead of the results."""
    read = itertools.count()
    furthest = 0

    def tasks() -> Iterator[Job]:
        nonlocal furthest
        for number in range(60):
            furthest = next(read) + 1
            yield Job(number)

    for done, _ in enumerate(executor.run(square, tasks(), "test"), start=1):
        assert furthest <= done + executor.window
    assert done == furthest == 60
    assert executor.window <= 16


def test_nothing_runs_before_it_is_asked_for(executor: Executor):
    """`run` is a generator: making it submits nothing, closing it ends it."""
    read: list[int] = []
    results = executor.run(square, (read.append(n) or Job(n) for n in range(100)), "test")
    assert read == []
    next(results)
    results.close()
    assert len(read) <= executor.window + 1
    assert list(executor.run(square, [Job(7)], "test")) == [49]


def test_an_error_of_a_task_arrives_as_it_is(executor: Executor):
    """Type and message survive the way between processes, and the pool serves the next run."""
    with pytest.raises(InputError, match=r"^number=3 is refused: take another$"):
        list(executor.run(fail_on_three, map(Job, range(20)), "test"))
    assert sorted(executor.run(square, map(Job, range(4)), "test")) == [0, 1, 4, 9]


@pytest.mark.parametrize("function", [fail_twice, fail_twice_inside])
def test_passing_errors_are_tried_again(
    executor: Executor, tmp_path: Path, function: Callable[[Job], int]
):
    """A lost connection is no reason to lose a run, also where it is only the cause of an error."""
    results = list(executor.run(function, [Job(n, tmp_path) for n in range(5)], "test"))
    assert sorted(results) == [0, 1, 4, 9, 16]
    assert [starts(tmp_path, n) for n in range(5)] == [3] * 5


def test_an_error_that_stays_is_raised_in_the_end(executor: Executor, tmp_path: Path):
    """Passing or not, a task is tried a bounded number of times."""
    with pytest.raises(BlocksFailedError, match="ConnectionError: the network is gone"):
        list(executor.run(fail_always, [Job(0, tmp_path)], "test"))
    assert starts(tmp_path, 0) == TRIES


def test_other_errors_are_not_tried_again(executor: Executor, tmp_path: Path):
    """What fails for good is tried once."""
    with pytest.raises(BlocksFailedError, match="ValueError: this will never work"):
        list(executor.run(refuse, [Job(0, tmp_path)], "test"))
    assert starts(tmp_path, 0) == 1


def test_nothing_runs_on_after_a_failure(executor: Executor, tmp_path: Path):
    """When `run` has raised, no task of it writes any more: what it made can be removed."""
    jobs = [Job(n, tmp_path) for n in range(6)]
    if executor.called == "serial":  # type: ignore[attr-defined]
        (tmp_path / "begun-0").touch()  # nothing runs beside the first
    with pytest.raises(InputError, match="the first one fails"):
        list(executor.run(fail_first_then_linger, jobs, "test"))
    begun, ended = (
        {path.name.split("-")[1] for path in tmp_path.glob(f"{what}-[1-9]")}
        for what in ("begun", "ended")
    )
    assert begun == ended


# workers that die


@LOSES_WORKERS
def test_a_worker_that_dies_once_is_survived(executor: Executor, tmp_path: Path):
    """Killed once by SIGKILL, a block is computed by another worker; all results are there."""
    results = executor.run(die_once, [Job(n, tmp_path) for n in range(12)], "test", describe)
    assert sorted(results) == [n**2 for n in range(12)]
    assert starts(tmp_path, 2) == 2


@LOSES_WORKERS
def test_a_block_that_kills_is_named(executor: Executor, tmp_path: Path):
    """Killing at every try ends the run, after a bounded number, with the killer's name.

    Not with the name of a block that only happened to wait for the same worker.
    """
    jobs = [Job(n, tmp_path) for n in range(24)]
    with pytest.raises(BlocksFailedError, match=r"\n  job number 5 lost its worker .*memory="):
        list(executor.run(die_on_five, jobs, "test", describe))
    assert 1 < starts(tmp_path, 5) <= 2 * TRIES
    assert sorted(executor.run(square, map(Job, range(4)), "test")) == [0, 1, 4, 9]


@pytest.mark.slow  # 20 s: nannies take their time
@pytest.mark.timeout(100)
def test_a_cluster_that_lost_all_workers_does_not_hang():
    """Workers that are gone and do not come back: others take over, or the run ends in an error.

    Happens when a worker dies while it starts: its nanny then gives up.
    """
    with start_executor("distributed", workers=2) as pool:
        results = pool.run(square, map(Job, range(100)), "test")
        seen = [next(results)]
        for nanny in list(pool._cluster.workers.values()):  # type: ignore[attr-defined]
            pool._cluster.sync(nanny.close)  # type: ignore[attr-defined]
        stopped = False
        try:
            seen += list(results)
        except CddError:
            stopped = True
    assert stopped or sorted(seen) == [n**2 for n in range(100)]


def test_suspects_are_tried_alone():
    """After a death nothing else runs beside a task that was in flight.

    So the one that kills is found, and tasks that only together are too large for the memory
    are computed one by one. A pool in a list shows what ran together.
    """
    pool = FragilePool(window=4)
    assert sorted(pool.run(square, map(Job, range(12)), "test")) == [n**2 for n in range(12)]
    suspects = pool.batches[0]
    assert len(suspects) == 4
    for batch in pool.batches[1:]:
        assert len(batch) == 1 or not suspects & batch


class FragilePool(Executor):
    """Runs what was submitted together at once, and the first time dies of it."""

    def __init__(self, window: int) -> None:
        self.window, self.batches = window, []

    def submit(self, function: Any, task: Any, name: str, number: int) -> Any:
        future: Future[Any] = Future()
        future.job = (function, task)  # type: ignore[attr-defined]
        return future

    def wait(self, futures: Collection[Any], timeout: float | None = None) -> Iterable[Any]:
        self.batches.append({future.job[1].number for future in futures})
        for future in futures:
            if len(self.batches) == 1:
                future.set_exception(BrokenProcessPool("killed"))
            else:
                function, task = future.job
                future.set_result(function(task))
        return list(futures)

    def worker_died(self, error: BaseException) -> bool:
        return isinstance(error, BrokenProcessPool)


# whole runs


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A user's own cluster."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as made:
        yield made


@pytest.fixture
def expected(outputs: Any, lognormal: Any) -> Any:
    """A field and its channels, computed block by block in this process."""
    field = lognormal((40, 21))
    return field, outputs(field, block=(16, 21), max_scale=2, e_rel=0.3)


OPTIONS = {"max_scale": 2, "e_rel": 0.3, "block": (16, 21)}


@pytest.mark.parametrize("name", EXECUTORS)
def test_runs_are_the_same_bits(tmp_path: Path, outputs: Any, expected: Any, name: str):
    """Whoever computes the blocks, and in whatever order, the channels are the same."""
    field, channels = expected
    workers = {} if name == "serial" else {"workers": 2}
    np.save(tmp_path / "in.npy", field)
    result = outputs(
        tmp_path / "in.npy", tmp_path / "out.zarr", executor=name, **workers, **OPTIONS
    )
    assert np.array_equal(result, channels)


@pytest.mark.parametrize("default", [True, False])
def test_a_user_s_client_is_used_and_left_alone(
    tmp_path: Path, outputs: Any, expected: Any, cluster: Any, default: bool
):
    """The user's client computes the blocks, whether it is the default one or not, and lives on."""
    from distributed import Client

    field, channels = expected
    with Client(cluster, set_as_default=default) as client:
        result = outputs(field, tmp_path / "out.zarr", client=client, **OPTIONS)
        assert np.array_equal(result, channels)
        assert client.submit(abs, -1).result() == 1
        assert len(client.scheduler_info()["workers"]) == 2
        plan = cdd_dask.open_decomposition(tmp_path / "out.zarr").attrs["plan"]
        assert plan["resources"]["executor"] == "distributed"
        assert plan["resources"]["workers"] == 2


def test_the_dashboard_shows_names(tmp_path: Path, lognormal: Any, cluster: Any):
    """While a client runs, its tasks are called after channel and pass; each block once."""
    from distributed import Client, get_task_stream

    field = lognormal((40, 21))
    np.save(tmp_path / "in.npy", field)
    with Client(cluster) as client, get_task_stream(client) as stream:
        cdd_dask.decompose(
            tmp_path / "in.npy", tmp_path / "out.zarr", client=client, progress=False, **OPTIONS
        )
    keys = [str(task["key"]).lstrip("('\"") for task in stream.data]
    names = [key.split("pass1")[0] for key in keys if key.startswith("decompose-ch")]
    assert sorted(names) == ["decompose-ch00-"] * 3 + ["decompose-ch01-"] * 3
    assert sum(key.startswith("decompose-copy-in") for key in keys) == 3


def test_the_cluster_keeps_nothing(tmp_path: Path, lognormal: Any, cluster: Any):
    """After a run the scheduler has forgotten its tasks, and no worker holds a result."""
    from distributed import Client

    with Client(cluster) as client:
        cdd_dask.decompose(
            lognormal((40, 21)), tmp_path / "out.zarr", client=client, progress=False, **OPTIONS
        )
        for _ in range(100):  # the last release is on its way
            left = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
            if not left:
                break
            time.sleep(0.05)
        assert left == 0


@pytest.mark.parametrize("name", ["processes", "distributed"])
def test_a_run_survives_the_death_of_a_worker(
    tmp_path: Path, outputs: Any, expected: Any, monkeypatch: pytest.MonkeyPatch, name: str
):
    """SIGKILL to a worker in the middle of a whole run: the same channels come out."""
    field, channels = expected
    np.save(tmp_path / "in.npy", field)
    others, killed = workers_now(), []

    def advance(self: Progress, work: int) -> None:
        done.append(work)
        if len(done) == 4:
            killed.append((workers_now() - others).pop())
            killed[0].kill()

    done: list[int] = []
    monkeypatch.setattr(Progress, "advance", advance)
    result = outputs(
        tmp_path / "in.npy", tmp_path / "out.zarr", executor=name, workers=2, **OPTIONS
    )
    assert killed
    assert not killed[0].is_running()
    assert np.array_equal(result, channels)


def workers_now() -> set[psutil.Process]:
    """The processes that this one spawned to work."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(process.cmdline()):
                found.add(process)
    return found


def test_a_task_is_an_address_and_integers():
    """What travels to a worker is small, whatever the volume: at most 1 kB with its function."""
    work = Pass("diffuse", tuple(range(1, 10)), 63, 10**4, 10**5, 10**9)
    address, nature = f"/scratch/{'long/' * 30}out.zarr", Nature(-1, True)
    task = Task(address, uuid.uuid4().hex[:12], work, 10**6, 10**9, nature)
    assert len(cloudpickle.dumps((run_task, task))) <= 1000
    assert cloudpickle.loads(cloudpickle.dumps(task)) == task


@pytest.mark.parametrize("name", ["serial", "threads"])
def test_the_caller_s_process_is_left_as_it_was(
    outputs: Any, lognormal: Any, monkeypatch: pytest.MonkeyPatch, name: str
):
    """A library call changes neither the environment of its process nor torch's threads."""
    torch = pytest.importorskip("torch")
    for variable in THREAD_LIMITS:
        monkeypatch.delenv(variable, raising=False)
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        outputs(lognormal((9, 9)), executor=name, engine="torch", device="cpu", **OPTIONS)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert dict(os.environ) == before


def test_closing_ends_the_pool():
    """A closed generator and a left `with` leave no worker behind."""
    with start_executor("processes", workers=2) as pool:
        with closing(pool.run(square, map(Job, range(50)), "test")) as results:
            next(results)
        pids = list(pool._pool._processes)  # type: ignore[attr-defined]
        assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
