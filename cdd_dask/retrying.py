"""Stores whose calls are tried again, or made otherwise, where a file system refuses them."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import shutil
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zarr.abc.store import Store
from zarr.storage import LocalStore, WrapperStore

from cdd_dask.errors import redacted
from cdd_dask.faults import NOT_THERE, is_of_library, tries_of, wait_before

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

R = TypeVar("R")

NO_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
"""What file systems without hard links say to one: exFAT, SMB, some of FUSE."""

IN_THE_WAY = frozenset((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP))
"""What is said where a folder stands in a file's place, or something else in a folder's."""

log = logging.getLogger(__name__)


class FileStore(LocalStore):
    """Files, also where there are no hard links, by which Zarr makes a file only if none is there.

    It does so for every group that it makes. The bytes then come after the name, at once.
    """

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        if not stat.S_ISREG(_kind(self.root / key)):  # to open a pipe would wait for ever
            return None
        return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        try:
            await super().set(key, value)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            await asyncio.to_thread(_make_way, self.root, key)
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(_make_way, self.root, key)
        # where that cannot be done Zarr would say nothing
        await asyncio.to_thread((self.root / key).parent.mkdir, parents=True, exist_ok=True)
        try:
            await super().set_if_not_exists(key, value)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            await asyncio.to_thread(_create, self.root / key, value.to_bytes())

    async def delete(self, key: str) -> None:
        self._check_writable()
        await asyncio.to_thread(_remove, self.root / key)

    async def delete_dir(self, prefix: str) -> None:
        if prefix:
            await self.delete(prefix)
        else:
            await super().delete_dir(prefix)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        if stat.S_ISDIR(_kind(self.root / prefix)):
            async for name in super().list_dir(prefix):
                yield name


class RetryingStore(WrapperStore[Store]):
    """Any Zarr store, each of whose calls may be made again: they all are fit to run twice."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return await tried(lambda: self._store.get(key, prototype, byte_range))

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        ranges = list(key_ranges)
        return await tried(lambda: self._store.get_partial_values(prototype, ranges))

    async def exists(self, key: str) -> bool:
        return await tried(lambda: self._store.exists(key))

    async def getsize(self, key: str) -> int:
        return await tried(lambda: self._store.getsize(key))

    async def is_empty(self, prefix: str) -> bool:
        return await tried(lambda: self._store.is_empty(prefix))

    async def set(self, key: str, value: Buffer) -> None:
        await tried(lambda: self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await tried(lambda: self._store.set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        await tried(lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        await tried(lambda: self._store.delete_dir(prefix))

    async def list(self) -> AsyncIterator[str]:
        for key in await tried(lambda: _all(self._store.list())):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in await tried(lambda: _all(self._store.list_prefix(prefix))):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for key in await tried(lambda: _all(self._store.list_dir(prefix))):
            yield key

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        await asyncio.gather(*(self.set(key, value) for key, value in values))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> Any:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)


async def tried(
    call: Callable[[], Awaitable[R]],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    draw: Callable[[], float] = random.random,
) -> R:
    """What `call` gives, made again where it fails for a passing reason."""
    tries = 1
    while True:
        try:
            return await call()
        except Exception as error:
            if tries >= tries_of(error):
                if not is_of_library(error) or isinstance(error, OSError):
                    raise
                raise OSError(redacted(f"{type(error).__name__}: {error}")) from error
            seconds = wait_before(tries, draw)
            log.warning("storage: %s; trying again in %.1f s", redacted(str(error)), seconds)
        await sleep(seconds)
        tries += 1


async def _all(names: AsyncIterator[str]) -> list[str]:
    return [name async for name in names]


def _kind(path: Path) -> int:
    """What a path leads to, as `stat` has it; 0 if to nothing."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in NOT_THERE:
            return 0
        raise


def _make_way(root: Path, key: str) -> None:
    """Remove what somebody has put in the way of a file: a folder, or no folder above it.

    A link to what is not there stays, which may be a disk that is not mounted. Others may write
    beside this one: of what they make meanwhile nothing is removed.
    """
    path = root / key
    if path.is_dir() or _is_strange(path):
        _remove(path)
    if path.parent.is_dir():
        return
    for above in path.relative_to(root).parents:
        place = root / above
        if place != root and (place.is_file() or _is_strange(place)):
            with suppress(OSError):
                place.unlink()


def _is_strange(path: Path) -> bool:
    """Whether there is a link that leads to itself, a pipe or the like."""
    try:
        kind = path.lstat().st_mode
        if stat.S_ISLNK(kind):
            kind = path.stat().st_mode
    except OSError as error:
        return error.errno == errno.ELOOP
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def _remove(path: Path) -> None:
    """Delete whatever is there; of a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return
    try:
        path.unlink()
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise


def _create(path: Path, data: bytes) -> None:
    with suppress(FileExistsError), path.open("xb") as file:
        file.write(data)
