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

import hashlib
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import lease
from cdd_dask.blocks import Grid, Region, storage_chunks
from cdd_dask.errors import AGAIN, DamagedError, OutputAccessError, StoreError
from cdd_dask.faults import NOT_THERE, Fault, mark
from cdd_dask.marks import keep_copy, read_copy
from cdd_dask.objects import (
    IN_MEMORY,
    bring_to_disk,
    names_in,
    read_attributes,
    read_object,
    remove_object,
    remove_objects,
    store_of,
    times_below,
    write_group,
)
from cdd_dask.readers.regions import read_region
from cdd_dask.seals import is_sealed, sealed

if TYPE_CHECKING:
    import zarr

FORMAT_VERSION = 2
KEY = "cdd_dask"
"""The one key under which everything of ours lies in the root's and the groups' attributes."""
SCRATCH_NAME = re.compile(r"cdd-dask-[0-9a-f]{12}\.zarr")
"""What a run calls the store of its working arrays in the folder `scratch`."""
RESIDUAL = "residual"
WORK = "work"

_record: ContextVar[Record | None] = ContextVar("record", default=None)


def channel_name(k: int) -> str:
    """Name of channel `k`'s group."""
    return f"channel_{k:02d}"


def output_names(channels: int) -> list[str]:
    """Names of the groups of all outputs of so many channels, the residual's last."""
    return [*map(channel_name, range(channels)), RESIDUAL]


def image_path(group: str) -> str:
    """Where the data of a channel's or the residual's group lie."""
    return f"{group}/scale0/image"


def work_path(name: str) -> str:
    """Where the working array called `name` lies."""
    return f"{WORK}/{name}"


def open_root(address: str, mode: str = "r") -> zarr.Group:
    """The root group of the store at `address`."""
    import zarr

    # a consolidated copy of the metadata, which a user may have made, is what nothing checks
    return zarr.open_group(
        store_of(address),
        mode=mode,  # type: ignore[arg-type]
        zarr_format=3,
        use_consolidated=False,
    )


def remembered(address: str) -> dict[str, Any] | None:
    """What the root of a store of ours remembers, or else its copy; None where there is none."""
    held = (read_attributes(address, "") or {}).get(KEY)
    found = [
        known
        for known in (held, read_copy(address).get(""))
        if isinstance(known, dict) and "format_version" in known
    ]
    # the copy is sealed, or it is none; a root that was edited is better than nothing
    return next(filter(is_sealed, found), found[0] if found else None)


def is_our_store(path: Path) -> bool:
    """Whether a folder holds a store that this package made, complete or not."""
    try:
        return path.is_dir() and remembered(str(path)) is not None
    except (OSError, ValueError):
        return False


def remove_store(path: Path) -> None:
    """Delete a store of ours with its scratch, and nothing else; its lease stays."""
    known = remembered(str(path))
    if known is None:
        raise StoreError(f"{path} is no decomposition store: it is not deleted")
    scratch = known.get("scratch")
    if isinstance(scratch, str) and SCRATCH_NAME.fullmatch(scratch.rpartition("/")[2]):
        with suppress(OSError, ValueError, ImportError):  # it is gone, or no store of that run
            held = (read_attributes(scratch, "") or {}).get(KEY)
            # and not of the store that this is a copy of
            if isinstance(held, dict) and held.get("output") == str(path):
                _remove_everything(scratch)
    if known.get("complete"):  # it no longer is, should this be stopped halfway
        whole = sealed({**known, "complete": False})
        keep_copy(str(path), {**read_copy(str(path)), "": whole})
        write_group(str(path), "", {KEY: whole})
    _remove_folder(path, keep=lease.GROUP)


def create_field(
    group: zarr.Group,
    path: str,
    grid: Grid,
    dtype: str,
    sharded: bool,
    dimension_names: tuple[str, ...] | None = None,
) -> None:
    """Make an empty array for a volume's values, written block by block."""
    shards, chunks = storage_chunks(grid)
    group.create_array(
        path,
        shape=grid.shape,
        # in memory there is no file to save and nothing to protect: a chunk is a block
        shards=shards if sharded else None,
        chunks=chunks if sharded else grid.block,
        compressors=_codecs() if sharded else None,
        dtype=dtype,
        fill_value=0.0,
        dimension_names=dimension_names,
    )


def on_disk(address: str) -> bool:
    """Whether a store's objects outlive this process."""
    return not address.startswith(IN_MEMORY)


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
    except ValueError as error:  # no JSON, or none of Zarr's
        raise StoreError(f"the root of {address} cannot be read: {error}") from error
    if owner != run:
        raise StoreError(f"the store at {address} was replaced by another run")
    return root


def attributes_of(address: str, run: str) -> dict[str, Any]:
    """What the root of a run's store remembers."""
    attributes: Any = root_of_run(address, run).attrs[KEY]
    return dict(attributes)


def take_scratch(address: str, run: str, output: str) -> None:
    """Make a store of working arrays this run's, for `output`; it is made anew if it is gone."""
    if "://" not in address and not Path(address).parent.is_dir():  # never made: who named it?
        raise OutputAccessError(
            f"scratch={Path(address).parent} is no folder: make it first, or name another one"
        )
    known = {"format_version": FORMAT_VERSION, "run": run, "output": output}
    try:
        write_group(address, "", {KEY: known})
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputAccessError(f"{address} is in the way of working fields: {error}") from error


def scratch_of(address: str, run: str) -> str | None:
    """Address of the working arrays of a run that have a store of their own."""
    scratch: str | None = attributes_of(address, run)["scratch"]
    return scratch


def remove_scratch(address: str, run: str) -> None:
    """Delete the store of a run's working arrays."""
    root_of_run(address, run, "r+")
    _remove_everything(address)


def _remove_everything(address: str) -> None:
    if "://" not in address:
        _remove_folder(Path(address))
    else:
        remove_objects(address, "")


def _remove_folder(path: Path, *, keep: str = "") -> None:
    """Delete a store on a disk but what is called `keep`, and the folder if nothing is left.

    What makes it a store goes last: until then the rest can be deleted again.
    """
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == "zarr.json"):
        if entry.name == keep:
            continue
        try:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        except OSError as error:  # which may name nothing but a file within
            raise OSError(error.errno, f"{error.strerror}, below", str(entry)) from error
    with suppress(OSError):
        path.rmdir()


def remove_partial(address: str) -> None:
    """Delete files that killed writers have left half-written; Zarr gives them names of their own.

    Nobody else writes to the store then: this run holds the lease.
    """
    if "://" in address or not on_disk(address):
        return  # objects come to be whole
    for folder, _, names in os.walk(address):
        for name in names:
            if name.endswith(".partial"):
                Path(folder, name).unlink(missing_ok=True)


def create_work_array(address: str, run: str, name: str, grid: Grid, dtype: str) -> None:
    """Make room for a working array, unless it is there."""
    root = root_of_run(address, run, "r+")
    if not _is_described(address, work_path(name)):
        remove_objects(address, work_path(name))  # what a killed run left of it
        create_field(root, work_path(name), grid, dtype, on_disk(address))


def remove_work_array(address: str, run: str, name: str) -> None:
    """Delete a working array that nothing needs any more."""
    root_of_run(address, run, "r+")
    remove_objects(address, work_path(name))


def remove_work(address: str, run: str) -> None:
    """Delete the group of working arrays, with what a killed run may have left in it."""
    root_of_run(address, run, "r+")
    if names_in(address, WORK):
        remove_objects(address, WORK)


def work_arrays(address: str) -> set[str]:
    """Names of the working arrays that are there, with all shards or not."""
    return {name for name in names_in(address, WORK) if _is_described(address, work_path(name))}


def _is_described(address: str, path: str) -> bool:
    """Whether there is an array, with metadata that a lost machine has not left torn."""
    try:
        found = json.loads(read_object(address, f"{path}/zarr.json") or b"")
        return bool(found["node_type"] == "array")
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


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
    import zarr

    from cdd_dask.whole import whole_array

    array = _open_array(address, path)
    whole = (*(slice(0, n) for n in array.shape[: array.ndim - len(region)]), *region)
    try:
        return read_region(zarr.Array(whole_array(array)), whole)
    except ValueError as error:
        record = _record.get()
        if record is not None:
            record.check()  # what another run has put there is not ours to judge
        for place in shards_of(array).touched(whole):
            if damage := shard_damage(array, place):
                remedy = ""
                if path.startswith(f"{WORK}/"):
                    remove_object(address, _shard_key(array, place))
                    remedy = f"; {AGAIN}, which makes it anew"
                raise DamagedError(f"{address}: {path}, {damage}{remedy}") from error
        mark(error, Fault.PASSING)  # it is sound by now
        raise


def shards_of(array: zarr.Array[Any]) -> Grid:
    """An array's shards, or its chunks where it has none."""
    return Grid(array.shape, array.shards or array.chunks)


def _check_there(array: zarr.Array[Any], place: tuple[int, ...]) -> None:
    """Raise `DamagedError` for a shard that is missing or empty: Zarr reads both as zeros."""
    from zarr.core.sync import sync

    try:
        size = sync(array.store.getsize(_shard_key(array, place)))
    except OSError as error:
        if error.errno in NOT_THERE or isinstance(error, FileNotFoundError):
            raise DamagedError(f"shard {place} is not there") from None
        raise
    if size == 0:
        raise DamagedError(f"shard {place} is empty")


def shard_damage(array: zarr.Array[Any], place: tuple[int, ...]) -> str:
    """What is wrong with a shard, in words; nothing if it can be read."""
    try:
        _check_there(array, place)
    except DamagedError as error:
        return str(error)
    chunks = Grid(array.shape, array.chunks)
    for chunk in chunks.touched(shards_of(array).core_at(place)):
        try:
            array.blocks[chunk] if array.shards is None else array[chunks.core_at(chunk)]
        except (ValueError, OSError, IndexError, RuntimeError) as error:
            return f"shard {place}, chunk {chunk} is damaged: {error}"
    return ""


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
    for place in shards_of(array).touched(core):
        remove_object(address, _shard_key(array, place))


def checksum(values: NDArray[Any], like: str = "") -> str:
    """Of an array's values, whatever its layout and byte order in memory.

    To be compared with a known one, it is of the kind that this is `like`: older stores hold a
    hash of 16 bytes, which takes several times as long. Nobody forges his own data.
    """
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    content = plain.view(np.uint8).reshape(-1).data
    if len(like) == 32:
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    return f"{zlib.crc32(content):08x}"


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
        """Raise `StoreError` if the output is complete, or another run's by now.

        A task that outlives its run must not write to it any more, nor to what was made in its
        place. Called just before every write: between the two a new run cannot have begun and
        come as far.
        """
        attributes: Any = root_of_run(self.address, self.run).attrs[KEY]
        if attributes.get("complete"):
            raise StoreError(f"the run of {self.address} is over: this task was given up")


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

    try:
        return zarr.open_array(store_of(address), path=path, mode=mode, zarr_format=3)
    except (ValueError, KeyError, TypeError) as error:  # no JSON, or nothing that Zarr knows
        raise StoreError(f"{address}: the metadata of {path} cannot be used: {error}") from error


def finish_store(
    address: str, run: str, outputs: dict[str, dict[str, Any]], attributes: dict[str, Any]
) -> None:
    """Write all that is known of every output, then that of the root: that it is complete."""
    root = root_of_run(address, run, "r+")
    write_attributes(address, root, {**attributes, "complete": True}, outputs)


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
    bring_to_disk(address, "zarr.json")


def write_times(address: str, path: str, grid: Grid) -> dict[int, float]:
    """The blocks of a grid, a shard each, that an array has, and when each was written.

    In seconds since the epoch; 0 where it is not on a disk.
    """
    array = _open_array(address, path)
    there = times_below(array.store, path)
    keys = (_shard_key(array, grid.index(block)) for block in range(len(grid)))
    return {block: there[key] for block, key in enumerate(keys) if key in there}


def missing_shards(array: zarr.Array[Any]) -> set[tuple[int, ...]]:
    """Places of an array's shards (or chunks) that are not in the store, or are empty files."""
    there = times_below(array.store, array.path)
    places = itertools.product(*map(range, shards_of(array).counts))
    return {place for place in places if _shard_key(array, place) not in there}
