"""The verb `doctor`: the checks before a run, without the run."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from cdd_dask.api import plan as make_plan
from cdd_dask.errors import (
    BudgetError,
    CddError,
    DeviceError,
    SourceNotFoundError,
    SourceReadError,
    redacted,
)
from cdd_dask.executors import IN_PROCESS, start_executor
from cdd_dask.identity import source_identity
from cdd_dask.output import check_output, check_scratch, output_address, scratch_address
from cdd_dask.preflight import CLIENT, Check, Preflight, preflight
from cdd_dask.readers import open_source
from cdd_dask.resuming import find_begun
from cdd_dask.task import limited_threads, prepare_process

NO_VOLUME = (64, 64, 64)
"""Shape to plan for where nothing is to be decomposed yet: it needs next to nothing."""
REFUSALS: dict[type[Exception], str] = {
    SourceNotFoundError: "source",
    SourceReadError: "source",
    DeviceError: "device",
    ImportError: "packages",  # an optional library's, or of a worker without this package
    BudgetError: "memory",
}
"""What the errors say that keep a plan from being made."""


def doctor(
    source: Any = None,
    out: str | Path | None = None,
    *,
    scratch: str | Path | None = None,
    client: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> Preflight:
    """Check whether this machine, or a cluster, is fit for a run; nothing is decomposed.

    Looked at, here and on every worker: that packages have the same versions, clocks agree, memory
    and disk suffice, threads are limited and the device is there; that the source can be read, and
    the output written by all at the same place. `decompose` checks the same before it begins.

    Parameters
    ----------
    source
        What would be decomposed, as `decompose` takes it; None leaves it out, and what a run would
        need.
    out
        Where the output would go; None checks the current folder.
    scratch, client, overwrite
        As for `decompose`.
    **options
        All other options of `decompose`, which decide what a run needs: `engine`, `device`,
        `memory`, `executor`, `workers`, `max_scale`, …

    Returns
    -------
    Preflight
        ``ok`` tells whether a run may begin, ``str()`` is a table.

    Raises
    ------
    InputError
        If an argument cannot be used.

    Examples
    --------
    >>> import cdd_dask
    >>> found = cdd_dask.doctor(engine="cpu")
    >>> found.ok, sorted({check.what for check in found.checks})
    (True, ['clock', 'device', 'memory', 'output', 'packages', 'threads'])
    """
    address = output_address("." if out is None else out)
    try:
        opened = None if source is None else open_source(source)
        volume = NO_VOLUME if source is None else source
        made = make_plan(
            volume, address, scratch=scratch, client=client, overwrite=overwrite, **options
        )
    except tuple(REFUSALS) as error:
        what = next(what for kind, what in REFUSALS.items() if isinstance(error, kind))
        where = CLIENT if client is None or what == "source" else f"{CLIENT} or a worker"
        return Preflight((Check(where, what, "failed", redacted(str(error))),))
    refused, folder, begun = [], None, None
    try:
        if scratch is not None:
            folder = scratch_address(scratch)
        if opened is not None and out is not None:
            begun = None if overwrite else find_begun(address)
            if begun is None:
                check_output(address, opened, made, overwrite)
            else:
                block = None if options.get("block") is None else made.block
                request = made.parameters, made.volume, made.resources, block
                made = begun.plan(*request, opened, source_identity(opened), folder)
                folder = folder or begun.scratch
        if folder is not None and begun is None:
            check_scratch(folder, address, made)
    except CddError as error:
        refused.append(Check(CLIENT, "output", "failed", str(error)))
    resources = made.resources
    how = (resources.engine, resources.device, resources.threads)
    pool = start_executor(
        resources.executor, resources.workers, client, partial(prepare_process, *how)
    )
    limits = limited_threads(*how) if resources.executor in IN_PROCESS else nullcontext()
    with limits, pool:
        found = preflight(made, opened, address, folder, pool)
    return Preflight((*found.checks, *refused))
