"""Threads of the CPU engine that share the work of one block."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

SMALLEST_PART = 30_000
"""Voxels; fewer are not worth a thread of their own."""
threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
"""Threads of one block in this process; see `limit_threads`."""


def limit_threads(count: int) -> int:
    """Let a block have `count` threads from now on, in this process; returns the count before."""
    global threads
    before, threads = threads, count
    return before


class ThreadTeam:
    """Threads that call a function together, each with a number of its own."""

    def __init__(self, voxels: int) -> None:
        self.size = max(1, min(threads, voxels // SMALLEST_PART))
        self._pool = ThreadPoolExecutor(self.size - 1) if self.size > 1 else None

    def __enter__(self) -> ThreadTeam:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def call(self, work: Callable[[int], object], abandon: Callable[[], object]) -> None:
        """Call ``work(thread)`` for all threads at once.

        They may wait for each other: if one cannot be started, `abandon` tells the others.
        """
        if self._pool is None:
            work(0)
            return
        others = []
        try:
            others = [self._pool.submit(work, thread) for thread in range(1, self.size)]
            work(0)
        except BaseException:
            abandon()
            raise
        for other in others:
            other.result()
