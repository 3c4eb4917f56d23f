"""Pools of threads and of processes on this machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterable
from concurrent import futures as pools
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cdd_dask.errors import RunError
from cdd_dask.executors.base import NO_PROCESSES, SECONDS_FOR_THE_LAST, Executor
from cdd_dask.executors.processes import (
    SECONDS_BETWEEN_LOOKS,
    Peaks,
    deaf_to_interrupts,
    end_with_parent,
    peak_memory,
)

log = logging.getLogger(__name__)

KILLED = -9
"""Exit code of a process that was killed, as by the system's out-of-memory killer."""
SECONDS_TO_ANSWER = 60.0
"""How long a process that was started may take until it works."""
SECONDS_FOR_OTHERS = 0.02
"""How long a process that has answered lets others answer."""


class ThreadsExecutor(Executor):
    """Runs tasks on threads of this process; SciPy and torch compute outside the GIL."""

    def __init__(self, workers: int) -> None:
        self.window = 2 * workers
        self._pool: pools.Executor = pools.ThreadPoolExecutor(workers)

    def submit(self, function: Callable[[Any], Any], task: Any, name: str, number: int) -> Any:
        return self._pool.submit(function, task)

    def wait(self, futures: Collection[Any], timeout: float | None = None) -> Iterable[Any]:
        return pools.wait(futures, timeout, return_when=pools.FIRST_COMPLETED).done

    def worker_died(self, error: BaseException) -> bool:
        return False

    def cancel(self, futures: Collection[Any], hurry: bool = False) -> None:
        super().cancel(futures)
        if hurry and (running := sum(future.running() for future in futures)):
            log.warning("stopping when %d blocks are done that threads compute", running)
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
        self._processes: dict[int, Any] = {}
        self._pool = self._start()
        self._peaks = Peaks(
            lambda: {pid: peak_memory(pid) for pid in self._processes}, SECONDS_BETWEEN_LOOKS
        )

    def _start(self) -> pools.Executor:
        pool = pools.ProcessPoolExecutor(
            self._workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._prepare,),
        )
        # a pool starts a process when a task finds none idle: have all of them now
        try:
            with deaf_to_interrupts():
                calls = [pool.submit(os.getpid) for _ in range(self._workers)]
            self._processes = dict(pool._processes)  # the pool forgets them when one has died
            pools.wait(calls)
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

    def everywhere(self, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        # an idle process takes a call, perhaps another's while that one starts: asked until all
        # have answered
        answers: dict[str, Any] = {}
        patience = time.monotonic() + SECONDS_TO_ANSWER
        while len(answers) < self._workers and time.monotonic() < patience:
            try:
                calls = [self.submit(_named, (function, args), "", 0) for _ in self._processes]
                answers |= dict(call.result() for call in calls)
            except BrokenProcessPool:
                self.recover()
        silent = {f"process {pid}" for pid in self._processes} - set(answers)
        error = TimeoutError(f"it has not begun to work in {SECONDS_TO_ANSWER:.0f} s")
        return answers | dict.fromkeys(silent if len(answers) < self._workers else (), error)

    def worker_died(self, error: BaseException) -> bool:
        return isinstance(error, BrokenProcessPool)

    def recover(self) -> None:
        # every future of the broken pool says so: only the first needs a new one
        if getattr(self._pool, "_broken", False):
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = self._start()

    def peak_of(self, error: BaseException) -> int | None:
        # the pool itself ends the processes beside the one that died, but not by this signal
        killed = [pid for pid, one in self._processes.items() if one.exitcode == KILLED]
        seen = map(self._peaks.of, killed or self._processes)
        return max((peak for peak in seen if peak), default=None)

    def abandon(self, future: Any, number: int, pending: Collection[Any]) -> Collection[Any]:
        # nobody tells which process computes it
        lost = [one for one in pending if not one.done()]
        self._kill()
        self._pool = self._start()
        return lost

    def cancel(self, futures: Collection[Any], hurry: bool = False) -> None:
        for future in futures:
            future.cancel()
        if hurry or pools.wait(futures, SECONDS_FOR_THE_LAST).not_done:
            self._kill()

    def close(self) -> None:
        self._peaks.close()
        super().close()

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        self._pool.shutdown(cancel_futures=True)


def _begin(prepare: Callable[[], None]) -> None:
    end_with_parent()
    prepare()


def _named(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[str, Any]:
    """What a function returns in this process, and the process's name."""
    function, args = call
    answer = function(*args)
    time.sleep(SECONDS_FOR_OTHERS)
    return f"process {os.getpid()}", answer
