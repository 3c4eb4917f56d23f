"""What is written to one file, and how the file is laid out."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdd_dask import __version__
from cdd_dask.blocks import Region, pieces
from cdd_dask.errors import StoreError

READ_BYTES = 64_000_000
"""A block of more bytes is read and written in parts: its run may have had far more memory."""


@dataclass(frozen=True)
class Layout:
    """Where the voxels lie in a file that has its metadata and its final size."""

    offset: int
    """Bytes before the first voxel."""
    dtype: np.dtype[Any]
    """Type of the voxels, with the file's byte order."""
    axes: tuple[int, ...]
    """The store's axes in the order in which the file has them, the slowest first."""


@dataclass(frozen=True)
class Output:
    """A region of one channel, or of the residual: what one file holds."""

    name: str
    """``channel_00``, …, ``residual``."""
    number: int | None
    """The channel's number; None for the residual."""
    scales: tuple[float, float | None]
    """Lower and upper scale in `unit`; no upper one for the residual."""
    array: Any
    """The Zarr array."""
    region: Region
    """The voxels to write."""
    attributes: Mapping[str, Any]
    """All that the store remembers."""

    def __post_init__(self) -> None:
        source, ndim = self.attributes["source"], len(self.region)
        full = source.get("file_shape")
        try:
            spacing, units = self.spacing, self.units
            usable = (spacing is None or len(spacing) == ndim) and len(units) == ndim
            usable = usable and all(size >= 1 for size in full or ())
        except (TypeError, ValueError, IndexError):
            usable = False
        if not usable:
            raise StoreError(
                f"the store's spacing, units or file_shape ({source.get('spacing')}, "
                f"{source.get('units')}, {full}) fit no volume of {ndim} axes: were they edited?"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the region in voxels."""
        return tuple(s.stop - s.start for s in self.region)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the voxels in native byte order."""
        native: np.dtype[Any] = np.dtype(self.array.dtype).newbyteorder("=")
        return native

    @property
    def nbytes(self) -> int:
        """Bytes of all voxels."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Names of the store's axes."""
        names = self.array.metadata.dimension_names or (None,) * len(self.shape)
        return tuple(name or f"dim_{axis}" for axis, name in enumerate(names))

    @property
    def unit(self) -> str:
        """What scales are counted in."""
        stated = self.attributes["parameters"]
        unit = "voxel" if stated.get("spacing") is None else "unit of spacing"
        return stated.get("unit") or unit

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Distance of neighbouring voxels per axis: what the run was told, else the source's."""
        own = self._own_spacing()
        spacing = self.attributes["source"].get("spacing") if own is None else own
        return None if spacing is None else tuple(map(float, spacing))

    @property
    def units(self) -> tuple[str | None, ...]:
        """Unit of the spacing per axis, where one is known."""
        stated, ndim = self.attributes["parameters"], len(self.shape)
        units = tuple(self.attributes["source"].get("units") or (None,) * ndim)
        if self._own_spacing() is None:
            return units
        # across slices nothing is computed, so there the source's own unit holds
        decomposed = {axis % ndim for axis in stated.get("axes") or range(ndim)}
        return tuple(stated.get("unit") if a in decomposed else units[a] for a in range(ndim))

    def _own_spacing(self) -> list[float] | None:
        spacing = self.attributes["parameters"].get("spacing")
        if spacing is None or isinstance(spacing, str):
            return None
        return [spacing] * len(self.shape) if isinstance(spacing, int | float) else list(spacing)

    def notes(self) -> list[str]:
        """What the file holds and how it came about, in ASCII."""
        low, high = self.scales
        scales = f"{low:g} to {high:g}" if high is not None else f"beyond {low:g}"
        made_by = self.attributes.get("versions", {}).get("cdd-dask", __version__)
        parameters = {k: v for k, v in self.attributes["parameters"].items() if v is not None}
        region = ", ".join(f"{s.start}:{s.stop}" for s in self.region)
        axes = ascii_text(" ".join(self.dimension_names))
        return [
            f"cdd-dask {made_by}: {self.name}, scales {scales} {ascii_text(self.unit)}, of a "
            "constrained diffusion decomposition (Li 2022, arXiv:2201.05484)",
            f"parameters {json.dumps(parameters)}",
            f"voxels [{region}] of {list(self.array.shape)}, axes {axes}; "
            f"exported by cdd-dask {__version__}",
        ]

    def pieces(self, block: tuple[int, ...]) -> Iterator[tuple[Region, Region]]:
        """Pairs (where in the region, where in the array); none is larger than a block."""
        limit = READ_BYTES // self.dtype.itemsize
        along = [
            pieces(s.start, s.stop, n, unit)
            for s, n, unit in zip(
                self.region,
                self.array.shape,
                read_shape(block, self.array.chunks, limit),
                strict=True,
            )
        ]
        for parts in itertools.product(*along):
            yield tuple(part[0] for part in parts), tuple(part[1] for part in parts)


def read_shape(block: tuple[int, ...], chunk: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """What to read at a time: the block, cut to about `limit` voxels where it has more.

    Cuts lie between chunks, so that none is decoded twice, and along the slowest axes, so that
    what is read lies close together in the file.

    Examples
    --------
    >>> read_shape((128, 128, 128), (64, 64, 64), limit=2**20)
    (64, 128, 128)
    """
    shape = list(block)
    for axis, side in enumerate(chunk):
        rest = math.prod(shape) // shape[axis]
        if math.prod(shape) > limit and shape[axis] > side:
            shape[axis] = max(side, limit // rest // side * side)
    return tuple(shape)


def ascii_text(text: str) -> str:
    """`text` for files that know no more than ASCII."""
    # the micro sign and the Greek letter look the same
    plain = text.replace("\u00b5", "u").replace("\u03bc", "u").replace("Å", "Angstrom")
    return plain.encode("ascii", "replace").decode()
