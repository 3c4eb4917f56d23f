"""Threads of the CPU engine that share the work of one block."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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

    def call(self, code: Any, record: ctypes.Structure, meeting: Any = None) -> None:
        """Call the compiled ``code(record, thread, size)`` for all threads at once.

        Where they wait for each other it is in the record `meeting`: if a thread cannot be
        started, the others are told there.
        """
        at = ctypes.byref(record)
        if self._pool is None:
            code(at, 0, 1)
            return
        try:
            others = [self._pool.submit(code, at, i, self.size) for i in range(1, self.size)]
            code(at, 0, self.size)
        except BaseException:
            if meeting is not None:
                meeting.abandoned = 1
            raise
        for other in others:
            other.result()
