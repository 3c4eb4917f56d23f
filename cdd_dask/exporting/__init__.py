"""Channels as files that other programs read: FITS, NumPy and OME-TIFF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cdd_dask.blocks import Region
from cdd_dask.decomposition import Decomposition, open_decomposition
from cdd_dask.errors import InputError, StoreError, VerificationError
from cdd_dask.exporting.selection import parse_channels, parse_region, select
from cdd_dask.exporting.targets import SUFFIXES, check_targets, make_folder, target_paths
from cdd_dask.exporting.writing import Create, write_file
from cdd_dask.parameters import check_choice, check_flag
from cdd_dask.progress import Progress
from cdd_dask.store import missing_shards

__all__ = ["export", "parse_channels", "parse_region"]


def export(
    store: str | Path | Decomposition,
    to: str,
    *,
    out: str | Path | None = None,
    channel: int | str | Sequence[int | str] | None = None,
    region: Region | slice | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write channels and residual to files, one each, block by block.

    Parameters
    ----------
    store
        Path or URL of the store, or what `decompose` returned.
    to
        ``fits`` (with the source's FITS header, where it had one), ``npy`` or ``tiff``
        (OME-TIFF; axes are reordered where y and x are not the last).
    out
        Folder, made if needed; None is the one that the store lies in. Where one output is
        selected, it may be the file itself, with one of the format's endings.
    channel
        Number of a channel, ``"residual"``, or several of these; None is all of them.
    region
        One slice per axis, as NumPy takes them, without steps; axes left out are whole.
    overwrite
        Replace files that are there.
    progress
        Show a progress bar, or log lines where nobody watches.

    Returns
    -------
    list of Path
        The files written, called like ``<store>_channel_00.fits``. A file appears when it is
        complete, and an interrupted one leaves nothing.

    Raises
    ------
    InputError
        If an argument cannot be used.
    StoreError, VerificationError
        If the store is incomplete; if something in it is missing or damaged.
    OutputExistsError, OutputAccessError, DiskSpaceError
        If a file is there already, cannot be written or does not fit.
    MissingDependencyError
        If astropy (FITS) or tifffile (TIFF) is not installed.
    """
    check_choice("to", to, tuple(SUFFIXES))
    check_flag("overwrite", overwrite)
    result = store if isinstance(store, Decomposition) else open_decomposition(store)
    if result.attrs["complete"] is not True:
        raise StoreError(f"{result.path} is not complete: its channels are not finished")
    create = _format(to, len(result.shape))
    outputs = select(result, channel, region)
    targets = target_paths(result, to, out, [output.name for output in outputs])
    check_targets(result, targets, [output.nbytes for output in outputs], overwrite)
    for output in outputs:
        if missing := missing_shards(output.array):  # before a file is begun
            lacks = f"{output.name} lacks {len(missing)} of its shards"
            raise VerificationError(f"{result.path}: {lacks}: `cdd-dask repair` mends it")
    make_folder(targets[0].parent)
    block = tuple(result.attrs["plan"]["block"])
    voxels = sum(math.prod(output.shape) for output in outputs)
    with Progress(progress, voxels) as shown:
        for output, target in zip(outputs, targets, strict=True):
            shown.stage(f"export-{output.name}", sum(1 for _ in output.pieces(block)))
            write_file(output, target, create, block, shown.advance)
    return targets


def _format(to: str, ndim: int) -> Create:
    """What makes a file of the format; the library it needs is looked for here."""
    if to == "fits":
        from cdd_dask.exporting import fits

        fits.import_fits()
        return fits.create
    if to == "tiff":
        from cdd_dask.exporting import tiff

        if ndim < 2:
            raise InputError('to="tiff" needs images of 2 to 4 axes, the store has 1: use to="npy"')
        tiff.import_tifffile()
        return tiff.create
    from cdd_dask.exporting import npy

    return npy.create
