"""Whether an output may be made where the user wants it, checked before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cdd_dask import lease
from cdd_dask.addresses import check_address
from cdd_dask.errors import DiskSpaceError, InputError, OutputAccessError, OutputExistsError
from cdd_dask.memory import format_bytes
from cdd_dask.objects import store_of
from cdd_dask.plans import Plan
from cdd_dask.readers import Source
from cdd_dask.store import is_our_store


def output_address(out: str | Path) -> str:
    """Absolute path, or the URL, of the output.

    Raises
    ------
    InputError
        If it is empty, or none that may be kept (see `check_address`).
    """
    return _absolute("out", out, "the store to make, for example out.zarr")


def check_output(address: str, source: Source, plan: Plan, overwrite: bool) -> None:
    """Refuse an output that would destroy something or cannot be written.

    Parameters
    ----------
    address
        From `output_address`.
    source
        What is decomposed.
    plan
        States the disk space needed.
    overwrite
        Whether a store of ours that is there may go.

    Raises
    ------
    InputError
        If replacing it would take away what the source reads.
    OutputExistsError
        If something is there that stays.
    OutputAccessError
        If the place cannot be written.
    DiskSpaceError
        If the output does not fit.
    """
    if "://" in address:
        _check_remote(address, overwrite)
        return
    path = Path(address)
    try:
        reclaimed = check_vacant(path, overwrite)
        if reclaimed and source.lazy:
            raise InputError(
                f"out={path} would be replaced before {source.description}, which may read from "
                "it, is read: remove it yourself, or name another output"
            )
        nearest = path if path.exists() else next(p for p in path.parents if p.exists())
    except OSError as error:
        if isinstance(error, OutputExistsError):
            raise
        raise OutputAccessError(f"out={address} cannot be used: {error}") from error
    if not nearest.is_dir():
        raise OutputAccessError(f"out={address} cannot be made: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputAccessError(f"out={address} cannot be made: no permission to write {nearest}")
    free = shutil.disk_usage(nearest).free + reclaimed
    if free < plan.disk_bytes:
        raise DiskSpaceError(
            f"out={address} needs up to {format_bytes(plan.disk_bytes)}, but its disk has "
            f"{format_bytes(free)} free: choose another disk, lower max_scale (fewer channels) or "
            "decompose a part"
        )


def scratch_address(scratch: str | Path) -> str:
    """Absolute path, or the URL, of the folder for working fields.

    Raises
    ------
    InputError
        If it is empty, or none that may be kept (see `check_address`).
    """
    return _absolute("scratch", scratch, "a folder for working fields").rstrip("/") or "/"


def _absolute(name: str, place: str | Path, meaning: str) -> str:
    text = str(place).removeprefix("file://")
    if not isinstance(place, str | os.PathLike) or not text:
        raise InputError(f"{name}={place!r} is no path: name {meaning}")
    check_address(name, text)
    return text if "://" in text else os.path.abspath(Path(text).expanduser())


def check_scratch(scratch: str, out: str, plan: Plan) -> None:
    """Refuse a folder for working fields that is not there, or has no room for them.

    Parameters
    ----------
    scratch
        From `scratch_address`.
    out
        From `output_address`.
    plan
        States the disk space needed.

    Raises
    ------
    InputError
        If it lies in the output.
    OutputAccessError
        If it is no folder that can be written.
    DiskSpaceError
        If the working fields do not fit.
    """
    if "://" in scratch:
        return
    path = Path(scratch)
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise OutputAccessError(
            f"scratch={scratch} is no folder that can be written: make it first"
        )
    if "://" not in out and Path(out).resolve() in (path.resolve(), *path.resolve().parents):
        raise InputError(f"scratch={scratch} lies in out={out}: name another folder")
    free = shutil.disk_usage(path).free
    if free < plan.scratch_bytes:
        raise DiskSpaceError(
            f"scratch={scratch} needs up to {format_bytes(plan.scratch_bytes)}, but its disk has "
            f"{format_bytes(free)} free: choose another disk"
        )


def check_apart(address: str, source: Source) -> None:
    """Refuse an output that is, lies in or contains what is decomposed.

    Raises
    ------
    InputError
        If they overlap.
    """
    if "://" in address:
        return
    try:
        out = Path(address).resolve()
        source_path = None if source.path is None else source.path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise OutputAccessError(f"out={address} cannot be used: {error}") from error
    for folder in out.parents:
        if (folder / "zarr.json").exists() and is_our_store(folder):
            raise InputError(f"out={out} lies in the decomposition {folder}: name another output")
    if source_path is None:
        return
    if out == source_path:
        raise InputError(f"out={out} is the source: name another output")
    if source_path in out.parents:
        raise InputError(f"out={out} lies in the source {source_path}: name another output")
    if out in source_path.parents:
        raise InputError(f"out={out} contains the source {source_path}: name another output")


def check_vacant(path: Path, overwrite: bool) -> int:
    """Bytes that overwriting what is at `path` frees."""
    if not path.exists() and not path.is_symlink():
        return 0
    if path.is_dir() and lease.is_vacant(str(path)):
        return 0
    if path.is_symlink() and is_our_store(path):
        raise OutputExistsError(
            f"out={path} is a symbolic link to a decomposition, and none is replaced through a "
            f"link: name {path.resolve()}"
        )
    if path.is_symlink() or not path.is_dir() or not is_our_store(path):
        raise OutputExistsError(
            f"out={path} exists and is no decomposition store, so it is never replaced: "
            "name another output"
        )
    if not overwrite:  # one that was there before would be gone on with
        raise OutputExistsError(
            f"out={path} was begun by another run just now: wait until that run is done, or name "
            "another output"
        )
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _check_remote(address: str, overwrite: bool) -> None:
    try:
        is_group = _is_group(address)
        vacant = not is_group and lease.is_vacant(address)
    except (ImportError, OSError, ValueError) as error:
        raise OutputAccessError(f"out={address} cannot be reached: {error}") from error
    if is_group:
        remedy = "it is not deleted for you there" if overwrite else "name another output"
        raise OutputExistsError(f"out={address} exists: {remedy}")
    if not vacant:
        raise OutputExistsError(
            f"out={address} holds something else than a decomposition: name another output"
        )


def _is_group(address: str) -> bool:
    """Whether there is a Zarr group."""
    import zarr

    try:
        zarr.open_group(store_of(address, read_only=True), mode="r")
    except FileNotFoundError:
        return False
    return True
