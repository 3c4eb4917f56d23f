"""Where the files go, and whether they may be made there; checked before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cdd_dask.decomposition import Decomposition
from cdd_dask.errors import (
    CddError,
    DiskSpaceError,
    InputError,
    OutputAccessError,
    OutputExistsError,
)
from cdd_dask.memory import format_bytes
from cdd_dask.readers.base import split_address

SUFFIXES = {
    "fits": (".fits", ".fit", ".fts"),
    "npy": (".npy",),
    "tiff": (".ome.tif", ".ome.tiff", ".tif", ".tiff"),
}
"""Formats, and how their files' names may end; the first is the one we give."""
METADATA_BYTES = 1_000_000
"""What a file may hold besides its voxels."""


def target_paths(
    result: Decomposition, to: str, out: str | Path | None, names: list[str]
) -> list[Path]:
    """The files to write, absolute."""
    local = result.path is not None and "://" not in result.path
    if out is None and not local:
        raise InputError("the store lies in no folder: name one with out= (--out)")
    text = str(Path(result.path or "").parent if out is None else out)
    if not text or "://" in text:
        raise InputError(f"out={text!r} is no path on this machine: files are written to folders")
    path = Path(os.path.abspath(Path(text).expanduser()))
    ending = "" if os.path.isdir(path) else path.name.lower()
    if ending.endswith(SUFFIXES[to]):
        if len(names) == 1:
            return [path]
        raise InputError(
            f"out={path} is one file, and {len(names)} outputs are selected: choose one with "
            "channel= (--channel), or name a folder"
        )
    if any(ending.endswith(known) for known in SUFFIXES.values()):
        raise InputError(f'out={path} is no name for to="{to}": end it with {SUFFIXES[to][0]}')
    stem = Path(result.path).stem if result.path else "decomposition"
    return [path / f"{stem}_{name}{SUFFIXES[to][0]}" for name in names]


def check_targets(
    result: Decomposition, targets: list[Path], sizes: list[int], overwrite: bool
) -> None:
    """Refuse files that would destroy something or cannot be written.

    Parameters
    ----------
    result
        What is exported: neither it nor its source may be written to.
    targets
        From `target_paths`.
    sizes
        Bytes of voxels that each will hold.
    overwrite
        Whether files that are there may go.
    """
    folder = targets[0].parent
    try:
        if result.path is not None and _within(folder, Path(result.path)):
            raise InputError(f"out={folder} lies in the store: name another folder")
        replaced = [_check_target(t, result.attrs["source"]["address"], overwrite) for t in targets]
        nearest = next(p for p in (folder, *folder.parents) if p.exists())
    except (OSError, RuntimeError) as error:  # a loop of links is either
        if isinstance(error, CddError):
            raise
        raise OutputAccessError(f"out={folder} cannot be used: {error}") from error
    if not nearest.is_dir():
        raise OutputAccessError(f"out={folder} cannot be made: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputAccessError(f"out={folder}: no permission to write {nearest}")
    _check_space(nearest, sizes, replaced)


def _within(path: Path, folder: Path) -> bool:
    path, folder = path.resolve(), folder.resolve()
    return folder == path or folder in path.parents


def _check_target(target: Path, source: str, overwrite: bool) -> int:
    """Bytes that replacing what is at `target` frees."""
    if not target.exists() and not target.is_symlink():
        return 0
    if target.is_dir() or not overwrite:
        remedy = "" if target.is_dir() else ", or replace it with overwrite=True (--overwrite)"
        raise OutputExistsError(f"{target} exists: name another place with out= (--out){remedy}")
    file = Path(split_address(source)[0])
    if file.exists() and target.exists() and target.samefile(file):
        raise InputError(f"{target} is what was decomposed: name another place with out= (--out)")
    return target.lstat().st_size


def _check_space(folder: Path, sizes: list[int], replaced: list[int]) -> None:
    held = needed = 0
    for size, before in zip(sizes, replaced, strict=True):
        held += size + METADATA_BYTES
        needed = max(needed, held)
        held -= before  # a file that is replaced goes when the new one is whole
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            f"out={folder} needs {format_bytes(needed)}, but its disk has {format_bytes(free)} "
            "free: choose another disk (--out), fewer channels (--channel) or a region (--region)"
        )


def make_folder(folder: Path) -> None:
    """Make the folder that the files go to, where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputAccessError(f"out={folder} cannot be made: {error}") from error
