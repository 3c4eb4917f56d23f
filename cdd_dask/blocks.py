"""Geometry of blocks: which voxels a task reads, computes and writes. Integers only."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cdd_dask.boundaries import CUT

Region = tuple[slice, ...]
"""One slice per axis, with explicit start and stop, in voxels of the volume."""

TYPICAL_CHUNK = 48
"""Inner chunks aim at this many voxels a side: small enough for halos, large enough for disks."""
LARGEST_CHUNK = 64


@dataclass(frozen=True)
class Grid:
    """A volume cut into blocks, numbered in C order; the last along an axis may be shorter.

    Examples
    --------
    >>> grid = Grid(shape=(10, 4), block=(4, 4))
    >>> grid.counts, len(grid), grid.core(2)
    ((3, 1), 3, (slice(8, 10, None), slice(0, 4, None)))
    """

    shape: tuple[int, ...]
    """Shape of the volume in voxels."""
    block: tuple[int, ...]
    """Shape of a block's core in voxels, at most `shape`."""

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of blocks per axis."""
        return tuple(-(-n // b) for n, b in zip(self.shape, self.block, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts)

    def index(self, number: int) -> tuple[int, ...]:
        """Position of block `number` in the grid."""
        index = []
        for count in reversed(self.counts):
            number, i = divmod(number, count)
            index.append(i)
        return tuple(reversed(index))

    def core(self, number: int) -> Region:
        """The voxels that block `number` writes."""
        return self.core_at(self.index(number))

    def core_at(self, index: tuple[int, ...]) -> Region:
        """The voxels of the block at a position in the grid."""
        return tuple(
            slice(i * b, min((i + 1) * b, n))
            for i, b, n in zip(index, self.block, self.shape, strict=True)
        )

    def touched(self, region: Region) -> list[tuple[int, ...]]:
        """Positions of the blocks that a region touches, which may run beyond the volume.

        Examples
        --------
        >>> Grid((10, 4), (4, 4)).touched((slice(-1, 5), slice(0, 4)))
        [(0, 0), (1, 0), (2, 0)]
        """
        along = [
            sorted({source.start // b for _, source in pieces(s.start, s.stop, n, b)})
            for s, n, b in zip(region, self.shape, self.block, strict=True)
        ]
        return list(itertools.product(*along))


@dataclass(frozen=True)
class HaloedBlock:
    """What one task reads to compute its core.

    ::

        outer.start      core.start        core.stop      outer.stop
             |<--- depth --->|<---- core ---->|<--- depth --->|
             |<--------------------- outer ------------------>|

    The halo ends at the volume's faces, except under ``wrap``, where `outer` runs on beyond
    them and is read modulo the volume's shape.
    """

    outer: Region
    """Core and halo."""
    inner: Region
    """The core's place within `outer`."""
    faces: tuple[tuple[str, str], ...]
    """Rule of every face of `outer`: the boundary at the volume's faces, elsewhere `CUT`."""


def with_halo(
    region: Region, shape: tuple[int, ...], depth: tuple[int, ...], boundary: str
) -> HaloedBlock:
    """The region to read to compute `region` of a volume of `shape` with a halo of `depth` voxels.

    Examples
    --------
    >>> block = with_halo((slice(4, 8),), (10,), (2,), "reflect")
    >>> block.outer, block.inner, block.faces
    ((slice(2, 10, None),), (slice(2, 6, None),), (('cut', 'reflect'),))
    >>> with_halo((slice(0, 4),), (10,), (2,), "wrap").outer
    (slice(-2, 6, None),)
    """
    outer, inner, faces = [], [], []
    for core, n, h in zip(region, shape, depth, strict=True):
        start, stop = halo_range(core, n, h, boundary)
        outer.append(slice(start, stop))
        inner.append(slice(core.start - start, core.stop - start))
        # under wrap a halo is data, and only a block without one meets the rule itself
        whole = (start, stop) == (0, n)
        at_edge = (whole, whole) if boundary == "wrap" else (start == 0, stop == n)
        faces.append((boundary if at_edge[0] else CUT, boundary if at_edge[1] else CUT))
    return HaloedBlock(tuple(outer), tuple(inner), tuple(faces))


def halo_range(core: slice, size: int, depth: int, boundary: str) -> tuple[int, int]:
    """Start and stop of `core` with its halo along one axis of `size` voxels."""
    if core == slice(0, size):
        return 0, size
    if boundary == "wrap":
        return core.start - depth, core.stop + depth
    return max(0, core.start - depth), min(size, core.stop + depth)


def haloed_voxels(grid: Grid, depth: tuple[int, ...], boundary: str) -> int:
    """Voxels that all blocks of `grid` read together, halos included."""
    along = zip(grid.shape, grid.block, grid.counts, depth, strict=True)
    return math.prod(_haloed_length(n, b, count, h, boundary) for n, b, count, h in along)


def _haloed_length(size: int, block: int, count: int, depth: int, boundary: str) -> int:
    """Length of all blocks along one axis together, halos included."""
    if count == 1:
        return size
    if boundary == "wrap":
        return size + 2 * depth * count
    last = size - (count - 1) * block
    # halos below: min(depth, i * block); above: min(depth, last + j * block), j from the end
    return size + _clipped_halos(0, block, count, depth) + _clipped_halos(
        last, block, count - 1, depth
    )  # fmt: skip


def _clipped_halos(first: int, step: int, count: int, depth: int) -> int:
    """``sum(min(depth, first + i * step) for i in range(count))``."""
    clipped = min(count, max(0, -(-(depth - first) // step)))
    return clipped * first + step * clipped * (clipped - 1) // 2 + (count - clipped) * depth


def haloed_shape(grid: Grid, depth: tuple[int, ...], boundary: str) -> tuple[int, ...]:
    """Shape of the largest block of `grid` with its halo, in voxels."""
    along = zip(grid.shape, grid.block, depth, strict=True)
    return tuple(_longest_haloed(n, b, h, boundary) for n, b, h in along)


@lru_cache(maxsize=8192)
def _longest_haloed(size: int, block: int, depth: int, boundary: str) -> int:
    """Length of the longest block along one axis, halos included."""
    count = -(-size // block)
    # lengths grow until the halo below is whole, and shrink once the one above is cut
    whole = -(-depth // block)
    ranges = [
        halo_range(slice(i * block, min((i + 1) * block, size)), size, depth, boundary)
        for i in {0, whole - 1, whole, count - 2, count - 1}
        if 0 <= i < count
    ]
    return max(stop - start for start, stop in ranges)


def shifted(region: Region, by: tuple[int, ...]) -> Region:
    """`region` moved by so many voxels along each axis.

    Examples
    --------
    >>> shifted((slice(2, 5), slice(0, 1)), (10, -1))
    (slice(12, 15, None), slice(-1, 0, None))
    """
    return tuple(slice(s.start + n, s.stop + n) for s, n in zip(region, by, strict=True))


def starts(region: Region) -> tuple[int, ...]:
    """First voxel of `region` along each axis."""
    return tuple(s.start for s in region)


def pieces(start: int, stop: int, size: int, unit: int) -> list[tuple[slice, slice]]:
    """Pairs (where in the range, where in the axis) that read ``start … stop`` modulo `size`.

    No piece crosses a multiple of `unit`.

    Examples
    --------
    >>> pieces(-2, 3, size=10, unit=10)
    [(slice(0, 2, None), slice(8, 10, None)), (slice(2, 5, None), slice(0, 3, None))]
    >>> pieces(3, 7, size=10, unit=5)
    [(slice(0, 2, None), slice(3, 5, None)), (slice(2, 4, None), slice(5, 7, None))]
    """
    result = []
    position = start
    while position < stop:
        source = position % size
        length = min(size - source, unit - source % unit, stop - position)
        at = position - start
        result.append((slice(at, at + length), slice(source, source + length)))
        position += length
    return result


@lru_cache(maxsize=1024)
def storage_chunks(grid: Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of a shard and of the inner chunks for arrays written block by block.

    A shard is one block's core, so that no two tasks ever write the same one; along an axis
    with a single block it may be rounded up beyond the volume. Chunks divide the shard.

    Examples
    --------
    >>> storage_chunks(Grid(shape=(256, 509), block=(128, 509)))
    ((128, 512), (64, 64))
    """
    sides = [_shard_and_chunk(b, n == 1) for n, b in zip(grid.counts, grid.block, strict=True)]
    return tuple(shard for shard, _ in sides), tuple(chunk for _, chunk in sides)


@lru_cache(maxsize=1024)
def _shard_and_chunk(block: int, alone: bool) -> tuple[int, int]:
    """Lengths of a shard and of a chunk along an axis of one block, or of several."""
    if alone:
        chunks = -(-block // LARGEST_CHUNK)
        side = -(-block // chunks)
        return side * chunks, side
    small = [d for d in range(1, math.isqrt(block) + 1) if block % d == 0]
    divisors = [*small, *(block // d for d in small)]
    return block, min(divisors, key=lambda d: abs(math.log(d / TYPICAL_CHUNK)))
