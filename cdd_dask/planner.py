"""The planner: chooses blocks that fit the memory, and says what each stage will cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NoReturn

from cdd_dask.blocks import Grid
from cdd_dask.drafts import Draft, Space, drafts_of
from cdd_dask.errors import BudgetError
from cdd_dask.halo import channel_passes
from cdd_dask.memory import format_bytes
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Plan, Resources, Stage, Volume
from cdd_dask.pyramid import SMALLEST_RTOL, SMALLEST_RTOL_AT_STEEP_FACES
from cdd_dask.regimes import CLOSURE_RTOL, Regime

RTOLS = (SMALLEST_RTOL, CLOSURE_RTOL, SMALLEST_RTOL_AT_STEEP_FACES)
"""Values of `rtol` from which on more regimes may serve."""
HOPELESS = 2
"""Blocks that take so many times the time of larger ones end the search."""


def make_plan(
    parameters: Parameters,
    volume: Volume,
    resources: Resources,
    block: tuple[int, ...] | None = None,
) -> Plan:
    """Plan a run.

    Parameters
    ----------
    parameters
        What to compute.
    volume
        Of what.
    resources
        With what.
    block
        Shape of a block's core in voxels; None takes the largest that `resources` hold.

    Raises
    ------
    InputError
        If `block` does not fit the volume's axes.
    BudgetError
        If no block fits the memory; the message states the smallest budget that would do.
    """
    draft, grid = _choose(drafts_of(parameters, volume, resources), block)
    first = 0 if draft.copies_in(grid) else 1
    stages = tuple(_stage(draft, grid, number) for number in range(first, len(draft.edges) + 1))
    out, work = draft.disk(grid)
    if resources.in_memory:
        out = work = Space(0, 0)
    return Plan(
        parameters=parameters,
        volume=volume,
        resources=resources,
        edges=draft.edges,
        block=grid.block,
        copy_in=draft.copies_in(grid),
        stages=stages,
        peak_memory=draft.peak(grid),
        disk_bytes=out.bytes,
        files=out.files,
        scratch_bytes=work.bytes,
    )


def _choose(drafts: list[Draft], block: tuple[int, ...] | None) -> tuple[Draft, Grid]:
    """The draft and the blocks that are done first, of those that fit."""
    best: tuple[float, Draft, Grid] | None = None
    too_large: list[tuple[Draft, Grid]] = []
    for draft in drafts:
        for grid in draft.grids() if block is None else [draft.volume.grid(block)]:
            if draft.fits(grid):
                seconds = draft.seconds(grid)
                if best is None or seconds < best[0]:
                    best = seconds, draft, grid
                elif seconds > HOPELESS * best[0]:
                    break  # blocks only get smaller
            else:
                too_large.append((draft, grid))
    if best is not None:
        return best[1:]
    draft, grid = min(too_large, key=lambda one: one[0].peak(one[1]))
    if block is None:
        _refuse(draft, grid, f"even with blocks of {grid.block}, the plan", "")
    _refuse(draft, grid, f"block={block}", "give a smaller block, ")


def _refuse(draft: Draft, grid: Grid, what: str, remedy: str) -> NoReturn:
    """Raise the `BudgetError` that says what `grid` needs and what would help."""
    resources = draft.resources
    needed, allowed = draft.peak(grid), resources.memory
    depths = draft.blank_depths
    deepest = max(range(len(depths)), key=lambda k: max(depths[k]))
    halo = f"the halo of channel {deepest} is {max(depths[deepest])} voxels deep"
    others = "lower max_scale"
    if draft.refined:
        others += ", lower upsample"
    if draft.blank_depths != draft.depths:
        others += ', say nan="raise" if no voxel is blank'
    if draft.parameters.constraint == "crossing":
        others += ", leave crossing out"
    rtol = _rtol_that_would_do(draft)
    wider = "raise rtol" if rtol is None else f"raise rtol to {rtol:g}"
    if needed <= allowed:
        needed = draft.device_peak(grid)
        raise BudgetError(
            f"{what} needs {format_bytes(needed)} on {resources.device} ({halo}), where "
            f"{format_bytes(resources.device_memory or 0)} are free: {remedy}{others} or "
            f"{wider}"
        )
    tasks = resources.tasks_per_budget
    others += f", use fewer workers (now {tasks} tasks share the memory)" if tasks > 1 else ""
    others += ", write to disk with out=" if resources.in_memory else ""
    raise BudgetError(
        f"{what} needs {format_bytes(needed)} ({halo}), but memory allows "
        f"{format_bytes(allowed)}: {remedy}raise memory to at least "
        f'"{-(-needed // 1_000_000)}MB", {others} or {wider}'
    )


def _rtol_that_would_do(draft: Draft) -> float | None:
    """The smallest larger `rtol` whose regimes serve within the memory given."""
    for rtol in RTOLS:
        if rtol <= draft.parameters.rtol:
            continue
        parameters = replace(draft.parameters, rtol=rtol)
        for other in drafts_of(parameters, draft.volume, draft.resources):
            if any(other.fits(grid) for grid in other.grids()):
                return rtol
    return None


def _stage(draft: Draft, grid: Grid, number: int) -> Stage:
    """Stage `number` for the blocks of `grid`."""
    if number == 0:
        return _copying_in(draft, grid)
    k = number - 1
    steps, regime = draft.steps[k], draft.regimes(grid)[k]
    cut = [count > 1 for count in (draft.tiles(grid) if steps.refinement > 1 else grid).counts]
    blank_tile = draft.blank_tile(grid, k, regime)
    cut_by_tiles = [
        whole or tile < block
        for whole, tile, block in zip(cut, blank_tile, grid.block, strict=True)
    ]
    depth, blank_depth = (
        tuple(h if is_cut else 0 for h, is_cut in zip(depths, where, strict=True))
        for depths, where in ((regime.depth, cut), (regime.blank_depth, cut_by_tiles))
    )
    read, written = draft.moved_bytes(grid, k, regime)
    cells = regime.cells or Grid((), ())
    return Stage(
        number=number,
        scale_from=draft.edges[k - 1] if k else 0.0,
        scale_to=draft.edges[k],
        steps=steps.count,
        sigma=max(kernel.sigma for kernel in steps.kernels),
        radius=max(kernel.radius for kernel in steps.kernels),
        regime=regime.name,
        parts=regime.parts,
        levels=regime.levels,
        depth=depth,
        blank_depth=blank_depth,
        cell_domain=cells.shape,
        cell_block=cells.block,
        cell_depth=regime.cell_depth,
        refinement=steps.refinement,
        tile=draft.tiles(grid).block if steps.refinement > 1 else grid.block,
        blank_tile=blank_tile,
        tasks=len(grid),
        haloed_voxels=math.prod(grid.shape) if regime.cells else draft.computed(grid, k, depth),
        voxel_steps=draft.work(grid, k, regime),
        bytes_read=read,
        bytes_written=written,
        peak_memory=draft.host(grid, k, regime),
        peak_device_memory=draft.device(grid, k, regime),
        seconds=draft.channel_seconds(grid, k, regime),
        error=_error(draft, k, regime, depth, cut),
    )


def _error(draft: Draft, k: int, regime: Regime, depth: tuple[int, ...], cut: list[bool]) -> str:
    """What is known of the error that cutting causes in channel `k`."""
    if regime.cells is not None:
        if regime.name == "closure":
            return "estimated"
        return "exact" if regime.name == "stream" or len(regime.cells) == 1 else "bounded"
    passes = next(p for p in channel_passes(draft.steps) if k in p)
    factor = draft.steps[k].refinement
    for axis, is_cut in enumerate(cut):
        computed = draft.computed_steps[passes.start : passes.stop]
        reach = sum(steps.reach[axis] for steps in computed)
        if len(regime.parts) > 1:
            reach = reach // computed[0].count * max(regime.parts)
        if is_cut and depth[axis] * factor < reach:
            return "estimated" if draft.parameters.constraint == "crossing" else "bounded"
    return "exact"


def _copying_in(draft: Draft, grid: Grid) -> Stage:
    """Stage 0: the source, block by block, into the store's first working field."""
    voxels, depth = math.prod(grid.shape), (0,) * len(grid.shape)
    read = voxels * draft.volume.source_itemsize
    return Stage(
        number=0,
        scale_from=0.0,
        scale_to=0.0,
        steps=0,
        sigma=0.0,
        radius=0,
        regime="copy",
        parts=(0,),
        levels=depth,
        depth=depth,
        blank_depth=depth,
        cell_domain=(),
        cell_block=(),
        cell_depth=(),
        refinement=1,
        tile=grid.block,
        blank_tile=grid.block,
        tasks=len(grid),
        haloed_voxels=voxels,
        voxel_steps=0,
        bytes_read=read,
        bytes_written=draft.field_bytes,
        peak_memory=draft.copying_memory(grid),
        peak_device_memory=0,
        seconds=draft.seconds_of(grid, 0.0, read, draft.field_bytes),
        error="exact",
    )
