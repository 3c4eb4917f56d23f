"""The result: a store of channels and a residual, opened."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import store
from cdd_dask.addresses import check_address
from cdd_dask.attributes import check_group, check_image, check_root
from cdd_dask.blocks import Grid, Region
from cdd_dask.errors import InputError, StoreError
from cdd_dask.memory import format_bytes
from cdd_dask.parameters import Parameters
from cdd_dask.seals import is_sealed
from cdd_dask.tables import text_table

if TYPE_CHECKING:
    import zarr

DETAILS = ("regime", "passes", "levels", "halo", "halo_cells", "error")
STATISTICS = ("count", "sum", "sum_abs", "sum_squares", "min", "max")


class Decomposition:
    """A field split into its scales: ``field = sum(channels) + residual``.

    Made by `decompose` and `open_decomposition`. Nothing is read before it is asked for:
    the channels are Zarr arrays, to be sliced like NumPy arrays.

    Attributes
    ----------
    scales : ndarray
        Scale edges in `unit`, shape ``(number of channels,)``; channel ``k`` holds the
        structures from ``scales[k - 1]`` (0 for the first) to ``scales[k]``.
    unit : str
        What scales are counted in: ``voxels``, or the unit of the spacing.
    channels : tuple of zarr.Array
        One per edge, from the finest to the coarsest, each of the field's shape.
    residual : zarr.Array
        What is larger than the last edge.
    attrs : mapping
        All that the store remembers: parameters, plan, versions, source and its header.
    parameters : Parameters
        What decided the values.
    """

    def __init__(self, address: str, root: zarr.Group) -> None:
        from cdd_dask.images import Image

        self._address = address
        known: Any = root.attrs.get(store.KEY)
        check_root(address, known)
        self.attrs: Mapping[str, Any] = MappingProxyType(known)
        self.scales: NDArray[np.float64] = np.array(known["edges"], np.float64)
        self.parameters = Parameters.of_dict(known["parameters"])
        self.unit = self.parameters.scale_unit
        grid = Grid(tuple(known["plan"]["volume"]["shape"]), tuple(known["plan"]["block"]))
        names = store.output_names(len(self.scales))
        self._groups: dict[str, Any] = {}
        images = []
        for name, scales in zip(names, pairwise([0.0, *known["edges"], None]), strict=True):
            group: Any = root[name].attrs.get(store.KEY)
            check_group(address, name, group, scales, known["complete"])
            path = store.image_path(name)
            image: Any = root[path]
            check_image(address, path, image, self.parameters, grid)
            self._groups[name] = group
            images.append(Image.of(image) if known["complete"] is True else image)
        self.channels: tuple[Any, ...] = tuple(images[:-1])
        self.residual: Any = images[-1]

    @property
    def path(self) -> str | None:
        """Path or URL of the store; None for one in memory."""
        return None if self._address.startswith("in-memory:") else self._address

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the field and of every channel, in voxels."""
        shape: tuple[int, ...] = self.residual.shape
        return shape

    def reconstruct(self, region: Region | slice | None = None) -> NDArray[Any]:
        """The field again: the channels from the finest to the coarsest, and the residual.

        Parameters
        ----------
        region
            Slices as NumPy takes them; None is everything, which must then fit into memory.

        Returns
        -------
        ndarray
            In the working dtype (summed in float64), equal to the field within 4 units in the
            last place of its maximum (or of `cval`, where that is larger); NaN where it is blank.
        """
        where = () if region is None else region
        total: NDArray[Any] = np.array(self.channels[0][where], np.float64)
        for part in (*self.channels[1:], self.residual):
            total += part[where]
        return total.astype(self.parameters.dtype)

    def outputs(self) -> Iterator[tuple[str, float, float | None, dict[str, Any]]]:
        """Name, lower and upper scale in `unit`, and statistics of every output."""
        for name, group in self._groups.items():
            yield name, group["scale_from"], group["scale_to"], group.get("statistics", {})

    def details(self, k: int) -> dict[str, Any]:
        """How channel `k` was computed: regime, passes, levels, halo, error with its kind."""
        known = self._groups[store.channel_name(k)]
        return {name: known[name] for name in DETAILS if name in known}

    def scale_spectrum(self) -> np.recarray[Any, Any]:
        """How the field is shared among its scales (Li 2022), one row for every output.

        Nothing is read but attributes, whatever the size of the field.

        Returns
        -------
        recarray
            Shape ``(number of channels + 1,)``, the last row being the residual's, with the
            columns ``output`` (its name), ``scale_from`` and ``scale_to`` (in `unit`; infinite
            for the residual), ``count`` (voxels that are not blank), ``sum``, ``sum_abs``,
            ``sum_squares``, ``min``, ``max`` (in the field's unit), and ``share``: of the sum
            of absolute values of all outputs. ``pandas.DataFrame(spectrum)`` takes it as it is.
            Ask for ``spectrum["sum"]``: as attributes some names mean methods.

        Raises
        ------
        StoreError
            If the store is not complete, or its statistics were edited.
        """
        self._check_statistics()
        rows = [
            (name, low, math.inf if high is None else high, *map(numbers.get, STATISTICS), 0.0)
            for name, low, high, numbers in self.outputs()
        ]
        kinds = [("scale_from", "f8"), ("scale_to", "f8"), ("count", "i8")]
        kinds += [(name, "f8") for name in (*STATISTICS[1:], "share")]
        spectrum = np.array(rows, dtype=[("output", "U16"), *kinds]).view(np.recarray)
        total = spectrum["sum_abs"].sum()
        spectrum["share"] = spectrum["sum_abs"] / total if total else 0.0
        return spectrum

    def _check_statistics(self) -> None:
        if self.attrs["complete"] is not True:
            raise StoreError(f"{self.path} is not complete: it has no statistics yet")
        for name, group in self._groups.items():
            if not is_sealed(group):
                raise StoreError(
                    f"{self.path} is damaged: the attributes of {name} were edited: `cdd-dask "
                    "repair` mends it"
                )

    def table(self) -> str:
        """Scale range, share, minimum and maximum of every output, as text."""
        rows = []
        for row in self.scale_spectrum():
            low, high = row["scale_from"], row["scale_to"]
            scales = f"> {low:g}" if math.isinf(high) else f"{low:g} - {high:g}"
            numbers = [f"{100 * row['share']:.2f}%", f"{row['min']:.6g}", f"{row['max']:.6g}"]
            rows.append([str(row["output"]), scales, *numbers])
        return text_table(["output", f"scales ({self.unit})", "share", "min", "max"], rows)

    def __repr__(self) -> str:
        size = " × ".join(map(str, self.shape))
        scales = ", ".join(f"{edge:g}" for edge in self.scales)
        volume = format_bytes(int(np.prod(self.shape)) * self.parameters.itemsize)
        state = "" if self.attrs["complete"] is True else "INCOMPLETE "
        return (
            f"<{state}Decomposition of {size} {self.parameters.dtype} voxels ({volume} a channel) "
            f"into {len(self.scales)} channels and a residual\n"
            f"  scales  {scales} {self.unit}\n"
            f"  source  {self.attrs['source']['description']}{self._stated_spacing()}\n"
            f"  store   {self.path or 'in memory'}>"
        )

    def _stated_spacing(self) -> str:
        """The spacing that the source itself states, for people."""
        spacing, units = (self.attrs["source"].get(key) for key in ("spacing", "units"))
        if spacing is None:
            return ""
        named = zip(spacing, units or [None] * len(spacing), strict=True)
        stated = " × ".join(f"{step:.6g} {unit}" if unit else f"{step:.6g}" for step, unit in named)
        return f" (states a spacing of {stated})"


def open_decomposition(path: str | Path, *, allow_incomplete: bool = False) -> Decomposition:
    """Open the result of an earlier `decompose`.

    Parameters
    ----------
    path
        Path or URL of the store.
    allow_incomplete
        Open a store that is not finished; channels may then hold zeros where nothing was
        written yet.

    Returns
    -------
    Decomposition

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    InputError
        If a store in memory is named.
    StoreError
        If it is no store of ours, of another format version, or not complete. When a damaged chunk
        is read, a `DamagedError`, which is one, too.
    """
    address = str(path)
    check_address("path", address)
    if address.startswith("in-memory:"):
        raise InputError("a store in memory cannot be opened by name: keep what decompose returned")
    if "://" not in address:
        address = os.path.abspath(Path(address).expanduser())
        if not Path(address).exists():
            raise FileNotFoundError(f"{address} does not exist")
    try:
        root = store.open_root(address)
        known: Any = root.attrs[store.KEY]
        complete = known["complete"]
    except Exception as error:  # damaged metadata make Zarr fail in any way
        known = None
        with suppress(OSError, ValueError, ImportError):
            known = store.remembered(address)
        if known is not None:
            raise StoreError(
                f"{address} is damaged, its root cannot be read ({_reason(error)}): `cdd-dask "
                "repair` mends a finished store, the same call of decompose goes on with others"
            ) from error
        raise StoreError(
            f"{address} is no decomposition store of cdd-dask that can be read: {_reason(error)}"
        ) from error
    if complete is False and not allow_incomplete:
        raise StoreError(
            f"{address} is not complete: its run is still going on, or was stopped, and the same "
            "call of decompose goes on with it; look at what is there with allow_incomplete=True "
            "(cdd-dask info --allow-incomplete)"
        )
    try:
        return Decomposition(address, root)
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{address} is damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
