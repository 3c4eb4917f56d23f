"""Preloaded by the workers of `kill.py`: every execution of a task leaves empty files on the disk.

    begun~OUTPUT~PASS~BLOCK~ID~TIME     when computing begins, in nanoseconds since the epoch
    ended~OUTPUT~PASS~BLOCK~ID~TIME     when its done mark is written, or when it has failed
    torn~TIME                           a write was torn, and the worker killed itself

Writes are torn as by a file system that does not write whole files at once.
"""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from threading import local
from typing import Any

from zarr.storage import _local

from cdd_dask import task

FOLDER = "CDD_RECORDS"
"""Environment variable that names the folder."""
TORN = "CDD_TORN"
"""Environment variable with the share of writes that are torn."""

SLACK = 10_000_000
"""Nanoseconds from a kill's signal to the death."""

_current = local()


def record(what: str) -> None:
    """Leave an empty file that tells what happens now."""
    (Path(os.environ[FOLDER]) / f"{what}~{time.time_ns()}").touch()


def beginning(compute: Any) -> Any:
    """What computes a block, which says when it begins, and when it fails."""

    @wraps(compute)
    def recorded(job: Any, one: Any) -> Any:
        output = Path(one.address).name
        _current.name = f"{output}~{one.number}~{one.block}~{uuid.uuid4().hex}"
        record(f"begun~{_current.name}")
        try:
            return compute(job, one)
        except Exception:
            record(f"ended~{_current.name}")
            raise

    return recorded


def ending(write_mark: Any) -> Any:
    """What writes a done mark, which says when that is done."""

    @wraps(write_mark)
    def recorded(*arguments: Any) -> None:
        write_mark(*arguments)
        record(f"ended~{_current.name}")

    return recorded


def tearing(write: Any, share: float) -> Any:
    """Zarr's way to write a file, which at times leaves the first half of it, and dies."""

    @wraps(write)
    def torn(path: Path, value: Any, exclusive: bool = False) -> Any:
        if random.random() < share:
            data = bytes(value.as_buffer_like())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[: len(data) // 2])
            record("torn")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, value, exclusive)

    return torn


def dask_setup(worker: Any) -> None:
    """Called by a worker that starts."""
    task._run, task.write_mark = beginning(task._run), ending(task.write_mark)
    share = float(os.environ.get(TORN, 0))
    if share:
        _local._put = tearing(_local._put, share)


@dataclass(frozen=True)
class Executions:
    """What the records tell of executed tasks."""

    tasks: int
    count: int
    in_flight: int
    """Executions that had begun and not ended when something was killed."""
    unexplained: int
    """Blocks redone though no execution of them was in flight at a kill."""

    @property
    def redone(self) -> int:
        return self.count - self.tasks

    @classmethod
    def of(cls, folder: Path, kills: list[int]) -> Executions:
        """Count the records in a folder."""
        begun: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)
        ended: dict[str, float] = {}
        names = os.listdir(folder)
        kills = kills + [int(name.partition("~")[2]) for name in names if name.startswith("torn")]
        for name in names:
            what, *about, when = name.split("~")
            if what == "begun":
                output, number, block, execution = about
                begun[output, number, block][execution] = int(when)
            elif what == "ended":
                ended[about[-1]] = int(when)
        in_flight = unexplained = 0
        for executions in begun.values():
            hit = sum(
                any(start - SLACK <= kill <= ended.get(one, float("inf")) + SLACK for kill in kills)
                for one, start in executions.items()
            )
            in_flight += hit
            unexplained += max(0, len(executions) - 1 - hit)
        return cls(len(begun), sum(map(len, begun.values())), in_flight, unexplained)
