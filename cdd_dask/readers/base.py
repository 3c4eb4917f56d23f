"""What every reader hands over: a `Source`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.addresses import UNPRINTABLE
from cdd_dask.blocks import Region
from cdd_dask.errors import CddError, DamagedError, InputError, SourceReadError
from cdd_dask.memory import available_memory, format_bytes
from cdd_dask.parameters import MAX_NDIM

LARGEST_VOLUME = 2**49
"""Voxels of the largest volume that anybody could store: 2 PB in float32."""


@dataclass(frozen=True)
class Source:
    """A field that can be read region by region.

    Raises
    ------
    InputError
        If its shape or dtype is none that can be decomposed.
    """

    description: str
    """What it is, for people: a path, or the kind of array."""
    address: str
    """What `open_source` opens it by again, in another process if `portable`."""
    portable: bool
    """Whether another process on a shared file system can open it."""
    lazy: bool
    """Whether it may read files that only it knows: they must not go before it is read."""
    is_zarr: bool
    """Whether it is a Zarr array, whose chunks make halo'd reads cheap."""
    shape: tuple[int, ...]
    """Shape in voxels."""
    dtype: np.dtype[Any]
    """Type as stored, of any byte order."""
    fetch: Callable[[Region], NDArray[Any]]
    """How `read` gets the values of a region."""
    dimension_names: tuple[str, ...] | None = None
    """Names of the axes, where the source knows them."""
    chunk: tuple[int, ...] | None = None
    """Shape of what is decoded at once, in voxels; None where nothing is."""
    header: str | None = None
    """The source's own metadata as text, where it has some."""
    spacing: tuple[float, ...] | None = None
    """Distance of neighbouring voxels per axis, where the source states it; > 0."""
    units: tuple[str | None, ...] | None = None
    """Unit of the spacing per axis, where the source states it."""
    file_shape: tuple[int, ...] | None = None
    """Shape in the file, where that has axes of length 1 that `shape` leaves out."""
    further_files: tuple[Path, ...] = ()
    """Files besides `path` that it reads; `path` may be among them."""

    @property
    def path(self) -> Path | None:
        """The file or folder that it is or lies in; None for URLs and arrays in this process."""
        if not self.portable or "://" in self.address:
            return None
        return Path(split_address(self.address)[0])

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it reads, `path` first; of a Zarr array its folder."""
        return () if self.path is None else tuple(dict.fromkeys([self.path, *self.further_files]))

    def read(self, region: Region) -> NDArray[Any]:
        """The values of a region, modulo the shape, in the source's dtype.

        Raises
        ------
        SourceReadError
            If they cannot be read, whatever the library says that reads them.
        """
        try:
            values = self.fetch(region)
        except DamagedError as error:  # of a decomposition
            raise SourceReadError(f"{self.description} cannot be read: {error}") from error
        except CddError:
            raise
        except Exception as error:  # damaged data make a library fail in any way
            raise SourceReadError(
                f"{self.description} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if values.dtype.kind == "c":  # whose imaginary part a cast would drop
            raise SourceReadError(f"{self.description} holds complex numbers, not {self.dtype}")
        return values

    def __post_init__(self) -> None:
        if UNPRINTABLE.search(self.description + self.address):
            raise InputError(f"source {self.description!a} holds characters that cannot be printed")
        if not 1 <= len(self.shape) <= MAX_NDIM:
            raise InputError(
                f"{self.description} has {len(self.shape)} axes (shape {self.shape}): "
                f"give an array of 1 to {MAX_NDIM} axes"
            )
        if 0 in self.shape:
            raise InputError(f"{self.description} is empty (shape {self.shape})")
        if math.prod(self.shape) > LARGEST_VOLUME or (self.chunk and min(self.chunk) < 1):
            raise InputError(
                f"{self.description} cannot have the shape {self.shape} in chunks of {self.chunk}"
            )
        if self.dtype.kind not in "biuf":
            raise InputError(
                f"{self.description} has dtype {self.dtype}: only real numbers can be decomposed"
            )


def split_address(address: str) -> tuple[str, str | None]:
    """Path and part of an address like ``file.h5::/data``; a file with such a name goes first."""
    path, separator, part = address.partition("::")
    if not separator or os.path.lexists(address):
        return address, None
    return path, part


def check_decodable(path: Path, chunk: tuple[int, ...], itemsize: int) -> None:
    """Refuse a file whose parts are decoded whole and would not fit the memory.

    Compressed, they need next to no room in the file: only its header tells.

    Raises
    ------
    SourceReadError
        If a `chunk` of so many voxels needs more than is free.
    """
    needed, free = math.prod(chunk) * itemsize, available_memory()
    if needed > free:
        raise SourceReadError(
            f"{path} is decoded in parts of {format_bytes(needed)}, but {format_bytes(free)} of "
            "memory is free: store it in smaller tiles"
        )


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of the axes that stay when those of length 1 are left out; the last one, if all are.

    Examples
    --------
    >>> squeezed((1, 53, 105, 105)), squeezed((1, 1))
    ((1, 2, 3), (1,))
    """
    return tuple(axis for axis, n in enumerate(shape) if n != 1) or (len(shape) - 1,)


def even_spacing(coordinates: NDArray[Any]) -> float | None:
    """Distance of neighbouring coordinates, where it is the same all along, to single precision.

    Examples
    --------
    >>> even_spacing(np.array([3.0, 2.5, 2.0])), even_spacing(np.array([1.0, 2.0, 4.0]))
    (0.5, None)
    """
    if len(coordinates) < 2 or coordinates.dtype.kind not in "iuf":
        return None
    values = coordinates.astype(np.float64)
    steps = np.diff(values)
    step = (values[-1] - values[0]) / (len(values) - 1)
    # coordinates in single precision are off by so much
    slack = 1e-4 * abs(step) + 1e-6 * np.abs(values).max()
    if (
        not math.isfinite(step)
        or step == 0
        or np.abs(steps - step).max() > min(slack, abs(step) / 10)
    ):
        return None
    return float(abs(step))
