"""Damage is found, whatever it is, and mended to the bit; what cannot be mended is said."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from examples import NIGHTLY, slowly

import cdd_dask
from cdd_dask import identity, lease, mending, run, store
from cdd_dask.errors import DamagedError, LeaseError, StoreError, VerificationError
from cdd_dask.seals import sealed

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import damage

LONG: dict[str, Any] = {"max_scale": 2, "e_rel": 0.3, "block": 16, "rtol": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def halos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of nine blocks, and its source beside it."""
    return damage.make_store(tmp_path_factory.mktemp("halos"), "halos")


@pytest.fixture
def made(halos: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(halos, tmp_path / "out.zarr"))


def shard(path: Path, output: str, *place: int) -> Path:
    return path.joinpath(output, "scale0", "image", "c", *map(str, place))


def test_damages_of_every_kind(tmp_path: Path):
    """Each is found; what is mended is the store that it was. Every other kind in short runs."""
    kinds = list(damage.DAMAGES)[:: 1 if NIGHTLY else 2]
    tally = damage.inject(kinds, ["halos"], len(kinds), 3, tmp_path)
    assert not tally.missed
    assert {what.split(":")[0] for what in tally.impossible} <= damage.HOPELESS


def test_without_checksums_swapped_shards_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each shard is sound by itself: only done marks tell."""
    monkeypatch.setattr(store, "checksum", lambda values, like="": "unchecked")
    tally = damage.inject(["swapped blocks", "swapped channels"], ["halos"], 2, 0, tmp_path)
    assert len(tally.missed) == 2


def test_several_damages_at_once(made: Path, halos: Path):
    """Of data, attributes and marks, in every copy once."""
    shard(made, "channel_00", 0, 1).unlink()
    shard(made, "residual", 2, 2).write_bytes(b"none")
    (made / "zarr.json").write_text("{")
    (made / "channel_01" / "zarr.json").unlink()
    (made / "channel_01" / "scale0" / "image" / "zarr.json").write_text("[]")
    first, *_, last = sorted((made / "done").glob("pass_*"))
    (first / "zarr.json").unlink()
    (last / "copy" / "zarr.json").write_text("")
    with pytest.raises(VerificationError, match="is damaged, in"):
        cdd_dask.verify(made, progress=False)
    done = cdd_dask.repair(made, progress=False)
    assert not done.impossible
    assert not done.approximate
    assert damage.same(damage.files_of(halos), damage.files_of(made))
    cdd_dask.verify(made, progress=False)
    assert str(cdd_dask.repair(made, progress=False)) == "nothing is damaged"


def test_metadata_come_back_byte_by_byte(made: Path):
    """Each document that is lost by itself."""
    names = {path for path in made.rglob("zarr.json") if "residual" not in path.parts}
    documents = {path: path.read_bytes() for path in names}
    for path, content in documents.items():
        path.unlink()
        assert len(cdd_dask.repair(made, progress=False).repaired) == 1, path
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("what", ["zarr.json", "done"])
def test_parts_of_another_run_are_named(what: str, made: Path, halos: Path, tmp_path: Path):
    """Nobody can tell which is right; whoever knows deletes the other, and the rest is mended."""
    other = damage.make_store(tmp_path / "other", "halos", seed=1)
    if what == "done":
        shutil.rmtree(made / "done")
        shutil.copytree(other / "done", made / "done")
    else:
        shutil.copy(other / "zarr.json", made / "zarr.json")
    for verb in (cdd_dask.verify, cdd_dask.repair):
        with pytest.raises(StoreError, match=r"of two runs: delete zarr\.json or done/zarr\.json"):
            verb(made, progress=False)
    strange = made / ("zarr.json" if what == "zarr.json" else "done/zarr.json")
    strange.unlink()
    assert not cdd_dask.repair(made, progress=False).impossible
    assert damage.same(damage.files_of(halos), damage.files_of(made))


def test_a_source_that_is_gone(tmp_path: Path):
    """Said for every block; metadata are mended all the same, and the rest when it is back."""
    made = damage.make_store(tmp_path, "halos")
    wanted, field = damage.files_of(made), tmp_path / "field.npy"
    field.rename(tmp_path / "elsewhere.npy")
    shard(made, "channel_01", 1, 1).unlink()
    (made / "channel_00" / "zarr.json").unlink()
    done = cdd_dask.repair(made, progress=False)
    assert [what.output for what, _ in done.impossible] == ["channel_01"]
    assert "no source to compute it from" in str(done)
    assert (made / "channel_00" / "zarr.json").exists()
    with pytest.raises(VerificationError, match="channel_01, block 4"):
        cdd_dask.verify(made, tmp_path / "elsewhere.npy", progress=False)
    # the same content at another place is the same source
    done = cdd_dask.repair(made, tmp_path / "elsewhere.npy", progress=False)
    assert [what.block for what in done.repaired] == [4]
    assert damage.same(wanted, damage.files_of(made))


def test_a_source_that_is_the_same_to_rounding(made: Path, halos: Path, tmp_path: Path):
    """The block is made of it and the other outputs, to 4 units in the last place, and marked."""
    field = np.load(halos.parent / "field.npy")
    np.save(tmp_path / "near.npy", np.nextafter(field, np.float32(np.inf)))
    shard(made, "channel_01", 1, 1).unlink()
    done = cdd_dask.repair(made, tmp_path / "near.npy", progress=False)
    assert [what.block for what, _ in done.approximate] == [4]
    assert not done.repaired
    assert not done.impossible
    found = cdd_dask.verify(made, progress=False)
    assert found.approximate == {"channel_01": [4]}
    assert "channel_01: repaired approximately in blocks 4" in str(found)
    held: Any = zarr.open_group(made / "channel_01").attrs["cdd_dask"]
    assert held["approximate_blocks"] == [4]
    whole, mended = map(cdd_dask.open_decomposition, (halos, made))
    for one, other in zip(whole.channels, mended.channels, strict=True):
        off = np.abs(one[...] - other[...])
        assert off.max() <= 4 * np.spacing(field.max())
        off[16:32, 16:32] = 0
        assert not off.any()
    # two outputs of a block cannot be told apart by their sum
    shard(made, "channel_00", 0, 0).unlink()
    shard(made, "residual", 0, 0).unlink()
    done = cdd_dask.repair(made, tmp_path / "near.npy", progress=False)
    assert [what.output for what, _ in done.impossible] == ["channel_00", "residual"]
    assert "several outputs of the block" in str(done)


def test_the_same_values_of_another_kind_of_source(
    made: Path, halos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Done marks prove what they give, whatever the source's identity says."""
    monkeypatch.setattr(identity, "SMALL", 100)  # an array is hashed whole, a file in samples
    field = np.load(halos.parent / "field.npy")
    for given in (field, field.astype("float64")):
        for output in ("channel_01", "residual"):
            shard(made, output, 1, 1).unlink()
        done = cdd_dask.repair(made, given, progress=False)
        assert len(done.repaired) == 2
        assert not done.approximate
        assert damage.same(damage.files_of(halos), damage.files_of(made))


# what is lost twice, and what is stopped


def lose_attributes(path: Path, output: str) -> None:
    """Edit the attributes of an output's group and their copy."""

    def change(document: Any) -> None:
        held = document["attributes"]["cdd_dask"]
        held.get(output, held)["scale_from"] = 77.0

    for name in (output, "done"):
        edited(path / name / "zarr.json", change)


@pytest.mark.parametrize("output", ["channel_01", "residual"])
def test_attributes_that_are_lost_twice_are_made_again(output: str, made: Path, halos: Path):
    """Of the plan and of the statistics in the done marks, to the byte."""
    lose_attributes(made, output)
    with pytest.raises(VerificationError, match=f"in 2 places:(\n.*)*{output}/zarr.json"):
        cdd_dask.verify(made, progress=False)
    assert len(cdd_dask.repair(made, progress=False).repaired) == 2
    assert damage.files_of(halos) == damage.files_of(made)


def test_attributes_that_tell_of_approximate_blocks_are_not(
    made: Path, halos: Path, tmp_path: Path
):
    """Nothing else tells of those: it is said once that they are lost."""
    field = np.load(halos.parent / "field.npy")
    np.save(tmp_path / "near.npy", np.nextafter(field, np.float32(np.inf)))
    shard(made, "channel_01", 1, 1).unlink()
    assert cdd_dask.repair(made, tmp_path / "near.npy", progress=False).approximate
    lose_attributes(made, "channel_01")
    before = (made / "channel_01" / "zarr.json").read_bytes()
    done = cdd_dask.repair(made, progress=False)
    assert [what.output for what, _ in done.impossible] == ["channel_01"]
    assert "its statistics are lost" in str(done)
    assert (made / "channel_01" / "zarr.json").read_bytes() == before


def test_a_repair_that_is_stopped_proves_nothing(
    made: Path, halos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between attributes and marks: an approximate block is damaged until both are there."""
    field = np.load(halos.parent / "field.npy")
    np.save(tmp_path / "near.npy", np.nextafter(field, np.float32(np.inf)))
    shard(made, "channel_01", 1, 1).unlink()

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mending, "gather_marks", stopped)
        with pytest.raises(KeyboardInterrupt):
            cdd_dask.repair(made, tmp_path / "near.npy", progress=False)
    with pytest.raises(VerificationError, match=r"channel_01, block 4.*is not what its run wrote"):
        cdd_dask.verify(made, progress=False)
    assert cdd_dask.repair(made, progress=False).repaired  # of the source itself, to the bit
    whole, mended = map(cdd_dask.open_decomposition, (halos, made))
    for one, other in zip(whole.channels, mended.channels, strict=True):
        assert np.array_equal(one[...], other[...])


def test_a_block_that_lacks_only_its_mark_stays(made: Path, monkeypatch: pytest.MonkeyPatch):
    """Where this machine computes it otherwise: the sum says that it is right."""
    last = sorted((made / "done").glob("pass_*"))[-1]

    def change(document: Any) -> None:
        held = document["attributes"]["cdd_dask"]
        held["marks"] = [mark for mark in held["marks"] if mark[0] != 4]

    for path in (last / "zarr.json", last / "copy" / "zarr.json"):
        edited(path, change)
    before = shard(made, "residual", 1, 1).read_bytes()
    statistics = store.write_block

    def otherwise(address: str, path: str, core: Any, values: Any) -> None:
        statistics(address, path, core, values * np.float32(1 + 1e-6))

    monkeypatch.setattr(store, "write_block", otherwise)
    done = cdd_dask.repair(made, progress=False)
    assert {what.block for what, _ in done.approximate} == {4}
    assert "kept as it is" in str(done)
    assert shard(made, "residual", 1, 1).read_bytes() == before


def test_what_a_killed_repair_left_goes(made: Path):
    """It computes in a folder beside the store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mending, "shutil", SimpleNamespace(rmtree=lambda path, **_: None))
        shard(made, "residual", 1, 1).unlink()
        assert cdd_dask.repair(made, progress=False).repaired
    assert [*made.parent.glob("cdd-dask-repair-*")]
    shard(made, "residual", 1, 1).unlink()
    assert cdd_dask.repair(made, progress=False).repaired
    assert not [*made.parent.glob("cdd-dask-repair-*")]


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_source_that_differs_just_there(
    size: str, made: Path, halos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All other blocks agree with it; the statistics of the damaged one do not."""
    if size == "large":  # told by samples: between them nobody looks
        monkeypatch.setattr(mending, "content_change", lambda known, found: "")
    field = np.load(halos.parent / "field.npy")
    field[24, 24] += 1000
    np.save(tmp_path / "other.npy", field)
    shard(made, "channel_00", 1, 1).unlink()
    done = cdd_dask.repair(made, tmp_path / "other.npy", progress=False)
    assert not done.approximate
    (reason,) = (why for _, why in done.impossible)
    assert "what it holds there is something else" in reason
    assert ("had source content=" if size == "small" else "not what its run wrote: ") in reason
    assert not shard(made, "channel_00", 1, 1).exists()


def test_another_source_mends_nothing(made: Path, halos: Path, tmp_path: Path):
    """What it would give is not what was decomposed."""
    np.save(tmp_path / "other.npy", np.load(halos.parent / "field.npy") * 1.001)
    shard(made, "channel_01", 1, 1).unlink()
    done = cdd_dask.repair(made, tmp_path / "other.npy", progress=False)
    assert len(done.impossible) == 1
    assert "the source is another one" in str(done)
    assert not shard(made, "channel_01", 1, 1).exists()


def test_repair_waits_for_its_turn(made: Path):
    """While another one writes to the store."""
    shard(made, "channel_01", 1, 1).unlink()
    with lease.Lease(str(made)):
        with pytest.raises(LeaseError, match="being written by"):
            cdd_dask.repair(made, progress=False)
        assert cdd_dask.repair(made, break_lease=True, progress=False).repaired


@pytest.mark.parametrize(("boundary", "place"), [("wrap", 0), ("reflect", 0), ("reflect", 7)])
def test_nothing_but_what_a_block_depends_on_is_computed(
    boundary: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its neighbours in the pass before, and theirs; across the faces where the field wraps."""

    def with_neighbours(blocks: set[int]) -> set[int]:
        reached = {block + side for block in blocks for side in (-1, 0, 1)}
        inside = {block for block in reached if 0 <= block < 20}
        return {block % 20 for block in reached} if boundary == "wrap" else inside

    np.save(tmp_path / "field.npy", np.random.default_rng(0).lognormal(size=320).astype("f4"))
    out, options = tmp_path / "out.zarr", {**LONG, "boundary": boundary}
    cdd_dask.decompose(tmp_path / "field.npy", out, **options)
    kinds = [one.kind for one in cdd_dask.plan(tmp_path / "field.npy", **options).passes]
    assert kinds == ["copy", "diffuse", "diffuse"]
    wanted, executed, original = damage.files_of(out), set(), run.run_task

    def counted(task: Any) -> Any:
        executed.add((task.number, task.block))
        return original(task)

    monkeypatch.setattr(run, "run_task", counted)
    shard(out, "residual", place).unlink()
    cdd_dask.repair(out, progress=False)
    near = with_neighbours({place})
    needed = [with_neighbours(near), near, {place}]
    assert executed == {(number, block) for number in range(3) for block in needed[number]}
    assert damage.same(wanted, damage.files_of(out))


# what readers are given


def edited(path: Path, change: Any) -> None:
    """Have a JSON document say something else."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_an_empty_shard_is_no_zeros(made: Path):
    """Neither of all of it nor of a part; a lost machine may leave such."""
    shard(made, "channel_00", 0, 0).write_bytes(b"")
    channel = cdd_dask.open_decomposition(made).channels[0]
    for region in (..., (slice(3, 5), slice(3, 5))):
        with pytest.raises(DamagedError, match=r"shard \(0, 0\) is empty"):
            channel[region]


@pytest.mark.parametrize("damaged", ["flipped", "gone"])
@pytest.mark.parametrize(
    "read",
    [
        lambda array: array[...],
        lambda array: array[10:30],
        lambda array: array.oindex[[20, 3], :],
        lambda array: array.vindex[[20, 3], [20, 3]],
        lambda array: array.blocks[1, 1],
        lambda array: array[np.ones(array.shape, bool)],
        lambda array: array.get_basic_selection((20, 20)),
    ],
)
def test_damage_is_named_however_it_is_read(read: Any, damaged: str, made: Path):
    """With the array, the shard, and what mends it."""
    path = shard(made, "residual", 1, 1)
    if damaged == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[30] ^= 4
        path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"residual/scale0/image, shard \(1, 1\).*repair"):
        read(cdd_dask.open_decomposition(made).residual)


def test_another_sealed_document_is_no_root(made: Path, halos: Path):
    """An output's attributes have a seal, too; the copy of the root's is sound."""
    shutil.copy(made / "residual/zarr.json", made / "zarr.json")
    with pytest.raises(VerificationError, match=r"zarr\.json has other attributes"):
        cdd_dask.verify(made, progress=False)
    assert cdd_dask.repair(made, progress=False).repaired
    assert damage.files_of(halos) == damage.files_of(made)


def test_storage_transformers_are_refused(made: Path, halos: Path):
    """Zarr itself looks at them only sometimes."""
    edited(
        made / "channel_00/scale0/image/zarr.json",
        lambda document: document.update(storage_transformers=[1]),
    )
    options = damage.BASE | damage.STORES["halos"][2]
    with pytest.raises(StoreError, match="storage transformers"):
        cdd_dask.decompose(halos.parent / "field.npy", made, **options)


def test_what_is_opened_can_be_sent(made: Path):
    """To workers, who are told of damage, too."""
    shard(made, "residual", 1, 1).unlink()
    image = cdd_dask.open_decomposition(made).residual
    sent = pickle.loads(pickle.dumps(image))
    assert sent[:10, :10].shape == (10, 10)
    with pytest.raises(DamagedError, match="is not there"):
        sent[20, 20]


@pytest.mark.parametrize("what", ["separator", "encoding", "endian", "fill value"])
def test_an_edited_array_is_refused(made: Path, what: str):
    """Zarr would read zeros from elsewhere, or other numbers."""

    def change(document: Any) -> None:
        if what == "separator":
            document["chunk_key_encoding"]["configuration"]["separator"] = "."
        elif what == "encoding":
            document["chunk_key_encoding"] = {"name": "v2"}
        elif what == "fill value":
            document["fill_value"] = 1.0
        else:
            inner = document["codecs"][0]["configuration"]["codecs"]
            inner[0]["configuration"]["endian"] = "big"

    edited(made / "channel_00" / "scale0" / "image" / "zarr.json", change)
    with pytest.raises(StoreError, match="was it edited"):
        cdd_dask.open_decomposition(made)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_consolidated_metadata_are_not_believed(made: Path, halos: Path):
    """A user may have made some, for other readers."""
    zarr.consolidate_metadata(made)

    def change(document: Any) -> None:
        held = document["consolidated_metadata"]["metadata"]["channel_00/scale0/image"]
        held["codecs"][0]["configuration"]["codecs"][0]["configuration"]["endian"] = "big"

    edited(made / "zarr.json", change)
    one, other = (cdd_dask.open_decomposition(path).channels[0][...] for path in (halos, made))
    assert np.array_equal(one, other)


def test_overwriting_that_is_stopped_leaves_no_complete_store(
    made: Path, monkeypatch: pytest.MonkeyPatch
):
    """Half of it deleted, and the store says so."""

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        store.remove_store(made)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="not complete"):
        cdd_dask.open_decomposition(made)


def test_overwriting_deletes_no_scratch_but_its_own(made: Path, halos: Path, tmp_path: Path):
    """Attributes may have been edited to name another store."""
    victim = Path(shutil.copytree(halos, tmp_path / "victim.zarr"))

    def change(document: Any) -> None:
        document["attributes"]["cdd_dask"]["scratch"] = str(victim)

    edited(made / "zarr.json", change)
    store.remove_store(made)
    assert not made.exists()
    assert (victim / "zarr.json").exists()


# strange things in place of files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    "names",
    [
        ("zarr.json", "channel_01/zarr.json", "residual/scale0/image/c/0/0"),
        ("done/zarr.json", "channel_00/scale0/x/c/0"),
        ("done", "channel_01/scale0/image/c/1", "residual/scale0"),
        ("channel_00", "channel_01/scale0/image/c"),
    ],
)
@pytest.mark.parametrize("what", ["folder", "pipe", *slowly("file", "loop")])
def test_what_is_something_else_is_replaced(
    what: str, names: tuple[str], made: Path, halos: Path, put_in_place: Any
):
    """Nothing waits for a pipe, or follows a link that leads to itself."""
    for name in names:
        put_in_place(made / name, what)
    with pytest.raises((VerificationError, StoreError)) as found:
        cdd_dask.verify(made, progress=False)
    assert "Errno" not in str(found.value)
    done = cdd_dask.repair(made, progress=False)
    assert done.repaired
    assert not done.impossible
    assert damage.files_of(halos) == {
        name: data for name, data in damage.files_of(made).items() if not name.endswith("/more")
    }


@pytest.mark.parametrize("held", ["x", 3, None, []])
def test_attributes_that_are_none_are_damaged(held: Any, made: Path, halos: Path):
    """Even where there should be none: other readers stumble over them."""
    edited(made / "channel_01/scale0/zarr.json", lambda document: document.update(attributes=held))
    with pytest.raises(
        VerificationError, match=r"channel_01/scale0/zarr\.json has other attributes"
    ):
        cdd_dask.verify(made, progress=False)
    assert cdd_dask.repair(made, progress=False).repaired
    assert damage.files_of(halos) == damage.files_of(made)


def test_a_root_that_contradicts_itself_gives_way(made: Path, halos: Path):
    """Somebody has edited and sealed it: its fingerprint is not its identity's."""

    def change(document: Any) -> None:
        held = document["attributes"]["cdd_dask"]
        held["identity"]["source"]["content"] = "0" * 32
        document["attributes"]["cdd_dask"] = sealed(held)

    edited(made / "zarr.json", change)
    with pytest.raises(VerificationError, match=r"zarr\.json has other attributes"):
        cdd_dask.verify(made, progress=False)
    assert cdd_dask.repair(made, progress=False).repaired
    assert damage.files_of(halos) == damage.files_of(made)


def test_a_key_that_stands_there_twice_is_damage(made: Path, halos: Path):
    """Readers differ in which they take."""
    path = made / "channel_01/scale0/image/zarr.json"
    text = path.read_text()
    path.write_text(text.replace('"shape"', '"shape": [7, 7], "shape"', 1))
    with pytest.raises(VerificationError, match=r"image/zarr\.json is damaged"):
        cdd_dask.verify(made, progress=False)
    assert cdd_dask.repair(made, progress=False).repaired
    assert damage.files_of(halos) == damage.files_of(made)


def test_edited_statistics_are_not_shown(made: Path):
    """The other attributes of an output are not relied on."""

    def change(document: Any) -> None:
        document["attributes"]["cdd_dask"]["statistics"]["sum_abs"] = 9e9

    edited(made / "channel_00/zarr.json", change)
    result = cdd_dask.open_decomposition(made)
    for ask in (result.scale_spectrum, result.table):
        with pytest.raises(StoreError, match="attributes of channel_00 were edited"):
            ask()


def test_a_source_that_is_told_by_samples_proves_nothing(
    made: Path, halos: Path, monkeypatch: pytest.MonkeyPatch
):
    """Written since, between the samples, and the done marks are lost, too."""
    monkeypatch.setattr(identity, "SMALL", 100)
    known = json.loads((made / "zarr.json").read_text())["attributes"]["cdd_dask"]["identity"]
    monkeypatch.setattr(identity, "content_of", lambda source: known["source"]["content"])
    field = np.load(halos.parent / "field.npy")
    field[20:30, 20:30] += 1
    np.save(made.parent / "field.npy", field)
    for place in (made / "done").glob("pass_*"):
        (place / "zarr.json").unlink()
        (place / "copy/zarr.json").unlink()
    for output in ("channel_00", "channel_01", "residual"):
        shard(made, output, 1, 1).unlink()
    done = cdd_dask.repair(made, made.parent / "field.npy", progress=False)
    assert not any(what.block == 4 for what in done.repaired)
    assert {what.block for what, _ in done.impossible} >= {4}
