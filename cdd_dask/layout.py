"""Metadata of stores, as Zarr and OME-Zarr have them: made when a run begins, restored later."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cdd_dask import store
from cdd_dask.blocks import Grid
from cdd_dask.marks import FOLDER
from cdd_dask.objects import (
    bring_to_disk,
    has_object,
    new_memory_store,
    read_object,
    store_of,
    times_below,
    write_object,
)
from cdd_dask.seals import seal_of

if TYPE_CHECKING:
    import zarr

ROOT = "zarr.json"
"""Key of the root's metadata, and the end of all keys of metadata."""
LONGEST_NAME = 200
"""Bytes of an axis' name: it becomes a file's, which most systems limit to 255."""
OME_UNITS = {
    "Å": "angstrom", "nm": "nanometer", "µm": "micrometer", "mm": "millimeter",
    "cm": "centimeter", "m": "meter", "km": "kilometer", "pc": "parsec",
    "ms": "millisecond", "s": "second", "min": "minute", "h": "hour",
}  # fmt: skip
"""Names that OME-Zarr has for units; others it has none for."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Axis:
    """An axis of the volume, as its coordinate array and the OME metadata describe it."""

    name: str
    spacing: float
    """Distance of neighbouring voxels, 1 where coordinates count voxels."""
    unit: str | None
    """Unit of `spacing`, where there is one."""


@dataclass(frozen=True)
class Layout:
    """What decides all metadata of a run's store."""

    grid: Grid
    """The volume cut into blocks; a shard is one block's core."""
    edges: Sequence[float]
    axes: tuple[Axis, ...]
    """The volume's."""
    attributes: dict[str, Any]
    """What the root remembers under `store.KEY` besides the format version; the ``parameters``
    among it give the type of all fields and the unit of the edges."""

    @classmethod
    def of(cls, attributes: dict[str, Any]) -> Layout:
        """That of a store whose root remembers these attributes."""
        plan = attributes["plan"]
        grid = Grid(tuple(plan["volume"]["shape"]), tuple(plan["block"]))
        axes = tuple(Axis(*axis) for axis in attributes["axes"])
        return cls(grid, attributes["edges"], axes, attributes)

    def create(self, address: str) -> None:
        """Write all metadata of an empty store; nothing may be there."""
        if not store.on_disk(address):
            self._create(address, sharded=False)
            return
        if has_object(address, ROOT):
            raise FileExistsError(f"{address} exists")
        # the root first, and whole: a run that goes on makes from it what is not there yet
        with self.in_memory() as whole:
            for key in objects_of(whole):
                write_object(address, key, read_object(whole, key) or b"")
        for key in (ROOT, f"{FOLDER}/{ROOT}"):
            bring_to_disk(address, key)

    def restore(self, address: str) -> None:
        """Write again what an unfinished store lacks: its run may have been killed."""
        with self.in_memory() as whole:
            for key in objects_of(whole):
                if not _is_sound(address, key, wanted := read_object(whole, key) or b""):
                    log.warning("%s lacks %s, or it is damaged: writing it again", address, key)
                    write_object(address, key, wanted)

    @contextmanager
    def in_memory(self) -> Iterator[str]:
        """Address of a store in memory of the same metadata as on a disk, and no data."""
        address, _kept = new_memory_store()
        self._create(address, sharded=True)
        yield address

    def _create(self, address: str, sharded: bool) -> None:
        root = store.open_root(address, "w-")
        known = {"format_version": store.FORMAT_VERSION, **self.attributes, "complete": False}
        store.write_attributes(address, root, known)
        level: dict[str, bytes] = {}  # what lies in ``scale0``, the same for all outputs
        for name, known in output_attributes(self.edges, self.attributes["parameters"]).items():
            multiscales = _ome_multiscales(name, self.axes)
            more = {} if multiscales is None else {"ome": multiscales}
            root.create_group(name, attributes={store.KEY: known, **more})
            if not level:
                self._create_level(root, f"{name}/scale0", sharded)
                keys = (key for key in objects_of(address) if key.startswith(f"{name}/scale0/"))
                level = {key.removeprefix(name): read_object(address, key) or b"" for key in keys}
                continue
            for key, whole in level.items():
                write_object(address, f"{name}{key}", whole)

    def _create_level(self, root: zarr.Group, path: str, sharded: bool) -> None:
        level, dtype = root.create_group(path), self.attributes["parameters"]["dtype"]
        names = tuple(axis.name for axis in self.axes)
        store.create_field(level, "image", self.grid, dtype, sharded, names)
        for axis, size in zip(self.axes, self.grid.shape, strict=True):
            coordinates = np.arange(size) * axis.spacing
            array = level.create_array(axis.name, data=coordinates, dimension_names=(axis.name,))
            if axis.unit is not None:
                array.attrs["units"] = axis.unit


def output_attributes(
    edges: Sequence[float], parameters: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What the group of every output remembers from the start, by its name, finest first."""
    unit = parameters["unit"] or ("voxel" if parameters["spacing"] is None else None)
    scales = itertools.pairwise([0.0, *edges, None])
    return {
        name: {"scale_from": low, "scale_to": high, "unit": unit}
        for name, (low, high) in zip(store.output_names(len(edges)), scales, strict=True)
    }


def difference_of(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """What metadata have that they should not, in words.

    Attributes of others may stand beside ours, and what is empty may be left out.
    """
    if "attributes" not in found:
        return "has no attributes"
    theirs = found["attributes"]
    if not isinstance(theirs, dict):
        return "has other attributes"
    ours = {key: theirs.get(key) for key in wanted["attributes"]}
    found = {**found, "attributes": ours}
    # copies of the rest, which users make for faster opening (`zarr.consolidate_metadata`)
    for name in sorted({*wanted, *found} - {"consolidated_metadata"}):
        one, other = (held.get(name, {}) for held in (wanted, found))
        if seal_of([] if one == {} else one) != seal_of([] if other == {} else other):
            return f"has other {name}"
    return ""


def _is_sound(address: str, key: str, wanted: bytes) -> bool:
    """Whether an object of metadata is there, and may stay."""
    found = read_object(address, key)
    if found is None or not key.endswith(ROOT):
        return found == wanted
    try:
        known, expected = json.loads(found), json.loads(wanted)
        if ours := expected["attributes"].get(store.KEY):
            held = dict(known["attributes"][store.KEY])
            if key == ROOT or ours.items() <= held.items():  # more comes to be as the run ends
                expected["attributes"][store.KEY] = held
        return not difference_of(expected, known)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def objects_of(address: str) -> list[str]:
    """Keys of all objects of a store, the root's first."""
    return sorted(times_below(store_of(address), ""), key=lambda key: (key != ROOT, key))


def _ome_multiscales(name: str, axes: tuple[Axis, ...]) -> dict[str, Any] | None:
    """OME-Zarr 0.5 metadata: for 2 or 3 space axes, after at most one axis of another kind."""
    names = [axis.name for axis in axes]
    space = [axis for axis in names if axis in ("z", "y", "x")]
    others = names[: len(names) - len(space)]
    if names != [*others, *space] or space not in (["y", "x"], ["z", "y", "x"]) or len(others) > 1:
        return None
    kinds = {"t": "time", "c": "channel", "v": "velocity", "f": "frequency", "w": "wavelength"}
    described = []
    for axis in axes:
        kind = "space" if axis.name in space else kinds.get(axis.name, "other")
        unit = OME_UNITS.get(axis.unit or "")
        described.append({"name": axis.name, "type": kind, **({"unit": unit} if unit else {})})
    scale = {"type": "scale", "scale": [axis.spacing for axis in axes]}
    datasets = [{"path": "scale0/image", "coordinateTransformations": [scale]}]
    return {
        "version": "0.5",
        "multiscales": [{"name": name, "axes": described, "datasets": datasets}],
    }


def usable_names(names: tuple[str, ...] | None, ndim: int) -> tuple[str, ...]:
    """The source's names of its axes, or ``z, y, x`` where they cannot name coordinate arrays."""
    # what a fourth axis is, nobody can guess
    default = ("z", "y", "x")[3 - ndim :] if ndim < 4 else ("dim_0", "dim_1", "dim_2", "dim_3")
    if names is None or len({*names, "image", ROOT}) <= ndim + 1:
        return default
    plain = all(
        re.fullmatch(r"[^\W_][\w .()-]*", name) and len(name.encode()) <= LONGEST_NAME
        for name in names
    )
    return names if plain else default
