"""Which version of its files a source is: how large each is, and when it was last written.

Of a large source only samples of the content are compared: these tell of changes between them.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cdd_dask.blocks import Region
from cdd_dask.faults import Fault, fault_of
from cdd_dask.objects import store_of

LISTED = 100_000
"""Objects of a Zarr array at a URL that are listed, at the most: some hundred requests."""
WALKED = 1_000_000
"""Files of a Zarr array on a file system that are looked at, at the most."""
METADATA = ("zarr.json", ".zarray", ".zattrs")
"""Keys of a Zarr array's metadata, of format 3 and 2."""
VERSIONS = (
    "generation", "etag", "sha", "contentmd5", "crc", "lastmodified", "mtime", "modified", "modify",
    "modificationtime", "lastwritetime", "updated", "created",
)  # fmt: skip
"""What file systems say of an object that changes when it is written; the first that is said."""
GENERIC = ("fsspec.spec", "fsspec.asyn")
"""Where a `find` is from that leaves out the folders which it fails to list."""

Entry = tuple[str, int | None, int | str | None]
"""A file's name, size in bytes, and its version or its time in ns; None where it is not there."""


def file_versions(files: Sequence[Path]) -> dict[str, Any]:
    """Size and time of the last change of a file, or of several in sum.

    Raises
    ------
    OSError
        If one is not there.
    """
    if len(files) > 1:
        return _sum((str(path), *_size_and_time(path)) for path in files)
    size, modified = _size_and_time(files[0])
    return {"bytes": size, "modified": modified}


def zarr_versions(address: str, regions: Iterable[Region]) -> dict[str, Any]:
    """The same of the objects of a Zarr array at a path or URL.

    Of an array of very many objects (`LISTED`, `WALKED`), and of one on a web server or elsewhere
    where nothing can be listed, only the metadata and a chunk of each of `regions` count.

    Raises
    ------
    OSError
        If they cannot be looked at.
    """
    import zarr
    from zarr.core.sync import sync

    array = zarr.open_array(store_of(address, read_only=True), mode="r")
    unit = array.shards or array.chunks
    # known before anything is listed: a listing would have no end
    count = math.prod(-(-n // side) for n, side in zip(array.shape, unit, strict=True))
    corners = (
        tuple(part.start // side for part, side in zip(region, unit, strict=True))
        for region in regions
    )
    keys = dict.fromkeys([*METADATA, *map(array.metadata.encode_chunk_key, corners)])
    if "://" in address:
        return _sum(sync(_objects(address, keys, count <= LISTED)))
    return _sum(_walked(address) if count <= WALKED else _named(address, keys))


def _sum(entries: Iterable[Entry]) -> dict[str, Any]:
    size = count = newest = names = 0
    for entry in entries:
        _, n, version = entry
        size, count = size + (n or 0), count + (entry[1:] != (None, None))
        newest = max(newest, version if isinstance(version, int) else 0)
        # added, so that no order plays a part, and nothing need be kept
        digest = hashlib.blake2b(repr(entry).encode(), digest_size=16).digest()
        names = (names + int.from_bytes(digest)) % 2**128
    modified = {"modified": newest} if newest else {}
    return {"bytes": size, **modified, "files": count, "versions": f"{names:032x}"}


def _size_and_time(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _walked(folder: str) -> Iterator[Entry]:
    """All files in a folder."""
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
                state = entry.stat()
                yield entry.path.removeprefix(folder), state.st_size, state.st_mtime_ns


def _named(folder: str, keys: Iterable[str]) -> Iterator[Entry]:
    """The files of these names in a folder."""
    for key in keys:
        try:
            yield key, *_size_and_time(Path(folder, key))
        except FileNotFoundError:  # a chunk that was never written
            yield key, None, None


async def _objects(address: str, keys: Collection[str], listed: bool) -> list[Entry]:
    """All objects at a URL, if they are to be `listed` and can be; else those at `keys`."""
    from zarr.storage import FsspecStore

    store = FsspecStore.from_url(address, read_only=True)
    files, root = store.fs, store.path.rstrip("/")
    getattr(files, "sync_fs", files).invalidate_cache()  # what it knows may be of yesterday
    # pages of a web server that list files say nothing of their versions
    if listed and not address.startswith(("http://", "https://")):
        try:
            found = await _listed(files, root)
            return [_entry(info["name"].removeprefix(root), info) for info in found]
        except (FileNotFoundError, PermissionError, NotImplementedError) as error:
            if fault_of(error) is not Fault.STAYING:
                raise
    return await asyncio.gather(*(_looked_at(files, root, key) for key in keys))


async def _listed(files: Any, root: str) -> list[dict[str, Any]]:
    """What a file system says of all files below `root`."""
    from cdd_dask.retrying import tried

    if files._find.__module__ not in GENERIC:  # one listing of keys, not folder by folder
        return list((await tried(partial(files._find, root, detail=True))).values())
    found, folders = [], [root]
    while folders:
        folder = folders.pop()
        for info in await tried(partial(files._ls, folder, detail=True)):
            if info["type"] != "directory":
                found.append(info)
            elif info["name"].rstrip("/") != folder.rstrip("/"):
                folders.append(info["name"])
    return found


async def _looked_at(files: Any, root: str, key: str) -> Entry:
    """What a file system says of the object at `key`."""
    from cdd_dask.retrying import tried

    try:
        return _entry(key, await tried(partial(files._info, f"{root}/{key}")))
    except (FileNotFoundError, PermissionError) as error:  # S3's word for a key of no object
        # to fsspec's HTTP whatever fails is not found
        if fault_of(error) is not Fault.STAYING:
            raise
        return key, None, None


def _entry(name: str, info: dict[str, Any]) -> Entry:
    said = {key.lower().replace("-", "").replace("_", ""): info[key] for key in info}
    version = next((str(said[key]) for key in VERSIONS if said.get(key)), None)
    return name, info.get("size"), version
