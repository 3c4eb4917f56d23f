"""Threads of the CPU engine that share the work of one block."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from cdd_dask.engines.vectors import BATCH

SMALLEST_PART = 30_000
"""Voxels; fewer are not worth a thread of their own."""
threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
"""Threads of one block in this process; see `limit_threads`."""


def limit_threads(count: int) -> int:
    """Let a block have `count` threads from now on, in this process; returns the count before."""
    global threads
    before, threads = threads, count
    return before


class Team:
    """Threads that share the work of one block; our own, because numba's cannot be shared."""

    def __init__(self, voxels: int) -> None:
        self.size = max(1, min(threads, voxels // SMALLEST_PART))
        self._pool = ThreadPoolExecutor(self.size) if self.size > 1 else None

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def share(
        self, work: Callable[..., Any], shape: tuple[int, ...], args: list[tuple[Any, ...]]
    ) -> None:
        """Call ``work(region, *args)`` for parts of an array of rows, one part per thread."""
        count = self.size if math.prod(shape) >= 2 * SMALLEST_PART else 1
        planes, rows = shape[0], shape[1]
        along_z = planes >= BATCH * count
        ends = _even(planes if along_z else rows, count)
        regions = [
            (a, b, 0, rows) if along_z else (0, planes, a, b) for a, b in pairwise(ends) if b > a
        ]
        self.run(work, [(region,) for region in regions], args)

    def run(
        self,
        work: Callable[..., Any],
        parts: list[tuple[Any, ...]],
        args: list[tuple[Any, ...]],
    ) -> None:
        """Call ``work(*part, *args)`` for every part, no more of them than there are threads."""
        if self._pool is None or len(parts) < 2:
            for part in parts:
                work(*part, *args[0])
            return
        futures = [
            self._pool.submit(work, *part, *own)
            for part, own in zip(parts[1:], args[1:], strict=False)
        ]
        work(*parts[0], *args[0])
        for future in futures:
            future.result()

    def borders(self, total: int, least: int) -> list[int]:
        """Borders of nearly equal parts of an axis, one per thread, none shorter than `least`."""
        return _even(total, max(1, min(self.size, total // max(least, 1))))


def _even(total: int, parts: int) -> list[int]:
    """Borders of nearly equal parts, at multiples of what is computed at once."""
    batches = -(-total // BATCH)
    return [min(total, batches * i // parts * BATCH) for i in range(parts + 1)]
