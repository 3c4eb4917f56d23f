"""The plan of a run: pure integers, made before anything is read or written.

(No module is called `plan`, because that is the name of the verb in `cdd_dask`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from cdd_dask.blocks import Grid
from cdd_dask.engines.base import Footprint
from cdd_dask.errors import InputError
from cdd_dask.memory import format_bytes
from cdd_dask.parameters import Parameters
from cdd_dask.tables import text_table

RADII = (2, 4, 7)
"""Radii of the kernels whose speeds are known."""


@dataclass(frozen=True)
class Volume:
    """The field to decompose, as the plan sees it."""

    shape: tuple[int, ...]
    """Shape in voxels."""
    source_itemsize: int = 4
    """Bytes per voxel of the source."""
    source_chunk: tuple[int, ...] | None = None
    """Shape of what the source decodes at once, in voxels; None where nothing is decoded."""
    is_zarr: bool = True
    """Whether the source is a Zarr array, which halo'd blocks are read from directly."""
    reachable: bool = True
    """Whether the tasks can open the source; else it is copied into the store first."""
    has_nan: bool = True
    """Whether the source's type has NaN, so that voxels can be blank."""

    def grid(self, block: tuple[int, ...]) -> Grid:
        """The blocks of a core that the user gives, clipped to the volume.

        Raises
        ------
        InputError
            If it has not the volume's axes, or is not positive along all of them.
        """
        if len(block) != len(self.shape):
            raise InputError(
                f"block={block} has {len(block)} axes, the volume of shape {self.shape} has "
                f"{len(self.shape)}"
            )
        if min(block) < 1:
            raise InputError(f"block={block} must be positive along every axis")
        return Grid(self.shape, tuple(min(b, n) for b, n in zip(block, self.shape, strict=True)))

    def may_be_masked(self, parameters: Parameters) -> bool:
        """Whether there may be blank voxels that take no part."""
        return parameters.nan == "mask" and self.has_nan

    def as_if_blank(self, parameters: Parameters) -> bool:
        """Whether all blocks are computed as if they had blank voxels: no bit may tell."""
        return parameters.rtol == 0 and self.may_be_masked(parameters)


@dataclass(frozen=True)
class Speeds:
    """How fast one task is while as many as may run at once do, for estimates of time only."""

    narrow: float
    """Voxel-steps per second with kernels of radius 2."""
    medium: float
    """The same of radius 4."""
    wide: float
    """The same of radius 7."""
    pyramid: float
    """The same of wider kernels on a coarser grid, where the engine has one."""
    read: float = 2e8
    """Bytes per second from the disk, when they are decompressed."""
    written: float = 2e8
    """Bytes per second to the disk, before they are compressed."""
    calibrated: bool = False
    """Whether they were measured, see `calibration`."""

    def __post_init__(self) -> None:
        for name, speed in asdict(self).items():
            if name != "calibrated" and not 0 < speed < math.inf:
                raise InputError(f"speed {name}={speed!r} must be more than 0 and finite")

    @classmethod
    def rough(cls, voxel_steps_per_second: float) -> Speeds:
        """One figure for all kernels, and a usual disk."""
        return cls(*(voxel_steps_per_second,) * 4)

    def per_step(self, radius: int, pyramid: bool) -> float:
        """Seconds that a step takes for each voxel, with a kernel of `radius`.

        They are linear in the radius between those known, and beyond.

        Examples
        --------
        >>> speeds = Speeds(narrow=10e8, medium=5e8, wide=4e8, pyramid=8e8)
        >>> [round(1e9 * speeds.per_step(radius, False), 2) for radius in (1, 2, 3, 7, 12)]
        [1.0, 1.0, 1.5, 2.5, 4.0]
        """
        if pyramid:
            return 1 / self.pyramid
        known = (1 / self.narrow, 1 / self.medium, 1 / self.wide)
        rise = max(0.0, (known[-1] - known[0]) / (RADII[-1] - RADII[0]))
        return float(np.interp(radius, RADII, known)) + max(0, radius - RADII[-1]) * rise


def engine_name(engine: str, instruction_set: str, device: str) -> str:
    """An engine for people.

    Examples
    --------
    >>> engine_name("cpu", "avx2", "cpu"), engine_name("torch", "", "cuda:0")
    ('cpu (avx2) on cpu', 'torch on cuda:0')
    """
    return (
        f"{engine} ({instruction_set}) on {device}" if instruction_set else f"{engine} on {device}"
    )


@dataclass(frozen=True)
class Resources:
    """What a run may use and on what it runs."""

    engine: str
    """Engine's name, never ``auto``."""
    device: str
    """Device the engine computes on."""
    executor: str
    """Executor's name, never ``auto``."""
    workers: int
    """Tasks that run at once, in the whole run."""
    tasks_per_budget: int
    """Tasks that share `memory`: all of them on one machine, a worker's threads on a cluster."""
    memory: int
    """Bytes those tasks may hold together above the interpreter's baseline."""
    threads: int
    """Threads a task may compute with."""
    footprint: Footprint
    """The engine's working memory in bytes per voxel."""
    blank_footprint: Footprint
    """The same where there are blank voxels; `footprint`, if there can be none."""
    speeds: Speeds
    """How fast one task is, for estimates of time."""
    has_pyramid: bool = False
    """Whether the engine smooths with wide kernels on a coarser grid."""
    device_memory: int | None = None
    """Free bytes on the device; None where the engine computes on the host."""
    in_memory: bool = False
    """Whether the output lives in memory rather than on disk."""
    scratch: bool = False
    """Whether working fields lie elsewhere than the output."""
    instruction_set: str = ""
    """What the engine's compiled code was made for; empty where it has none of its own."""

    @property
    def engine_name(self) -> str:
        """The engine, its instruction set and its device, for people."""
        return engine_name(self.engine, self.instruction_set, self.device)

    @classmethod
    def of_dict(cls, values: dict[str, Any]) -> Resources:
        """The resources of plain JSON values."""
        records = {"footprint": Footprint, "blank_footprint": Footprint, "speeds": Speeds}
        return cls(**{**values, **{name: make(**values[name]) for name, make in records.items()}})


@dataclass(frozen=True)
class Stage:
    """All work for one channel, or the copying-in of the source (stage 0)."""

    number: int
    """0 for the copying-in, ``k + 1`` for channel `k`."""
    scale_from: float
    """Lower scale edge in the unit of scales, 0 for the first channel."""
    scale_to: float
    """Upper scale edge in the unit of scales."""
    steps: int
    """Number of diffusion steps."""
    sigma: float
    """Largest standard deviation along an axis of one step's kernel, in cells."""
    radius: int
    """Largest radius along an axis of one step's kernel, in cells."""
    regime: str
    """How the channel is computed: ``copy``, ``direct`` (full kernels, halo'd blocks),
    ``pyramid`` (wide kernels on a coarser grid, see `levels`), ``refined`` (on a finer grid,
    tile by tile, with all other refined channels), or on cells: ``closure``, ``linear``,
    ``stream`` (see `regimes`)."""
    parts: tuple[int, ...]
    """Steps of every pass: over the voxels or, where there are cells, over these."""
    levels: tuple[int, ...]
    """How often the grid is halved per axis, for the smoothing or for cells; 0 is the full grid."""
    depth: tuple[int, ...]
    """Halo in voxels per axis; 0 along axes that are not cut."""
    blank_depth: tuple[int, ...]
    """Halo of blocks that hold blank voxels."""
    cell_domain: tuple[int, ...]
    """Number of cells per axis, with those around the volume that its voxels need."""
    cell_block: tuple[int, ...]
    """Shape in cells of the blocks that they are cut into."""
    cell_depth: tuple[int, ...]
    """Halo of these blocks in cells."""
    refinement: int
    """Cells per voxel and decomposed axis; 1 is the volume's own grid."""
    tile: tuple[int, ...]
    """What is computed at once of a block's core, in voxels: all of it, but on a refined grid."""
    blank_tile: tuple[int, ...]
    """The same of a block that holds blank voxels, which take more memory."""
    tasks: int
    """Number of tasks."""
    haloed_voxels: int
    """Voxels (or cells) computed by all tasks together, halos included, none being blank."""
    voxel_steps: int
    """Steps times `haloed_voxels`; where there are cells, what all work comes to in such."""
    bytes_read: int
    """Bytes read, uncompressed."""
    bytes_written: int
    """Bytes written, before compression."""
    peak_memory: int
    """Bytes that one task holds at its peak on the host."""
    peak_device_memory: int
    """Bytes that one task holds at its peak on the device."""
    seconds: float
    """Estimate of the stage's time."""
    error: str
    """``exact`` (nothing is cut), ``bounded``, or what decides whether it is."""

    @property
    def channel(self) -> int | None:
        """Number of the channel; None for the copying-in."""
        return self.number - 1 if self.number else None

    @property
    def work(self) -> int:
        """Weight of the stage in the run's progress."""
        return self.voxel_steps + self.haloed_voxels


def stage_from_dict(values: dict[str, Any]) -> Stage:
    """A stage from plain JSON values."""
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Stage(**known)


@dataclass(frozen=True)
class Pass:
    """Tasks that run in any order, between two barriers."""

    kind: str
    """``copy``, ``diffuse``; ``smooth``, ``evolve`` (cells); ``gather``, ``scatter``, ``relax``
    (voxels, with cells)."""
    stages: tuple[int, ...]
    """Numbers of the stages that it computes; one but where several are computed in one go."""
    number: int
    """Which of the stage's passes of this kind it is, from 0."""
    first: int
    """First of the channel's steps that it takes."""
    last: int
    """The step behind the last."""
    tasks: int
    """Number of tasks."""


def stage_passes(stage: Stage) -> list[Pass]:
    """The passes of one channel."""
    numbers, ends = (stage.number,), [0, *accumulate(stage.parts)]
    ranges = list(enumerate(pairwise(ends)))
    if not stage.cell_domain:
        return [Pass("diffuse", numbers, i, a, b, stage.tasks) for i, (a, b) in ranges]
    cells = len(Grid(stage.cell_domain, stage.cell_block))
    if stage.regime == "stream":
        return [
            one
            for i, (a, b) in ranges
            for one in (
                Pass("smooth", numbers, i, a, a, cells),
                Pass("relax", numbers, i, a, b, stage.tasks),
            )
        ]
    start = [Pass("smooth", numbers, 0, 0, 0, cells)]
    if stage.regime == "closure":
        start.append(Pass("gather", numbers, 0, 0, 0, stage.tasks))
    evolve = [Pass("evolve", numbers, i, a, b, cells) for i, (a, b) in ranges]
    return [*start, *evolve, Pass("scatter", numbers, 0, 0, stage.steps, stage.tasks)]


@dataclass(frozen=True)
class Plan:
    """What a run will do, stage by stage, and what it needs."""

    parameters: Parameters
    volume: Volume
    resources: Resources
    edges: tuple[float, ...]
    """Scale edges, in the unit of scales."""
    block: tuple[int, ...]
    """Shape of a block's core in voxels."""
    copy_in: bool
    """Whether the source is first copied into the store, block by block, as stage 0."""
    stages: tuple[Stage, ...]
    peak_memory: int
    """Projected peak of all tasks that run at once, in bytes, per machine or worker."""
    disk_bytes: int
    """Largest size of the output while it is made, in bytes, before compression."""
    files: int
    """Largest number of files (objects) in the output while it is made."""
    scratch_bytes: int
    """Largest size of the working fields, before compression: in the output, if there is no other
    place for them."""

    @classmethod
    def of_dict(cls, values: dict[str, Any], resources: Resources | None = None) -> Plan:
        """The plan that `as_dict` described, to be carried out with other `resources` if given."""
        resources = resources or Resources.of_dict(values["resources"])
        stages = tuple(map(stage_from_dict, values["stages"]))
        known = values["volume"]
        chunk = known["source_chunk"]
        volume = Volume(
            **{**known, "shape": tuple(known["shape"]), "source_chunk": chunk and tuple(chunk)}
        )
        block = tuple(values["block"])
        at_once = min(resources.tasks_per_budget, len(Grid(volume.shape, block)))
        return cls(
            parameters=Parameters.of_dict(values["parameters"]),
            volume=volume,
            resources=resources,
            edges=tuple(values["edges"]),
            block=block,
            copy_in=values["copy_in"],
            stages=stages,
            peak_memory=at_once * max(stage.peak_memory for stage in stages),
            disk_bytes=values["disk_bytes"],
            files=values["files"],
            scratch_bytes=values["scratch_bytes"],
        )

    @property
    def grid(self) -> Grid:
        """The volume cut into blocks."""
        return Grid(self.volume.shape, self.block)

    @property
    def cells_per_voxel(self) -> int:
        """Cells of the refined grid in one voxel."""
        axes = self.parameters.decomposed_axes(len(self.volume.shape))
        return int(self.parameters.upsample ** len(axes))

    @property
    def one_block(self) -> bool:
        """Whether one task computes everything, so that no working field is stored."""
        return len(self.grid) == 1

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes in the order in which they run, with a barrier between each and the next.

        Where the volume is one block, one task computes all channels; else the refined ones are one
        pass.
        """
        tasks = len(self.grid)
        channels = [stage for stage in self.stages if stage.number > 0]
        passes = [Pass("copy", (0,), 0, 0, 0, tasks)] if self.copy_in else []
        together = channels if self.one_block else [s for s in channels if s.refinement > 1]
        if together:
            numbers = tuple(stage.number for stage in together)
            passes.append(Pass("diffuse", numbers, 0, 0, together[-1].steps, tasks))
        for stage in channels[len(together) :]:
            passes += stage_passes(stage)
        return tuple(passes)

    @property
    def tasks(self) -> int:
        """Number of all tasks."""
        return sum(one.tasks for one in self.passes)

    @property
    def seconds(self) -> float:
        """Estimate of the run's time."""
        return sum(stage.seconds for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {**asdict(self), "grid": self.grid.counts, "seconds": self.seconds}

    def __str__(self) -> str:
        return describe_plan(self)


def describe_plan(plan: Plan) -> str:
    """The plan as a table for people."""
    volume, resources = plan.volume, plan.resources
    itemsize = plan.parameters.itemsize
    shared = f"{min(resources.tasks_per_budget, len(plan.grid))} at once"
    lines = [
        f"volume     {_times(volume.shape)} {plan.parameters.dtype}, "
        f"{format_bytes(math.prod(volume.shape) * itemsize)}",
        f"blocks     {len(plan.grid)} of {_times(plan.block)} ({_times(plan.grid.counts)})",
        f"engine     {resources.engine_name}, executor {resources.executor}, "
        f"{resources.workers} worker{'s' if resources.workers > 1 else ''}",
        f"memory     {format_bytes(plan.peak_memory)} at the peak ({shared}) of "
        f"{format_bytes(resources.memory)} allowed",
        "disk       none (in memory)"
        if resources.in_memory
        else f"disk       up to {format_bytes(plan.disk_bytes)} in {plan.files} files"
        + f", scratch up to {format_bytes(plan.scratch_bytes)}" * resources.scratch,
        f"time       about {format_seconds(plan.seconds)} "
        f"({'calibrated' if resources.speeds.calibrated else 'rough'})",
    ]
    refined = [stage for stage in plan.stages if stage.refinement > 1]
    if refined:
        work, cells = sum(stage.work for stage in plan.stages), plan.cells_per_voxel
        lines.append(
            f"upsample   channels 0 - {refined[-1].channel} on {cells} cells a voxel: "
            f"{100 * sum(stage.work for stage in refined) / work:.0f}% of the run's work"
        )
    lines += describe_error(plan)
    scales = f"scales ({plan.parameters.scale_unit})"
    columns: dict[str, Callable[[Stage], str]] = {
        "stage": lambda s: f"channel {s.channel}" if s.number else "copy in",
        scales: lambda s: f"{s.scale_from:g} - {s.scale_to:g}" if s.number else "",
        "regime": lambda s: f"{s.regime} ×{s.refinement}" if s.refinement > 1 else s.regime,
        "passes": lambda s: str(len(s.parts)),
        "steps": lambda s: str(s.steps),
        "sigma": lambda s: f"{s.sigma:.3g}",
        "level": lambda s: str(max(s.levels)),
        "halo": lambda s: f"{_times(s.cell_depth)} cells" if s.cell_depth else _times(s.depth),
        "overhead": lambda s: f"{s.haloed_voxels / math.prod(volume.shape):.2f}",
        "voxel-steps": lambda s: f"{s.voxel_steps:.2g}",
        "tasks": lambda s: str(s.tasks),
        "read": lambda s: format_bytes(s.bytes_read),
        "written": lambda s: format_bytes(s.bytes_written),
        "task peak": lambda s: format_bytes(s.peak_memory),
        "device": lambda s: format_bytes(s.peak_device_memory),
        "time": lambda s: format_seconds(s.seconds),
        "error": lambda s: s.error,
    }
    rows = [[column(stage) for column in columns.values()] for stage in plan.stages]
    return "\n".join([*lines, "", text_table(list(columns), rows)])


def describe_error(plan: Plan) -> list[str]:
    """What the plan promises of the error that blocks cause, where that depends on the data."""
    bounded = any(stage.error.startswith("bounded") for stage in plan.stages)
    if not bounded or not plan.volume.may_be_masked(plan.parameters):
        return []
    return ["error      bounded for a field without blank voxels, else estimated"]


def format_seconds(seconds: float) -> str:
    """A duration in the units a person reads.

    Examples
    --------
    >>> format_seconds(0.4), format_seconds(75), format_seconds(7300)
    ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _times(numbers: tuple[int, ...]) -> str:
    return " × ".join(map(str, numbers))
