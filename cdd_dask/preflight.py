"""Preflight: whether everything is fit for a run, here and on every worker, before it begins.

Each process gathers `facts`; this one judges them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

from cdd_dask.errors import PreflightError, redacted
from cdd_dask.executors import IN_PROCESS, Executor
from cdd_dask.facts import Facts, Question, look_around
from cdd_dask.memory import format_bytes
from cdd_dask.objects import IN_MEMORY
from cdd_dask.plans import Plan, Resources, engine_name
from cdd_dask.probes import Access, Probe, ahead, placed, probe_for
from cdd_dask.readers import Source
from cdd_dask.store import is_our_store
from cdd_dask.tables import text_table

CLIENT = "client"
"""Where the checks of this process are made, unless it is the only worker."""
WORKER_CLOCK = 5.0
"""Seconds by which a worker's clock may differ from the client's."""
FILE_CLOCK = 30.0
"""Seconds by which times of files may differ from a process's clock: a lease is given up after
some missed beats."""
ORDER = ("packages", "source", "output", "scratch", "memory", "threads", "device", "clock")
"""What is checked, in the order of the table."""
NAMES_SHOWN = 4
"""Workers named where the same is wrong with several; more are counted."""

log = logging.getLogger(__name__)

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing looked at in one place."""

    where: str
    """``client``, or the worker's name."""
    what: str
    verdict: Verdict
    detail: str
    """What was found, and the remedy where it will not do."""

    def __str__(self) -> str:
        return f"{self.what} on {self.where}: {self.detail}"


@dataclass(frozen=True)
class Preflight:
    """What was checked before a run, and the verdict; ``str()`` is a table."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether the run may begin: nothing failed."""
        return not self.having("failed")

    def having(self, verdict: Verdict) -> list[Check]:
        """The checks with a verdict, one for all workers that found the same."""
        alike: dict[tuple[str, bool, str], list[Check]] = {}
        for check in self.checks:
            if check.verdict == verdict:
                # of workers that are well one example will do
                detail = "" if verdict == "ok" else check.detail
                alike.setdefault((check.what, check.where == CLIENT, detail), []).append(check)
        merged = [replace(checks[0], where=_places(checks)) for checks in alike.values()]
        return sorted(merged, key=lambda check: ORDER.index(check.what))

    def enforce(self) -> None:
        """Log the warnings, and refuse the run if anything failed.

        Raises
        ------
        PreflightError
            If anything failed; the message names everything that did.
        """
        for check in self.having("warning"):
            log.warning("%s", check)
        if not self.ok:
            failed = map(str, self.having("failed"))
            raise PreflightError(
                "\n".join(["the run cannot begin, and nothing was done:", *failed])
            )

    def __str__(self) -> str:
        lines = [*self.having("ok"), *self.having("warning"), *self.having("failed")]
        lines.sort(key=lambda check: ORDER.index(check.what))
        rows = [[check.what, check.where, check.verdict, check.detail] for check in lines]
        table = text_table(["check", "where", "verdict", "detail"], rows, left=4)
        return f"{table}\n\n{self.verdict}"

    @property
    def verdict(self) -> str:
        """The last line: ready, or what must be mended."""
        if failed := self.having("failed"):
            mend = ", ".join(f"{check.what} on {check.where}" for check in failed)
            return f"not ready; to be mended: {mend}"
        count = len(self.having("warning"))
        return "ready" if not count else f"ready, with {count} warning{'s' if count > 1 else ''}"


def _places(checks: list[Check]) -> str:
    names = [check.where for check in checks]
    if checks[0].verdict == "ok" and len(names) > 1:
        return f"{len(names)} workers"
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + f" and {more} more" * (more > 0)


def preflight(
    plan: Plan,
    source: Source | None,
    address: str | None,
    scratch: str | Path | None,
    pool: Executor,
) -> Preflight:
    """Check this process and every worker of `pool`.

    Parameters
    ----------
    plan
        States what is needed.
    source
        What will be read; one that lives in this process's memory is not asked of workers.
    address
        Address of the output; None or one in memory needs no place.
    scratch
        Folder or URL for working fields, where it is not the output.
    pool
        Executor that will run the tasks, with the threads limited as for them.

    Returns
    -------
    Preflight
        ``ok`` tells whether the run may begin. Nothing is left behind.
    """
    resources = plan.resources
    in_memory = address is None or address.startswith(IN_MEMORY)
    own, stored = None, cache(partial(_stored, address))  # it looks at every file
    with ExitStack() as stack:
        wanted = {"output": None if in_memory else address, "scratch": scratch}
        probes, checks = _place_probes(stack, wanted)
        question = Question(
            None if source is None or not source.portable else source.address,
            resources.engine,
            resources.device,
            probes,
        )
        if resources.executor not in IN_PROCESS:
            own = look_around(replace(question, engine=None))
        began = time.time()
        found = pool.everywhere(look_around, question)
        ended = time.time()
    if own is not None:
        checks += _judge(CLIENT, own, own, plan, stored)
    demands = _demands(plan, pool, list(found))
    for where, facts in found.items():
        if isinstance(facts, Exception):
            checks.append(Check(where, "packages", "failed", _no_answer(facts)))
            continue
        checks += [
            *_judge(where, facts, own or facts, plan, stored),
            _judge_memory(where, facts, demands[where]),
            _judge_threads(where, facts, resources),
            _judge_device(where, facts, plan),
            _judge_clock(where, ahead(facts.clock, began, ended)),
        ]
    return Preflight(tuple(checks))


def _place_probes(
    stack: ExitStack, wanted: dict[str, str | Path | None]
) -> tuple[dict[str, Probe], list[Check]]:
    """Probes at places, there until `stack` closes, and what is wrong with those that refuse."""
    probes: dict[str, Probe] = {}
    refused = []
    for what, where in wanted.items():
        if where is None:
            continue
        probe = probe_for(str(where))
        try:
            stack.enter_context(placed(probe))
            probes[what] = probe
        except Exception as error:  # what holds objects fails in any way
            problem = redacted(f"{probe.at} cannot be written: {error}")
            refused.append(Check(CLIENT, what, "failed", problem))
    return probes, refused


def _judge(
    where: str, facts: Facts, client: Facts, plan: Plan, stored: Callable[[], int]
) -> Iterator[Check]:
    """What concerns the client as much as the workers."""
    yield _judge_packages(where, facts, client)
    if facts.source or facts.source_error:
        yield _judge_source(where, facts, client)
    needs = {"output": plan.disk_bytes, "scratch": plan.scratch_bytes}
    for what, access in facts.places.items():
        # what is there of our own is part of what is needed, or goes
        reclaimed = stored if what == "output" else int
        yield Check(where, what, *_judge_place(access, needs[what], reclaimed))


def _no_answer(error: Exception) -> str:
    said = redacted(f"{type(error).__name__}: {error}")
    return f"no answer, {said}: see what it does, and install the client's packages there"


def _judge_packages(where: str, facts: Facts, client: Facts) -> Check:
    others = [
        f"{name} {facts.versions.get(name, 'absent')} for {wanted}"
        for name, wanted in client.versions.items()
        if facts.versions.get(name) != wanted
    ]
    if others:
        detail = f"{', '.join(others)} of the client: install the client's versions there"
        return Check(where, "packages", "failed", detail)
    if facts is client:
        listed = ", ".join(f"{name} {found}" for name, found in facts.versions.items())
        return Check(where, "packages", "ok", listed)
    return Check(where, "packages", "ok", "the client's versions")


def _judge_clock(where: str, off: float) -> Check:
    if abs(off) > WORKER_CLOCK:
        detail = f"{_off(off)} the client's, more than {WORKER_CLOCK:g} s: synchronise it (NTP)"
        return Check(where, "clock", "warning", detail)
    return Check(where, "clock", "ok", f"within {WORKER_CLOCK:g} s of the client's")


def _off(seconds: float) -> str:
    return f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'}"


@dataclass(frozen=True)
class Demand:
    """Bytes that the tasks of a worker, and of all workers of its machine, hold at the peak."""

    machine: int
    own: int
    limit: int | None = None
    """Bytes that the worker may hold, interpreter included."""


def _demands(plan: Plan, pool: Executor, workers: list[str]) -> dict[str, Demand]:
    """What each worker must be able to hold."""
    if plan.resources.executor != "distributed":  # all are processes of this machine
        return dict.fromkeys(workers, Demand(plan.peak_memory, plan.peak_memory))
    from cdd_dask.executors.dask import DaskExecutor, workers_of

    assert isinstance(pool, DaskExecutor)
    info = {name: about for name, about in workers_of(pool.client).items() if name in workers}
    shared = plan.resources.tasks_per_budget
    a_task = plan.peak_memory // min(shared, len(plan.grid))
    tasks = {name: min(about["nthreads"], shared) for name, about in info.items()}
    # who came or went meanwhile has at least a task to hold
    demands = dict.fromkeys(workers, Demand(a_task, a_task))
    for name, about in info.items():
        beside = sum(tasks[other] for other in info if info[other]["host"] == about["host"])
        machine, own = (a_task * min(count, len(plan.grid)) for count in (beside, tasks[name]))
        demands[name] = Demand(machine, own, about["memory_limit"] or None)
    return demands


def _judge_memory(where: str, facts: Facts, demand: Demand) -> Check:
    if demand.machine > facts.available:
        detail = (
            f"{format_bytes(facts.available)} free, but tasks on this machine hold up to "
            f"{format_bytes(demand.machine)}: lower memory= or workers=, or free some"
        )
        return Check(where, "memory", "failed", detail)
    if demand.limit is not None and facts.held + demand.own > demand.limit:
        detail = (
            f"limited to {format_bytes(demand.limit)} and holds {format_bytes(facts.held)}, but "
            f"its tasks take up to {format_bytes(demand.own)}: lower memory=, or raise the "
            "worker's memory limit"
        )
        return Check(where, "memory", "failed", detail)
    needed = f"{format_bytes(demand.machine)} needed"
    return Check(where, "memory", "ok", f"{format_bytes(facts.available)} free, {needed}")


def _judge_threads(where: str, facts: Facts, resources: Resources) -> Check:
    allowed = resources.threads
    found = {} if resources.executor in IN_PROCESS else facts.limits
    loose = [
        f"{name}={limit}" if limit else f"{name} is not set"
        for name, limit in found.items()
        if not (limit or "").isdecimal() or int(limit or 0) > allowed
    ]
    if facts.threads > allowed:
        loose.append(f"the engine takes {facts.threads}")
    if loose:
        detail = (
            f"a task may have {allowed}, but {', '.join(loose)}: set {allowed} before it starts"
        )
        return Check(where, "threads", "warning", detail)
    return Check(where, "threads", "ok", f"{allowed} a task")


def _judge_device(where: str, facts: Facts, plan: Plan) -> Check:
    resources = plan.resources
    shown = engine_name(resources.engine, facts.instruction_set, resources.device)
    name = f"engine {shown}"
    if facts.device_error:
        detail = f"no {name}, {redacted(facts.device_error)}"
        return Check(where, "device", "failed", detail)
    if facts.device_memory is None:
        return Check(where, "device", "ok", name)
    needed = max(stage.peak_device_memory for stage in plan.stages)
    free = f"{name}, {format_bytes(facts.device_memory)} free, {format_bytes(needed)} needed"
    if facts.device_memory < needed:
        detail = f"{free}: give a smaller block, or free the device"
        return Check(where, "device", "failed", detail)
    return Check(where, "device", "ok", free)


def _judge_source(where: str, facts: Facts, client: Facts) -> Check:
    if facts.source_error:
        detail = f"cannot be read there, {redacted(facts.source_error)}"
        return Check(where, "source", "failed", detail)
    if client.source and facts.source != client.source:
        detail = f"another one at the same path: {facts.source}, the client's has {client.source}"
        return Check(where, "source", "failed", detail)
    return Check(where, "source", "ok", facts.source)


def _judge_place(access: Access, need: int, reclaimed: Callable[[], int]) -> tuple[Verdict, str]:
    if access.error:
        return "failed", f"cannot be written, {redacted(access.error)}"
    if not access.same:
        remedy = "name one on a file system that all share"
        return "failed", f"another disk under the same path as the client's: {remedy}"
    if access.free is None:
        return "ok", "can be written"
    room = f"{format_bytes(access.free)} free, {format_bytes(need)} needed"
    if access.free < need and access.free + reclaimed() < need:
        return "failed", f"{room}: choose another disk"
    if abs(access.file_clock) > FILE_CLOCK:
        off = f"times of its files are {_off(access.file_clock)} this machine's clock"
        return "warning", f"{off}, more than {FILE_CLOCK:g} s: synchronise both (NTP)"
    return "ok", f"can be written, {room}"


def _stored(address: str | None) -> int:
    """Bytes of a store of ours that is there already."""
    if address is None or "://" in address or not is_our_store(Path(address)):
        return 0
    return sum(file.stat().st_size for file in Path(address).rglob("*") if file.is_file())
