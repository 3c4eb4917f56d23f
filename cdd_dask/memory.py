"""Bytes: how many there are, and how many a task holds at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cdd_dask.blocks import Grid, storage_chunks
from cdd_dask.engines.base import LARGEST_RADIUS, SAVED_ROWS, Footprint
from cdd_dask.errors import InputError
from cdd_dask.pyramid import StepGrids

TASK_OVERHEAD = 10_000_000
"""Bytes that a task holds besides its arrays: buffers of the I/O pool, small objects, and by how
much its process and the scheduler grow in a long run."""
CHUNKS_IN_FLIGHT = 10
"""Inner chunks that Zarr decodes at once (its setting ``async.concurrency``)."""

MOST_BYTES = 2**63 - 1
"""What may be asked for: more is a slip."""
LARGEST_COUNT = 10**30
"""Bytes that are told apart from more."""
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
    if count > MOST_BYTES:
        raise InputError(f"{name}={value!r} is more than any machine has: at most 2**63 - 1 bytes")
    return int(count)


def format_bytes(count: float) -> str:
    """`count` in a unit that a person reads.

    Examples
    --------
    >>> format_bytes(1_234_567_890), format_bytes(999)
    ('1.23 GB', '999 B')
    """
    count = min(count, LARGEST_COUNT)  # what damaged headers ask for is beyond a float
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000 or unit == "PB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"


@dataclass(frozen=True)
class TaskMemory:
    """What decides how many bytes one task holds at its peak."""

    grid: Grid
    """The volume cut into blocks."""
    haloed: tuple[int, ...]
    """Shape of the largest block with its halo, in voxels."""
    footprint: Footprint
    """The engine's working memory."""
    itemsize: int
    """Bytes per voxel of the working field."""
    source_itemsize: int
    """Bytes per voxel of the source."""
    source_chunk: tuple[int, ...] | None
    """Shape of what the source decodes at once, in voxels."""
    grids: StepGrids
    """Those that the block is smoothed on."""
    cells: tuple[int, ...] | None = None
    """Shape of the largest tile with its halo on the refined grid, where there is one."""
    channels: int = 1
    """Channels that the pass computes."""
    cores: int = 1
    """Cores held besides what is read and diffused."""

    @cached_property
    def host(self) -> int:
        """Bytes on the host.

        The largest of the three phases of a task: reading the haloed block (and converting its
        type), diffusing it while the core's start is kept, and encoding a core to write it.
        """
        haloed = math.prod(self.haloed) * self.itemsize
        held = (self.cores - 1) * math.prod(self.grid.block) * self.itemsize
        core = math.prod(self.grid.block) * self.itemsize
        shard, chunk = storage_chunks(self.grid)
        # one shard is read at a time: its chunks encoded, some of them decoded
        encoded = math.prod(shard) * self.itemsize
        fetching = encoded + CHUNKS_IN_FLIGHT * math.prod(chunk) * self.itemsize
        if self.source_chunk is not None:
            parts = zip(self.grid.shape, self.source_chunk, strict=True)
            count = math.prod(-(-n // c) for n, c in parts)
            in_flight = min(CHUNKS_IN_FLIGHT, count) * math.prod(self.source_chunk)
            fetching = max(fetching, 2 * in_flight * self.source_itemsize)
        reading = haloed + math.prod(self.haloed) * self.source_itemsize + fetching
        computed, work = math.prod(self.cells or self.haloed), self.work
        if self.cells is None:
            diffusing = work + core
            # the halo is gone when the shard is encoded, and then joined
            writing = 2 * core + max(haloed, 2 * encoded)
        else:
            # interpolating holds the cells, and about as much again of what they are made of
            refined = max(work, computed * (3 * self.itemsize + 1))
            fields = haloed + (self.channels + 1) * core
            diffusing = fields + refined
            writing = fields + 2 * core + 2 * encoded
        return max(reading + held, diffusing + held, writing) + TASK_OVERHEAD

    @property
    def work(self) -> int:
        """Bytes of the engine, the block included."""
        shape, footprint, grids = self.cells or self.haloed, self.footprint, self.grids
        multiple = footprint.lanes * (2 if any(grids.levels) else 1)
        row = grids.padded[-1]
        longer = -(-row // multiple) * multiple
        copied = math.prod(shape[:-1]) * longer + grids.cells * longer // row
        *outer, last = grids.coarsest
        if outer and grids.radius <= LARGEST_RADIUS:
            # axes that are left alone may be joined where there are more than three
            planes = math.prod(outer) // (outer[-1] if len(outer) < 3 else min(outer))
            saved = footprint.threads * max(SAVED_ROWS, grids.radius) * (3 if grids.wraps else 1)
            copied += planes * saved * (last * longer // row)
        # a tile has 16 to 32 rows, where there are so many: two tiles for each of several threads
        rows = math.prod(shape[-2:-1] if len(shape) <= 3 else shape[:-1])
        more = rows / (32 * footprint.threads if footprint.threads > 1 else 16)
        least = longer * footprint.row * 3 // (2 if grids.wraps else 3)
        tiles = max(least, min(int(least * min(2, max(1, more))), footprint.tiles))
        lines = max(shape) * footprint.line
        return math.prod(shape) * footprint.host + copied * footprint.copy + max(tiles, lines)

    @property
    def device(self) -> int:
        """Bytes on the engine's device."""
        return math.prod(self.cells or self.haloed) * self.footprint.device


def voxel_task_bytes(grid: Grid, levels: tuple[int, ...], itemsize: int, masked: bool) -> int:
    """Bytes on the host of a task that brings a block's voxels to cells, or cells to them.

    The block, completed to whole cells, the smooth field and what it is interpolated from, and
    sorted deviations; with blanks the smooth share of the others. Besides, cores are encoded.
    """
    block = math.prod(-(-b >> level) << level for b, level in zip(grid.block, levels, strict=True))
    arrays = 8 if masked else 6
    return block * (arrays * itemsize + 2) + 2 * math.prod(grid.block) * itemsize + TASK_OVERHEAD


def cell_task_bytes(cells: int, values: int, itemsize: int, work: int) -> int:
    """Bytes on the host of a task that evolves cells of so many values, engine's work included."""
    return cells * (values * itemsize + work + 8) + TASK_OVERHEAD
