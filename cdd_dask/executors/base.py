"""The contract of all executors, and the loop they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable
from types import TracebackType
from typing import Any, TypeVar

from cdd_dask.executors.loop import TRIES, Loop

Task = TypeVar("Task")
Result = TypeVar("Result")

SECONDS_FOR_THE_LAST = 600.0
"""How long a failed run waits for blocks that its workers still compute."""
NO_PROCESSES = (
    "the worker processes cannot start: in a script, put the call under "
    '`if __name__ == "__main__":`, because each of them imports the script; or use '
    'executor="threads"'
)


class Executor(ABC):
    """Runs independent tasks, a bounded number submitted at a time.

    A task may run twice: whole shards are written, and the same bits. An executor translates
    to one kind of pool and does nothing else.
    """

    window: int
    """Largest number of tasks submitted and not finished."""
    tries_per_death: int = TRIES
    """How often a task may lose its worker; fewer where the pool itself has tried again."""

    @abstractmethod
    def submit(self, function: Callable[[Any], Any], task: Any, name: str, number: int) -> Any:
        """Start ``function(task)`` and return its future; `name` is what people call it."""

    @abstractmethod
    def wait(self, futures: Collection[Any], timeout: float | None = None) -> Iterable[Any]:
        """Block until some of `futures` are done, or for `timeout` seconds; those that are done."""

    def result(self, future: Any) -> Any:
        """What the task of a `future` that is done has returned; raises what it has raised."""
        return future.result()

    @abstractmethod
    def worker_died(self, error: BaseException) -> bool:
        """Whether `error` says that the process computing a task was lost."""

    def recover(self) -> None:  # noqa: B027 - most pools have nothing to do
        """Make the pool usable again after a worker died."""

    def peak_of(self, error: BaseException) -> int | None:
        """Most memory in bytes that the worker was seen to hold whose death `error` tells."""
        return None

    def has_begun(self, future: Any) -> bool:
        """Whether a worker may be computing `future`."""
        return bool(future.running())

    def abandon(self, future: Any, number: int, pending: Collection[Any]) -> Collection[Any]:
        """Stop `future`, of the task of that number, although a worker computes it.

        Returns which of `pending` will never be done for it; none where it cannot be stopped.
        """
        return ()

    def cancel(self, futures: Collection[Any], hurry: bool = False) -> None:
        """Give up what has not started of `futures`, and wait for the rest.

        In a `hurry` the rest is dropped, if it can be; the executor then can only be closed.
        """
        for future in futures:
            future.cancel()

    def everywhere(self, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """``function(*args)`` of every worker, by its name; what it raised, where it failed.

        Called while no task runs; `function` is importable by its name.
        """
        return {"this process": function(*args)}

    def close(self) -> None:  # noqa: B027 - nor to release
        """Release the pool."""

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        name: str,
        describe: Callable[[Task], str] = str,
        projected: int | None = None,
        places: Collection[str] = (),
        expected: float = 0.0,
    ) -> Generator[Result, None, None]:
        """Yield ``function(task)`` of every task, in the order in which they finish.

        A task that fails for good does not keep the others from running, unless what is wrong is
        wrong for all: the data, the store, a full disk.

        Parameters
        ----------
        function
            Importable by its name; it and its results travel between processes.
        tasks
            Independent of each other; read only as far as they are submitted.
        name
            What people call these tasks, for example ``decompose-ch03-pass1``.
        describe
            Words for one task, for messages.
        projected
            Bytes that a task is planned to hold, for the message where a worker is killed.
        places
            Where the tasks write, for the message where a disk is full.
        expected
            Seconds that a task is planned to take: one is not soon taken to hang.

        Raises
        ------
        BlocksFailedError
            In the end, if tasks failed: not for a passing reason, or `TRIES` times, or with
            their workers; after `loop.MOST_KILLERS` of the last kind at once, and after
            `loop.MOST_FAILED` of any kind if none was done.
        DiskFullError
            If there is no space to write.
        InputError, StoreError
            As a task raised it, or an error that it caused.
        RunError
            If the cluster's scheduler is gone.
        """
        return Loop(self, function, tasks, name, describe, projected, places, expected).results()

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
