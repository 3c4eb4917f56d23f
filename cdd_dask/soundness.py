"""Whether a finished store is whole: its metadata, and every block of every output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import layout, objects, store
from cdd_dask.attributes import check_root
from cdd_dask.decomposition import open_decomposition
from cdd_dask.errors import StoreError
from cdd_dask.identity import fingerprint_of
from cdd_dask.marks import (
    FOLDER,
    Mark,
    copy_path,
    keep_copy,
    marks_at,
    pass_path,
    read_copy,
    read_marks,
)
from cdd_dask.plans import Plan
from cdd_dask.run import Totals, outcome_of
from cdd_dask.seals import is_sealed, sealed
from cdd_dask.statistics import Statistics
from cdd_dask.working import outputs


@dataclass(frozen=True)
class Damage:
    """Something of a store that is not as its run left it."""

    what: str
    """In words."""
    output: str = ""
    """Name of the output; none where metadata are damaged."""
    block: int = -1
    """Number of the block."""
    key: str = ""
    """Key of the damaged object of metadata."""
    readable: bool = False
    """Whether the block has values, but no done mark to tell whether they are the run's."""

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Ledger:
    """What a finished store says of itself besides its arrays: attributes and done marks.

    Of both there are two copies, with seals: what is sound is used, and the other one is damaged.
    """

    address: str
    kept: dict[str, dict[str, Any]]
    """Attributes as the run left them, by the name of the output's group, the root's by ``""``; an
    output whose attributes and their copy are both damaged, and which the marks do not tell, has
    none."""

    @classmethod
    def of(cls, address: str) -> Ledger:
        """Read what is there.

        Raises
        ------
        StoreError
            If there is no finished store, or neither the root's attributes nor their copy can be
            relied on, or they are of two runs.
        """
        problem: StoreError | None = None
        try:
            open_decomposition(address)
        except StoreError as error:
            problem = error
        copies = read_copy(address)
        places = {"zarr.json": _attributes(address, ""), f"{FOLDER}/zarr.json": copies.get("")}
        sound = {key: held for key, held in places.items() if _is_sound(address, held)}
        if not sound:
            raise problem or StoreError(
                f"{address} cannot be relied on: the attributes of its root and their copy in "
                f"{FOLDER} were edited: decompose again with overwrite=True (--overwrite)"
            )
        if len({held["fingerprint"] for held in sound.values()}) > 1:
            raise StoreError(
                f"{address} cannot be relied on: the attributes of its root and their copy in "
                f"{FOLDER} are of two runs: delete {' or '.join(sound)}, whichever was put there"
            )
        attributes = next(iter(sound.values()))
        if attributes["complete"] is not True:
            raise problem or StoreError(f"{address} is not complete")
        kept = {"": attributes}
        expected = layout.output_attributes(attributes["edges"], attributes["parameters"])
        for name, first in expected.items():
            for held in (_attributes(address, name), copies.get(name)):
                if is_sealed(held) and first.items() <= held.items():
                    kept[name] = held
        ledger = cls(address, kept)
        return cls(address, {**ledger._made_again(), **kept})

    def _made_again(self) -> dict[str, dict[str, Any]]:
        """Attributes of outputs that are lost: they follow from the plan and the done marks."""
        lost = [name for name in self.names if name not in self.kept and self._has_statistics(name)]
        if not lost:
            return {}
        totals = Totals()
        for marks in self.marks.values():
            for block in sorted(marks):  # in the order of the run, so that sums have the same bits
                totals.add(marks[block])
        of_source = Statistics.of_dict(self.attributes["source_statistics"])
        # the marks may lack those of outputs that are not asked for
        totals.statistics = dict.fromkeys(self.names, of_source) | totals.statistics
        totals.statistics["source"] = of_source
        known, _ = outcome_of(self.plan, totals)
        return {name: sealed(known[name]) for name in lost}

    def _has_statistics(self, output: str) -> bool:
        """Whether the marks hold statistics of every block: of approximate ones they do not."""
        marks = self.marks[self.writers[output]].values()
        return len(marks) == len(self.plan.grid) and all(output in one.statistics for one in marks)

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the root."""
        return self.kept[""]

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run that made the store."""
        return Plan.of_dict(self.attributes["plan"])

    @cached_property
    def names(self) -> list[str]:
        """Names of all outputs."""
        return store.output_names(len(self.plan.edges))

    @cached_property
    def writers(self) -> dict[str, int]:
        """Number of the pass that writes an output, by its name, finest first."""
        return {
            self.names[k]: number
            for number, one in enumerate(self.plan.passes)
            for k in sorted(outputs(self.plan, one))
        }

    @cached_property
    def marks(self) -> dict[int, dict[int, Mark]]:
        """The done marks of the passes that write outputs, by the pass's number and by block."""
        fingerprint = self.attributes["fingerprint"]
        numbers = sorted({*self.writers.values()})
        return {number: read_marks(self.address, fingerprint, number) for number in numbers}

    def checksum(self, output: str, block: int) -> str | None:
        """What a block of an output was when it was written."""
        mark = self.marks[self.writers[output]].get(block)
        return None if mark is None else mark.checksums.get(store.image_path(output))

    @property
    def approximate(self) -> dict[str, list[int]]:
        """Numbers of the blocks that were repaired approximately, by the output's name."""
        known = {name: held.get("approximate_blocks", []) for name, held in self.kept.items()}
        return {name: blocks for name, blocks in known.items() if blocks}

    def damaged_block(self, output: str, block: int) -> tuple[NDArray[Any] | None, Damage | None]:
        """A block of an output, and what is wrong with it."""
        core, path = self.plan.grid.core(block), store.image_path(output)
        text = ", ".join(f"{s.start}:{s.stop}" for s in core)
        where = f"{output}, block {block}, region [{text}]"
        try:
            values = store.read_block(self.address, path, core)
        except Exception as error:  # damaged shards and metadata make Zarr fail in any way
            reason = str(error).removeprefix(f"{self.address}: {path}").lstrip(", ")
            return None, Damage(f"{where}: {reason}", output, block)
        expected = self.checksum(output, block)
        if expected is None:
            return values, Damage(f"{where}: has no done mark", output, block, readable=True)
        if store.checksum(values, expected) != expected:
            return values, Damage(f"{where}: is not what its run wrote", output, block)
        return values, None

    def damaged_metadata(self) -> Iterator[Damage]:
        """What of groups, arrays, coordinates and marks is not as the run left it."""
        lost = {f"{name}/zarr.json": name for name in self.names if name not in self.kept}
        with self.template() as expected:
            # of what is lost the template does not hold all
            for key in sorted({*layout.objects_of(expected)} - lost.keys()):
                if problem := self._difference(expected, key):
                    yield Damage(f"{key} {problem}", key=key)
        for key, name in lost.items():
            what = f"{key} and its copy in {FOLDER} are both damaged"
            yield Damage(what, output=name, key=key)
        fingerprint = self.attributes["fingerprint"]
        for number, marks in self.marks.items():
            for place in (pass_path(number), copy_path(number)):
                if marks_at(self.address, fingerprint, number, place) != marks or not marks:
                    key = f"{place}/zarr.json"
                    yield Damage(f"{key} lacks done marks, or holds damaged ones", key=key)

    @contextmanager
    def template(self) -> Iterator[str]:
        """Address of a store in memory, of the same metadata without its marks and its data."""
        with layout.Layout.of(self.attributes).in_memory() as expected:
            for name, attributes in self.kept.items():
                key = f"{name}/{layout.ROOT}".lstrip("/")
                document = json.loads(objects.read_object(expected, key) or b"")
                document["attributes"][store.KEY] = attributes
                objects.write_object(expected, key, json.dumps(document, indent=2).encode())
            keep_copy(expected, self.kept)
            yield expected

    def _difference(self, expected: str, key: str) -> str:
        """What an object lacks of what is expected, in words."""
        wanted, found = (objects.read_object(place, key) for place in (expected, self.address))
        if found is None or wanted is None:
            return "is not there"
        if found == wanted:
            return ""
        path, is_chunk, _ = key.partition("/c/")
        try:
            if is_chunk:  # of coordinates, which another version may compress otherwise
                values = store.read_block(self.address, path, ())
                same = np.array_equal(values, store.read_block(expected, path, ()))
                return "" if same else "is damaged"
            plain = json.loads(found, object_pairs_hook=_without_repetition)
            return layout.difference_of(json.loads(wanted), plain)
        except Exception:  # whatever was put there
            return "is damaged"


def _attributes(address: str, group: str) -> Any:
    """What a group of ours remembers, as it is there."""
    return (objects.read_attributes(address, group) or {}).get(store.KEY)


def _is_sound(address: str, held: Any) -> bool:
    """Whether these are a root's attributes, as a run of ours left them.

    Whoever edits them can seal them anew, but then they contradict themselves.
    """
    if not is_sealed(held):
        return False
    try:
        check_root(address, held)
        return bool(fingerprint_of(held["identity"]) == held["fingerprint"])
    except (StoreError, KeyError, TypeError, RecursionError):
        return False


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which readers take the first or the last where a key stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found
