"""Damage finished stores, one injury at a time, and see it found and mended.

    python scripts/damage.py --count 300 --seed 0

For every damage `verify` must refuse the store, no reader be given other values, `repair` mend it
or say that it cannot, and what was mended be the undamaged store again, file by file. The exit
status is 1 if anything was missed. ``--without-checksums`` leaves out the comparison with the done
marks: shards that were swapped are missed then.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zarr

import cdd_dask
from cdd_dask import store
from cdd_dask.errors import CddError
from cdd_dask.tables import text_table

BASE: dict[str, Any] = {"max_scale": 4, "e_rel": 0.3, "block": 16, "progress": False}
CELLS: dict[str, Any] = {"min_scale": 16, "max_scale": 32, "e_rel": 0.4}
STORES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "halos": ("positive", (48, 40), {"max_scale": 2}),
    "several passes": ("positive", (48, 40), {}),
    "wrap": ("positive", (40, 48), {"boundary": "wrap", "dtype": "float64"}),
    "closure": ("positive", (48, 40), CELLS),
    "stream": ("positive", (48, 40), {**CELLS, "rtol": 2e-4}),
    "signed": ("signed", (48, 40), CELLS),
    "blanks": ("blank", (48, 40), {"max_scale": 8}),
    "refined": ("positive", (40, 40), {"upsample": 2, "switch_scale": 2}),
    "one block": ("positive", (40, 30), {"block": 64}),
    "halos in 3-D": ("positive", (24, 24, 20), {"max_scale": 2}),
    "closure in 3-D": ("positive", (32, 24, 20), CELLS),
    "spacing": ("positive", (48, 40), {"max_scale": 2, "spacing": 0.5, "unit": "pc"}),
}
"""A field, its shape and the options of `decompose` for every regime."""

EMPTY: tuple[Any, ...] = ({}, [])
Files = dict[str, bytes]
Outputs = dict[str, np.ndarray[Any, Any] | None]


def make_store(folder: Path, name: str, seed: int = 0) -> Path:
    """Decompose the field of a regime into a store in `folder`."""
    kind, shape, options = STORES[name]
    values = np.random.default_rng(seed).lognormal(size=shape).astype("float32")
    if kind == "signed":
        values = np.log(values)
    if kind == "blank":
        values[10:14, 5:9] = np.nan
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "field.npy", values)
    cdd_dask.decompose(folder / "field.npy", folder / "out.zarr", **{**BASE, **options})
    return folder / "out.zarr"


# damages


@dataclass(frozen=True)
class Patient:
    """A finished store that is damaged, and another one that strange parts are taken from."""

    path: Path
    donor: Path
    """A store of another field, of the same parameters."""
    random: random.Random

    def files(self, pattern: str) -> list[Path]:
        return sorted(path for path in self.path.glob(pattern) if path.is_file())

    def shard(self) -> Path:
        return self.random.choice(self.files("*/scale0/image/c/**/*"))

    def document(self) -> Path:
        return self.random.choice(self.files("**/zarr.json"))

    def anything(self) -> Path:
        return self.random.choice(self.files("**/*"))


Damage = Callable[[Patient], str]
DAMAGES: dict[str, Damage] = {}
HOPELESS = {"both copies", "another store's marks and copy", "another store's root"}
"""Damages after which nobody can tell what was there: to be said."""
WELL_FORMED = {
    "swapped blocks", "swapped channels", "another store's shard", "swapped chunks",
    "a changed voxel", "a whole channel copied over another",
}  # fmt: skip
"""Damages that leave every chunk's own checksum right: only done marks, and so `verify`, tell."""


def damage(name: str) -> Callable[[Damage], Damage]:
    """Name a damage; it returns what it hit, or nothing where the store has no such thing."""

    def keep(function: Damage) -> Damage:
        DAMAGES[name] = function
        return function

    return keep


@damage("truncated")
def _truncate(patient: Patient) -> str:
    path = patient.anything()
    data = path.read_bytes()
    path.write_bytes(data[: patient.random.randrange(len(data))])
    return str(path)


@damage("deleted")
def _delete(patient: Patient) -> str:
    path = patient.anything()
    path.unlink()
    return str(path)


def _flip(path: Path, place: int, bit: int) -> str:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path}, bit {bit} of byte {place}"


@damage("bit of a shard")
def _flip_shard(patient: Patient) -> str:
    path = patient.shard()
    return _flip(path, patient.random.randrange(path.stat().st_size), patient.random.randrange(8))


@damage("bit of a shard's index")
def _flip_index(patient: Patient) -> str:
    path = patient.shard()
    return _flip(path, path.stat().st_size - 1 - patient.random.randrange(20), 3)


@damage("bit of a document")
def _flip_document(patient: Patient) -> str:
    path = patient.document()
    return _flip(path, patient.random.randrange(path.stat().st_size), patient.random.randrange(8))


@damage("bit of coordinates")
def _flip_coordinates(patient: Patient) -> str:
    path = patient.random.choice(patient.files("*/scale0/[!i]*/c/*"))
    return _flip(path, patient.random.randrange(path.stat().st_size), patient.random.randrange(8))


@damage("garbage appended")
def _append(patient: Patient) -> str:
    path = patient.shard()
    path.write_bytes(path.read_bytes() + patient.random.randbytes(7))
    return str(path)


@damage("zeros")
def _zeros(patient: Patient) -> str:
    path = patient.shard()
    path.write_bytes(bytes(path.stat().st_size))
    return str(path)


def _swap(one: Path, other: Path) -> str:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one} and {other}"


@damage("swapped blocks")
def _swap_blocks(patient: Patient) -> str:
    one = patient.shard()
    image = one.relative_to(patient.path).parts[0]
    others = [path for path in patient.files(f"{image}/scale0/image/c/**/*") if path != one]
    return _swap(one, patient.random.choice(others)) if others else ""


@damage("swapped channels")
def _swap_channels(patient: Patient) -> str:
    one = patient.shard()
    _, *place = one.relative_to(patient.path).parts
    others = [path for path in patient.files("/".join(["*", *place])) if path != one]
    return _swap(one, patient.random.choice(others))


@damage("another store's shard")
def _strange_shard(patient: Patient) -> str:
    one = patient.shard()
    shutil.copy(patient.donor / one.relative_to(patient.path), one)
    return str(one)


def _array(patient: Patient) -> tuple[str, Any]:
    path = patient.random.choice(sorted(patient.path.glob("*/scale0/image")))
    return str(path), zarr.open_array(path, mode="r+")


@damage("swapped chunks")
def _swap_chunks(patient: Patient) -> str:
    """Within a shard, whose index is then right again."""
    path, array = _array(patient)
    sides = [min(n, 2 * c) // 2 for n, c in zip(array.shape, array.chunks, strict=True)]
    first = tuple(slice(0, side) for side in sides)
    last = (slice(array.shape[0] - sides[0], array.shape[0]), *first[1:])
    values = array[...]
    values[first], values[last] = values[last].copy(), values[first].copy()
    array[...] = values
    return path


@damage("a changed voxel")
def _change_voxel(patient: Patient) -> str:
    """Written by Zarr, so that all its checksums are right."""
    path, array = _array(patient)
    place = tuple(patient.random.randrange(n) for n in array.shape)
    value = array[place]
    array[place] = 1.0 if np.isnan(value) else np.nextafter(value, value.dtype.type(np.inf))
    return f"{path} at {place}"


@damage("a whole channel copied over another")
def _copy_channel(patient: Patient) -> str:
    outputs = sorted(path.parents[1] for path in patient.path.glob("*/scale0/image"))
    one, other = patient.random.sample(outputs, 2)
    shutil.rmtree(other)
    shutil.copytree(one, other)
    return f"{one} to {other}"


@damage("a folder deleted")
def _delete_folder(patient: Patient) -> str:
    folders = sorted(path for path in patient.path.rglob("*") if path.is_dir())
    folder = patient.random.choice(folders)
    shutil.rmtree(folder)
    return str(folder)


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        nested = isinstance(one, dict | list) and len(one) > 0
        yield from _leaves(one, (*place, key)) if nested else [(*place, key)]


def _edit(document: Any, place: tuple[Any, ...]) -> None:
    for key in place[:-1]:
        document = document[key]
    value = document[place[-1]]
    changed = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value * 2 + 1}
    text = {str: lambda: value + "x", type(None): lambda: 1}
    document[place[-1]] = {**changed, **text}.get(type(value), lambda: None)()


def _edit_file(patient: Patient, path: Path) -> str:
    document = json.loads(path.read_text())
    place = patient.random.choice(list(_leaves(document)))
    _edit(document, place)
    path.write_text(json.dumps(document))
    return f"{path}: {'.'.join(map(str, place))}"


@damage("edited root")
def _edit_root(patient: Patient) -> str:
    return _edit_file(patient, patient.path / "zarr.json")


@damage("edited output")
def _edit_group(patient: Patient) -> str:
    return _edit_file(patient, patient.random.choice(patient.files("*/zarr.json")))


@damage("edited array")
def _edit_array(patient: Patient) -> str:
    return _edit_file(patient, patient.random.choice(patient.files("*/scale0/*/zarr.json")))


@damage("edited marks")
def _edit_marks(patient: Patient) -> str:
    return _edit_file(patient, patient.random.choice(patient.files("done/**/zarr.json")))


@damage("edited marks, twice")
def _edit_marks_twice(patient: Patient) -> str:
    """The same in both copies."""
    path = patient.random.choice(patient.files("done/*/zarr.json"))
    document = json.loads(path.read_text())
    place = patient.random.choice(list(_leaves(document["attributes"])))
    _edit(document["attributes"], place)
    for one in (path, path.parent / "copy" / "zarr.json"):
        one.write_text(json.dumps(document))
    return f"{path}: {'.'.join(map(str, place))}"


@damage("marks of another pass")
def _other_pass(patient: Patient) -> str:
    passes = patient.files("done/*/zarr.json")
    if len(passes) < 2:
        return ""
    one, other = patient.random.sample(passes, 2)
    for name in ("zarr.json", "copy/zarr.json"):
        shutil.copy(one.parent / name, other.parent / name)
    return f"{one} to {other}"


@damage("another store's marks")
def _strange_marks(patient: Patient) -> str:
    path = patient.random.choice(patient.files("done/*/zarr.json"))
    for one in (path, path.parent / "copy" / "zarr.json"):
        shutil.copy(patient.donor / one.relative_to(patient.path), one)
    return str(path)


@damage("all marks deleted")
def _no_marks(patient: Patient) -> str:
    shutil.rmtree(patient.path / "done")
    return str(patient.path / "done")


@damage("another store's marks and copy")
def _strange_ledger(patient: Patient) -> str:
    shutil.rmtree(patient.path / "done")
    shutil.copytree(patient.donor / "done", patient.path / "done")
    return str(patient.path / "done")


@damage("another store's root")
def _strange_root(patient: Patient) -> str:
    shutil.copy(patient.donor / "zarr.json", patient.path / "zarr.json")
    return str(patient.path / "zarr.json")


@damage("both copies")
def _both_copies(patient: Patient) -> str:
    for path in (patient.path / "zarr.json", patient.path / "done" / "zarr.json"):
        path.write_bytes(path.read_bytes().replace(b"fingerprint", b"fingerprinx"))
    return str(patient.path / "zarr.json")


@damage("both copies of an output")
def _both_copies_of_group(patient: Patient) -> str:
    """Edited in the same way."""
    path = patient.random.choice(patient.files("*/scale0/zarr.json")).parents[1] / "zarr.json"
    for one in (path, patient.path / "done" / "zarr.json"):
        document = json.loads(one.read_text())
        held = document["attributes"]["cdd_dask"]
        held = held.get(path.parent.name, held)
        held["statistics"]["sum"] = 77.0
        one.write_text(json.dumps(document))
    return str(path)


# what becomes of it


@dataclass
class Tally:
    """What became of the damages, by kind."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)

    @property
    def injected(self) -> int:
        return sum(count.total() for count in self.counts.values())

    def add(self, kind: str, what: str, outcome: str, detail: str = "") -> None:
        self.counts.setdefault(kind, Counter())[outcome] += 1
        if outcome == "MISSED":
            self.missed.append(f"{kind}: {what}: {detail}")
        if outcome == "said impossible":
            self.impossible.append(f"{kind}: {what}: {detail}")

    def __str__(self) -> str:
        columns = ["injected", "harmless", "found", "repaired", "said impossible", "MISSED"]
        rows = []
        for kind in [*sorted(self.counts), "all"]:
            several = list(self.counts.values()) if kind == "all" else [self.counts[kind]]
            count = sum(several, Counter())
            count["injected"] = count.total()
            count["found"] = count["repaired"] + count["said impossible"]
            rows.append([kind, *(str(count[column]) for column in columns)])
        return text_table(["damage", *columns], rows)


def files_of(folder: Path) -> Files:
    """All files of a store."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def same(wanted: Files, found: Files) -> bool:
    """Whether files mean the same: documents as they are read, all else to the bit.

    What is empty in a document may be left out.
    """

    def loaded(name: str, data: bytes) -> Any:
        if not name.endswith("zarr.json"):
            return data
        try:
            kept = {key: value for key, value in json.loads(data).items() if value not in EMPTY}
            return json.dumps(kept, sort_keys=True)
        except (ValueError, AttributeError):
            return None

    return wanted.keys() == found.keys() and all(
        loaded(name, data) == loaded(name, found[name]) for name, data in wanted.items()
    )


def outputs_of(path: Path) -> Outputs:
    """The values of every output, as a reader is given them; None where that is an error."""
    try:
        result = cdd_dask.open_decomposition(path)
    except CddError:
        return {}
    found: Outputs = {}
    arrays = (*result.channels, result.residual)
    for (name, *_), array in zip(result.outputs(), arrays, strict=True):
        try:
            found[name] = array[...]
        except CddError:
            found[name] = None
    return found


def misread(path: Path, kind: str, whole: Outputs) -> str:
    """The first output whose reader is given other values without being told; or none."""
    if kind in WELL_FORMED:
        return ""
    for name, values in outputs_of(path).items():
        if values is not None and not np.array_equal(values, whole[name], equal_nan=True):
            return f"{name} is read otherwise"
    return ""


def treat(path: Path, wanted: Files, whole: Outputs, kind: str) -> tuple[str, str]:
    """What becomes of a damaged store, and details where it is not repaired."""
    hopeless = kind in HOPELESS
    try:
        cdd_dask.verify(path, progress=False)
        return "MISSED", "verify finds nothing"
    except CddError as error:
        found = str(error)
    if wrong := misread(path, kind, whole):
        return "MISSED", wrong
    try:
        done = cdd_dask.repair(path, progress=False)
    except CddError as error:
        return ("said impossible" if hopeless else "MISSED"), str(error)
    if done.impossible:
        return ("said impossible" if hopeless else "MISSED"), str(done)
    try:
        cdd_dask.verify(path, progress=False)
    except CddError as error:
        return "MISSED", f"after its repair: {error}"
    return ("repaired", found) if same(wanted, files_of(path)) else ("MISSED", "files differ")


def is_whole(path: Path) -> bool:
    """Whether `verify` finds nothing."""
    try:
        cdd_dask.verify(path, progress=False)
    except CddError:
        return False
    return True


def inject(
    kinds: list[str], stores: list[str], count: int, seed: int, place: Path, say: bool = False
) -> Tally:
    """Damage stores `count` times, each kind as often as the others."""
    tally, number = Tally(), 0
    made: dict[str, tuple[Path, Path, Files, Outputs]] = {}
    while tally.injected < count:
        kind = kinds[number % len(kinds)]
        # so that every kind meets every store
        name = stores[(number + number // len(stores)) % len(stores)]
        number += 1
        if name not in made:
            whole = make_store(place / name, name)
            donor = make_store(place / name / "other", name, seed=1)
            made[name] = whole, donor, files_of(whole), outputs_of(whole)
        whole, donor, wanted, values = made[name]
        path = place / "damaged.zarr"
        shutil.copytree(whole, path)
        patient = Patient(path, donor, random.Random(f"{seed}/{number}"))
        hit = DAMAGES[kind](patient)
        if not hit:
            shutil.rmtree(path)
            continue
        what = f"{name}: {hit.replace(f'{path}/', '')}"
        # what means the same may be damage all the same: a group's empty attributes that are gone
        harmless = same(wanted, files_of(path)) and is_whole(path)
        outcome, detail = ("harmless", "") if harmless else treat(path, wanted, values, kind)
        tally.add(kind, what, outcome, detail)
        if say:
            print(f"{tally.injected}: {kind}: {what}: {outcome}", file=sys.stderr, flush=True)
        shutil.rmtree(path)
    return tally


def main() -> None:
    """Damage as many stores as asked for, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(DAMAGES), action="append")
    parser.add_argument("--store", choices=sorted(STORES), action="append")
    parser.add_argument("--without-checksums", action="store_true")
    parser.add_argument("--say", action="store_true", help="a line for every damage")
    arguments = parser.parse_args()
    kinds, stores = arguments.kind or list(DAMAGES), arguments.store or list(STORES)
    unsafe = mock.patch.object(store, "checksum", return_value="unchecked")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.without_checksums:
            unsafe.start()
        tally = inject(kinds, stores, arguments.count, arguments.seed, Path(folder), arguments.say)
    print(tally)
    print("\nsaid impossible:", *tally.impossible, sep="\n  ")
    print("\nmissed:", *tally.missed, sep="\n  ")
    sys.exit(1 if tally.missed else 0)


if __name__ == "__main__":
    main()
