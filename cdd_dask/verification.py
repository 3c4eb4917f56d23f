"""Proof of a finished store: everything is there, the sum is the source, and samples agree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cdd_dask.blocks import Grid
from cdd_dask.decomposition import Decomposition, open_decomposition
from cdd_dask.errors import InputError, VerificationError
from cdd_dask.memory import available_memory, byte_count
from cdd_dask.parameters import check_count
from cdd_dask.progress import Progress
from cdd_dask.readers import Source, open_source, read_field
from cdd_dask.sampling import Sample, sample_channels
from cdd_dask.statistics import difference
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
    samples: tuple[Sample, ...] = ()
    """What recomputed blocks showed, one for each channel, where they were asked for."""

    @property
    def worst_ulp(self) -> float:
        """The largest difference in units in the last place of the maximum."""
        return self.worst_error / self.ulp

    def __str__(self) -> str:
        return (
            f"reconstruction error at most {self.worst_error:.3g} "
            f"({self.worst_ulp:.2g} ulp of the maximum), at voxel {self.where}"
        )


def verify(
    path: str | Path,
    source: Any = None,
    *,
    sample: int = 0,
    seed: int = 0,
    memory: int | str | None = None,
    progress: bool = True,
) -> Verification:
    """Check that a store is whole and that its outputs sum up to the source.

    Every shard of every output must be there; then ``sum(channels) + residual`` is compared
    with the source, one block at a time. Whether the field is shared rightly among the channels
    only a `sample` tells, see `sampling`.

    Parameters
    ----------
    path
        The store.
    source
        What was decomposed, as `decompose` takes it; None opens what the store remembers.
    sample
        Blocks of every channel to recompute, of at most 32 voxels a side, with the halo of a
        tenth of `rtol`, and full kernels (or ones a level finer) where the run's were coarse.
    seed
        Of the random choice of these blocks, a whole number >= 0.
    memory
        Bytes (or ``"500MB"``) that a recomputation may take; None is half of what is free. A
        channel whose blocks need more is not sampled, and its sample says so.
    progress
        Show a progress bar, or log lines where nobody watches.

    Returns
    -------
    Verification

    Raises
    ------
    VerificationError
        If something is missing or damaged, or the sum is off by more than 4 units in the last
        place of the maximum; or if a channel whose error is exact or bounded differs from its
        recomputation by more than `rtol` of the field's range. The message names the worst voxel.
        Coarse kernels and fields of mixed sign are judged by the root mean square difference,
        which may be larger by what is known of these.
    InputError
        If an argument cannot be used, or the source is gone or does not match the store.
    """
    count, seed = check_count("sample", sample, 0), check_count("seed", seed, 0)
    budget = available_memory() // 2 if memory is None else byte_count("memory", memory)
    result = open_decomposition(path)
    opened = _source_of(result, source)
    _check_present(result)
    grid = Grid(result.shape, tuple(result.attrs["plan"]["block"]))
    with Progress(progress, len(grid) + count * len(result.channels)) as shown:
        found = _compare_sum(result, opened, grid, shown)
        if count:
            samples = sample_channels(result, opened, count, seed, budget, shown)
            _check_kept(result, samples)
            found = replace(found, samples=samples)
    return found


def _compare_sum(
    result: Decomposition, source: Source, grid: Grid, shown: Progress
) -> Verification:
    """How far ``sum(channels) + residual`` is from the source, block by block."""
    worst, where, largest = -1.0, (0,) * len(result.shape), 0.0
    shown.stage("verify", len(grid))
    for number in range(len(grid)):
        core = grid.core(number)
        field = read_field(source, core, result.parameters)
        try:
            total = result.reconstruct(core)
        except (ValueError, OSError) as error:
            raise VerificationError(
                f"{result.path}: block {number}, region {_text(core)}, cannot be read: {error}"
            ) from error
        largest = max(largest, float(np.abs(field).max(where=~np.isnan(field), initial=0.0)))
        off = difference(total, field)
        place = np.unravel_index(int(off.argmax()), off.shape)
        if off[place] > worst:
            worst = float(off[place])
            where = tuple(s.start + int(i) for s, i in zip(core, place, strict=True))
        shown.advance(1)
    ulp = float(np.spacing(np.array(largest, result.parameters.dtype)))
    found = Verification(worst, where, ulp)
    if found.worst_ulp > TOLERANCE:
        raise VerificationError(
            f"{result.path}: sum(channels) + residual differs from {source.description} by "
            f"{worst:.6g} ({found.worst_ulp:.3g} ulp of the maximum, {TOLERANCE} allowed) at voxel "
            f"{where}"
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


def _check_kept(result: Decomposition, samples: tuple[Sample, ...]) -> None:
    if broken := [sample for sample in samples if sample.is_broken]:
        problems = "; ".join(f"{s} ({s.share:.2g} times what is allowed)" for s in broken)
        rtol = result.parameters.rtol
        raise VerificationError(f"{result.path}: rtol={rtol:g} is not kept: {problems}")


def _text(region: tuple[slice, ...]) -> str:
    return "[" + ", ".join(f"{s.start}:{s.stop}" for s in region) + "]"
