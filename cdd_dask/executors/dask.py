"""Workers of a Dask cluster: the user's own, or one made on this machine."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import dask.utils
from distributed import WorkerPlugin

from cdd_dask.errors import AGAIN, ClusterError, InputError, RunError
from cdd_dask.executors.base import NO_PROCESSES, SECONDS_FOR_THE_LAST, Executor
from cdd_dask.executors.processes import (
    SECONDS_BETWEEN_LOOKS,
    Peaks,
    deaf_to_interrupts,
    peak_memory,
)

log = logging.getLogger(__name__)

WINDOW_PER_THREAD = 4
"""Tasks in flight for each of a cluster's threads: enough to hide the scheduler's latency."""
LARGEST_WINDOW = 256
"""More in flight only burden the scheduler, unless that leaves threads idle."""
SECONDS_BETWEEN_REPORTS = 5.0
"""Between two looks at what a user's workers have told their scheduler."""
SECONDS_TO_RESTART = 30.0
"""How long a worker on which a task hung may take to be back."""
SECONDS_BETWEEN_CHECKS = 5.0
"""Between two looks whether there still is a scheduler, while tasks are waited for."""


@contextmanager
def losses_told() -> Iterator[None]:
    """Say what to do where the scheduler cannot be reached, or a worker that was asked."""
    try:
        yield
    except (OSError, CancelledError) as error:
        raise _lost(error) from error


def _lost(why: object) -> ClusterError:
    line = " ".join(str(why).split())
    return ClusterError(
        f"the cluster has lost its scheduler, or a worker that was asked ({line}): see that it "
        f"runs, and {AGAIN}, finished blocks are kept"
    )


class DaskExecutor(Executor):
    """Runs tasks on the workers of a `distributed.Client`.

    Parameters
    ----------
    client
        The user's client; None starts a `LocalCluster`, whose dashboard and scheduler listen
        on the loopback interface only.
    workers
        Processes of that `LocalCluster`, each with one thread.
    prepare
        Called in every worker before the first task; importable by its name.
    """

    # the scheduler has tried again, `allowed-failures` times, but counts a death against every
    # task that waited on the worker: alone, once more, tells which of them kills
    tries_per_death = 2

    def __init__(self, client: Any, workers: int, prepare: Callable[[], None]) -> None:
        self._cluster = None
        if client is None:
            self._cluster, client = start_local_cluster(workers)
        self.client = client
        self._elsewhere: dict[int, list[str]] = {}
        """Workers that a task shall rather run on, by its number: it hung on another."""
        self._peaks: Peaks | None = None
        self._run = uuid.uuid4().hex[:8]
        try:
            with losses_told():
                client.register_plugin(_Prepare(prepare), name=f"cdd-dask-{self._run}")
            info = workers_of(client)
        except BaseException:
            self.close()
            raise
        threads = sum(worker["nthreads"] for worker in info.values())
        self.window = max(8, min(WINDOW_PER_THREAD * threads, max(LARGEST_WINDOW, 2 * threads)))
        self._resources = {"GPU": 1} if all_have_gpus(info) else {}
        interval = SECONDS_BETWEEN_REPORTS if self._cluster is None else SECONDS_BETWEEN_LOOKS
        self._peaks = Peaks(self._memory_of_workers, interval)

    def submit(self, function: Callable[[Any], Any], task: Any, name: str, number: int) -> Any:
        # the dashboard shows a key's first part, up to the first hyphen before a digit; so the
        # readable name is the first item of a tuple, which it shows as a group
        key = (f"{name}-{self._run}", number, uuid.uuid4().hex[:4])
        elsewhere = self._elsewhere.pop(number, None) or None
        self._check_scheduler()
        with dask.annotate(span=_span()):
            return self.client.submit(
                function,
                task,
                key=key,
                pure=False,
                resources=self._resources,
                retries=0,
                workers=elsewhere,
                allow_other_workers=elsewhere is not None,
            )

    def wait(self, futures: Collection[Any], timeout: float | None = None) -> Iterable[Any]:
        from distributed import wait

        end = float("inf") if timeout is None else time.monotonic() + timeout
        if known := [future for future in futures if future.done()]:
            return known  # which a wait of no time would not see
        with self.client.as_current():  # the user's client need not be the default one
            while True:
                self._check_scheduler()
                left = max(0.0, end - time.monotonic())
                with suppress(TimeoutError, CancelledError):
                    wait(list(futures), min(left, SECONDS_BETWEEN_CHECKS), "FIRST_COMPLETED")
                self._check_scheduler()  # if it is gone, nobody gives out results
                done = [future for future in futures if future.done()]
                if done or time.monotonic() >= end:
                    return done

    def result(self, future: Any) -> Any:
        if future.status != "finished":
            return future.result()  # raises
        with losses_told():
            return future.result()

    def _check_scheduler(self) -> None:
        if self.client.status != "running":
            raise _lost(f"the client is {self.client.status}")

    @losses_told()
    def everywhere(self, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        return dict(self.client.run(function, *args, on_error="return"))

    def worker_died(self, error: BaseException) -> bool:
        from distributed.scheduler import KilledWorker

        return isinstance(error, KilledWorker)

    def peak_of(self, error: BaseException) -> int | None:
        address = getattr(getattr(error, "last_worker", None), "address", "")
        return self._peaks.of(address) if self._peaks else None

    def _memory_of_workers(self) -> dict[str | int, int | None]:
        if self._cluster is not None:
            nannies = list(self._cluster.workers.values())
            return {one.worker_address: peak_memory(one.pid) for one in nannies if one.pid}
        return {
            address: worker["metrics"]["memory"]
            for address, worker in _known_workers(self.client).items()
        }

    @losses_told()
    def has_begun(self, future: Any) -> bool:
        return self._worker_of(future) is not None

    def _worker_of(self, future: Any) -> str | None:
        """Address of the worker that has a task; None while the task waits at the scheduler."""
        held = self.client.processing().items()
        return next((address for address, keys in held if future.key in keys), None)

    @losses_told()
    def abandon(self, future: Any, number: int, pending: Collection[Any]) -> Collection[Any]:
        address = self._worker_of(future)
        known = _known_workers(self.client)
        self.client.cancel([future], force=True)
        # restarted, or without a nanny occupied for ever
        self._elsewhere[number] = [other for other in known if other != address]
        if address in known and known[address].get("nanny"):
            log.warning("restarting the worker %s, on which a task hangs", address)
            self.client.restart_workers(
                [address], timeout=SECONDS_TO_RESTART, raise_for_error=False
            )
        return (future,)

    @losses_told()
    def cancel(self, futures: Collection[Any], hurry: bool = False) -> None:
        if not futures or self.client.status != "running":
            return
        self.client.cancel(list(futures), force=True)
        if hurry:  # a later run writes the same bits, and nothing is written to that of another
            return
        # what has begun cannot be stopped, and must not write after its run has ended
        patience = time.monotonic() + SECONDS_FOR_THE_LAST
        while any(self.client.run(_computes, self._run, on_error="ignore").values()):
            if time.monotonic() > patience:
                log.warning("workers still compute blocks of a run that has ended")
                return
            time.sleep(0.05)

    def close(self) -> None:
        if self._peaks is not None:
            self._peaks.close()
        if self._cluster is not None:
            self.client.close()
            self._cluster.close()
        elif self.client.status == "running":
            with suppress(OSError, ValueError):  # a scheduler that was started anew has none
                self.client.unregister_worker_plugin(f"cdd-dask-{self._run}")
            with suppress(Exception):  # memory is all that it is about
                self.client.run_on_scheduler(_forget_tasks, _span()["ids"][-1])


@lru_cache(maxsize=1)
def _span() -> dict[str, Any]:
    """The one span, in Dask's sense, of all tasks that this process submits.

    The scheduler would else begin one for every few of them, and keep it for ever.
    """
    from distributed import span

    with span("cdd-dask"):
        annotation: dict[str, Any] = dask.get_annotations()["span"]
    return annotation


class _Prepare(WorkerPlugin):  # type: ignore[misc]  # distributed is not typed
    """Makes a worker ready when it joins: also one that comes late, or again."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare

    def setup(self, worker: Any) -> None:
        self._prepare()

    def teardown(self, worker: Any) -> None:
        _forget_keys()


def _forget_keys() -> None:
    """Empty Dask's cache of keys, which holds 100 000: those of a run are never used again."""
    dask.utils.key_split.cache_clear()


def _forget_tasks(span_id: str, dask_scheduler: Any) -> None:
    """Have a scheduler drop what it would keep of ended tasks: a span remembers every one."""
    _forget_keys()
    span = dask_scheduler.extensions["spans"].spans.get(span_id)
    if span is None:  # nothing was submitted
        return
    span.groups -= {group for group in span.groups if group.done}
    span.metadata["collections"].clear()


def all_have_gpus(info: dict[str, Any]) -> bool:
    """Whether every worker declares the resource ``GPU``; asked for otherwise, tasks would hang."""
    return all(worker["resources"].get("GPU") for worker in info.values())


def _computes(run: str, dask_worker: Any) -> bool:
    """Whether a worker still computes a task of a run, cancelled or not."""
    tasks = list(dask_worker.state.tasks.values())
    busy = ("executing", "long-running", "cancelled")
    return any(task.state in busy and run in str(task.key) for task in tasks)


def start_local_cluster(workers: int) -> tuple[Any, Any]:
    """A cluster of `workers` processes with one thread each on this machine, and its client."""
    from distributed import Client, LocalCluster

    settings = {
        "distributed.scheduler.allowed-failures": 2,
        # an hour of samples of every worker's stack would outgrow what the plan allows it
        "distributed.worker.profile.enabled": False,
    }
    with dask.config.set(settings):
        try:
            with deaf_to_interrupts():
                cluster = LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    silence_logs=logging.ERROR,
                )
        except RuntimeError as error:
            raise RunError(NO_PROCESSES) from error
        # a nanny gives up a worker that dies while it starts: have the cluster make another
        cluster.adapt(minimum=workers, maximum=workers, interval="1s")
        if find_spec("bokeh"):
            log.info("dashboard at %s", cluster.dashboard_link)
        return cluster, Client(cluster)


def workers_of(client: Any) -> dict[str, Any]:
    """What the scheduler knows of its workers, by address.

    Raises
    ------
    InputError
        If `client` is no connected client.
    ClusterError
        If the scheduler does not answer any more.
    """
    if not hasattr(client, "scheduler_info") or getattr(client, "asynchronous", False):
        raise InputError(f"client={client!r} must be a synchronous distributed.Client")
    if client.status != "running":
        raise InputError(f"client={client!r} is {client.status}: connect it to a scheduler")
    info = _known_workers(client)
    if not info:
        raise InputError(f"client={client!r} has no workers: start some first")
    return info


@losses_told()
def _known_workers(client: Any) -> dict[str, Any]:
    """What the scheduler knows of its workers now, by address."""
    # `client.scheduler_info` may return what the client's own periodic look has just found, which
    # leaves the workers out
    return dict(client.sync(client.scheduler.identity, n_workers=-1)["workers"])
