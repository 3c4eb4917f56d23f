"""Facts: what a process finds around it before a run; `preflight` judges them."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cdd_dask.engines import load_engine
from cdd_dask.identity import content_of
from cdd_dask.memory import available_memory
from cdd_dask.probes import Access, Probe, try_place
from cdd_dask.readers import open_source
from cdd_dask.run import PACKAGES
from cdd_dask.task import THREAD_LIMITS


@dataclass(frozen=True)
class Question:
    """What a process shall look at."""

    source: str | None
    """Address of the source, where the process must reach it."""
    engine: str | None
    """Engine that computes there, if it does."""
    device: str
    places: dict[str, Probe]
    """Where it must be able to write, by what lies there: ``output``, ``scratch``."""


@dataclass(frozen=True)
class Facts:
    """What a process found; an error is a text, empty where there was none."""

    versions: dict[str, str]
    clock: float
    """When the process looked at its clock, in seconds since the epoch."""
    available: int
    """Bytes of memory that it could still take."""
    held: int
    """Bytes that it holds."""
    limits: dict[str, str | None]
    """Environment variables that cap the threads of libraries."""
    source: str = ""
    """What it found at the source's address."""
    source_error: str = ""
    device_error: str = ""
    device_memory: int | None = None
    """Free bytes on the device; None where the engine computes on the host."""
    threads: int = 1
    """Threads that the engine computes with."""
    instruction_set: str = ""
    """What the engine's compiled code was made for."""
    places: dict[str, Access] = field(default_factory=dict)


def look_around(question: Question) -> Facts:
    """Gather the facts of this process."""
    import psutil

    facts = Facts(
        versions=package_versions(),
        clock=time.time(),
        available=available_memory(),
        held=psutil.Process().memory_info().rss,
        limits={name: os.environ.get(name) for name in THREAD_LIMITS},
        places={what: try_place(probe) for what, probe in question.places.items()},
    )
    if question.source is not None:
        facts = replace(facts, **_look_at_source(question.source))
    if question.engine is not None:
        facts = replace(facts, **_look_at_device(question.engine, question.device))
    return facts


def package_versions() -> dict[str, str]:
    """Versions that decide the result or how processes talk; Python's without its patch level."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _look_at_source(address: str) -> dict[str, Any]:
    try:
        source = open_source(address)
        content = content_of(source)
    except Exception as error:  # a damaged file makes its reader fail in any way
        return {"source_error": f"{type(error).__name__}: {error}"}
    shape = " × ".join(map(str, source.shape))
    return {"source": f"{shape} {source.dtype.name}, content {content[:12]}"}


def _look_at_device(engine: str, device: str) -> dict[str, Any]:
    try:
        loaded = load_engine(engine, device)
        threads = loaded.limit_threads(1)  # which says what the limit was
        loaded.limit_threads(threads)
        return {
            "device_memory": loaded.free_device_memory(),
            "threads": threads,
            "instruction_set": loaded.instruction_set,
        }
    except Exception as error:  # and so does a driver
        return {"device_error": f"{type(error).__name__}: {error}"}
