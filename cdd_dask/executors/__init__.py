"""Executors: each runs a stage's tasks on one kind of pool, under one contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cdd_dask.executors.base import Executor

EXECUTORS = ("auto", "serial", "threads", "processes", "distributed")
IN_PROCESS = ("serial", "threads")
"""Executors whose tasks share this process's memory."""


def nothing() -> None:
    """What a process needs before its first task, where a caller does not say."""


__all__ = ["EXECUTORS", "IN_PROCESS", "Executor", "start_executor"]


def start_executor(
    name: str, workers: int, client: Any = None, prepare: Callable[[], None] = nothing
) -> Executor:
    """The executor called `name`, never ``auto``, ready to run tasks.

    Parameters
    ----------
    name
        One of `EXECUTORS`.
    workers
        Tasks that run at once.
    client
        The user's `distributed.Client`, for ``distributed``.
    prepare
        Called in every other process before its first task; importable by its name.
    """
    if name == "distributed":
        from cdd_dask.executors.dask import DaskExecutor

        return DaskExecutor(client, workers, prepare)
    if name == "processes":
        from cdd_dask.executors.local import ProcessesExecutor

        return ProcessesExecutor(workers, prepare)
    if name == "threads":
        from cdd_dask.executors.local import ThreadsExecutor

        return ThreadsExecutor(workers)
    from cdd_dask.executors.serial import SerialExecutor

    return SerialExecutor()
