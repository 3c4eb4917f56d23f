"""Probes: small objects that show whether a place can be written, and is the same for all."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cdd_dask.objects import read_object, remove_object, write_object
from cdd_dask.store import is_our_store

ZARR_METADATA = ("zarr.json", ".zgroup", ".zarray")
PREFIX = ".cdd-dask-probe-"
"""How names of probes begin."""
SECONDS_TO_LIVE = 3600.0
"""Age of a probe that its maker has surely forgotten."""


@dataclass(frozen=True)
class Probe:
    """An object at a place, with content that nobody could guess."""

    at: str
    """Folder or URL."""
    name: str
    token: str


@dataclass(frozen=True)
class Access:
    """What a process can do at the place of a probe."""

    error: str = ""
    """Why it cannot write and delete there; empty if it can."""
    same: bool = True
    """Whether it found there what the probe's maker had written."""
    free: int | None = None
    """Free bytes; None where nobody knows, at a URL."""
    file_clock: float = 0.0
    """Seconds by which modification times of files are ahead of the process's clock."""


def probe_for(address: str) -> Probe:
    """A probe, not written yet, for a store to be made at `address`, a path or a URL.

    It goes where the store goes, or into the nearest folder that is there; into no Zarr hierarchy
    but one of ours.
    """
    token = uuid.uuid4().hex
    return Probe(_nearest(address), f"{PREFIX}{token[:12]}", token)


def _nearest(address: str) -> str:
    if "://" in address:  # no folders there, only names
        return address
    path = Path(os.path.abspath(address))
    usable = (p for p in (path, *path.parents) if os.path.isdir(p) and not _is_foreign(p))
    return str(next(usable, path.anchor))


def _is_foreign(folder: Path) -> bool:
    has_metadata = any(os.path.exists(folder / name) for name in ZARR_METADATA)
    return has_metadata and not is_our_store(folder)


@contextmanager
def placed(probe: Probe) -> Iterator[None]:
    """Have the probe where it belongs, for others to find."""
    remove_probes(probe.at, time.time() - SECONDS_TO_LIVE)
    write_object(probe.at, probe.name, probe.token.encode())
    try:
        yield
    finally:
        with suppress(Exception):  # `try_place` tells whether deleting works
            remove_object(probe.at, probe.name)


def left_in(at: str) -> list[Path]:
    """The probes in a folder, most likely of processes that were killed."""
    return [] if "://" in at else [*Path(at).glob(f"{PREFIX}*")]


def remove_probes(at: str, before: float) -> None:
    """Delete the probes in a folder that were written before a time."""
    for path in left_in(at):
        with suppress(OSError):  # another one has deleted it, or may do so
            if path.stat().st_mtime < before:
                path.unlink()


def try_place(probe: Probe) -> Access:
    """Find the probe, then write and delete another one beside it."""
    own = replace(probe, name=f"{probe.name}-{uuid.uuid4().hex[:12]}")
    try:
        if read_object(probe.at, probe.name) != probe.token.encode():
            return Access(same=False)  # and write nothing: the folder may not even be there
        began = time.time()
        write_object(own.at, own.name, own.token.encode())
        ended = time.time()
        try:
            if "://" in own.at:
                return Access()
            modified = os.stat(Path(own.at) / own.name).st_mtime
            free = shutil.disk_usage(own.at).free
            return Access(free=free, file_clock=ahead(modified, began, ended))
        finally:
            remove_object(own.at, own.name)
    except Exception as error:  # what holds objects fails in any way
        return Access(error=f"{type(error).__name__}: {error}")


def ahead(moment: float, began: float, ended: float) -> float:
    """Seconds by which a clock that showed `moment` between two times is ahead, at the least.

    Examples
    --------
    >>> ahead(12.0, 10.0, 11.0), ahead(10.5, 10.0, 11.0), ahead(7.0, 10.0, 11.0)
    (1.0, 0.0, -3.0)
    """
    return min(moment - began, 0.0) + max(moment - ended, 0.0)
