"""The contract of all executors, and the loop they share."""

from __future__ import annotations

import errno
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import CancelledError
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from cdd_dask.errors import BlockError

Task = TypeVar("Task")
Result = TypeVar("Result")

TRIES = 3
"""How often a task is tried that fails for a passing reason."""
NO_PROCESSES = (
    "the worker processes cannot start: in a script, put the call under "
    '`if __name__ == "__main__":`, because each of them imports the script; or use '
    'executor="threads"'
)
PASSING_ERRNOS = frozenset(
    (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY)
)

log = logging.getLogger(__name__)


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
    def wait(self, futures: Collection[Any]) -> Iterable[Any]:
        """Block until some of `futures` are done, and return those."""

    @abstractmethod
    def worker_died(self, error: BaseException) -> bool:
        """Whether `error` says that the process computing a task was lost."""

    def recover(self) -> None:  # noqa: B027 - most pools have nothing to do
        """Make the pool usable again after a worker died."""

    def cancel(self, futures: Collection[Any]) -> None:
        """Give up what has not started of `futures`, and wait for the rest."""
        for future in futures:
            future.cancel()

    def close(self) -> None:  # noqa: B027 - nor to release
        """Release the pool."""

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        name: str,
        describe: Callable[[Task], str] = str,
    ) -> Generator[Result, None, None]:
        """Yield ``function(task)`` of every task, in the order in which they finish.

        Parameters
        ----------
        function
            Importable by its name; it and its results travel between processes.
        tasks
            Independent of each other; read only as far as they are submitted.
        name
            What people call these tasks, for example ``decompose-ch03-pass1``.
        describe
            Words for one task, used when its worker dies.

        Raises
        ------
        BlockError
            If a task's worker dies `TRIES` times.
        Exception
            What a task raised, if not for a passing reason, or `TRIES` times.
        """
        guarded = partial(_call, function)
        fresh = ((number, task, 1) for number, task in enumerate(tasks))
        # tasks in flight when a worker died: tried again one by one, to find the one that kills
        suspects: list[tuple[int, Task, int]] = []
        alone = False
        pending: dict[Any, tuple[int, Task, int]] = {}

        def start(item: tuple[int, Task, int]) -> None:
            pending[self.submit(guarded, item[1], name, item[0])] = item

        try:
            while True:
                if not pending:
                    alone = bool(suspects)
                    if suspects:
                        start(suspects.pop())
                while not alone and len(pending) < self.window:
                    item = next(fresh, None)
                    if item is None:
                        break
                    start(item)
                if not pending:
                    return
                for future in list(self.wait(pending)):
                    number, task, tries = pending.pop(future)
                    try:
                        result = future.result()
                    except (Exception, CancelledError) as error:
                        again = (number, task, tries + 1)
                        if self._died_or_raise(error, tries, task, describe):
                            suspects.append(again)
                            alone = True
                        else:
                            start(again)
                    else:
                        # the cluster may forget it: a result kept is a block rerun when lost
                        getattr(future, "release", lambda: None)()
                        yield result
        finally:
            self.cancel(pending)

    def _died_or_raise(
        self, error: BaseException, tries: int, task: Task, describe: Callable[[Task], str]
    ) -> bool:
        """Whether `task` lost its worker; raises unless it is worth another try."""
        died = self.worker_died(error)
        if died:
            self.recover()
            if tries >= self.tries_per_death:
                raise BlockError(
                    f"{describe(task)} lost its worker every time it was tried, most likely to "
                    "the system's out-of-memory killer: lower memory= or workers=, or give a "
                    "smaller block"
                ) from error
        elif tries >= TRIES or not is_passing(error):
            raise error
        log.warning("%s: %s; trying again", describe(task), error)
        return died

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    """``function(task)``; an error is marked before it travels, as its cause may be left behind."""
    try:
        return function(task)
    except Exception as error:
        error.passing = is_passing(error)  # type: ignore[attr-defined]
        raise


def is_passing(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, may be gone at the next try.

    Examples
    --------
    >>> is_passing(TimeoutError()), is_passing(PermissionError()), is_passing(ValueError())
    (True, False, False)
    """
    while error is not None:
        if getattr(error, "passing", False):
            return True
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if isinstance(error, OSError) and error.errno in PASSING_ERRNOS:
            return True
        error = error.__cause__
    return False
