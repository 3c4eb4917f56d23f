"""Single objects of a store, beneath Zarr: each is written whole or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdd_dask.faults import NOT_THERE

if TYPE_CHECKING:
    from zarr.abc.store import Store
    from zarr.storage import MemoryStore

IN_MEMORY = "in-memory:"
"""How addresses of stores in this process's memory begin."""

AT_ONCE = 256
"""Objects that are read at the same time."""

NO_FLUSHING = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
"""What file systems that cannot bring a file to a disk say to it."""

_numbers = itertools.count()
_memory_stores: weakref.WeakValueDictionary[str, MemoryStore] = weakref.WeakValueDictionary()


def new_memory_store() -> tuple[str, MemoryStore]:
    """A store in this process's memory and its address; it lives as long as it is referenced."""
    from zarr.storage import MemoryStore

    address, store = f"{IN_MEMORY}{next(_numbers)}", MemoryStore()
    _memory_stores[address] = store
    return address, store


def store_of(address: str, read_only: bool = False) -> Store:
    """What holds the objects at `address`: a path, a URL, or a store in this process's memory."""
    from zarr.storage import FsspecStore

    from cdd_dask.retrying import FileStore, RetryingStore

    if address.startswith(IN_MEMORY):
        return _memory_stores[address]
    if "://" in address:
        return RetryingStore(FsspecStore.from_url(address, read_only=read_only))
    return RetryingStore(FileStore(address, read_only=read_only))


def read_object(address: str, key: str) -> bytes | None:
    """The bytes at `key`; None where there are none."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    try:
        # a store that may be written makes its folder when it is opened
        found = sync(store_of(address, read_only=True).get(key, default_buffer_prototype()))
    except FileNotFoundError:  # nor is there a folder
        return None
    return None if found is None else found.to_bytes()


def _read_at_once(address: str, keys: list[str]) -> list[bytes]:
    """The bytes at `keys`, read at the same time; none where there are none."""
    import asyncio

    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    store, kind = store_of(address, read_only=True), default_buffer_prototype()

    async def read() -> list[bytes]:
        found = await asyncio.gather(*(store.get(key, kind) for key in keys))
        return [b"" if one is None else one.to_bytes() for one in found]

    return sync(read())


def write_object(address: str, key: str, data: bytes, *, new: bool = False) -> None:
    """Write the bytes at `key`; those of a `new` object only if none is there."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    store, value = store_of(address), default_buffer_prototype().buffer.from_bytes(data)
    sync(store.set_if_not_exists(key, value) if new else store.set(key, value))


def remove_object(address: str, key: str) -> None:
    """Delete the bytes at `key`, if they are there."""
    from zarr.core.sync import sync

    sync(store_of(address).delete(key))


def has_object(address: str, key: str) -> bool:
    """Whether there are bytes at `key`."""
    from zarr.core.sync import sync

    return bool(sync(store_of(address).exists(key)))


def remove_objects(address: str, folder: str) -> None:
    """Delete all objects whose keys lie in `folder`; ``""`` is everything."""
    from zarr.core.sync import sync

    sync(store_of(address).delete_dir(folder))


def names_in(address: str, folder: str) -> list[str]:
    """First parts of the keys that lie in `folder`, sorted; ``""`` is the whole store."""
    from zarr.core.sync import sync

    store = store_of(address)

    async def names() -> list[str]:
        return [name async for name in store.list_dir(folder)]

    return sorted(name.rstrip("/") for name in sync(names()))


def times_below(store: Store, folder: str) -> dict[str, float]:
    """Keys in `folder` (``""`` is everything) and all below, but those of empty files.

    A lost machine may leave such. Each comes with the time at which its file was written, in
    seconds since the epoch; with 0 where it is no file.
    """
    from zarr.core.sync import sync
    from zarr.storage import LocalStore, WrapperStore

    inner, prefix = store, f"{folder}/" if folder else ""
    while isinstance(inner, WrapperStore):
        inner = inner._store
    if isinstance(inner, LocalStore):
        return dict(_files_in(inner.root / folder, prefix, frozenset()))

    async def keys() -> dict[str, float]:
        return {key: 0.0 async for key in store.list_prefix(prefix)}

    return sync(keys())


def _files_in(
    place: Path, prefix: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, float]]:
    """Keys and times of files in a folder, and all below but what a link leads back to."""
    with _if_there(), os.scandir(place) as entries:
        here = os.stat(place)
        above |= {(here.st_dev, here.st_ino)}
        for entry in entries:
            below = f"{prefix}{entry.name}"
            with _if_there():  # a late writer has renamed it, or a link leads nowhere
                state = entry.stat()
                if not stat.S_ISDIR(state.st_mode):
                    if state.st_size:
                        yield below, state.st_mtime
                elif (state.st_dev, state.st_ino) not in above:
                    yield from _files_in(Path(entry.path), f"{below}/", above)


@contextmanager
def _if_there() -> Iterator[None]:
    """Go on behind it where a path leads to nothing."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise


def bring_to_disk(address: str, key: str) -> None:
    """Have what was written at `key` outlive a power failure, where it is a file."""
    import asyncio

    from zarr.core.sync import sync

    from cdd_dask.retrying import tried

    if "://" not in address and not address.startswith(IN_MEMORY):
        sync(tried(lambda: asyncio.to_thread(_flush, Path(address, key))))


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NO_FLUSHING:
                raise
    with suppress(OSError):  # not every system can do so for a folder
        number = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def group_document(attributes: dict[str, Any]) -> bytes:
    """The object that makes a folder a group of the Zarr hierarchy."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document).encode()


def write_group(address: str, path: str, attributes: dict[str, Any]) -> None:
    """Write a group of the Zarr hierarchy with its attributes, as one object; "" is the root."""
    write_object(address, _group_key(path), group_document(attributes))


def read_attributes(address: str, path: str) -> dict[str, Any] | None:
    """Attributes of the group at `path`; None where it is not, or cannot be understood."""
    return _attributes_in(read_object(address, _group_key(path)) or b"")


def read_all_attributes(
    address: str, paths: list[str]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each of `paths` with the attributes of the group there, many read at once."""
    for start in range(0, len(paths), AT_ONCE):
        some = paths[start : start + AT_ONCE]
        documents = _read_at_once(address, list(map(_group_key, some)))
        yield from zip(some, map(_attributes_in, documents), strict=True)


def _group_key(path: str) -> str:
    return f"{path}/zarr.json".lstrip("/")


def _attributes_in(data: bytes) -> dict[str, Any] | None:
    """Attributes of the group that a document describes; None if it does not."""
    try:
        document = json.loads(data)
        is_group = document["zarr_format"] == 3 and document["node_type"] == "group"
        attributes = document["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return attributes if is_group and isinstance(attributes, dict) else None
