"""Proof of a finished store: everything is there, and the sum is the source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdd_dask.blocks import Grid
from cdd_dask.decomposition import Decomposition, open_decomposition
from cdd_dask.errors import InputError, VerificationError
from cdd_dask.progress import Progress
from cdd_dask.readers import Source, open_source, read_field
from cdd_dask.store import missing_shards

TOLERANCE = 4
"""Units in the last place of the field's maximum that the sum may be off."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    worst_error: float
    """Largest difference of sum and source, in the field's unit."""
    where: tuple[int, ...]
    """Voxel of that difference."""
    ulp: float
    """Unit in the last place of the source's largest absolute value."""

    @property
    def worst_ulp(self) -> float:
        """The largest difference in units in the last place of the maximum."""
        return self.worst_error / self.ulp

    def __str__(self) -> str:
        return (
            f"reconstruction error at most {self.worst_error:.3g} "
            f"({self.worst_ulp:.2g} ulp of the maximum), at voxel {self.where}"
        )


def verify(path: str | Path, source: Any = None, *, progress: bool = True) -> Verification:
    """Check that a store is whole and that its outputs sum up to the source.

    Every shard of every output must be there; then ``sum(channels) + residual`` is compared
    with the source, one block at a time.

    Parameters
    ----------
    path
        The store.
    source
        What was decomposed, as `decompose` takes it; None opens what the store remembers.
    progress
        Show a progress bar, or log lines where nobody watches.

    Returns
    -------
    Verification

    Raises
    ------
    VerificationError
        If something is missing or damaged, or the sum is off by more than 4 units in the last
        place of the maximum; the message names the worst voxel.
    InputError
        If the source is needed and was an array in memory, or does not match the store.
    """
    result = open_decomposition(path)
    opened = _source_of(result, source)
    _check_present(result)
    grid = Grid(result.shape, tuple(result.attrs["plan"]["block"]))
    worst, where, largest = -1.0, (0,) * len(result.shape), 0.0
    with Progress(progress, len(grid)) as shown:
        shown.stage("verify", len(grid))
        for number in range(len(grid)):
            core = grid.core(number)
            field = read_field(opened, core, result.parameters)
            try:
                total = result.reconstruct(core)
            except (ValueError, OSError) as error:
                raise VerificationError(
                    f"{path}: block {number}, region {_text(core)}, cannot be read: {error}"
                ) from error
            blank = np.isnan(field)
            largest = max(largest, float(np.abs(field).max(where=~blank, initial=0.0)))
            off = np.abs(total.astype(np.float64) - field)
            off[np.isnan(off)] = np.inf
            off[blank & np.isnan(total)] = 0.0  # blank voxels are blank in the sum, too
            place = np.unravel_index(int(off.argmax()), off.shape)
            if off[place] > worst:
                worst = float(off[place])
                where = tuple(s.start + int(i) for s, i in zip(core, place, strict=True))
            shown.advance(1)
    ulp = float(np.spacing(np.array(largest, result.parameters.dtype)))
    found = Verification(worst, where, ulp)
    if found.worst_ulp > TOLERANCE:
        raise VerificationError(
            f"{path}: sum(channels) + residual differs from {opened.description} by {worst:.6g} "
            f"({found.worst_ulp:.3g} ulp of the maximum, {TOLERANCE} allowed) at voxel {where}"
        )
    return found


def _source_of(result: Decomposition, source: Any) -> Source:
    remembered = result.attrs["source"]
    if source is None:
        if remembered["address"].startswith("object:"):
            raise InputError(
                f"{result.path} was made from {remembered['description']}, which is gone: name "
                "the source (--source)"
            )
        source = remembered["address"]
    opened = open_source(source)
    if opened.shape != result.shape:
        raise InputError(
            f"source {opened.description} has shape {opened.shape}, the store {result.shape}: "
            "name the source that was decomposed"
        )
    return opened


def _check_present(result: Decomposition) -> None:
    arrays = (*result.channels, result.residual)
    for (name, *_), array in zip(result.outputs(), arrays, strict=True):
        if missing := missing_shards(array):
            raise VerificationError(f"{result.path}: {name} lacks {missing} of its shards")


def _text(region: tuple[slice, ...]) -> str:
    return "[" + ", ".join(f"{s.start}:{s.stop}" for s in region) + "]"
