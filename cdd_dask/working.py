"""The working arrays of a run: what every pass reads and writes besides its outputs.

Each is made before the first pass that writes it, and removed after the last that uses it. None
is written again by a later pass: what a killed run still writes can then do no harm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cdd_dask.blocks import Grid
from cdd_dask.closure import SNAPSHOTS, coarse_shape
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Pass, Plan, Stage
from cdd_dask.regimes import face_layers, group_count, has_shares
from cdd_dask.statistics import Statistics


@dataclass(frozen=True)
class Nature:
    """What the source turned out to be, which decides what has to be kept."""

    sign: int
    """1 or -1 where no voxel (nor `cval`) has the other sign, 0 where both occur."""
    masked: bool
    """Whether there are blank voxels."""


def nature_of(plan: Plan, source: Statistics | None) -> Nature:
    """What is known of the source; at first that it may be anything."""
    if source is None or source.count == 0:
        return Nature(0, plan.volume.may_be_masked(plan.parameters))
    cval = plan.parameters.cval if plan.parameters.boundary == "constant" else 0.0
    low, high = min(source.min, cval), max(source.max, cval)
    sign = 1 if low >= 0 else -1 if high <= 0 else 0
    return Nature(sign, source.count < math.prod(plan.volume.shape))


def field_name(k: int) -> str:
    """The field that channel `k` starts from."""
    return f"field_{k:02d}"


def part_name(k: int, number: int) -> str:
    """The field between two passes of channel `k`."""
    return f"field_{k:02d}_part_{number}"


def means_name(k: int, number: int = 0) -> str:
    """Means of cells, and the share of voxels that take part, before a pass over the cells."""
    return f"means_{k:02d}_part_{number}"


def smooth_name(k: int, number: int = 0) -> str:
    """The smooth field on the cells, and the smooth share, that such a pass makes of them."""
    return f"smooth_{k:02d}_part_{number}"


def groups_name(k: int, number: int) -> str:
    """Groups of cells before an evolution's pass."""
    return f"groups_{k:02d}_part_{number}"


def snapshots_name(k: int) -> str:
    """Smooth fields that voxels will be moved to."""
    return f"snapshots_{k:02d}"


def keeps_states(parameters: Parameters, nature: Nature) -> bool:
    """Whether a step needs what the one before left of the voxels.

    Of one sign they follow from their first values and the last smooth field alone, and without a
    constraint from the latter.
    """
    return nature.sign == 0 and parameters.constraint != "unconstrained"


def kept_steps(stage: Stage, sign: int) -> tuple[int, ...]:
    """The steps whose smooth fields voxels need: of one sign only the last.

    Voxels of changing sign follow all of them; between those kept they are interpolated.
    """
    last = stage.steps - 1
    if sign or stage.regime == "linear":
        return (last,)
    stride = -(-stage.steps // (SNAPSHOTS - 1))
    return (*range(0, last, stride), last)


def snapshots_of(plan: Plan, one: Pass, sign: int) -> list[int]:
    """Which of the kept smooth fields a pass over the cells writes."""
    kept = kept_steps(_stage(plan, one.stages[0] - 1), sign)
    return [number for number, step in enumerate(kept) if one.first <= step < one.last]


def uses(plan: Plan, one: Pass) -> tuple[set[str], set[str]]:
    """Names of the working arrays that a pass reads and of those that it writes.

    As if the field had both signs: an array that is not made is not missed.
    """
    number = one.stages[0]
    stages = {stage.number: stage for stage in plan.stages}
    stage, last = stages[number], one.stages[-1] == plan.stages[-1].number
    k, after = number - 1, one.stages[-1]
    following = set() if last else {field_name(after)}
    if not last and stages[after + 1].cell_domain:
        following |= {means_name(after)}
    start = {field_name(k)} if k > 0 or plan.copy_in else set()
    ends = one.last == stages[one.stages[-1]].steps
    if one.kind == "copy":
        return set(), following
    if one.kind == "diffuse":
        here = {part_name(k, one.number - 1)} if one.number else set()
        reads = (here or start) | (start if ends else set())
        return reads, following if ends else {part_name(k, one.number)}
    if one.kind == "smooth":
        return {means_name(k, one.number)}, {smooth_name(k, one.number)}
    if one.kind == "gather":
        return start | {means_name(k), smooth_name(k)}, {groups_name(k, 0)}
    if one.kind == "evolve":
        first = means_name(k) if stage.regime == "linear" else groups_name(k, 0)
        reads = {groups_name(k, one.number) if one.number else first, smooth_name(k)}
        more = set() if ends else {groups_name(k, one.number + 1)}
        return reads, more | {snapshots_name(k)}
    if one.kind == "scatter":
        return start | {snapshots_name(k), smooth_name(k)}, following
    moved = {part_name(k, one.number - 1)} if one.number else set()
    reads = start | moved | {smooth_name(k, one.number)}
    if ends:
        return reads, following
    return reads, {means_name(k, one.number + 1), part_name(k, one.number)}


def reads_source(plan: Plan, one: Pass) -> bool:
    """Whether the tasks of a pass read the source itself."""
    return one.kind == "copy" or (one.stages[0] == 1 and not plan.copy_in)


def outputs(plan: Plan, one: Pass) -> set[int]:
    """Numbers of the channels that a pass writes; of the residual the number of channels."""
    stages = {stage.number: stage for stage in plan.stages}
    last = one.stages[-1]
    moves = one.kind in ("diffuse", "scatter", "relax")
    if not moves or one.last < stages[last].steps:
        return set()
    written = {number - 1 for number in one.stages}
    return written | ({last} if last == plan.stages[-1].number else set())


def geometry(plan: Plan, name: str, nature: Nature) -> Grid | None:
    """Shape and blocks of a working array; None where a field of this nature needs none.

    Arrays of cells have their values along a first axis.
    """
    kind, number, *part = name.split("_")
    k = int(number)
    if kind == "field":
        streamed = part and _stage(plan, k).regime == "stream"
        return None if streamed and not keeps_states(plan.parameters, nature) else plan.grid
    stage = _stage(plan, k)
    shared = int(has_shares(plan.parameters, plan.volume.shape, stage.levels) or nature.masked)
    values = {
        "means": 1 + shared,
        "smooth": 1 + nature.masked,
        "groups": group_count(stage.regime, stage.levels) + 1 + shared,
        "snapshots": len(kept_steps(stage, nature.sign)),
    }[kind]
    layers = layers_by_voxels(plan, name)
    if layers is None:
        at_once = 1 if kind == "snapshots" else values  # which are written one after the other
        return Grid((values, *stage.cell_domain), (at_once, *stage.cell_block))
    cells = coarse_shape(plan.volume.shape, stage.levels)
    block = coarse_shape(plan.block, stage.levels)
    # layers beyond the faces are parts of blocks of their own
    cells = tuple(n + layer * (b + 1) for n, layer, b in zip(cells, layers, block, strict=True))
    return Grid((values, *cells), (values, *block))


def layers_by_voxels(plan: Plan, name: str) -> tuple[int, ...] | None:
    """Layers of cells beyond the faces that an array has; None if passes over cells write it.

    Of the others each block of voxels writes the part that is its own.
    """
    kind, number, *part = name.split("_")
    if kind == "means":
        return face_layers(plan.parameters, _stage(plan, int(number)).levels)
    return (0,) * len(plan.block) if kind == "groups" and part[-1] == "0" else None


def _stage(plan: Plan, k: int) -> Stage:
    """The stage of channel `k`."""
    return next(stage for stage in plan.stages if stage.number == k + 1)
