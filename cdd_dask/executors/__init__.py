"""Executors: each runs a stage's tasks on one kind of pool, under one contract."""

from __future__ import annotations

from typing import Any

from cdd_dask.executors.base import Executor

EXECUTORS = ("auto", "serial", "threads", "processes", "distributed")
IN_PROCESS = ("serial", "threads")
"""Executors whose tasks share this process's memory."""

__all__ = ["EXECUTORS", "IN_PROCESS", "Executor", "start_executor"]


def start_executor(name: str, workers: int, threads: int, client: Any = None) -> Executor:
    """The executor called `name`, never ``auto``, ready to run tasks.

    Parameters
    ----------
    name
        One of `EXECUTORS`.
    workers
        Tasks that run at once.
    threads
        Threads that a task of a process pool may compute with.
    client
        The user's `distributed.Client`, for ``distributed``.
    """
    if name == "distributed":
        from cdd_dask.executors.dask import DaskExecutor

        return DaskExecutor(client, workers)
    if name == "serial":
        from cdd_dask.executors.serial import SerialExecutor

        return SerialExecutor()
    from cdd_dask.executors.local import ProcessesExecutor, ThreadsExecutor

    return ProcessesExecutor(workers, threads) if name == "processes" else ThreadsExecutor(workers)
