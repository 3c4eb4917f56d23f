"""Geometry of blocks against brute force: every voxel is counted, none is argued about."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cdd_dask.blocks import (
    LARGEST_CHUNK,
    Grid,
    haloed_shape,
    haloed_voxels,
    pieces,
    storage_chunks,
    with_halo,
)
from cdd_dask.boundaries import CUT
from cdd_dask.parameters import BOUNDARIES
from cdd_dask.readers.regions import read_region

RULES = st.sampled_from(BOUNDARIES)


@st.composite
def grids(draw: st.DrawFn, largest: int = 12) -> Grid:
    """Small volumes of 1 to 4 axes, cut anywhere."""
    shape = draw(st.lists(st.integers(1, largest), min_size=1, max_size=4))
    block = [draw(st.integers(1, n)) for n in shape]
    return Grid(tuple(shape), tuple(block))


@st.composite
def haloed_grids(draw: st.DrawFn) -> tuple[Grid, tuple[int, ...]]:
    """A grid and a halo per axis, which may be wider than the volume."""
    grid = draw(grids())
    return grid, tuple(draw(st.integers(0, 15)) for _ in grid.shape)


@given(grids())
def test_blocks_tile_the_volume_exactly_once(grid: Grid):
    """Every voxel is written by one block and no other: nothing is missing, nothing races."""
    written = np.zeros(grid.shape, int)
    for number in range(len(grid)):
        core = grid.core(number)
        assert written[core].size > 0
        assert all(s.stop - s.start <= b for s, b in zip(core, grid.block, strict=True))
        written[core] += 1
    assert (written == 1).all()


@given(grids())
def test_blocks_are_numbered_in_c_order(grid: Grid):
    """`index` is NumPy's unravelling of the number, which storage relies on."""
    for number in range(len(grid)):
        assert grid.index(number) == np.unravel_index(number, grid.counts)


@given(haloed_grids(), RULES)
def test_outer_is_core_and_halo(haloed: tuple[Grid, tuple[int, ...]], boundary: str):
    """What is read is the core and `depth` voxels around it, as far as there are voxels.

    Under ``wrap`` there always are; an axis that is not cut needs no halo at all.
    """
    grid, depth = haloed
    for number in range(len(grid)):
        outer = with_halo(grid.core(number), grid.shape, depth, boundary).outer
        axes = zip(outer, grid.core(number), grid.shape, grid.counts, depth, strict=True)
        for read, core, size, count, halo in axes:
            if count == 1:
                assert read == slice(0, size)
            elif boundary == "wrap":
                assert (read.start, read.stop) == (core.start - halo, core.stop + halo)
            else:
                near = [i for i in range(size) if core.start - halo <= i < core.stop + halo]
                assert (read.start, read.stop) == (near[0], near[-1] + 1)


@given(haloed_grids(), RULES)
def test_inner_finds_the_core_in_outer(haloed: tuple[Grid, tuple[int, ...]], boundary: str):
    """Trimming what was read to `inner` gives exactly the voxels of the core."""
    grid, depth = haloed
    volume = np.arange(math.prod(grid.shape)).reshape(grid.shape)
    for number in range(len(grid)):
        block = with_halo(grid.core(number), grid.shape, depth, boundary)
        places = [
            np.arange(s.start, s.stop) % n for s, n in zip(block.outer, grid.shape, strict=True)
        ]
        assert np.array_equal(volume[np.ix_(*places)][block.inner], volume[grid.core(number)])


@given(haloed_grids(), RULES)
def test_faces_are_cut_where_the_volume_goes_on(
    haloed: tuple[Grid, tuple[int, ...]], boundary: str
):
    """A boundary rule acts at the volume's faces only; a face inside the volume is `CUT`.

    Under ``wrap`` a cut axis has no faces of the volume at all, unless a halo happens to end
    at both: then the block holds the axis once, and the rule is right.
    """
    grid, depth = haloed
    for number in range(len(grid)):
        block = with_halo(grid.core(number), grid.shape, depth, boundary)
        for read, size, rules in zip(block.outer, grid.shape, block.faces, strict=True):
            low, high = read.start == 0, read.stop == size
            if boundary == "wrap":
                low = high = low and high
            assert rules == (boundary if low else CUT, boundary if high else CUT)


@given(haloed_grids(), RULES)
def test_counted_voxels_are_the_voxels_read(haloed: tuple[Grid, tuple[int, ...]], boundary: str):
    """The plan's closed sums equal the sizes of all halo'd blocks, added one by one."""
    grid, depth = haloed
    sizes = [
        math.prod(
            s.stop - s.start
            for s in with_halo(grid.core(number), grid.shape, depth, boundary).outer
        )
        for number in range(len(grid))
    ]
    assert haloed_voxels(grid, depth, boundary) == sum(sizes)
    assert math.prod(haloed_shape(grid, depth, boundary)) == max(sizes)


@given(st.integers(-30, 30), st.integers(1, 40), st.integers(1, 13), st.integers(1, 15))
def test_pieces_read_an_axis_modulo_its_size(start: int, length: int, size: int, unit: int):
    """Pieces follow each other, stay within one unit, and give ``take(mode="wrap")``."""
    axis = np.arange(size)
    found = pieces(start, start + length, size, unit)
    for target, source in found:
        assert 0 <= source.start < source.stop <= size
        assert source.start // unit == (source.stop - 1) // unit
        assert target.stop - target.start == source.stop - source.start
    assert [target.start for target, _ in found] == [0, *(t.stop for t, _ in found[:-1])]
    read = np.concatenate([axis[source] for _, source in found])
    assert np.array_equal(read, axis.take(np.arange(start, start + length), mode="wrap"))


class Sharded:
    """An array that notes what is read, with shards as a Zarr array has."""

    def __init__(self, values: np.ndarray, shards: tuple[int, ...] | None) -> None:
        self.values, self.shape, self.shards, self.read = values, values.shape, shards, []

    def __getitem__(self, region: tuple[slice, ...]) -> np.ndarray:
        self.read.append(region)
        return self.values[region]


@settings(max_examples=50)
@given(st.data())
def test_regions_are_read_modulo_the_volume_and_shard_by_shard(data: st.DataObject):
    """A region that runs beyond the volume, along any axis and by any amount, is read modulo it.

    Never is more than one shard asked for at a time: that is what the memory is planned for.
    """
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    shards = data.draw(st.none() | st.tuples(*(st.integers(1, 9) for _ in shape)))
    array = Sharded(np.random.default_rng(0).random(shape), shards)
    starts = [data.draw(st.integers(-9, 9)) for _ in shape]
    region = tuple(slice(s, s + data.draw(st.integers(1, 20))) for s in starts)
    expected = array.values
    for axis, s in enumerate(region):
        expected = expected.take(np.arange(s.start, s.stop), axis, mode="wrap")
    assert np.array_equal(read_region(array, region), expected)
    for read in array.read if shards else []:
        assert all(s.start // u == (s.stop - 1) // u for s, u in zip(read, shards, strict=True))


@given(grids(largest=400))
def test_chunks_divide_shards_and_shards_are_cores(grid: Grid):
    """No shard is shared by two blocks, so no two tasks ever write the same file.

    Along an axis that is not cut a shard may run beyond the volume, by less than a chunk.
    """
    shards, chunks = storage_chunks(grid)
    axes = zip(shards, chunks, grid.counts, grid.block, grid.shape, strict=True)
    for shard, chunk, count, block, size in axes:
        assert shard % chunk == 0
        if count > 1:
            assert shard == block
        else:
            assert size <= shard < size + chunk
            assert chunk <= LARGEST_CHUNK
