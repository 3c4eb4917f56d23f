"""One task after the other in this process: the debugger."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from typing import Any

from cdd_dask.executors.base import Executor


class SerialExecutor(Executor):
    """Runs a task when it is submitted."""

    window = 1

    def submit(self, function: Callable[[Any], Any], task: Any, name: str, number: int) -> Any:
        future: Future[Any] = Future()
        try:
            future.set_result(function(task))
        except Exception as error:
            future.set_exception(error)
        return future

    def wait(self, futures: Collection[Any], timeout: float | None = None) -> Iterable[Any]:
        return futures

    def worker_died(self, error: BaseException) -> bool:
        return False
