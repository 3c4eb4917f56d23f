"""Repairing a finished store: exactly what is damaged, to the same bits where that can be."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import layout, objects, store
from cdd_dask.cone import cone
from cdd_dask.errors import BudgetError, CddError, OutputAccessError, RunError
from cdd_dask.executors.serial import SerialExecutor
from cdd_dask.identity import change_of, content_change, is_surely_same, source_identity
from cdd_dask.lease import Lease
from cdd_dask.marks import Mark, gather_marks, read_marks
from cdd_dask.memory import available_memory, byte_count, format_bytes
from cdd_dask.output import output_address
from cdd_dask.parameters import check_flag
from cdd_dask.plans import Plan
from cdd_dask.progress import Progress
from cdd_dask.readers import Source, read_field
from cdd_dask.run import Totals, carry_out, prepare_store
from cdd_dask.seals import seal_of
from cdd_dask.soundness import Damage, Ledger
from cdd_dask.statistics import Statistics, difference
from cdd_dask.task import limited_threads
from cdd_dask.verification import TOLERANCE, source_of
from cdd_dask.working import nature_of

BLOCKS_COMPARED = 8
"""Blocks whose sum shows whether a source is the one that was decomposed."""


@dataclass(frozen=True)
class Repair:
    """What `repair` found and did."""

    repaired: tuple[Damage, ...]
    """What is as its run left it again, to the bit."""
    approximate: tuple[tuple[Damage, str], ...]
    """Blocks that were made of the field and the other outputs, to 4 units in the last place, each
    with the reason."""
    impossible: tuple[tuple[Damage, str], ...]
    """What is still damaged, each with the reason."""

    def __str__(self) -> str:
        lines = [f"repaired to the bit: {damage}" for damage in self.repaired]
        lines += [f"repaired approximately: {damage}: {why}" for damage, why in self.approximate]
        lines += [f"not repaired: {damage}: {why}" for damage, why in self.impossible]
        return "\n".join(lines) or "nothing is damaged"


def repair(
    path: str | Path,
    source: Any = None,
    *,
    memory: int | str | None = None,
    scratch: str | Path | None = None,
    break_lease: bool = False,
    progress: bool = True,
) -> Repair:
    """Mend what `verify` finds damaged in a finished store, and nothing else.

    Metadata are restored from their copy and from the plan. Damaged blocks are computed again from
    the source, through all blocks that they depend on, and must then be what their done marks
    say. Where the source is not to the bit what was decomposed, a block of one output is made of
    it and the block's other outputs.

    Parameters
    ----------
    path
        The store.
    source
        What was decomposed, as `decompose` takes it; None opens what the store remembers.
    memory
        Bytes (or ``"500MB"``) that computing may take; None is half of what is free.
    scratch
        Folder for what is computed on the way; None takes the one that `path` lies in.
    break_lease
        Write to the store even if a run seems to, which surely is no more.
    progress
        Show a progress bar, or log lines where nobody watches.

    Returns
    -------
    Repair
        What was done and what could not be.

    Raises
    ------
    StoreError
        If there is no finished store, or its metadata and their copy are both lost.
    LeaseError
        If another run writes to the store.
    BudgetError
        If the store's blocks do not fit the memory.
    RunError
        If another run takes over the store meanwhile, or it cannot be written.
    OutputAccessError
        If what is computed on the way cannot be written anywhere.
    """
    check_flag("break_lease", break_lease)
    address = output_address(path)
    budget = available_memory() // 2 if memory is None else byte_count("memory", memory)
    Ledger.of(address)  # or there is nothing to repair, nor to hold a lease of
    with Lease(address, break_lease) as lease:
        mender = _Mender(Ledger.of(address), budget, scratch, lease.check)
        try:
            mender.restore_metadata()
            mender.mend_blocks(source, progress)
            mender.finish()
        except OSError as error:
            if isinstance(error, CddError):
                raise
            raise RunError(
                f"the repair of {address} stopped: {error}; nothing is lost by repairing again"
            ) from error
    return Repair(tuple(mender.repaired), tuple(mender.approximate), tuple(mender.impossible))


class _Mender:
    """One repair."""

    def __init__(
        self, ledger: Ledger, budget: int, scratch: str | Path | None, check: Callable[[], None]
    ) -> None:
        self._ledger, self._plan, self._address = ledger, ledger.plan, ledger.address
        self._budget, self._scratch, self._check = budget, scratch, check
        self._fingerprint = ledger.attributes["fingerprint"]
        self.repaired: list[Damage] = []
        self.approximate: list[tuple[Damage, str]] = []
        self.impossible: list[tuple[Damage, str]] = []

    def restore_metadata(self) -> None:
        """Write again what of the metadata is not as it was; marks follow at the end."""
        for damage in self._ledger.damaged_metadata():
            if damage.output:
                self.impossible.append(
                    (damage, "its statistics are lost: decompose anew (--overwrite)")
                )
            else:
                self.repaired.append(damage)
        keys = {damage.key for damage in self.repaired}
        with self._ledger.template() as expected:
            for key in sorted(keys & {*layout.objects_of(expected)}):
                whole = objects.read_object(expected, key) or b""
                objects.write_object(self._address, key, whole)

    def mend_blocks(self, source: Any, progress: bool) -> None:
        """Find the damaged blocks and make them again."""
        found = []
        with Progress(progress, len(self._plan.grid)) as shown:
            shown.stage("look for damage", len(self._plan.grid))
            for block in range(len(self._plan.grid)):
                for name in self._ledger.names:
                    damage = self._ledger.damaged_block(name, block)[1]
                    found += [damage] if damage is not None else []
                shown.advance(1)
        if not found:
            return
        known = self._ledger.attributes["identity"]["source"]
        try:
            opened = source_of(self._ledger.attributes["source"], self._plan.volume.shape, source)
            found_now = source_identity(opened)
        except (CddError, OSError) as error:
            self.impossible += [
                (damage, f"no source to compute it from: {error}") for damage in found
            ]
            return
        why = "computed again it is not what its run wrote"
        why += f": {change_of(known, found_now) or 'other versions or machine'}"
        same = is_surely_same(opened, known, found_now)
        if difference := content_change(known, found_now):
            why = f"the source is another one, it had {difference}"
            if not self._may_be_source(opened, {damage.block for damage in found}):
                self.impossible += [(damage, why) for damage in found]
                return
        # the same values may come as another kind of source: done marks tell
        differing = self._recompute(opened, found, progress, only_proven=not same)
        if not same and not difference:
            why = f"{why}; or it has no done mark, and the source is known by samples alone"
        self._approximate(opened, differing, why, same)

    def _recompute(
        self, source: Source, found: list[Damage], progress: bool, only_proven: bool
    ) -> list[Damage]:
        """Compute damaged blocks from the source, in a store of their own, and copy them.

        Those that came out otherwise than their run wrote them are given back, and if `only_proven`
        those of which nothing tells.
        """
        plan, known = self._plan_here(), self._ledger.attributes
        wanted: dict[int, set[int]] = defaultdict(set)
        for damage in found:
            wanted[self._ledger.writers[damage.output]].add(damage.block)
        nature = nature_of(plan, Statistics.of_dict(known["source_statistics"]))
        resources, total = plan.resources, sum(stage.work for stage in plan.stages)
        limits = limited_threads(resources.engine, resources.device, resources.threads)
        with self._folder() as folder, limits, Progress(progress, total) as shown:
            again, pool = str(folder / "again.zarr"), SerialExecutor()
            run = prepare_store(plan, source, again, known["identity"])
            needed = cone(plan, wanted)
            carry_out(plan, source, again, run, pool, shown, needed, Totals(), nature, self._check)
            # of the identity as it is stored, which somebody may have sealed anew
            fingerprint = store.attributes_of(again, run)["fingerprint"]
            marks = {number: read_marks(again, fingerprint, number) for number in wanted}
            return [one for one in found if not self._copied(again, marks, one, only_proven)]

    def _copied(
        self, again: str, marks: dict[int, dict[int, Mark]], damage: Damage, only_proven: bool
    ) -> bool:
        """Put a block that was computed again in the place of a damaged one, if it is the same."""
        path, core = store.image_path(damage.output), self._plan.grid.core(damage.block)
        number = self._ledger.writers[damage.output]
        values = store.read_block(again, path, core)
        expected = self._ledger.checksum(damage.output, damage.block)
        if expected is not None and store.checksum(values, expected) != expected:
            return False
        if damage.readable:  # it lacks but a mark, and may be right where this machine is not
            there = store.read_block(self._address, path, core)
            if store.checksum(there) != store.checksum(values):
                return False
        elif expected is None and only_proven:
            return False
        else:
            self._write(path, damage.block, values)
        if expected is None:
            self._ledger.marks[number][damage.block] = marks[number][damage.block]
        self.repaired.append(damage)
        return True

    def _write(self, path: str, block: int, values: NDArray[Any]) -> None:
        """Write a block's shard anew: Zarr would keep what the old one holds beyond the volume."""
        self._check()
        core = self._plan.grid.core(block)
        store.remove_block(self._address, path, core)
        store.write_block(self._address, path, core, values)

    def _plan_here(self) -> Plan:
        """The plan on this machine, one block at a time."""
        stored = self._plan.resources
        resources = replace(
            stored, executor="serial", workers=1, tasks_per_budget=1, memory=self._budget
        )
        plan = Plan.of_dict(self._ledger.attributes["plan"], resources)
        if plan.peak_memory > self._budget:
            raise BudgetError(
                f"blocks of {plan.block} need {format_bytes(plan.peak_memory)}, but memory allows "
                f"{format_bytes(self._budget)}: raise memory"
            )
        return plan

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder beside the store, or where scratch data go; a killed repair's is removed."""
        place = self._scratch
        if place is None:
            place = tempfile.gettempdir() if "://" in self._address else Path(self._address).parent
        prefix = f"cdd-dask-repair-{seal_of(self._address)[:12]}-"  # nobody else repairs this store
        for left in Path(place).glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        except OSError as error:
            raise OutputAccessError(
                f"{place} cannot be written: {error}; name another folder, scratch= (--scratch)"
            ) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def _approximate(self, source: Source, found: list[Damage], why: str, same: bool) -> None:
        """Make blocks of the field and their other outputs.

        Unless the source is the `same`, the statistics of a block must be what its run noted.
        """
        by_block: dict[int, list[Damage]] = defaultdict(list)
        for damage in found:
            by_block[damage.block].append(damage)
        if by_block and not self._fits(source, by_block):
            self.impossible += [(damage, why) for damage in found]
            return
        for block, damages in by_block.items():
            if self._only_unmarked(source, block, damages):
                kept = f"{why}; kept as it is, for the sum of the block's outputs is the source"
                self._keep(damages)
                self.approximate += [(damage, kept) for damage in damages]
                continue
            if len(damages) > 1:
                several = f"{why}; and several outputs of the block are damaged"
                self.impossible += [(damage, several) for damage in damages]
                continue
            (damage,) = damages
            path, core = store.image_path(damage.output), self._plan.grid.core(block)
            wanted = read_field(source, core, self._plan.parameters)
            rest = self._sum(block, leave_out=damage.output)
            values = (wanted.astype(np.float64) - rest).astype(wanted.dtype)
            if not self._was_like(damage, values, may_lack=same):
                other = f"{why}; and what it holds there is something else"
                self.impossible.append((damage, other))
                continue
            self._write(path, block, values)
            self._mark_approximate(damage, values)
            self.approximate.append((damage, why))

    def _was_like(self, damage: Damage, values: NDArray[Any], may_lack: bool) -> bool:
        """Whether a damaged block was like these values, by the statistics in its mark."""
        mark = self._ledger.marks[self._ledger.writers[damage.output]].get(damage.block)
        known = None if mark is None else mark.statistics.get(damage.output)
        if known is None:
            return may_lack
        return Statistics.of(values).agrees_with(known, self._allowed)

    @property
    def _allowed(self) -> float:
        """How far a sum may be off."""
        known = Statistics.of_dict(self._ledger.attributes["source_statistics"])
        return TOLERANCE * self._plan.parameters.ulp(max(-known.min, known.max))

    def _keep(self, damages: list[Damage]) -> None:
        """Mark a block's outputs again as they are: nothing proves them but their sum."""
        for damage in damages:
            path, core = store.image_path(damage.output), self._plan.grid.core(damage.block)
            self._mark_approximate(damage, store.read_block(self._address, path, core))

    def _only_unmarked(self, source: Source, block: int, damages: list[Damage]) -> bool:
        """Whether a block lacks nothing but done marks: its values sum up to the source."""
        return all(damage.readable for damage in damages) and self._sums_up(source, block)

    def _fits(self, source: Source, damaged: Collection[int]) -> bool:
        """Whether the source is the sum of the outputs in blocks that are not damaged."""
        return len(damaged) < len(self._plan.grid) and self._may_be_source(source, damaged)

    def _may_be_source(self, source: Source, damaged: Collection[int]) -> bool:
        """The same, or there are no other blocks."""
        whole = [block for block in range(len(self._plan.grid)) if block not in damaged]
        some = whole[:: max(1, len(whole) // BLOCKS_COMPARED)]
        return all(self._sums_up(source, block) for block in some)

    def _sums_up(self, source: Source, block: int) -> bool:
        wanted = read_field(source, self._plan.grid.core(block), self._plan.parameters)
        return bool(difference(self._sum(block), wanted).max() <= self._allowed)

    def _sum(self, block: int, leave_out: str = "") -> NDArray[np.float64]:
        """The sum of a block's outputs, in float64."""
        core = self._plan.grid.core(block)
        total = np.zeros([s.stop - s.start for s in core])
        for name in self._ledger.names:
            if name != leave_out:
                total += store.read_block(self._address, store.image_path(name), core)
        return total

    def _mark_approximate(self, damage: Damage, values: NDArray[Any]) -> None:
        """Note what the block now is, and in the attributes that it may not be what was written."""
        name, number = damage.output, self._ledger.writers[damage.output]
        mark = self._ledger.marks[number].get(damage.block, Mark(damage.block))
        checksums = {**mark.checksums, store.image_path(name): store.checksum(values)}
        exact = {what: one for what, one in mark.statistics.items() if what != name}
        mark = replace(mark, checksums=checksums, statistics=exact)
        self._ledger.marks[number][damage.block] = mark
        if held := self._ledger.kept.get(name):
            blocks = sorted({*held.get("approximate_blocks", []), damage.block})
            self._ledger.kept[name] = {**held, "approximate_blocks": blocks}

    def finish(self) -> None:
        """Write attributes and marks that follow from what was mended."""
        if self.approximate:  # before the marks: until these are there the blocks are damaged
            root, groups = store.open_root(self._address, "r+"), dict(self._ledger.kept)
            store.write_attributes(self._address, root, groups.pop(""), groups)
        if self.repaired or self.approximate:
            for number, marks in self._ledger.marks.items():
                gather_marks(self._address, self._fingerprint, number, marks.values())
        still = {damage.key for damage in Ledger.of(self._address).damaged_metadata()}
        lost = [damage for damage in self.repaired if damage.key in still]
        self.repaired = [damage for damage in self.repaired if damage.key not in still]
        self.impossible += [(damage, "marks of blocks that are not repaired") for damage in lost]
