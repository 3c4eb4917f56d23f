"""Pools of threads and of processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable
from concurrent import futures as pools
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cdd_dask.errors import RunError
from cdd_dask.executors.base import NO_PROCESSES, Executor


class ThreadsExecutor(Executor):
    """Runs tasks on threads of this process; SciPy and torch compute outside the GIL."""

    def __init__(self, workers: int) -> None:
        self.window = 2 * workers
        self._pool: pools.Executor = pools.ThreadPoolExecutor(workers)

    def submit(self, function: Callable[[Any], Any], task: Any, name: str, number: int) -> Any:
        return self._pool.submit(function, task)

    def wait(self, futures: Collection[Any]) -> Iterable[Any]:
        return pools.wait(futures, return_when=pools.FIRST_COMPLETED).done

    def worker_died(self, error: BaseException) -> bool:
        return False

    def cancel(self, futures: Collection[Any]) -> None:
        super().cancel(futures)
        pools.wait(futures)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class ProcessesExecutor(ThreadsExecutor):
    """Runs tasks in processes of this machine, which start afresh (``spawn``).

    Parameters
    ----------
    workers
        Number of processes.
    prepare
        Called in each when it starts; importable by its name.
    """

    def __init__(self, workers: int, prepare: Callable[[], None]) -> None:
        self.window = 2 * workers
        self._workers, self._prepare = workers, prepare
        self._pool = self._start()

    def _start(self) -> pools.Executor:
        pool = pools.ProcessPoolExecutor(
            self._workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=self._prepare,
        )
        # a pool starts a process when a task finds none idle: have all of them now
        try:
            pools.wait([pool.submit(os.getpid) for _ in range(self._workers)])
            pool.submit(os.getpid).result()
        except BrokenProcessPool as error:
            pool.shutdown(wait=False)
            raise RunError(NO_PROCESSES) from error
        return pool

    def submit(self, function: Callable[[Any], Any], task: Any, name: str, number: int) -> Any:
        try:
            return super().submit(function, task, name, number)
        except BrokenProcessPool:  # a worker died, and its future is still to be seen
            self.recover()
            return super().submit(function, task, name, number)

    def worker_died(self, error: BaseException) -> bool:
        return isinstance(error, BrokenProcessPool)

    def recover(self) -> None:
        # every future of the broken pool says so: only the first needs a new one
        if getattr(self._pool, "_broken", False):
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = self._start()
