"""The loop that all executors share: keep some tasks in flight, and see to those that fail."""

from __future__ import annotations

import heapq
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cdd_dask.errors import AGAIN, BlocksFailedError, DiskFullError, RunError, redacted
from cdd_dask.faults import EXPIRED_TRIES, Fault, fault_of, is_understood, mark, wait_before
from cdd_dask.memory import format_bytes

if TYPE_CHECKING:
    from cdd_dask.executors.base import Executor

TRIES = 3
"""How often a task is tried that fails for a passing reason, or hangs."""
LEAST_PATIENCE = 60.0
"""Shortest time in flight, in seconds, after which a task may be taken to hang."""
PATIENCE = 10.0
"""A task hangs that is in flight so many times as long as any sibling that has finished, and as is
expected: the first to finish may be those with nothing to do. Each further try is given so many
times longer: a slow block among quick ones does not hang."""
LEAST_SIBLINGS = 3
"""How many must have finished before a task is taken to hang."""
MOST_LISTED = 10
"""How many failed blocks are logged, and listed in the end."""
MOST_FAILED = 100
"""After so many failed blocks, and none that was done, a run stops."""
MOST_KILLERS = 3
"""After so many blocks that killed their workers a run stops: all blocks are of a size."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One try of one task."""

    number: int
    task: Any
    tries: int = 1
    since: float = 0.0
    """When it was submitted, or last seen waiting: on the monotonic clock, in seconds."""


class Loop:
    """The tasks of one call of `Executor.run`, whose parameters these are."""

    def __init__(
        self,
        executor: Executor,
        function: Callable[[Any], Any],
        tasks: Iterable[Any],
        name: str,
        describe: Callable[[Any], str],
        projected: int | None,
        places: Collection[str],
        expected: float,
    ) -> None:
        self.executor, self.name, self.describe = executor, name, describe
        self.projected, self.places, self.expected = projected, places, expected
        self.function = partial(_call, function)
        self.fresh = (Attempt(number, task) for number, task in enumerate(tasks))
        self.pending: dict[Any, Attempt] = {}
        self.later: list[tuple[float, int, Attempt]] = []
        """Tasks to try again, a heap by the time before which that is too early."""
        self.suspects: list[Attempt] = []
        """In flight when a worker died: tried again one by one, to find the one that kills."""
        self.alone = False
        self.finished, self.longest = 0, 0.0
        self.failed, self.killers = 0, 0
        self.reasons: list[str] = []
        self.first: BaseException | None = None

    def results(self) -> Generator[Any, None, None]:
        """What the tasks return, in the order in which they finish."""
        hurry = False
        try:
            while self._fill():
                for future in list(self.executor.wait(self.pending, self._until_next())):
                    attempt = self.pending.pop(future)
                    try:
                        result = self.executor.result(future)
                    except (Exception, CancelledError) as error:
                        self._see_to(attempt, error)
                    else:
                        self.finished += 1
                        self.longest = max(self.longest, time.monotonic() - attempt.since)
                        # the cluster may forget it: a result kept is a block rerun when lost
                        getattr(future, "release", lambda: None)()
                        yield result
                self._see_to_hanging()
        except KeyboardInterrupt:
            hurry = True
            raise
        finally:
            self.executor.cancel(self.pending, hurry)
        if self.failed:
            raise self._failure() from self.first

    def _fill(self) -> bool:
        """Submit what may run; False where nothing is left to run."""
        while True:
            if not self.pending:
                self.alone = bool(self.suspects)
                if self.suspects:
                    self._start(self.suspects.pop())
            while not self.alone and len(self.pending) < self.executor.window:
                attempt = self._next()
                if attempt is None:
                    break
                self._start(attempt)
            if self.pending or not self.later:
                return bool(self.pending)
            time.sleep(max(0.0, self.later[0][0] - time.monotonic()))

    def _next(self) -> Attempt | None:
        if self.later and self.later[0][0] <= time.monotonic():
            return heapq.heappop(self.later)[2]
        return next(self.fresh, None)

    def _start(self, attempt: Attempt) -> None:
        attempt = replace(attempt, since=time.monotonic())
        future = self.executor.submit(self.function, attempt.task, self.name, attempt.number)
        self.pending[future] = attempt

    def _until_next(self) -> float | None:
        """Seconds to the next thing to do should no task finish; None is for ever."""
        times = []
        if self.finished >= LEAST_SIBLINGS:
            times.append(min(one.since + self._patience(one) for one in self.pending.values()))
        if self.later and not self.alone and len(self.pending) < self.executor.window:
            times.append(self.later[0][0])
        seconds = max(0.0, min(times, default=float("inf")) - time.monotonic())
        return None if seconds == float("inf") else seconds

    # tasks that fail

    def _see_to(self, attempt: Attempt, error: BaseException) -> None:
        """Have a task that failed tried again, or give it up; raises where the run must stop."""
        if isinstance(error, CancelledError):
            raise RunError(
                f"{self.describe(attempt.task)} was cancelled, by somebody else or with the "
                f"cluster's scheduler: {AGAIN}, finished blocks are kept"
            ) from error
        if self.executor.worker_died(error):
            self._see_to_death(attempt, error)
            return
        fault = fault_of(error)
        if fault is Fault.FATAL:
            raise error
        if fault is Fault.FULL:
            raise DiskFullError(
                f"{self._reason(attempt, error)}; a disk is full{self._free()}: free some space "
                f"and {AGAIN}, finished blocks are kept"
            ) from error
        if attempt.tries < {Fault.PASSING: TRIES, Fault.EXPIRED: EXPIRED_TRIES}.get(fault, 1):
            self._try_later(attempt, self._reason(attempt, error))
        else:
            self._give_up(attempt, error, self._reason(attempt, error))

    def _see_to_death(self, attempt: Attempt, error: BaseException) -> None:
        peak = self.executor.peak_of(error)
        self.executor.recover()
        if attempt.tries < self.executor.tries_per_death:
            what = self.describe(attempt.task)
            log.warning("%s: %s; trying again by itself", what, redacted(str(error)))
            self.suspects.append(replace(attempt, tries=attempt.tries + 1))
            self.alone = True
            return
        projected, seen = (
            "unknown" if count is None else format_bytes(count) for count in (self.projected, peak)
        )
        self.killers += 1
        self._give_up(
            attempt,
            error,
            f"{self.describe(attempt.task)} lost its worker every time it was tried, most likely "
            "to the system's out-of-memory killer: the projected peak is "
            f"{projected} besides the interpreter's own, seen were {seen} in all; lower memory= "
            "or workers=, or give a smaller block=",
        )
        if self.killers >= MOST_KILLERS:
            raise self._failure() from self.first

    def _try_later(self, attempt: Attempt, reason: str) -> None:
        seconds = wait_before(attempt.tries)
        log.warning("%s; trying again in %.1f s", reason, seconds)
        again = replace(attempt, tries=attempt.tries + 1)
        heapq.heappush(self.later, (time.monotonic() + seconds, attempt.number, again))

    def _give_up(self, attempt: Attempt, error: BaseException, reason: str) -> None:
        self.failed += 1
        self.first = self.first or error
        if self.failed <= MOST_LISTED:
            self.reasons.append(reason)
            trace = ""
            if not is_understood(error):
                trace = "\n" + "".join(traceback.format_exception(error))
            log.error("%s; the other blocks go on%s", redacted(reason), redacted(trace))
        if self.failed >= MOST_FAILED and not self.finished:
            raise self._failure() from self.first

    def _reason(self, attempt: Attempt, error: BaseException) -> str:
        what, text = self.describe(attempt.task), redacted(str(error)) or "no message"
        return text if text.startswith(what) else f"{what} failed: {type(error).__name__}: {text}"

    def _failure(self) -> BlocksFailedError:
        listed = "".join(f"\n  {reason}" for reason in self.reasons)
        more = self.failed - len(self.reasons)
        return BlocksFailedError(
            f"{self.failed} of the blocks of {self.name} failed:{listed}"
            f"{f'{chr(10)}  and {more} more' * bool(more)}\n"
            f"mend the cause and {AGAIN}: finished blocks are kept"
        )

    def _free(self) -> str:
        """How much is free where the tasks write, as far as it is on disks of this machine."""
        found = []
        for place in self.places:
            try:
                free = shutil.disk_usage(place).free
            except OSError:
                continue
            found.append(f"{format_bytes(free)} free at {place}")
        return f" ({', '.join(found)})" if found else ""

    # tasks that hang

    def _patience(self, attempt: Attempt) -> float:
        """Seconds in flight after which a task is taken to hang."""
        longest = max(self.longest, self.expected)
        return max(LEAST_PATIENCE, PATIENCE * longest) * PATIENCE ** (attempt.tries - 1)

    def _see_to_hanging(self) -> None:
        """Cancel a task that hangs, and have it tried elsewhere."""
        now = time.monotonic()
        hanging = (
            future
            for future, attempt in self.pending.items()
            if now - attempt.since >= self._patience(attempt) and not future.done()
        )
        if self.finished < LEAST_SIBLINGS or (future := next(hanging, None)) is None:
            return  # another one that hangs has its turn after the next wait, of no time
        attempt = self.pending[future]
        if not self.executor.has_begun(future):
            self.pending[future] = replace(attempt, since=now)
            return
        took = f"is not done after {now - attempt.since:.0f} s, others took {self.longest:.0f} s"
        lost = self.executor.abandon(future, attempt.number, self.pending)
        if not lost:
            what = self.describe(attempt.task)
            log.warning("%s %s: it may hang, but cannot be cancelled", what, took)
            self.pending[future] = replace(attempt, since=float("inf"))
            return
        for one in lost:
            other = self.pending.pop(one)
            if one is not future:  # it only had its process in common
                heapq.heappush(self.later, (now, other.number, other))
        if attempt.tries < TRIES:
            what = self.describe(attempt.task)
            self._try_later(attempt, f"{what} {took} and was cancelled")
        else:
            error = TimeoutError(f"{took}, in each of {TRIES} tries")
            self._give_up(attempt, error, f"{self.describe(attempt.task)} {error}")


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    """``function(task)``; an error is marked before it travels, as its cause may be left behind."""
    try:
        return function(task)
    except Exception as error:
        mark(error)
        raise
