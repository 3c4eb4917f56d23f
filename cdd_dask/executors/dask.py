"""Workers of a Dask cluster: the user's own, or one made on this machine."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from typing import Any

from distributed import WorkerPlugin

from cdd_dask.errors import InputError, RunError
from cdd_dask.executors.base import NO_PROCESSES, Executor

log = logging.getLogger(__name__)

WINDOW_PER_THREAD = 4
"""Tasks in flight for each of a cluster's threads: enough to hide the scheduler's latency."""
LARGEST_WINDOW = 256
"""More in flight only burden the scheduler, unless that leaves threads idle."""
SECONDS_FOR_THE_LAST = 600.0
"""How long a failed run waits for blocks that its workers still compute."""


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
        self._run = uuid.uuid4().hex[:8]
        try:
            client.register_plugin(_Prepare(prepare), name=f"cdd-dask-{self._run}")
            info = workers_of(client)
        except BaseException:
            self.close()
            raise
        threads = sum(worker["nthreads"] for worker in info.values())
        self.window = max(8, min(WINDOW_PER_THREAD * threads, max(LARGEST_WINDOW, 2 * threads)))
        self._resources = {"GPU": 1} if all_have_gpus(info) else {}

    def submit(self, function: Callable[[Any], Any], task: Any, name: str, number: int) -> Any:
        # the dashboard shows a key's first part, up to the first hyphen before a digit; so the
        # readable name is the first item of a tuple, which it shows as a group
        key = (f"{name}-{self._run}", number, uuid.uuid4().hex[:4])
        return self.client.submit(
            function, task, key=key, pure=False, resources=self._resources, retries=0
        )

    def wait(self, futures: Collection[Any]) -> Iterable[Any]:
        from distributed import wait

        with self.client.as_current():  # the user's client need not be the default one
            done: Iterable[Any] = wait(list(futures), return_when="FIRST_COMPLETED").done
        return done

    def worker_died(self, error: BaseException) -> bool:
        from distributed.scheduler import KilledWorker

        return isinstance(error, KilledWorker)

    def cancel(self, futures: Collection[Any]) -> None:
        if not futures:
            return
        self.client.cancel(list(futures), force=True)
        # what has begun cannot be stopped, and must not write after its run has ended
        patience = time.monotonic() + SECONDS_FOR_THE_LAST
        while any(self.client.run(_computes, self._run, on_error="ignore").values()):
            if time.monotonic() > patience:
                log.warning("workers still compute blocks of a run that has ended")
                return
            time.sleep(0.05)

    def close(self) -> None:
        if self._cluster is not None:
            self.client.close()
            self._cluster.close()
        elif self.client.status == "running":
            self.client.unregister_worker_plugin(f"cdd-dask-{self._run}")


class _Prepare(WorkerPlugin):  # type: ignore[misc]  # distributed is not typed
    """Makes a worker ready when it joins: also one that comes late, or again."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare

    def setup(self, worker: Any) -> None:
        self._prepare()


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
    import dask
    from distributed import Client, LocalCluster

    settings = {
        "distributed.scheduler.allowed-failures": 2,
        # an hour of samples of every worker's stack would outgrow what the plan allows it
        "distributed.worker.profile.enabled": False,
    }
    with dask.config.set(settings):
        try:
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
    """
    if not hasattr(client, "scheduler_info") or getattr(client, "asynchronous", False):
        raise InputError(f"client={client!r} must be a synchronous distributed.Client")
    if client.status != "running":
        raise InputError(f"client={client!r} is {client.status}: connect it to a scheduler")
    info = client.scheduler_info(n_workers=-1)["workers"]
    if not info:
        raise InputError(f"client={client!r} has no workers: start some first")
    return dict(info)
