"""One run: the metadata, then stage after stage of tasks, then ``complete``."""

from __future__ import annotations

import json
import logging
import platform
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import astuple, dataclass, field
from importlib.metadata import version
from typing import Any

from cdd_dask import layout, store
from cdd_dask.attributes import LONGEST_HEADER, check_root
from cdd_dask.errors import AGAIN, CddError, InputError, RunError, StoreError
from cdd_dask.executors import Executor
from cdd_dask.executors.serial import SerialExecutor
from cdd_dask.identity import difference_of, fingerprint_of, source_identity
from cdd_dask.lease import Lease
from cdd_dask.marks import (
    FOLDER,
    Mark,
    are_gathered,
    drop_marks,
    gather_marks,
    pass_path,
    read_marks,
    remove_marks,
    start_marks,
)
from cdd_dask.objects import has_object, names_in
from cdd_dask.plans import Pass, Plan, Stage
from cdd_dask.probes import left_in, remove_probes
from cdd_dask.progress import Progress
from cdd_dask.readers import BadValueError, Source, locate_bad_value
from cdd_dask.regimes import regime_error
from cdd_dask.resuming import unfinished
from cdd_dask.statistics import Statistics
from cdd_dask.task import Task, describe_task, run_task
from cdd_dask.working import Nature, geometry, nature_of, outputs, reads_source, uses

log = logging.getLogger(__name__)

PACKAGES = ("cdd-dask", "numpy", "scipy", "zarr", "dask", "distributed")


def prepare_store(
    plan: Plan,
    source: Source,
    address: str,
    identity: dict[str, Any],
    scratch: str | None = None,
) -> str:
    """Write all metadata of a run's store and return the run's name.

    In the folder `scratch`, where there is one, the working arrays get a store of their own.
    """
    run = uuid.uuid4().hex[:12]
    attributes: dict[str, Any] = {
        "run": run,
        "scratch": scratch and f"{scratch.rstrip('/')}/cdd-dask-{run}.zarr",
        "parameters": plan.parameters.as_dict(),
        "edges": list(plan.edges),
        "identity": identity,
        "fingerprint": fingerprint_of(identity),
        "axes": [astuple(axis) for axis in _axes(plan, source)],
        **_how_it_runs(plan, source),
    }
    _check_readable(address, attributes)
    layout.Layout.of(attributes).create(address)
    if scratch:  # which a run that goes on makes if it is not there
        store.take_scratch(attributes["scratch"], run, address)
    return run


def _check_readable(address: str, attributes: dict[str, Any]) -> None:
    """Refuse, before anything is written, attributes that no reader would accept."""
    held = {"format_version": store.FORMAT_VERSION, **attributes, "complete": False}
    try:
        check_root(address, json.loads(json.dumps(held)))
    except StoreError as error:
        raise InputError(f"nothing was done, for no one could read the result: {error}") from error


def go_on_with_store(plan: Plan, source: Source, address: str, scratch: str | None) -> str:
    """Make a store that another run has begun this run's own, and return this run's name.

    What it lacks of its metadata is written again. The working arrays may have been moved, to the
    folder `scratch`.
    """
    run, attributes = uuid.uuid4().hex[:12], store.remembered(address)
    if attributes is None:
        raise StoreError(f"the store at {address} is gone: was it deleted?")
    if scratch:
        name = attributes["scratch"].rpartition("/")[2]
        attributes = {**attributes, "scratch": f"{scratch}/{name}"}
        store.take_scratch(attributes["scratch"], run, address)
    layout.Layout.of(attributes).restore(address)
    root = store.open_root(address, "r+")
    here = _how_it_runs(plan, source)
    if others := _differences(attributes.get("versions"), here["versions"]):
        log.warning("going on with other versions, blocks may differ in the last bits: %s", others)
    here["parameters"] = here["plan"]["parameters"]  # with `crossing`, which older runs lacked
    store.write_attributes(address, root, {**attributes, "run": run, **here})
    store.remove_partial(address)
    return run


def _differences(before: Any, now: dict[str, str]) -> str:
    """Packages whose versions have changed, in words."""
    before = before if isinstance(before, dict) else {}
    pairs = {name: (before.get(name, "unknown"), number) for name, number in now.items()}
    return ", ".join(f"{name} {old} → {new}" for name, (old, new) in pairs.items() if old != new)


def _how_it_runs(plan: Plan, source: Source) -> dict[str, Any]:
    """What may be otherwise when a run goes on."""
    return {
        "plan": plan.as_dict(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "source": {
            "description": source.description,
            "address": source.address,
            "shape": list(source.shape),
            "file_shape": source.file_shape and list(source.file_shape),
            "dtype": source.dtype.str,
            "spacing": source.spacing and list(source.spacing),
            "units": source.units and list(source.units),
            "header": _kept_header(source),
        },
    }


def _kept_header(source: Source) -> str | None:
    if source.header is None or len(source.header) <= LONGEST_HEADER:
        return source.header
    log.warning("the header of %s is too long to be kept", source.description)
    return None


def _axes(plan: Plan, source: Source) -> tuple[layout.Axis, ...]:
    """The axes as the store describes them: in the unit of scales where those have a spacing."""
    parameters, ndim = plan.parameters, len(plan.volume.shape)
    names = layout.usable_names(source.dimension_names, ndim)
    decomposed = parameters.decomposed_axes(ndim)
    # across the slices nothing is computed, so there the source's own unit may be another
    units = [
        parameters.unit if axis in decomposed else (source.units or (None,) * ndim)[axis]
        for axis in range(ndim)
    ]
    if parameters.spacing is None:
        units = [None] * ndim
    return tuple(map(layout.Axis, names, parameters.voxel_spacing(ndim), units))


def execute(
    plan: Plan,
    source: Source,
    address: str,
    run: str,
    executor: Executor,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run what is left of `plan` on a prepared store, and declare it complete.

    `check` is called after every task: it raises where the run must not go on.

    Raises
    ------
    BadValueError
        If the source holds values that are refused, the message says where the first one is; or
        nothing but blank voxels.
    RunError
        If a block cannot be computed, or the store cannot be written.
    """
    try:
        attributes = store.attributes_of(address, run)
        if attributes["complete"]:  # since this run looked
            clean_up(plan, address, run)
            return
        left = unfinished(plan, address, attributes)
        done = plan.tasks - sum(map(len, left))
        if done:
            log.info("going on: %d of %d blocks are done", done, plan.tasks)
        totals = Totals()

        def unchanged(number: int) -> None:
            if change := _source_change(address, attributes, source):
                store.root_of_run(address, run)
                drop_marks(address, attributes["fingerprint"], number, left[number])
                raise RunError(
                    f"the run stopped, for {source.description} was written while blocks of it "
                    f"were read: it had {change}. Start anew when it stays as it is, with "
                    "overwrite=True (--overwrite)"
                )

        todo = (plan, source, address, run, executor, progress, left, totals)
        carry_out(*todo, check=check, unchanged=unchanged)
        known, outcome = outcome_of(plan, totals)
        store.finish_store(address, run, known, {**attributes, **outcome})
        clean_up(plan, address, run)
    except (OSError, StoreError) as error:
        if isinstance(error, CddError) and not isinstance(error, StoreError):
            raise
        if not store.on_disk(address):
            raise RunError(f"the run stopped: {error}") from error
        raise RunError(
            f"the run stopped, and {address} is left incomplete: {error}; {AGAIN} to go on"
        ) from error


def _source_change(address: str, attributes: dict[str, Any], source: Source) -> str:
    """What of a source is not as it was when its run began; "" if nothing is."""
    if not store.on_disk(address):  # nobody goes on with it
        return ""
    known, found = attributes["identity"]["source"], source_identity(source)
    return difference_of({"source": known}, {"source": found})


def clean_up(plan: Plan, address: str, run: str) -> None:
    """Remove what a complete store does not need: only now, for a run that goes on needs it.

    What cannot be removed does no harm; the same call of `decompose` tries again.
    """
    try:
        for number in _passes_without_outputs(plan):
            remove_marks(address, number)
        store.remove_partial(address)
        if holder := Lease.read(address):  # since then nobody has placed a probe that is still used
            remove_probes(address, holder.since)
        store.remove_work(address, run)
        scratch = store.scratch_of(address, run)
        if scratch and has_object(scratch, layout.ROOT):
            store.remove_scratch(scratch, run)
    except (OSError, StoreError) as error:
        log.warning(
            "%s is complete, but what it does not need any more could not be removed: %s",
            address,
            error,
        )


def has_leftovers(plan: Plan, address: str, scratch: str | None) -> bool:
    """Whether a complete store has what `clean_up` removes: that was stopped, or failed."""
    marked = {*names_in(address, FOLDER)}
    passes = {pass_path(number).rpartition("/")[2] for number in _passes_without_outputs(plan)}
    return bool(
        marked & passes
        or names_in(address, store.WORK)
        or left_in(address)
        or (scratch and has_object(scratch, layout.ROOT))
    )


def _passes_without_outputs(plan: Plan) -> list[int]:
    return [number for number, one in enumerate(plan.passes) if not outputs(plan, one)]


def outcome_of(plan: Plan, totals: Totals) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What the attributes of every output say when all is done, and what the root's say more."""
    first = layout.output_attributes(plan.edges, plan.parameters.as_dict())
    whole = totals.statistics["source"]
    nature = nature_of(plan, whole)
    outcome = {
        "source_statistics": whole.as_dict(),
        "error": _error_kind(nature, {stage.error for stage in plan.stages}),
        "blocks": {"computed": totals.computed, "empty": totals.empty},
    }
    known = {
        name: {**held, "statistics": totals.statistics[name].as_dict()}
        for name, held in first.items()
    }
    for stage in plan.stages:
        if stage.channel is not None:
            known[store.channel_name(stage.channel)] |= _how(plan, stage, nature)
    return known, outcome


def carry_out(
    plan: Plan,
    source: Source,
    address: str,
    run: str,
    executor: Executor,
    progress: Progress,
    left: Sequence[Collection[int]],
    totals: Totals,
    nature: Nature | None = None,
    check: Callable[[], None] = lambda: None,
    unchanged: Callable[[int], None] = lambda number: None,
) -> None:
    """Run the blocks that are `left` of every pass, and add up what is known of all that are done.

    The `nature` of the source is what the first pass finds, unless it is given. When blocks of a
    pass have read the source, `unchanged` is called with its number, also if the pass was stopped:
    it raises where the source is not what it was.
    """
    fingerprint = store.attributes_of(address, run)["fingerprint"]
    arrays = WorkArrays(plan, address, run)
    for number, one in enumerate(plan.passes):
        batch = Batch(
            address, run, one, number, nature or nature_of(plan, totals.statistics.get("source"))
        )
        marks = read_marks(address, fingerprint, number)
        if left[number]:
            arrays.make(number, batch.nature)
            start_marks(address, number)
            blocks = sorted(left[number])
            try:
                marks |= _run_pass(plan, source, batch, blocks, executor, progress, check)
            except BaseException:
                if reads_source(plan, one):
                    with suppress(OSError, StoreError):  # what stopped the pass is what to tell
                        unchanged(number)
                raise
            if reads_source(plan, one):
                unchanged(number)
        # also those of a run that was stopped after the last block
        if marks and not are_gathered(address, fingerprint, number, marks):
            gather_marks(address, fingerprint, number, marks.values())
        progress.skip(_work(plan, one) * (one.tasks - len(left[number])))
        for block in sorted(marks):  # in this order, so that sums are the same to the bit
            totals.add(marks[block])
        if nature is None and totals.statistics["source"].count == 0:
            raise BadValueError(f"{source.description} holds nothing but blank (NaN) voxels")
        arrays.remove(number)


class WorkArrays:
    """The working arrays of a run, each there from its first use to its last."""

    def __init__(self, plan: Plan, address: str, run: str) -> None:
        self._plan, self._run = plan, run
        self._address = store.scratch_of(address, run) or address
        used = [uses(plan, one) for one in plan.passes]
        self._written = [writes for _, writes in used]
        self._last: dict[str, int] = {}
        for number, (reads, writes) in enumerate(used):
            self._last |= dict.fromkeys(reads | writes, number)
        self._there = store.work_arrays(self._address)

    def make(self, number: int, nature: Nature) -> None:
        """Make room for what the pass of that number writes."""
        for name in sorted(self._written[number]):
            grid = geometry(self._plan, name, nature)
            if grid is not None:
                dtype = self._plan.parameters.dtype
                store.create_work_array(self._address, self._run, name, grid, dtype)
                self._there.add(name)

    def remove(self, number: int) -> None:
        """Remove what no pass after that of this number uses."""
        for name in sorted(self._there):
            if self._last.get(name, -1) <= number:
                store.remove_work_array(self._address, self._run, name)
                self._there.remove(name)


@dataclass(frozen=True)
class Batch:
    """The tasks of one pass, and the store they write to."""

    address: str
    run: str
    work: Pass
    number: int
    """Number of the pass in the plan."""
    nature: Nature

    @property
    def name(self) -> str:
        """What a person calls the tasks."""
        first, last = (number - 1 for number in (self.work.stages[0], self.work.stages[-1]))
        if first < 0:
            return "decompose-copy-in"
        channels = f"ch{first:02d}" if first == last else f"ch{first:02d}-ch{last:02d}"
        kind = "pass" if self.work.kind == "diffuse" else self.work.kind
        return f"decompose-{channels}-{kind}{self.work.number + 1}"

    def tasks(self, blocks: Iterable[int]) -> Iterator[Task]:
        """One task for every one of `blocks`."""
        return (
            Task(self.address, self.run, self.work, self.number, block, self.nature)
            for block in blocks
        )


@dataclass
class Totals:
    """What all tasks so far have told."""

    statistics: dict[str, Statistics] = field(default_factory=dict)
    """Of every output, and of the ``source``."""
    computed: int = 0
    """Blocks diffused, counted once for every channel."""
    empty: int = 0
    """Blocks not diffused, having nothing but zeros and blank voxels, counted likewise."""

    def add(self, result: Mark) -> None:
        for name, statistics in result.statistics.items():
            known = self.statistics.get(name)
            self.statistics[name] = statistics if known is None else known + statistics
        self.computed += result.computed
        self.empty += result.empty


def _run_pass(
    plan: Plan,
    source: Source,
    batch: Batch,
    blocks: list[int],
    executor: Executor,
    progress: Progress,
    check: Callable[[], None],
) -> dict[int, Mark]:
    """Run some of a pass's tasks; their marks, by block."""
    progress.stage(batch.name, len(blocks))
    work, marks = _work(plan, batch.work), {}
    # only this process has an array that lives in its memory
    copying_in = batch.work.kind == "copy"
    pool = SerialExecutor() if copying_in and not source.portable else executor
    stages = [stage for stage in plan.stages if stage.number in batch.work.stages]
    peak = max(stage.peak_memory for stage in stages)
    seconds = plan.resources.workers * sum(stage.seconds for stage in stages)
    expected = seconds / _tasks_of_stages(plan, batch.work)
    places = {batch.address, store.scratch_of(batch.address, batch.run) or batch.address}
    results = pool.run(
        run_task,
        batch.tasks(blocks),
        batch.name,
        describe_task,
        projected=peak,
        places=places,
        expected=expected,
    )
    try:
        with closing(results):
            try:
                for mark in results:
                    marks[mark.block] = mark
                    progress.advance(work)
                    check()
            except KeyboardInterrupt as stop:  # between two results: it hurries there, too
                results.throw(stop)
    except BadValueError as error:
        raise locate_bad_value(source, plan.parameters) from error
    return marks


def _work(plan: Plan, one: Pass) -> int:
    """Weight of one task of a pass in the run's progress."""
    work = sum(stage.work for stage in plan.stages if stage.number in one.stages)
    return work // _tasks_of_stages(plan, one)


def _tasks_of_stages(plan: Plan, one: Pass) -> int:
    """Number of tasks of all passes over the stages of a pass, roughly: as if each had its many."""
    return one.tasks * sum(other.stages == one.stages for other in plan.passes)


def _how(plan: Plan, stage: Stage, nature: Nature) -> dict[str, Any]:
    """How a channel was computed, and what is known of its error."""
    return {
        "regime": stage.regime,
        "passes": len(stage.parts),
        "levels": list(stage.levels),
        "halo": list(stage.depth),
        "halo_cells": list(stage.cell_depth),
        "error": {
            "kind": _error_kind(nature, {stage.error}),
            "rtol": plan.parameters.rtol,
            "relative_l2": regime_error(plan.parameters, stage.regime, stage.levels),
        },
    }


def _error_kind(nature: Nature, kinds: set[str]) -> str:
    """Whether an error of these kinds is bounded, now that the field's nature is known."""
    if kinds == {"exact"}:
        return "exact"
    mixed = nature.sign == 0 and "bounded (one sign)" in kinds  # of a plan that crosses zero
    return "estimated" if "estimated" in kinds or nature.masked or mixed else "bounded"
