"""Workers of a Dask cluster: the user's own, or one made on this machine."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from typing import Any

from cdd_dask.errors import InputError
from cdd_dask.executors.base import Executor

log = logging.getLogger(__name__)

WINDOW_PER_THREAD = 4
"""Tasks in flight for each of a cluster's threads: enough to hide the scheduler's latency."""
LARGEST_WINDOW = 256
"""More in flight only burden the scheduler, unless that leaves threads idle."""


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

    tries_per_death = 1  # the scheduler has tried again, `allowed-failures` times

    def __init__(self, client: Any, workers: int, prepare: Callable[[], None]) -> None:
        self._cluster = None
        if client is None:
            self._cluster, client = start_local_cluster(workers)
        self.client = client
        info = workers_of(client)
        client.run(prepare)
        threads = sum(worker["nthreads"] for worker in info.values())
        self.window = max(8, min(WINDOW_PER_THREAD * threads, max(LARGEST_WINDOW, 2 * threads)))
        # a resource that no worker declares would leave tasks pending for ever
        gpus = [worker for worker in info.values() if worker["resources"].get("GPU")]
        self._resources = {"GPU": 1} if info and len(gpus) == len(info) else {}
        self._run = uuid.uuid4().hex[:8]

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
        while any(self.client.run(_computes, self._run).values()):
            time.sleep(0.05)

    def close(self) -> None:
        if self._cluster is not None:
            self.client.close()
            self._cluster.close()


def _computes(run: str, dask_worker: Any) -> bool:
    """Whether a worker still computes a task of a run, cancelled or not."""
    busy = ("executing", "long-running", "cancelled", "resumed")
    tasks = list(dask_worker.state.tasks.values())
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
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
        )
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
