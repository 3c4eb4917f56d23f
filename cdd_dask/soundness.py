"""Whether a finished store is whole: its metadata, and every block of every output."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cdd_dask import objects, store
from cdd_dask.blocks import Grid
from cdd_dask.errors import StoreError
from cdd_dask.marks import FOLDER, Mark, read_marks
from cdd_dask.plans import Plan
from cdd_dask.run import Totals, outcome_of
from cdd_dask.working import outputs

DECIDED = ("shape", "data_type", "chunk_grid", "codecs", "fill_value", "dimension_names")
"""What of an array's metadata decides its values and their meaning."""


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

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Ledger:
    """What a store says of itself besides its arrays: attributes, in two copies, and done marks."""

    address: str
    attributes: dict[str, Any]
    """Of the root, from the copy beside the marks where the root's were edited."""
    problems: dict[str, str]
    """What is wrong with the root's and with their copy, in words, by the object's key."""

    @classmethod
    def of(cls, address: str) -> Ledger:
        """Read what is there.

        Raises
        ------
        StoreError
            If neither the root's attributes nor their copy can be relied on.
        """
        root: Any = (objects.read_attributes(address, "") or {}).get(store.KEY)
        copy: Any = (objects.read_attributes(address, FOLDER) or {}).get(store.KEY)
        problems = {"zarr.json": _problem(root), f"{FOLDER}/zarr.json": _problem(copy)}
        attributes = copy if problems["zarr.json"] else root
        if all(problems.values()):
            raise StoreError(
                f"{address} cannot be relied on: its attributes {problems['zarr.json']}, and so is "
                f"their copy in {FOLDER}: decompose again"
            )
        if not problems[f"{FOLDER}/zarr.json"] and copy["complete"] != attributes["complete"]:
            problems[f"{FOLDER}/zarr.json"] = "are not those of the root"
        return cls(address, attributes, problems)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run that made the store."""
        return Plan.of_dict(self.attributes["plan"])

    @cached_property
    def marks(self) -> list[dict[int, Mark]]:
        """The done marks of passes, by block: of those that write an output, and the first."""
        fingerprint, passes = self.attributes["fingerprint"], self.plan.passes
        return [
            read_marks(self.address, fingerprint, number)
            if number == 0 or outputs(self.plan, one)
            else {}
            for number, one in enumerate(passes)
        ]

    @cached_property
    def writers(self) -> dict[str, int]:
        """Number of the pass that writes an output, by its name, finest first."""
        names = output_names(self.plan)
        return {
            names[k]: number
            for number, one in enumerate(self.plan.passes)
            for k in sorted(outputs(self.plan, one))
        }

    def checksum(self, output: str, block: int) -> str | None:
        """What a block of an output was when it was written."""
        mark = self.marks[self.writers[output]].get(block)
        return None if mark is None else mark.checksums.get(store.image_path(output))

    def damaged_block(self, output: str, block: int) -> tuple[NDArray[Any] | None, Damage | None]:
        """A block of an output, and what is wrong with it."""
        core, path = self.plan.grid.core(block), store.image_path(output)
        text = ", ".join(f"{s.start}:{s.stop}" for s in core)
        where = f"{output}, block {block}, region [{text}]"
        try:
            values = store.read_block(self.address, path, core)
        except (StoreError, OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).removeprefix(f"{self.address}: {path}").lstrip(", ")
            return None, Damage(f"{where}: {reason}", output, block)
        expected = self.checksum(output, block)
        if expected is None:
            return values, Damage(f"{where}: has no done mark", output, block)
        if store.checksum(values) != expected:
            return values, Damage(f"{where}: is not what its run wrote", output, block)
        return values, None

    def damaged_metadata(self) -> Iterator[Damage]:
        """What of groups, arrays and coordinates is not as the plan has it."""
        for key, problem in self.problems.items():
            if problem:
                yield Damage(f"attributes in {key} {problem}", key=key)
        with template(self.attributes) as expected:
            for path in sorted(file for file in expected.rglob("*") if file.is_file()):
                key = path.relative_to(expected).as_posix()
                if key in self.problems:
                    continue  # looked at above
                found = objects.read_object(self.address, key)
                if problem := _difference(path.read_bytes(), found):
                    yield Damage(f"{key} {problem}", key=key)
        if all(map(self.has_all_marks, output_names(self.plan))):
            yield from self._edited_outcome()

    def has_all_marks(self, output: str) -> bool:
        """Whether all blocks of an output have done marks."""
        return len(self.marks[self.writers[output]]) == len(self.plan.grid)

    def outcome(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """What the attributes of the outputs and of the root must say, by the marks."""
        return outcome_of(self.plan, Totals.of(self.marks))

    def _edited_outcome(self) -> Iterator[Damage]:
        known, outcome = self.outcome()
        for name, wanted in {**known, "": outcome}.items():
            stated = (objects.read_attributes(self.address, name) or {}).get(store.KEY)
            for key, value in wanted.items():
                if not isinstance(stated, dict) or stated.get(key) != value:
                    what = f"{name or 'the root'}: its attribute {key!r} was edited"
                    yield Damage(what, key=f"{name}/zarr.json".lstrip("/"))


def output_names(plan: Plan) -> list[str]:
    """Names of all outputs, the residual's last."""
    return [*map(store.channel_name, range(len(plan.edges))), store.RESIDUAL]


def _problem(attributes: Any) -> str:
    """Why attributes of the root cannot be relied on, in words; nothing if they can."""
    if not isinstance(attributes, dict) or "seal" not in attributes:
        return "are not there"
    return "" if attributes["seal"] == store.seal_of(attributes) else "were edited"


@contextmanager
def template(attributes: dict[str, Any]) -> Iterator[Path]:
    """An empty store of the same metadata, in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="cdd-dask-template-"))
    try:
        plan, axes = attributes["plan"], [store.Axis(*axis) for axis in attributes["axes"]]
        grid = Grid(tuple(plan["volume"]["shape"]), tuple(plan["block"]))
        known = {key: value for key, value in attributes.items() if key != "complete"}
        store.create_store(str(folder / "store"), grid, attributes["edges"], tuple(axes), known)
        yield folder / "store"
    finally:
        shutil.rmtree(folder)


def _difference(expected: bytes, found: bytes | None) -> str:
    """What an object lacks of what is expected, in words."""
    if found is None:
        return "is not there"
    if found == expected:
        return ""
    try:
        one, other = json.loads(expected), json.loads(found)
    except ValueError:
        return "is damaged"
    with suppress(KeyError, TypeError, AttributeError):
        if one["node_type"] != other["node_type"]:
            return "is of another kind"
        if one["node_type"] == "array":
            changed = [key for key in DECIDED if one.get(key) != other.get(key)]
            return f"has another {changed[0]}" if changed else ""
        for key, held in one["attributes"].items():
            now = other["attributes"][key]
            for name, value in held.items():
                if now[name] != value:
                    return f"has another {name}"
        return ""
    return "lacks attributes"
