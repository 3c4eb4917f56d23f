"""Going on with an output that another run has begun: what is left, and whether it may be done."""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from cdd_dask import store
from cdd_dask.attributes import check_root
from cdd_dask.blocks import Grid
from cdd_dask.cone import Needs, reads_of
from cdd_dask.errors import (
    BudgetError,
    DamagedError,
    DifferentRunError,
    InputError,
    OutputAccessError,
    StoreError,
)
from cdd_dask.identity import check_same, identity_of
from cdd_dask.layout import ROOT
from cdd_dask.marks import Mark, drop_marks, read_marks
from cdd_dask.memory import format_bytes
from cdd_dask.objects import has_object
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Pass, Plan, Resources, Volume
from cdd_dask.readers import Source
from cdd_dask.readers.fields import read_field
from cdd_dask.seals import is_sealed
from cdd_dask.statistics import Statistics
from cdd_dask.working import (
    Nature,
    geometry,
    layers_by_voxels,
    nature_of,
    outputs,
    snapshots_of,
    uses,
)

SECONDS_TO_SYNC = 300.0
"""Time after which systems have surely brought to their disks what was written.

It is far above the differences of clocks that the preflight warns of.
"""
TIMES_TO_DOUBT = 32
"""Shards whose times do not count, as those of a clock that was set would hide the others."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """An output that a run has begun, and perhaps ended."""

    address: str
    attributes: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.attributes.get("complete") is True

    @property
    def scratch(self) -> str | None:
        """Folder in which the store of the working fields lies, where they have one."""
        place: str | None = self.attributes["scratch"]
        return place and place.rpartition("/")[0]

    def plan(
        self,
        parameters: Parameters,
        volume: Volume,
        resources: Resources,
        block: tuple[int, ...] | None,
        source: Source,
        identity: dict[str, Any],
        scratch: str | None,
    ) -> Plan:
        """The plan that it was begun with, to be carried out with other resources.

        Parameters
        ----------
        parameters, volume, block
            What is wanted now; None takes the blocks that there are.
        resources
            What the run may use now.
        source, identity
            The source, and what it is now.
        scratch
            Folder in which working fields shall lie; None leaves them where they are. Another one
            than before is taken if they were moved there, or are lost.

        Raises
        ------
        DifferentRunError
            If anything that decides the values is not the same.
        StoreError
            If what the output remembers was edited.
        BudgetError
            If its blocks do not fit the memory.
        """
        begun = self.attributes.get("identity")
        if self.attributes.get("format_version") != store.FORMAT_VERSION or not begun:
            raise DifferentRunError(
                f"out={self.address} is of another format version: name another output, or start "
                "anew with overwrite=True (--overwrite)"
            )
        check_root(self.address, self.attributes)
        if not is_sealed(self.attributes):
            raise StoreError(
                f"out={self.address} is damaged: the attributes of its root were edited. If it is "
                "finished, `cdd-dask repair` mends it; else start anew with overwrite=True "
                "(--overwrite)"
            )
        plan = Plan.of_dict(self.attributes["plan"], resources)
        wanted = identity_of(replace(plan, parameters=parameters), identity)
        if block is not None:
            wanted["block"] = list(volume.grid(block).block)
        check_same(begun, wanted, self.address)
        if "crossing" not in begun and parameters.constraint == "constrained":
            self._check_sign(plan, source)
        if not (scratch is None or self.complete or self._may_move_to(scratch)):
            check_same({"scratch": self.scratch}, {"scratch": scratch}, self.address)
        if not self.complete:
            self._check_resources(plan, volume)
        return plan

    def _check_sign(self, plan: Plan, source: Source) -> None:
        """Refuse a field of both signs where voxels cross zero, as all did in earlier versions."""
        known = self.attributes.get("source_statistics")
        if known is not None:
            found = Statistics.of_dict(known)
        else:
            grid = plan.volume.grid(plan.block)
            parts = (read_field(source, grid.core(i), plan.parameters) for i in range(len(grid)))
            found = reduce(add, map(Statistics.of, parts))
        if nature_of(plan, found).sign == 0:
            raise DifferentRunError(
                f"out={self.address} was begun by a version in which voxels cross zero, and its "
                "field has both signs: go on so with crossing=True (--crossing), name another "
                "output, or start anew with overwrite=True (--overwrite)"
            )

    def _may_move_to(self, scratch: str) -> bool:
        """Whether the store of the working fields lies in this folder by now, or is lost."""
        known: str | None = self.attributes["scratch"]
        if known is None:
            return False
        try:
            there = has_object(known, ROOT)
        except OSError:  # on another machine's disk
            there = False
        return not there or has_object(f"{scratch}/{known.rpartition('/')[2]}", ROOT)

    def _check_resources(self, plan: Plan, volume: Volume) -> None:
        resources = plan.resources
        if plan.peak_memory > resources.memory:
            raise BudgetError(
                f"out={self.address} was begun in blocks of {plan.block}, which need "
                f"{format_bytes(plan.peak_memory)}, but memory allows "
                f"{format_bytes(resources.memory)}: raise memory, use fewer workers, or start anew "
                "with overwrite=True (--overwrite)"
            )
        if not plan.copy_in and not volume.reachable:
            raise InputError(
                f"out={self.address} was begun with tasks that read the source in this process, "
                f'which executor="{resources.executor}" cannot: use executor="threads"'
            )


def find_begun(address: str) -> Begun | None:
    """The output at `address`, if a run has begun one there."""
    try:
        attributes = store.remembered(address)
    except (ImportError, OSError, ValueError) as error:
        raise OutputAccessError(f"out={address} cannot be reached: {error}") from error
    return None if attributes is None else Begun(address, attributes)


def check_shards(plan: Plan, address: str) -> None:
    """Refuse a finished output that lacks blocks; whether they are sound `verify` tells.

    Raises
    ------
    DamagedError
        If any are gone.
    """
    everything = set(range(len(plan.grid)))
    paths = map(store.image_path, store.output_names(len(plan.edges)))
    there = (store.write_times(address, path, plan.grid).keys() for path in paths)
    if lost := set[int]().union(*(everything - one for one in there)):
        raise DamagedError(
            f"out={address} was finished, but lacks {len(lost)} of {len(plan.grid)} blocks: "
            "`cdd-dask verify` lists all damage, `cdd-dask repair` mends it"
        )


def unfinished(plan: Plan, address: str, attributes: dict[str, Any]) -> list[set[int]]:
    """The blocks that are left of every pass.

    Those without a done mark, those whose outputs are gone or, of what was written last, not what
    their marks say, and those whose part of a working array is gone though something that is left
    needs it; seen from the last pass to the first, for arrays are only read by later ones.
    """
    fingerprint, work = attributes["fingerprint"], attributes["scratch"] or address
    passes = plan.passes
    finished, nature = [], nature_of(plan, None)
    for number in range(len(passes)):  # their marks one by one: all at once may be too many
        marks = read_marks(address, fingerprint, number)
        finished.append(set(marks))
        if number == 0:
            nature = nature_of(plan, _source_statistics(marks))
    without_outputs = _lost_outputs(plan, address, fingerprint, finished)
    needs = Needs()
    left: list[set[int]] = []
    for number in reversed(range(len(passes))):
        one, done = passes[number], finished[number]
        _, writes = uses(plan, one)
        lost = without_outputs[number]
        if done:
            for name in writes:
                grid = geometry(plan, name, nature)
                if grid is not None and (some := needs.among({name}, done)):
                    lost |= some & _lost_blocks(plan, work, name, grid, done, one, nature)
        if lost:
            drop_marks(address, fingerprint, number, lost)
        left.append(set(range(one.tasks)) - done | lost)
        needs.add(reads_of(plan, one, left[-1]))
    return left[::-1]


def _source_statistics(marks: dict[int, Mark]) -> Statistics | None:
    """What the first pass has found of the source so far."""
    total: Statistics | None = None
    for block in sorted(marks):
        one = marks[block].statistics.get("source")
        if one is not None:
            total = one if total is None else total + one
    return total


def _lost_outputs(
    plan: Plan, address: str, fingerprint: str, finished: list[set[int]]
) -> list[set[int]]:
    """Blocks of every pass that are done, but an output lacks them, or is not what the mark says.

    The latter is looked for in what was written last: a machine that is lost takes with it what it
    has not brought to its disk, and no later pass reads an output. Objects at URLs come whole.
    """
    names = store.output_names(len(plan.edges))
    lost: list[set[int]] = [set() for _ in finished]
    written: list[tuple[float, int, str, int]] = []
    for number, one in enumerate(plan.passes):
        for path in (store.image_path(names[k]) for k in sorted(outputs(plan, one))):
            moments = store.write_times(address, path, plan.grid)
            lost[number] |= finished[number] - moments.keys()
            there = finished[number] & moments.keys()
            written = _written_last(
                written + [(moments[block], number, path, block) for block in there]
            )
    if written:
        log.info("checking the %d shards that were written last", len(written))
    for number in {number for _, number, _, _ in written}:
        marks = read_marks(address, fingerprint, number)
        for _, _, path, block in (one for one in written if one[1] == number):
            try:
                values = store.read_block(address, path, plan.grid.core(block))
            except Exception:  # a damaged shard makes Zarr fail in any way
                lost[number].add(block)
                continue
            known = marks[block].checksums.get(path, "")
            if store.checksum(values, known) != known:
                lost[number].add(block)
    return lost


def _written_last(written: list[tuple[float, int, str, int]]) -> list[tuple[float, int, str, int]]:
    """What may not have come to the disk, of what was written, given by the time first."""
    newest = heapq.nlargest(TIMES_TO_DOUBT, (moment for moment, *_ in written))
    since = max(newest[-1] - SECONDS_TO_SYNC, 0.0) if newest else 0.0
    return [one for one in written if one[0] > since]


def _lost_blocks(
    plan: Plan, work: str, name: str, grid: Grid, done: set[int], one: Pass, nature: Nature
) -> set[int]:
    """Blocks that are done but whose part of a working array is gone.

    Of what a pass over cells writes it may be all of them.
    """
    if name not in store.work_arrays(work):
        return done
    if grid == plan.grid:
        return done - store.write_times(work, store.work_path(name), grid).keys()
    missing = store.missing_shards(store.work_array(work, name))
    if (layers := layers_by_voxels(plan, name)) is not None:
        counts = plan.grid.counts
        # layers beyond a face are written with the block at it
        index = [
            np.subtract(place[1:], layers).clip(0, np.subtract(counts, 1)) for place in missing
        ]
        return done & {int(np.ravel_multi_index(tuple(place), counts)) for place in index}
    if name.startswith("snapshots"):  # of which every pass writes some
        written = snapshots_of(plan, one, nature.sign)
        lost = {place[1:] for place in missing if place[0] in written}
        blocks = Grid(grid.shape[1:], grid.block[1:])
        return {block for block in done if blocks.index(block) in lost}
    return done if missing and len(done) == one.tasks else set()
