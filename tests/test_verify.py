"""`verify` finds what is wrong with a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

import cdd_dask
from cdd_dask.errors import InputError, StoreError, VerificationError
from cdd_dask.verification import verify

SHAPE = (20, 30)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A source and its decomposition in 6 blocks."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    np.save(source, np.random.default_rng(0).lognormal(size=SHAPE).astype("f4"))
    cdd_dask.decompose(source, out, max_scale=4, block=(10, 10), progress=False)
    return source, out


def test_a_sound_store_passes(made: tuple[Path, Path]):
    """The error is measured, in units in the last place."""
    found = verify(made[1], progress=False)
    assert 0 <= found.worst_ulp <= 4
    assert len(found.where) == 2


def test_a_changed_voxel_is_named(made: tuple[Path, Path]):
    """Its block is not what its done mark says."""
    array = zarr.open_array(made[1] / "channel_01/scale0/image", mode="r+")
    array[13, 27] += 0.5
    message = r"channel_01, block 5, region \[10:20, 20:30\]: is not what its run wrote"
    with pytest.raises(VerificationError, match=message):
        verify(made[1], progress=False)


def test_another_field_is_told_by_its_worst_voxel(made: tuple[Path, Path]):
    """Whose place and error are in the message."""
    field = np.load(made[0])
    field[13, 27] += 0.5
    with pytest.raises(VerificationError, match=r"0\.5.*\(13, 27\)"):
        verify(made[1], field, progress=False)


def test_a_missing_shard_is_named(made: tuple[Path, Path]):
    """A deleted file reads as zeros: it is looked for before anything is read."""
    (made[1] / "channel_02/scale0/image/c/1/2").unlink()
    with pytest.raises(
        VerificationError, match=r"channel_02, block 5.*shard \(1, 2\) is not there"
    ):
        verify(made[1], progress=False)


def test_an_empty_shard_is_named(made: tuple[Path, Path]):
    """So does an empty file, as a machine may leave one that lost its power."""
    (made[1] / "channel_02/scale0/image/c/1/2").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"channel_02, block 5.*shard \(1, 2\) is empty"):
        verify(made[1], progress=False)


def test_a_flipped_bit_is_named(made: tuple[Path, Path]):
    """The checksum of a chunk tells; the message names the block."""
    shard = made[1] / "residual/scale0/image/c/0/1"
    data = bytearray(shard.read_bytes())
    data[20] ^= 4
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match=r"block 1.*checksum"):
        verify(made[1], progress=False)


@pytest.mark.parametrize("options", [{"constrained": False}, {"inverted": True}])
def test_a_value_beyond_the_faces_counts(options: dict[str, bool], tmp_path: Path):
    """What rounds is what the smoothing mixes: with `cval` far above the field, that."""
    field = np.random.default_rng(0).lognormal(size=SHAPE).astype("f4")
    out, more = tmp_path / "out.zarr", {"boundary": "constant", "cval": 1e4, **options}
    cdd_dask.decompose(field, out, max_scale=4, block=(10, 10), progress=False, **more)
    found = verify(out, field, progress=False)
    assert found.worst_ulp <= 4
    assert found.ulp == np.spacing(np.float32(1e4))


def test_the_source_must_be_known_and_match(made: tuple[Path, Path], tmp_path: Path):
    """An array in memory has to be given again, and another shape is refused."""
    field = np.load(made[0])
    out = tmp_path / "from_memory.zarr"
    cdd_dask.decompose(field, out, max_scale=4, progress=False)
    with pytest.raises(InputError, match="--source"):
        verify(out, progress=False)
    assert verify(out, field, progress=False).worst_ulp <= 4
    with pytest.raises(InputError, match="shape"):
        verify(out, field[1:], progress=False)


@pytest.mark.parametrize(
    "edit",
    [
        {"edges": "x"},
        {"edges": [1, 2, 4, 8]},
        {"parameters": None},
        {"parameters": {"x": 1}},
        {"plan": None},
        {"plan": {"block": [0, 0], "volume": {"shape": SHAPE}}},
        {"plan": {"block": [10, 10], "volume": {"shape": [5, 5]}}},
        {"source": None},
        {"complete": "yes"},
        {"format_version": 99},
    ],
)
def test_edited_metadata_is_refused(made: tuple[Path, Path], edit: dict[str, object]):
    """What nobody could work with is said to be damaged, when the store is opened."""
    root = zarr.open_group(made[1], mode="r+")
    root.attrs["cdd_dask"] = {**root.attrs["cdd_dask"], **edit}
    with pytest.raises(StoreError, match=str(made[1])):
        cdd_dask.open_decomposition(made[1])


def test_a_group_without_its_scales_is_refused(made: tuple[Path, Path]):
    """So is a channel that does not know what it is."""
    zarr.open_group(made[1] / "channel_00", mode="r+").attrs["cdd_dask"] = {}
    with pytest.raises(StoreError, match=r"channel_00\.scale_from is missing"):
        cdd_dask.open_decomposition(made[1])


def test_a_source_that_is_elsewhere(made: tuple[Path, Path]):
    """Blocks are checked all the same; then it is said that the sum could not be."""
    source, out = made
    moved = source.rename(source.parent / "moved.npy")
    with pytest.raises(InputError, match=r"every block of .* is what its run wrote.*--source"):
        verify(out, progress=False)
    assert verify(out, moved, progress=False)
    (out / "channel_00/scale0/image/c/0/0").unlink()
    with pytest.raises(VerificationError, match="damaged, in 1 place:"):
        verify(out, progress=False)


def test_a_source_that_has_changed(made: tuple[Path, Path]):
    """The sum is off, and the message says what is different now."""
    source, out = made
    field = np.load(source)
    field[3, 4] += 1
    np.save(source, field)
    with pytest.raises(VerificationError, match=r"voxel \(3, 4\); it is not what was decomposed: "):
        verify(out, progress=False)
