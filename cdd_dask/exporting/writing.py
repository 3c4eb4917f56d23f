"""Writing one file, block by block, under another name until it is whole."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from cdd_dask.blocks import Region
from cdd_dask.errors import CddError, DiskSpaceError, OutputAccessError, VerificationError
from cdd_dask.exporting.base import Layout, Output

Create = Callable[[Path, Output], Layout]
"""Makes a file of its final size and tells where its voxels go; one per format."""


def write_file(
    output: Output,
    target: Path,
    create: Create,
    block: tuple[int, ...],
    advance: Callable[[int], None],
) -> None:
    """Write `output` to `target`, which appears when it is complete.

    Parameters
    ----------
    output
        What to write.
    target
        The file; one that is there is replaced at the end.
    create
        The format.
    block
        Largest shape that is held at a time, in voxels.
    advance
        Told the number of voxels after every block.

    Raises
    ------
    VerificationError
        If the store is damaged.
    DiskSpaceError, OutputAccessError
        If the file cannot be written.
    """
    with appearing(target) as partial:
        layout = create(partial, output)
        _reserve(partial)
        for where, source in output.pieces(block):
            _write_piece(output, partial, layout, where, source)
            advance(int(np.prod([s.stop - s.start for s in where])))


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """The path of a file to be written, which replaces `target` when it is complete.

    Raises
    ------
    DiskSpaceError, OutputAccessError
        If the file cannot be written.
    """
    partial = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # what the disk refuses, it refuses here
        if target.is_file() and not target.is_symlink():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except OSError as error:
        if isinstance(error, CddError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kind = DiskSpaceError if full else OutputAccessError
        raise kind(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # where it could not be made, it cannot be removed either
            partial.unlink()


def _reserve(path: Path) -> None:
    """Take the whole file's space on the disk.

    Mapped writes into a file with holes kill the process when the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system can
            raise


def _write_piece(output: Output, path: Path, layout: Layout, where: Region, source: Region) -> None:
    try:
        values = output.array[source]
    except (ValueError, OSError) as error:
        region = ", ".join(f"{s.start}:{s.stop}" for s in source)
        raise VerificationError(
            f"{output.name}, region [{region}], cannot be read: {error}"
        ) from error
    # mapped anew for every block: pages that stay mapped would count as this process's memory
    shape = tuple(output.shape[axis] for axis in layout.axes)
    mapped = np.memmap(path, layout.dtype, "r+", layout.offset, shape)
    mapped[tuple(where[axis] for axis in layout.axes)] = values.transpose(layout.axes)
