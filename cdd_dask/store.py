"""The store: a Zarr hierarchy that is the only state of a run.

::

    out.zarr                       attributes["cdd_dask"]: parameters, edges, plan, source, …
    ├── channel_00/scale0/image    and the coordinate arrays z, y, x beside it
    ├── channel_01/scale0/image
    ├── residual/scale0/image
    ├── done/pass_0000             what is known of finished tasks, see `marks`
    ├── lease                      who writes to the store, see `lease`
    └── work/field_00              working fields, removed when nothing needs them

All metadata is written before any task; a task writes whole shards that no other task writes;
``complete: true`` is written last.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import lease
from cdd_dask.blocks import Grid, Region, pieces, storage_chunks
from cdd_dask.errors import AGAIN, DamagedError, StoreError
from cdd_dask.faults import Fault
from cdd_dask.marks import keep_copy
from cdd_dask.objects import (
    IN_MEMORY,
    has_object,
    names_in,
    read_attributes,
    remove_object,
    remove_objects,
    store_of,
)
from cdd_dask.readers.regions import read_region
from cdd_dask.seals import sealed

if TYPE_CHECKING:
    import zarr

FORMAT_VERSION = 2
KEY = "cdd_dask"
"""The one key under which everything of ours lies in the root's and the groups' attributes."""
RESIDUAL = "residual"
WORK = "work"

OME_UNITS = {
    "Å": "angstrom", "nm": "nanometer", "µm": "micrometer", "mm": "millimeter",
    "cm": "centimeter", "m": "meter", "km": "kilometer", "pc": "parsec",
    "ms": "millisecond", "s": "second", "min": "minute", "h": "hour",
}  # fmt: skip
"""Names that OME-Zarr has for units; others it has none for."""

_record: ContextVar[Record | None] = ContextVar("record", default=None)


@dataclass(frozen=True)
class Axis:
    """An axis of the volume, as its coordinate array and the OME metadata describe it."""

    name: str
    spacing: float
    """Distance of neighbouring voxels, 1 where coordinates count voxels."""
    unit: str | None
    """Unit of `spacing`, where there is one."""


def channel_name(k: int) -> str:
    """Name of channel `k`'s group."""
    return f"channel_{k:02d}"


def image_path(group: str) -> str:
    """Where the data of a channel's or the residual's group lie."""
    return f"{group}/scale0/image"


def work_path(name: str) -> str:
    """Where the working array called `name` lies."""
    return f"{WORK}/{name}"


def open_root(address: str, mode: str = "r") -> zarr.Group:
    """The root group of the store at `address`."""
    import zarr

    return zarr.open_group(store_of(address), mode=mode, zarr_format=3)  # type: ignore[arg-type]


def is_our_store(path: Path) -> bool:
    """Whether a folder holds a store that this package made, complete or not."""
    import json

    try:
        metadata = json.loads((path / "zarr.json").read_text())
        return "format_version" in metadata["attributes"][KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remove_store(path: Path) -> None:
    """Delete a store of ours with its scratch, and nothing else; its lease stays."""
    if not is_our_store(path):
        raise StoreError(f"{path} is no decomposition store: it is not deleted")
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is no store of that run, or gone
        known = (read_attributes(str(path), "") or {})[KEY]
        if known["scratch"]:
            remove_scratch(known["scratch"], known["run"])
    # what makes it a store goes last: until then the rest can be deleted again
    for name in sorted(path.iterdir(), key=lambda entry: entry.name == "zarr.json"):
        if name.name == lease.GROUP:
            continue
        shutil.rmtree(name) if name.is_dir() and not name.is_symlink() else name.unlink()
    with suppress(OSError):
        path.rmdir()


def create_store(
    address: str,
    grid: Grid,
    edges: Sequence[float],
    axes: tuple[Axis, ...],
    attributes: dict[str, Any],
) -> None:
    """Write all metadata of an empty store; nothing may be there.

    Parameters
    ----------
    address
        Path, URL or memory address.
    grid
        The volume cut into blocks; a shard is one block's core.
    edges
        Scale edges.
    axes
        The volume's axes.
    attributes
        What the root remembers under `KEY` besides the format version; the ``parameters`` among
        it give the type of all fields and the unit of the edges.
    """
    import zarr
    from zarr.errors import ContainsArrayError, ContainsGroupError

    try:
        # only the lease may be there, which Zarr's mode "w-" would take for a store
        root = zarr.create_group(store_of(address), zarr_format=3, overwrite=False)
    except (ContainsGroupError, ContainsArrayError) as error:
        raise FileExistsError(f"{address} exists") from error
    known = {"format_version": FORMAT_VERSION, **attributes, "complete": False}
    write_attributes(address, root, known)
    lower = [0.0, *edges]
    for k, (low, high) in enumerate(itertools.pairwise(lower)):
        _create_output(root, channel_name(k), (low, high), grid, axes, attributes["parameters"])
    _create_output(root, RESIDUAL, (edges[-1], None), grid, axes, attributes["parameters"])


def _create_output(
    root: zarr.Group,
    name: str,
    scales: tuple[float, float | None],
    grid: Grid,
    axes: tuple[Axis, ...],
    parameters: dict[str, Any],
) -> None:
    group = root.create_group(name)
    unit = parameters["unit"] or ("voxel" if parameters["spacing"] is None else None)
    group.attrs[KEY] = {"scale_from": scales[0], "scale_to": scales[1], "unit": unit}
    multiscales = _ome_multiscales(name, axes)
    if multiscales is not None:
        group.attrs["ome"] = multiscales
    level = group.create_group("scale0")
    names = tuple(axis.name for axis in axes)
    _create_field(level, "image", grid, parameters["dtype"], names)
    for axis, size in zip(axes, grid.shape, strict=True):
        coordinates = np.arange(size) * axis.spacing
        array = level.create_array(axis.name, data=coordinates, dimension_names=(axis.name,))
        if axis.unit is not None:
            array.attrs["units"] = axis.unit


def _create_field(
    group: zarr.Group,
    path: str,
    grid: Grid,
    dtype: str,
    dimension_names: tuple[str, ...] | None = None,
) -> None:
    from zarr.storage import MemoryStore

    shards, chunks = storage_chunks(grid)
    in_memory = isinstance(group.store, MemoryStore)
    group.create_array(
        path,
        shape=grid.shape,
        # in memory there is no file to save and nothing to protect: a chunk is a block
        shards=None if in_memory else shards,
        chunks=grid.block if in_memory else chunks,
        compressors=None if in_memory else _codecs(),
        dtype=dtype,
        fill_value=0.0,
        dimension_names=dimension_names,
    )


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


def root_of_run(address: str, run: str, mode: str = "r") -> zarr.Group:
    """The root of a store, which must still be the one that the run called `run` made.

    Raises
    ------
    StoreError
        If the store was replaced, or is gone.
    """
    from zarr.errors import BaseZarrError

    try:
        root = open_root(address, mode)
        attributes: Any = root.attrs[KEY]
        owner = attributes["run"]
    except (FileNotFoundError, BaseZarrError, KeyError, TypeError) as error:
        raise StoreError(f"the store at {address} is gone: was it deleted?") from error
    if owner != run:
        raise StoreError(f"the store at {address} was replaced by another run")
    return root


def attributes_of(address: str, run: str) -> dict[str, Any]:
    """What the root of a run's store remembers."""
    attributes: Any = root_of_run(address, run).attrs[KEY]
    return dict(attributes)


def create_scratch(address: str, run: str) -> None:
    """Make a store of its own for the working arrays of a run."""
    open_root(address, "w-").attrs[KEY] = {"format_version": FORMAT_VERSION, "run": run}


def take_scratch(address: str, run: str) -> None:
    """Make a store of working arrays this run's; it is made anew if it is gone."""
    root = open_root(address, "a")
    root.attrs[KEY] = {"format_version": FORMAT_VERSION, "run": run}


def scratch_of(address: str, run: str) -> str | None:
    """Address of the working arrays of a run that have a store of their own."""
    scratch: str | None = attributes_of(address, run)["scratch"]
    return scratch


def remove_scratch(address: str, run: str) -> None:
    """Delete the store of a run's working arrays."""
    root_of_run(address, run, "r+")
    if "://" not in address:
        shutil.rmtree(address)
    else:
        remove_objects(address, "")


def remove_partial(address: str) -> None:
    """Delete files that killed writers have left half-written; Zarr gives them names of their own.

    Nobody else writes to the store then: this run holds the lease.
    """
    if "://" in address or address.startswith(IN_MEMORY):
        return  # objects come to be whole
    for folder, _, names in os.walk(address):
        for name in names:
            if name.endswith(".partial"):
                Path(folder, name).unlink(missing_ok=True)


def create_work_array(address: str, run: str, name: str, grid: Grid, dtype: str) -> None:
    """Make room for a working array, unless it is there."""
    root = root_of_run(address, run, "r+")
    if not has_object(address, f"{work_path(name)}/zarr.json"):
        remove_objects(address, work_path(name))  # what a killed run left of it
        _create_field(root, work_path(name), grid, dtype)


def remove_work_array(address: str, run: str, name: str) -> None:
    """Delete a working array that nothing needs any more, and `work` when it is empty."""
    root_of_run(address, run, "r+")
    remove_objects(address, work_path(name))
    if names_in(address, WORK) == ["zarr.json"]:
        remove_objects(address, WORK)


def work_arrays(address: str) -> set[str]:
    """Names of the working arrays that are there, with all shards or not."""
    names = names_in(address, WORK)
    return {name for name in names if has_object(address, f"{work_path(name)}/zarr.json")}


def work_array(address: str, name: str) -> zarr.Array[Any]:
    """A working array, opened."""
    return _open_array(address, work_path(name))


def read_block(address: str, path: str, region: Region) -> NDArray[Any]:
    """The values of `region`, which may run beyond the array and is then read modulo its shape.

    Axes that the array has before those of `region` are read whole.

    Raises
    ------
    DamagedError
        If a shard is not there, which Zarr would read as zeros, or fails its checksum. One of a
        working array is then deleted, so that it is made again when the run goes on.
    """
    array = _open_array(address, path)
    region = (*(slice(0, n) for n in array.shape[: array.ndim - len(region)]), *region)
    unit = array.shards or array.chunks
    touched = [
        sorted({source.start // u for _, source in pieces(s.start, s.stop, n, u)})
        for s, n, u in zip(region, array.shape, unit, strict=True)
    ]
    places = list(itertools.product(*touched))
    try:
        for place in places:
            _check_there(array, place)
        return read_region(array, region)
    except ValueError as error:
        for place in places:
            if damage := shard_damage(array, place):
                remedy = ""
                if path.startswith(f"{WORK}/"):
                    remove_object(address, _shard_key(array, place))
                    remedy = f"; {AGAIN}, which makes it anew"
                raise DamagedError(f"{address}: {path}, {damage}{remedy}") from error
        error.fault = Fault.PASSING.value  # type: ignore[attr-defined]  # it is sound by now
        raise


def _check_there(array: zarr.Array[Any], place: tuple[int, ...]) -> None:
    """Raise `DamagedError` for a shard that is missing or empty: Zarr reads both as zeros."""
    from zarr.core.sync import sync

    try:
        size = sync(array.store.getsize(_shard_key(array, place)))
    except FileNotFoundError:
        raise DamagedError(f"shard {place} is not there") from None
    if size == 0:
        raise DamagedError(f"shard {place} is empty")


def shard_damage(array: zarr.Array[Any], place: tuple[int, ...]) -> str:
    """What is wrong with a shard, in words; nothing if it can be read."""
    try:
        _check_there(array, place)
    except DamagedError as error:
        return str(error)
    unit = array.shards or array.chunks
    along = [
        range(p * u // c, -(-min((p + 1) * u, n) // c))
        for p, u, c, n in zip(place, unit, array.chunks, array.shape, strict=True)
    ]
    for chunk in itertools.product(*along):
        try:
            array.blocks[chunk] if array.shards is None else array[_chunk_region(array, chunk)]
        except (ValueError, OSError, IndexError, RuntimeError) as error:
            return f"shard {place}, chunk {chunk} is damaged: {error}"
    return ""


def _chunk_region(array: zarr.Array[Any], chunk: tuple[int, ...]) -> Region:
    return tuple(
        slice(i * c, min((i + 1) * c, n))
        for i, c, n in zip(chunk, array.chunks, array.shape, strict=True)
    )


def write_block(address: str, path: str, core: Region, values: NDArray[Any]) -> None:
    """Write one block's core: a whole shard, which no other task writes."""
    record = _record.get()
    if record is not None:
        record.check()
    # the setting is not stored with the array: a block of zeros must leave its chunks
    array = _open_array(address, path, "r+").with_config({"write_empty_chunks": True})
    try:
        array[core] = values
    except ValueError:
        # Zarr reads a shard before it writes it, and a torn one would make every retry fail
        remove_block(address, path, core)
        array[core] = values
    if record is not None:
        record.checksums[path] = checksum(values)


def remove_block(address: str, path: str, core: Region) -> None:
    """Delete the shards that a block touches, whatever is in them."""
    array = _open_array(address, path)
    unit = array.shards or array.chunks
    along = [range(s.start // n, -(-s.stop // n)) for s, n in zip(core, unit, strict=True)]
    for place in itertools.product(*along):
        remove_object(address, _shard_key(array, place))


def checksum(values: NDArray[Any]) -> str:
    """Of an array's values, whatever its layout and byte order in memory."""
    import hashlib

    # a hash of 16 bytes is shorter than those of its family, and nobody forges his own data
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return hashlib.blake2b(plain.view(np.uint8).reshape(-1).data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Record:
    """What a run's task writes."""

    address: str
    """Of the output."""
    run: str
    """Name of the run."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Of what was written, by the array's path."""

    def check(self) -> None:
        """Raise `StoreError` if the output is another run's by now, which may overwrite it.

        A task that outlives its run must not write to what was made in its place. Called just
        before every write: between the two a new run cannot have begun and come as far.
        """
        root_of_run(self.address, self.run)


@contextmanager
def recorded(address: str, run: str) -> Iterator[Record]:
    """Keep a record of what this thread writes meanwhile for a run."""
    record = Record(address, run)
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def _shard_key(array: zarr.Array[Any], place: tuple[int, ...]) -> str:
    return f"{array.path}/{array.metadata.encode_chunk_key(place)}"


def rehearse() -> None:
    """Load what Zarr loads when it first writes and reads an array like ours."""
    import zarr
    from zarr.storage import MemoryStore

    root = zarr.open_group(MemoryStore(), mode="w", zarr_format=3)
    array = root.create_array(
        "image", shape=(4,), shards=(4,), chunks=(2,), compressors=_codecs(), dtype="float32"
    )
    array[:] = 1.0
    array[:]


def _codecs() -> list[Any]:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    return [ZstdCodec(level=1), Crc32cCodec()]


def _open_array(address: str, path: str, mode: str = "r") -> zarr.Array[Any]:
    import zarr

    return zarr.open_array(store_of(address), path=path, mode=mode, zarr_format=3)


def finish_store(
    address: str, run: str, outputs: dict[str, dict[str, Any]], attributes: dict[str, Any]
) -> None:
    """Write what is known of every output, then `attributes`, and last that it is complete."""
    root = root_of_run(address, run, "r+")
    groups = {name: {**_held(root[name]), **known} for name, known in outputs.items()}
    write_attributes(address, root, {**_held(root), **attributes, "complete": True}, groups)


def _held(group: Any) -> dict[str, Any]:
    return dict(group.attrs[KEY])


def write_attributes(
    address: str,
    root: zarr.Group,
    attributes: dict[str, Any],
    outputs: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> None:
    """Write what the root and the groups of outputs remember, sealed, after a copy of it.

    The root comes last: it says whether the store is complete.
    """
    groups = {name: sealed(known) for name, known in outputs.items()}
    whole = sealed(attributes)
    keep_copy(address, {**groups, "": whole})
    for name, known in groups.items():
        root[name].attrs[KEY] = known
    root.attrs[KEY] = whole


def usable_names(names: tuple[str, ...] | None, ndim: int) -> tuple[str, ...]:
    """The source's names of its axes, or ``z, y, x`` where they cannot name coordinate arrays."""
    # what a fourth axis is, nobody can guess
    default = ("z", "y", "x")[3 - ndim :] if ndim < 4 else ("dim_0", "dim_1", "dim_2", "dim_3")
    if names is None or len({*names, "image"}) <= ndim:
        return default
    plain = all(re.fullmatch(r"[^\W_][\w .()-]*", name) for name in names)
    return names if plain else default


def lacking(address: str, path: str, grid: Grid, blocks: Collection[int]) -> set[int]:
    """Those of some blocks, a shard each, that an array lacks."""
    missing = missing_shards(_open_array(address, path))
    return {block for block in blocks if grid.index(block) in missing}


def missing_shards(array: zarr.Array[Any]) -> set[tuple[int, ...]]:
    """Places of an array's shards (or chunks) that are not in the store."""
    from zarr.core.sync import sync

    async def keys() -> set[str]:
        # Zarr's own count of them takes a time that grows with the square of their number
        return {key async for key in array.store.list_prefix(f"{array.path}/")}

    there, unit = sync(keys()), array.shards or array.chunks
    places = itertools.product(*(range(-(-n // u)) for n, u in zip(array.shape, unit, strict=True)))
    return {place for place in places if _shard_key(array, place) not in there}
