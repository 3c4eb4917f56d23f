"""Bytes: how many there are, and how many a task holds at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import math
from pathlib import Path

from cdd_dask.blocks import Grid, haloed_shape, storage_chunks
from cdd_dask.engines.base import Footprint
from cdd_dask.errors import InputError

TASK_OVERHEAD = 10_000_000
"""Bytes that a task holds besides its arrays: buffers of the I/O pool, small objects, and by how
much its process and the scheduler grow in a long run."""
CHUNKS_IN_FLIGHT = 10
"""Inner chunks that Zarr decodes at once (its setting ``async.concurrency``)."""

CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Limit and use of a control group, version 2 and version 1."""
_M_MMAP_THRESHOLD = -3
"""Number of glibc's `mallopt` setting (malloc.h)."""


def available_memory() -> int:
    """Bytes this process could still take: the least that the system and its cgroups leave."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for folder in _cgroups():
        for limit_file, usage_file in CGROUP_FILES:
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / limit_file).read_text())
                usage = int((folder / usage_file).read_text())
                statistics = (folder / "memory.stat").read_text().split()
                # pages of files that nobody uses go when memory is wanted
                cache = dict(zip(statistics[::2], statistics[1::2], strict=True))
                usage -= int(cache.get("inactive_file", 0))
                available = min(available, max(0, limit - usage))
    return available


def _cgroups() -> list[Path]:
    """Folders of the control groups that this process is in, with all above them."""
    root = Path("/sys/fs/cgroup")
    folders = {root, root / "memory"}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            base = root / "memory" if "memory" in controllers.split(",") else root
            own = base / name.lstrip("/")
            folders |= {own, *(parent for parent in own.parents if base in parent.parents)}
    return sorted(folders)


def return_freed_memory() -> None:
    """Have the C library give memory back to the system when an array is freed.

    glibc otherwise keeps freed arrays of up to 32 MB in its arenas, one per thread, and a
    process comes to hold several times what it uses.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 128 << 10)


def byte_count(name: str, value: int | float | str) -> int:
    """Bytes meant by the argument `name`: a number, or a text like ``"500MB"`` or ``"2 GiB"``.

    Examples
    --------
    >>> byte_count("memory", "500MB"), byte_count("memory", "2 GiB")
    (500000000, 2147483648)
    """
    from dask.utils import parse_bytes

    try:
        if isinstance(value, bool) or value == "":
            raise ValueError
        count = parse_bytes(value) if isinstance(value, str) else int(value)
    except (ValueError, TypeError, OverflowError):
        raise InputError(
            f'{name}={value!r} is no amount of bytes: write 500000000, "500MB" or "2 GiB"'
        ) from None
    if count <= 0:
        raise InputError(f"{name}={value!r} must be more than 0 bytes")
    return int(count)


def format_bytes(count: float) -> str:
    """`count` in a unit that a person reads.

    Examples
    --------
    >>> format_bytes(1_234_567_890), format_bytes(999)
    ('1.23 GB', '999 B')
    """
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000 or unit == "PB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"


def task_peak(
    grid: Grid,
    depth: tuple[int, ...],
    boundary: str,
    footprint: Footprint,
    itemsize: int,
    source_itemsize: int,
    source_chunk: tuple[int, ...] | None,
) -> int:
    """Bytes that one task of a stage holds at its peak on the host.

    The largest of its three phases: reading the haloed block (and converting its type),
    diffusing it while the core's start is kept, and encoding a core to write it.
    """
    shape = haloed_shape(grid, depth, boundary)
    haloed = math.prod(shape)
    core = math.prod(grid.block) * itemsize
    shard, chunk = storage_chunks(grid)
    # one shard is read at a time: its chunks encoded, some of them decoded
    fetching = math.prod(shard) * itemsize + CHUNKS_IN_FLIGHT * math.prod(chunk) * itemsize
    if source_chunk is not None:
        count = math.prod(-(-n // c) for n, c in zip(grid.shape, source_chunk, strict=True))
        in_flight = min(CHUNKS_IN_FLIGHT, count) * math.prod(source_chunk)
        fetching = max(fetching, 2 * in_flight * source_itemsize)
    reading = haloed * (itemsize + source_itemsize) + fetching
    diffusing = haloed * footprint.host + max(shape) * footprint.line + core
    # the field with its halo, its core, the channel, and the shard encoded and then joined
    writing = haloed * itemsize + 2 * core + 2 * math.prod(shard) * itemsize
    return max(reading, diffusing, writing) + TASK_OVERHEAD


def device_peak(grid: Grid, depth: tuple[int, ...], boundary: str, footprint: Footprint) -> int:
    """Bytes that one task holds at its peak on the engine's device."""
    return math.prod(haloed_shape(grid, depth, boundary)) * footprint.device
