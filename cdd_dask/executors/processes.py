"""Processes of this machine that work for a pool: what they must not hear, and what they hold."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from pathlib import Path

import psutil

SECONDS_BETWEEN_LOOKS = 0.2
"""Between two looks at what processes hold; the system itself keeps their peaks."""
SECONDS_TO_END = 5.0
"""How long ended processes may take to be gone."""


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started within, also by threads started within, do not hear Ctrl-C.

    A terminal sends it to all of them; the first process alone shall decide, and end the others.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows: there they end with a traceback
        yield
        return
    resource_tracker.ensure_running()  # started later it would unblock what is blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Have this process end when the one that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def kill_children() -> None:
    """Kill all processes that this one started, and those that these did."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=SECONDS_TO_END)


def peak_memory(pid: int) -> int | None:
    """Most memory that a process has held, in bytes; where the system does not tell, what it holds.

    Examples
    --------
    >>> peak_memory(os.getpid()) > 1e7
    True
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
        return None  # it has ended
    except OSError:
        with suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
        return None


class Peaks:
    """The most memory that workers were seen to hold, in bytes, by whatever tells them apart.

    Parameters
    ----------
    sample
        Called in a thread of its own, again and again: what each worker holds now.
    interval
        Seconds between the calls.
    """

    def __init__(
        self, sample: Callable[[], Mapping[str | int, int | None]], interval: float
    ) -> None:
        self.seen: dict[str | int, int] = {}
        self._sample, self._interval = sample, interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-peaks", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            with suppress(Exception):  # workers come and go; a figure missed is no reason to fail
                for worker, held in self._sample().items():
                    self.seen[worker] = max(held or 0, self.seen.get(worker, 0))

    def of(self, worker: str | int) -> int | None:
        """The most that a worker was seen to hold."""
        return self.seen.get(worker) or None

    def close(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join(self._interval)
