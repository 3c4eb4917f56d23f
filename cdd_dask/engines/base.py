"""The contract of all engines.

An engine sees one block, the steps with their taps and a rule for every face; never the block's
place in the volume, its files or its scheduler. Engines import neither zarr nor dask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from cdd_dask.time_stepping import Steps

Faces = tuple[tuple[str, str], ...]
"""Rule of the low and of the high face of every axis: a boundary mode, or `boundaries.CUT`."""


@dataclass(frozen=True)
class Diffusion:
    """What an engine does to a block: some steps under one rule."""

    steps: Steps
    """How many steps, and the kernel of one step along each axis."""
    constraint: str
    """``constrained``, ``inverted``, ``crossing`` or ``unconstrained``, see `Engine`."""
    faces: Faces
    """Rule of every face: `CUT`, where any extension will do, or the axis's; ``wrap`` on both faces
    or on neither."""
    cval: float = 0.0
    """Value beyond ``constant`` faces, in the field's unit."""
    levels: tuple[int, ...] = ()
    """How often the grid may be halved along each axis to smooth with wide kernels; none: not at
    all. An engine without a pyramid takes it for none."""
    phase: tuple[int, ...] = ()
    """Voxels between the last border of coarse cells and the block's start, for each axis."""
    as_if_blank: bool = False
    """Compute as where there are blank voxels even if this block has none, so that a voxel's last
    bit does not depend on whether one lies in the same block."""


SAVED_ROWS, LARGEST_RADIUS = 6, 16
"""See `Footprint.threads`."""


@dataclass(frozen=True)
class Footprint:
    """Working memory of an engine, in bytes per voxel of the halo'd block."""

    host: int
    """On the host, the block itself included."""
    device: int
    """On the device; 0 where the engine computes on the host."""
    line: int = 0
    """On the host, per voxel of the block's longest side alone."""
    row: int = 0
    """On the host, per voxel of a row alone, for tiles of 16 rows; half as much again where the
    field wraps around."""
    tiles: int = 0
    """On the host, what taller tiles take at most."""
    copy: int = 0
    """On the host, per voxel of a copy, and per cell of coarser grids."""
    lanes: int = 1
    """Rows of the copy are a multiple of so many voxels, of twice as many with coarser grids."""
    threads: int = 0
    """Of a block. Each saves rows of every plane of the copy, or of the coarsest grid, `SAVED_ROWS`
    or the kernel's radius if that is more, and thrice as many where the field wraps around; but
    none where the radius is above `LARGEST_RADIUS`."""


class Engine(ABC):
    """Diffuses one block.

    One step smooths, ``S = G_sigma * I``, and then takes for every voxel

    - constrained: ``min(max(I, 0), max(min(I, 0), S))``, which is `S` where that lies between 0 and
      `I`, and the nearer of the two where it does not;
    - inverted: ``I > 0 → max(I, S)``, ``I < 0 → min(I, S)``, ``I = 0`` stays;
    - crossing: ``I > 0 → min(I, S)``, ``I < 0 → max(I, S)``, ``I = 0`` stays;
    - unconstrained: ``S``

    All but the last solve ``dI/dt = H(∓sgn(I) ∇²I) ∇²I`` (Li 2022, arXiv:2201.05484) for small
    steps. Constrained, no voxel crosses 0, nor does any in the equation: a step is monotone and a
    contraction in the maximum norm. Between steps the field has the dtype that it came with.

    NaN voxels are blank: they take no part and stay NaN, and the smoothing of the others is
    normalised, ``S = (G_sigma * I M) / (G_sigma * M)``, `M` being 0 there and 1 elsewhere; beyond
    a ``constant`` face all is data.
    """

    name: ClassVar[str]
    voxel_steps_per_second: ClassVar[float]
    """Rough speed on one core or device, for estimates of time only."""
    has_pyramid: ClassVar[bool] = False
    """Whether it smooths with wide kernels on a coarser grid, see `pyramid`."""
    device: str = "cpu"
    instruction_set: str = ""
    """What its compiled code was made for; empty where it has none of its own."""

    @abstractmethod
    def diffuse(self, field: NDArray[Any], diffusion: Diffusion) -> NDArray[Any]:
        """The field after the steps of `diffusion`.

        Parameters
        ----------
        field
            The block with its halo, 1-D to 4-D, float32 or float64, C-contiguous, NaN where
            blank. It may be overwritten, and the result may be the same array.
        diffusion
            What to do; its kernels and faces match `field`'s axes.

        Returns
        -------
        ndarray
            Same shape and dtype as `field`, on the host.
        """

    @abstractmethod
    def footprint(self, itemsize: int, blanks: bool = False, threads: int = 1) -> Footprint:
        """Working memory for a field of `itemsize` bytes per voxel, perhaps with `blanks`.

        `threads` are those that a block has.
        """

    def free_device_memory(self) -> int | None:
        """Free bytes on the device; None where the engine computes on the host."""
        return None

    def device_count(self) -> int:
        """Number of such devices on this machine."""
        return 1

    @abstractmethod
    def limit_threads(self, count: int) -> int:
        """Compute with `count` threads from now on, in this process; returns the count before."""
