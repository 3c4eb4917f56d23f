"""Done marks: what is known of every finished task, written after all that it wrote.

A mark belongs to one pass of a plan and one block. It is bound to the fingerprint of everything
that decides the values, so that it means nothing to another run; and it holds a checksum of what
the task wrote to every array, and the statistics of it, so that neither is lost with the run. ::

    done/pass_0003/blocks/00000012/zarr.json    while the pass goes on, one object a task
    done/pass_0003/zarr.json                    all of them, when it is over
    done/pass_0003/copy/zarr.json               and once more
    done/zarr.json                              a copy of what the root and the outputs say

All are attributes of groups, so that the store remains a Zarr hierarchy. Each mark has a seal, and
so have the attributes of a finished store: what was edited shows, and what is sound is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from cdd_dask import objects
from cdd_dask.seals import is_sealed, seal_of
from cdd_dask.statistics import Statistics

FOLDER = "done"
BLOCKS = "blocks"
"""Name of the group in which the marks of a pass lie while it goes on."""
KEY = "cdd_dask"


@dataclass(frozen=True)
class Mark:
    """What a task tells of a block when everything is written."""

    block: int
    """Number of the block, of voxels or of cells."""
    statistics: dict[str, Statistics] = field(default_factory=dict)
    """Of the outputs that were written (and of the ``source``), by name."""
    computed: int = 0
    """Number of channels that were diffused."""
    empty: int = 0
    """Number of channels that were not: the block had nothing but zeros and blank voxels."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Of what was written, by the array's path; see `store.checksum`."""

    def as_list(self) -> list[Any]:
        """The mark as plain JSON values."""
        known = {name: one.as_dict() for name, one in self.statistics.items()}
        return [self.block, known, self.computed, self.empty, self.checksums]

    @classmethod
    def of_list(cls, values: Any) -> Mark:
        """The mark of plain JSON values, which may have been edited.

        Raises
        ------
        ValueError
            If they are none.
        """
        try:
            block, known, computed, empty, checksums = values
            statistics = {str(name): Statistics.of_dict(one) for name, one in known.items()}
            checksums = {str(path): str(one) for path, one in checksums.items()}
            return cls(int(block), statistics, int(computed), int(empty), checksums)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{values!r:.80} is no done mark") from error


def pass_path(number: int) -> str:
    """Where the marks of a pass lie."""
    return f"{FOLDER}/pass_{number:04d}"


def block_path(number: int, block: int) -> str:
    """Where a block's mark of a pass lies while the pass goes on."""
    return f"{_blocks_path(number)}/{block:08d}"


def _blocks_path(number: int) -> str:
    return f"{pass_path(number)}/{BLOCKS}"


def copy_path(number: int) -> str:
    """Where the marks of a pass that is over lie once more."""
    return f"{pass_path(number)}/copy"


def keep_copy(address: str, attributes: dict[str, dict[str, Any]]) -> None:
    """Keep a copy of attributes beside the marks, to repair those.

    They are given by the group's name, those of the root by ``""``, in any order.
    """
    objects.write_group(address, FOLDER, {KEY: dict(sorted(attributes.items()))})
    objects.bring_to_disk(address, f"{FOLDER}/zarr.json")


def read_copy(address: str) -> dict[str, dict[str, Any]]:
    """Copies of the attributes of a finished store that are as they were, by the group's name."""
    held = (objects.read_attributes(address, FOLDER) or {}).get(KEY)
    held = held if isinstance(held, dict) else {}
    return {name: attributes for name, attributes in held.items() if is_sealed(attributes)}


def start_marks(address: str, number: int) -> None:
    """Make the groups in which the marks of a pass lie."""
    for path in (pass_path(number), _blocks_path(number)):
        if not objects.has_object(address, f"{path}/zarr.json"):
            objects.write_group(address, path, {})


def write_mark(address: str, fingerprint: str, number: int, mark: Mark) -> None:
    """Mark a block of a pass as done."""
    _write(address, fingerprint, number, block_path(number, mark.block), [mark])


def read_marks(address: str, fingerprint: str, number: int) -> dict[int, Mark]:
    """The marks of a pass, by block; those of another fingerprint, or damaged, are none."""
    found: dict[int, Mark] = {}
    folder = _blocks_path(number)
    paths = [f"{folder}/{name}" for name in objects.names_in(address, folder)]
    for path, attributes in objects.read_all_attributes(address, paths):
        marks = _marks_in(attributes, fingerprint, number)
        found |= {m.block: m for m in marks.values() if path == block_path(number, m.block)}
    # a task that was given up may leave a mark of its own when the pass is over
    for path in (copy_path(number), pass_path(number)):
        found |= marks_at(address, fingerprint, number, path)
    return found


def marks_at(address: str, fingerprint: str, number: int, path: str) -> dict[int, Mark]:
    """The marks of a pass that one object holds, by block."""
    return _marks_in(objects.read_attributes(address, path), fingerprint, number)


def _marks_in(attributes: dict[str, Any] | None, fingerprint: str, number: int) -> dict[int, Mark]:
    held = (attributes or {}).get(KEY)
    if not isinstance(held, dict) or held.get("fingerprint") != fingerprint:
        return {}
    marks = {}
    for values in held["marks"] if isinstance(held.get("marks"), list) else []:
        try:
            *plain, seal = values
            if seal == seal_of([fingerprint, number, *plain]):
                mark = Mark.of_list(plain)
                marks[mark.block] = mark
        except (TypeError, ValueError):
            continue
    return marks


def are_gathered(address: str, fingerprint: str, number: int, marks: dict[int, Mark]) -> bool:
    """Whether the `marks` of a pass lie together, twice, and nowhere else."""
    places = (pass_path(number), copy_path(number))
    return BLOCKS not in objects.names_in(address, pass_path(number)) and all(
        marks_at(address, fingerprint, number, place) == marks for place in places
    )


def gather_marks(address: str, fingerprint: str, number: int, marks: Iterable[Mark]) -> None:
    """Write all marks of a pass as one, twice, and remove those of its blocks."""
    held = sorted(marks, key=lambda mark: mark.block)
    for path in (pass_path(number), copy_path(number)):
        _write(address, fingerprint, number, path, held)
        objects.bring_to_disk(address, f"{path}/zarr.json")
    objects.remove_objects(address, _blocks_path(number))


def _write(address: str, fingerprint: str, number: int, path: str, marks: Iterable[Mark]) -> None:
    plain = [mark.as_list() for mark in marks]
    held = [[*values, seal_of([fingerprint, number, *values])] for values in plain]
    objects.write_group(address, path, {KEY: {"fingerprint": fingerprint, "marks": held}})


def drop_marks(address: str, fingerprint: str, number: int, blocks: Collection[int]) -> None:
    """Forget that some blocks of a pass are done."""
    marks = read_marks(address, fingerprint, number)
    kept = [mark for block, mark in marks.items() if block not in blocks]
    gather_marks(address, fingerprint, number, kept)


def remove_marks(address: str, number: int) -> None:
    """Delete the marks of a pass whose arrays nobody needs any more."""
    objects.remove_objects(address, pass_path(number))
