"""The verbs: `decompose`, `plan` and what they share."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from cdd_dask import store
from cdd_dask.calibration import calibrate as run_calibration
from cdd_dask.decomposition import Decomposition, open_decomposition
from cdd_dask.errors import CddError, InputError, OutputAccessError, OutputExistsError
from cdd_dask.executors import IN_PROCESS, start_executor
from cdd_dask.identity import check_same, identity_of, source_identity
from cdd_dask.lease import Lease
from cdd_dask.objects import IN_MEMORY, new_memory_store
from cdd_dask.output import (
    check_apart,
    check_output,
    check_scratch,
    check_vacant,
    output_address,
    scratch_address,
)
from cdd_dask.parameters import MAX_NDIM, Parameters, check_count, check_flag
from cdd_dask.planner import make_plan
from cdd_dask.plans import Plan, Resources, Volume
from cdd_dask.preflight import preflight
from cdd_dask.progress import Progress
from cdd_dask.readers import BadValueError, Source, open_source
from cdd_dask.readers.base import LARGEST_VOLUME
from cdd_dask.resources import resolve_resources
from cdd_dask.resuming import Begun, check_shards, find_begun
from cdd_dask.run import clean_up, execute, go_on_with_store, has_leftovers, prepare_store
from cdd_dask.task import limited_threads, prepare_process

log = logging.getLogger(__name__)


def decompose(
    source: Any,
    out: str | Path | None = None,
    *,
    min_scale: float | None = None,
    max_scale: float | None = None,
    num_channels: int | None = None,
    mode: str = "log",
    log_scale_base: float = 2.0,
    linear_scale_step: float | None = None,
    e_rel: float = 3e-2,
    constrained: bool = True,
    inverted: bool = False,
    crossing: bool = False,
    kernel: str = "discrete",
    boundary: str = "reflect",
    cval: float = 0.0,
    rtol: float = 1e-3,
    dtype: str = "float32",
    axes: Sequence[int] | int | None = None,
    spacing: Sequence[float] | float | str | None = None,
    unit: str | None = None,
    nan: str = "mask",
    fill_value: float = 0.0,
    upsample: int = 1,
    switch_scale: float | None = None,
    engine: str = "auto",
    device: str | None = None,
    memory: int | str | None = None,
    block: Sequence[int] | int | None = None,
    scratch: str | Path | None = None,
    executor: str = "auto",
    workers: int | None = None,
    client: Any = None,
    overwrite: bool = False,
    break_lease: bool = False,
    progress: bool = True,
) -> Decomposition:
    """Split a field of 1 to 4 dimensions into its scales, in blocks that fit the memory.

    Where `out` was begun by a run that was stopped, with the same parameters and of the same
    source, this one goes on with the blocks that are left; where nothing is left it does nothing.

    Constrained diffusion decomposition (Li 2022, arXiv:2201.05484). The field is recovered as
    ``sum(channels) + residual``.

    Parameters
    ----------
    source
        A path (Zarr array, FITS, HDF5, TIFF, NIfTI, `.npy`; ``file::part`` names an HDU, a
        dataset or a series) or an array (NumPy, torch, Zarr, dask, xarray).
    out
        Path of the Zarr store to make, or to go on with. None keeps the result in memory,
        uncompressed.
    min_scale
        First scale edge; None is the smallest spacing (1 voxel). All scales are in voxels, or in
        `unit` where `spacing` is given.
    max_scale
        Largest scale that an edge may reach; None is half of the largest decomposed axis.
    num_channels
        Number of channels in log mode; given, it decides the edges instead of `max_scale`.
    mode
        ``"log"``: edges ``min_scale * log_scale_base**i``; ``"lin"``: edges
        ``min_scale + i * linear_scale_step``.
    log_scale_base
        Ratio of an edge to the one before, > 1.
    linear_scale_step
        Distance of an edge to the one before, > 0; needed in lin mode.
    e_rel
        Largest step in time relative to the time where a channel begins. Part of the method's
        definition: results are comparable at the same `e_rel` only.
    constrained
        Apply the sign constraint: positive voxels only sink, negative ones only rise, and none
        crosses zero, so that every output has the sign of the field, voxel by voxel.
    inverted
        Invert the constraint; counts only when constrained.
    crossing
        Let voxels cross zero within a step, as the package ``constrained-diffusion`` does, to
        compare with it. Counts only when constrained and not inverted; on a field of one sign it
        changes nothing.
    kernel
        ``"discrete"``: the discrete Gaussian (Lindeberg 1990), right at every scale;
        ``"sampled"``: a sampled Gaussian, for comparison with other software.
    boundary
        ``"reflect"``, ``"mirror"``, ``"nearest"``, ``"wrap"`` or ``"constant"``, as in
        `scipy.ndimage`.
    cval
        Value beyond the edge for ``boundary="constant"``, in the field's unit.
    rtol
        Error that cutting into blocks may cause, relative to the field's range. 0 gives
        the same bits for every choice of blocks. It is a bound, but an estimate with blank voxels,
        with `crossing`, and where the plan says so. From 1e-4 on, the CPU engine smooths with wide
        kernels on a coarser grid, which changes a channel by up to 2e-4 of its L2 norm (1e-3 if
        inverted).
    dtype
        Working type, ``"float32"`` or ``"float64"``.
    axes
        Axes to decompose along; each slice across the others is decomposed by itself, as the
        sky planes of a spectral cube with ``(1, 2)``. None is all.
    spacing
        Distance of neighbouring voxels along every axis of the volume, or one number for all: a
        step then smooths along each axis by ``sigma / spacing`` voxels, and scales are in
        `unit`. ``"header"`` takes what the source states.
    unit
        Unit of `spacing`, for example ``"µm"``; with ``"header"`` the source states it.
    nan
        Blank (NaN) voxels. ``"mask"``: they take no part, and are NaN in every output;
        ``"raise"``: they are refused; ``"fill"``: they become `fill_value`.
    fill_value
        What blank voxels become with ``nan="fill"``, in the field's unit.
    upsample
        1, 2 or 4: edges up to `switch_scale` are computed on a grid of so many cells per voxel
        and axis, which makes their channels 1.5 to 4 times more accurate and, in 3-D, 8 or 64
        times as expensive.
    switch_scale
        Largest edge computed on the refined grid; None is 5 times the smallest spacing.
    engine
        ``"cpu"`` (compiled, all cores), ``"torch"``, ``"reference"`` (SciPy: slow and plain), or
        ``"auto"``: torch where there is a device other than the CPU, else the CPU engine.
    device
        Device for torch: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    memory
        What all tasks on this machine may hold together above the interpreter's baseline, in
        bytes or as ``"500MB"``; None is half of what is free. With a client it is per worker.
    block
        Core of a block in voxels, one number or one per axis, clipped to the volume; None
        takes the largest that `memory` holds, or those that `out` was begun with.
    scratch
        Folder for working fields, for example on a fast disk beside a cloud store; None keeps them
        in `out`. What the run puts there it removes when it is done.
    executor
        ``"serial"``, ``"threads"``, ``"processes"``, ``"distributed"``, or ``"auto"``: with a
        client or several workers distributed, else serial.
    workers
        Tasks that run at once.
    client
        A `distributed.Client` whose workers reach `source` and `out` by the same paths.
    overwrite
        Replace a decomposition that is at `out`. Nothing else is ever replaced.
    break_lease
        Write to `out` even if another run seems to: one that surely is no more, on another host.
    progress
        Show a progress bar, or log lines where nobody watches.

    Returns
    -------
    Decomposition
        The opened store; its channels are Zarr arrays.

    Raises
    ------
    InputError
        If an argument or the data cannot be used (a `ValueError`).
    BudgetError
        If the memory does not suffice (a `MemoryError`); nothing is written.
    OutputExistsError
        If `out` exists (a `FileExistsError`): as something else, or begun with other parameters or
        of another source, the first of which the message names.
    PreflightError
        If a worker cannot do what is asked of it, see `doctor`; nothing is written.
    DamagedError
        If `out` is finished but lacks blocks (a `ValueError`): `repair` mends it.
    LeaseError
        If another run writes to `out` (a `BlockingIOError`).
    RunError
        If blocks could not be computed, or the run was stopped by a full disk, another run that
        took over `out`, or the like; the same call goes on with what is left. If `source` was
        written while it was read: then `overwrite` starts anew.

    Examples
    --------
    >>> import numpy as np, cdd_dask
    >>> field = np.random.default_rng(0).lognormal(size=(32, 32))
    >>> result = cdd_dask.decompose(field, max_scale=8, progress=False)
    >>> result.scales.tolist(), len(result.channels)
    ([1.0, 2.0, 4.0, 8.0], 4)
    >>> bool(np.allclose(result.reconstruct(), field, rtol=1e-6))
    True
    """
    arguments = locals()
    opened = open_source(source)
    request = _request(opened, arguments)
    identity: dict[str, Any] = {}
    folder = None if scratch is None else scratch_address(scratch)
    if out is None:
        # the store lives as long as what is returned, which holds it
        address, _kept = new_memory_store()
        made = make_plan(*request)
    else:
        address = output_address(out)
        check_apart(address, opened)
        identity = source_identity(opened)
        begun = None if overwrite else find_begun(address)
        if begun is not None:
            made = begun.plan(*request, opened, identity, folder)
            folder = folder or begun.scratch
            if begun.complete:
                _clean_up_after_others(made, begun)
                result = open_decomposition(address)
                check_shards(made, address)
                log.info("%s is complete: nothing is left to do", address)
                return result
        else:
            made = make_plan(*request)
            check_output(address, opened, made, overwrite)
            if folder is not None:
                check_scratch(folder, address, made)
    identity = identity_of(made, identity)
    resources = made.resources
    log.info(
        "%s: %d channels, blocks: %d, engine %s on %s, executor %s",
        opened.description,
        len(made.edges),
        len(made.grid),
        resources.engine,
        resources.device,
        resources.executor,
    )
    how = (resources.engine, resources.device, resources.threads)
    in_process = resources.executor in IN_PROCESS
    lease = Lease(address, break_lease)
    pool = start_executor(
        resources.executor, resources.workers, client, partial(prepare_process, *how)
    )
    limits = limited_threads(*how) if in_process else nullcontext()
    progress_of = Progress(progress, sum(stage.work for stage in made.stages))
    with limits, pool:
        preflight(made, opened, address, folder, pool).enforce()
        with lease, progress_of as shown:
            run, new = _begin(made, opened, address, identity, overwrite, folder)
            try:
                execute(made, opened, address, run, pool, shown, lease.check)
            except BadValueError:
                if new and "://" not in address and out is not None:
                    store.root_of_run(address, run)
                    store.remove_store(Path(address))  # this run made it, of data of no use
                raise
    return Decomposition(address, store.open_root(address))


def plan(
    source_or_shape: Any,
    out: str | Path | None = "out.zarr",
    *,
    min_scale: float | None = None,
    max_scale: float | None = None,
    num_channels: int | None = None,
    mode: str = "log",
    log_scale_base: float = 2.0,
    linear_scale_step: float | None = None,
    e_rel: float = 3e-2,
    constrained: bool = True,
    inverted: bool = False,
    crossing: bool = False,
    kernel: str = "discrete",
    boundary: str = "reflect",
    cval: float = 0.0,
    rtol: float = 1e-3,
    dtype: str = "float32",
    axes: Sequence[int] | int | None = None,
    spacing: Sequence[float] | float | str | None = None,
    unit: str | None = None,
    nan: str = "mask",
    fill_value: float = 0.0,
    upsample: int = 1,
    switch_scale: float | None = None,
    engine: str = "auto",
    device: str | None = None,
    memory: int | str | None = None,
    block: Sequence[int] | int | None = None,
    scratch: str | Path | None = None,
    executor: str = "auto",
    workers: int | None = None,
    client: Any = None,
    overwrite: bool = False,
    break_lease: bool = False,
    progress: bool = True,
    calibrate: bool = False,
) -> Plan:
    """What `decompose` would do with the same arguments, and what it would need.

    Nothing is read but the source's metadata, and nothing is written unless by `calibrate`.

    Parameters
    ----------
    source_or_shape
        A source as `decompose` takes it, or the shape of a volume in voxels (a tuple), which
        is then taken to be a Zarr array of the working dtype.
    out
        Where the output would go: None keeps it in memory, which the plan then counts. Any
        path means a store on disk.
    overwrite, break_lease, progress
        Without effect here, so that the same options can be given.
    calibrate
        First measure how fast the engine computes here and the disk of `out` is, in about 5 s, and
        keep it in the user's cache folder, for every machine, engine and device. This plan and all
        later ones take their times from it; results do not depend on it.

    All other parameters are those of `decompose`.

    Returns
    -------
    Plan
        ``str(plan)`` is a table; ``plan.peak_memory`` is in bytes.

    Raises
    ------
    InputError
        If an argument cannot be used.
    BudgetError
        If no sensible block fits the memory.
    CalibrationError
        If what `calibrate` measures cannot be kept.

    Examples
    --------
    >>> import cdd_dask
    >>> made = cdd_dask.plan((512, 512, 512), max_scale=8, memory="500MB")
    >>> made.block, made.peak_memory < 500_000_000
    ((256, 256, 256), True)
    """
    arguments = locals()
    is_shape = isinstance(source_or_shape, tuple | list) and all(
        isinstance(n, Integral) and not isinstance(n, bool) for n in source_or_shape
    )
    source: Source | tuple[int, ...]
    if is_shape:
        source = tuple(map(int, source_or_shape))
        if not 1 <= len(source) <= MAX_NDIM or min(source) < 1:
            raise InputError(f"shape {source} must have 1 to {MAX_NDIM} axes of at least 1 voxel")
    else:
        source = open_source(source_or_shape)
    if calibrate and client is not None:
        raise InputError("calibrate=True measures this machine, not a client's: leave one out")
    request = _request(source, arguments)
    if calibrate:
        run_calibration(request[2].engine, request[2].device, out)
        request = _request(source, arguments)
    return make_plan(*request)


Request = tuple[Parameters, Volume, Resources, tuple[int, ...] | None]
"""What `make_plan` takes."""


def _request(source: Source | tuple[int, ...], arguments: dict[str, Any]) -> Request:
    """What a verb's `arguments` ask for."""
    for name in ("overwrite", "break_lease", "progress"):
        check_flag(name, arguments[name])
    parameters = Parameters(**{f.name: arguments[f.name] for f in fields(Parameters)})
    if isinstance(source, tuple):
        volume = Volume(source, source_itemsize=parameters.itemsize)
    else:
        parameters = with_header_spacing(parameters, source)
        volume = Volume(
            shape=source.shape,
            source_itemsize=source.dtype.itemsize,
            source_chunk=source.chunk,
            is_zarr=source.is_zarr,
            has_nan=source.dtype.kind == "f",
        )
    if math.prod(volume.shape) > LARGEST_VOLUME:
        raise InputError(
            f"a volume of shape {volume.shape!s:.200} has more than {LARGEST_VOLUME:.1e} voxels, "
            "which no disk holds: decompose a part"
        )
    names = ("engine", "device", "memory", "executor", "workers", "client")
    resources = resolve_resources(
        parameters,
        **{name: arguments[name] for name in names},
        in_memory=arguments["out"] is None,
        blanks=volume.may_be_masked(parameters),
    )
    resources = replace(resources, scratch=arguments["scratch"] is not None)
    if resources.in_memory and resources.scratch:
        raise InputError(
            f"scratch={str(arguments['scratch'])!r} with out=None: all stays in memory, leave it "
            "out"
        )
    if isinstance(source, Source):
        reachable = source.portable or resources.executor in IN_PROCESS
        volume = replace(volume, reachable=reachable)
    ndim = len(volume.shape)
    return parameters.resolved(ndim), volume, resources, _block(arguments["block"], ndim)


def with_header_spacing(parameters: Parameters, source: Source) -> Parameters:
    """`parameters` with the spacing and the unit that `source` states, where they are asked for.

    Raises
    ------
    InputError
        If it states none, or different units along the axes to decompose.
    """
    if parameters.spacing != "header":
        return parameters
    if source.spacing is None:
        raise InputError(
            f'spacing="header", but {source.description} states no spacing: give the numbers, '
            "spacing=(…)"
        )
    ndim = len(source.shape)
    units = source.units or (None,) * ndim
    stated = {units[axis] for axis in parameters.decomposed_axes(ndim)}
    if len(stated) > 1:
        listed = ", ".join(f"axis {axis}: {unit or 'none'}" for axis, unit in enumerate(units))
        raise InputError(
            f"{source.description} states spacings in different units ({listed}): choose axes= of "
            "one unit, or give spacing=(…) in one unit of your own"
        )
    (unit,) = stated
    if parameters.unit is not None and unit is not None and parameters.unit != unit:
        raise InputError(
            f"unit={parameters.unit!r}, but {source.description} states its spacing in {unit!r}: "
            "leave unit= out, or give spacing=(…) in your unit"
        )
    return replace(parameters, spacing=source.spacing, unit=unit or parameters.unit)


def _block(block: Sequence[int] | int | None, ndim: int) -> tuple[int, ...] | None:
    """The core shape meant by the argument `block`."""
    if block is None:
        return None
    sides = tuple(block) if isinstance(block, Iterable) else (block,) * ndim
    return tuple(check_count("block", side) for side in sides)


def _clean_up_after_others(made: Plan, begun: Begun) -> None:
    """Remove what a run leaves that is killed when its output is complete, the lease at last."""
    address, known = begun.address, begun.attributes
    with suppress(OSError, ValueError, ImportError):  # it stays then, and does no harm
        if Lease.read(address) is not None or has_leftovers(made, address, known["scratch"]):
            with Lease(address):
                clean_up(made, address, known["run"])


def _begin(
    made: Plan,
    source: Source,
    address: str,
    identity: dict[str, Any],
    overwrite: bool,
    scratch: str | None,
) -> tuple[str, bool]:
    """Make the store, in place of one that may go, or take over the one that is there.

    Returns the run's name, and whether it made the store.
    """
    try:
        # looked at again, now that nobody else may write there
        begun = None if overwrite or address.startswith(IN_MEMORY) else find_begun(address)
        if begun is not None:
            check_same(begun.attributes["identity"], identity, address)
            if begun.complete:  # by now
                return str(begun.attributes["run"]), False
            return go_on_with_store(made, source, address, scratch), False
        if "://" not in address and not address.startswith(IN_MEMORY):
            if check_vacant(Path(address), overwrite):
                store.remove_store(Path(address))
        return prepare_store(made, source, address, identity, scratch), True
    except CddError:
        raise
    except (FileExistsError, ValueError) as error:  # Zarr's error where a group is
        raise OutputExistsError(f"out={address} exists: {error}") from error
    except OSError as error:
        raise OutputAccessError(f"out={address} cannot be written: {error}") from error
