"""Proof of a finished store: everything is there, the sum is the source, and samples agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cdd_dask.decomposition import Decomposition, open_decomposition
from cdd_dask.errors import (
    InputError,
    SourceNotFoundError,
    SourceReadError,
    VerificationError,
)
from cdd_dask.identity import content_change, source_identity
from cdd_dask.memory import available_memory, byte_count
from cdd_dask.output import output_address
from cdd_dask.parameters import check_count
from cdd_dask.progress import Progress
from cdd_dask.readers import Source, open_source, read_field
from cdd_dask.sampling import Sample, sample_channels
from cdd_dask.soundness import Damage, Ledger
from cdd_dask.statistics import difference

TOLERANCE = 4
"""Units in the last place of the field's maximum that the sum may be off."""
MOST_SHOWN = 20
"""Damages that a message lists."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    worst_error: float
    """Largest difference of sum and source, in the field's unit."""
    where: tuple[int, ...]
    """Voxel of that difference."""
    ulp: float
    """Unit in the last place of the source's largest absolute value, or of `cval`'s."""
    samples: tuple[Sample, ...] = ()
    """What recomputed blocks showed, one for each channel, where they were asked for."""
    approximate: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Numbers of the blocks that `repair` made approximately, by the output's name."""

    @property
    def worst_ulp(self) -> float:
        """The largest difference in units in the last place of the maximum."""
        return self.worst_error / self.ulp

    def __str__(self) -> str:
        lines = [
            f"reconstruction error at most {self.worst_error:.3g} "
            f"({self.worst_ulp:.2g} ulp of the maximum), at voxel {self.where}"
        ]
        for name, blocks in self.approximate.items():
            lines.append(f"{name}: repaired approximately in blocks {', '.join(map(str, blocks))}")
        return "\n".join(lines)


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

    Its metadata must be as they were written, and every block of every output be there, sound, and
    what its done mark describes; then ``sum(channels) + residual`` is compared with the source.
    Whether the field is shared rightly among the channels
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
        If something is missing or damaged (`repair` mends it), or the sum is off by more than 4
        units in the last place of the maximum (or of `cval`, where that is larger); or if a
        channel whose error is exact or bounded differs from its recomputation by more than `rtol`
        of the field's range. The message names the worst voxel.
        Coarse kernels and fields of mixed sign are judged by the root mean square difference,
        which may be larger by what is known of these.
    InputError
        If an argument cannot be used, or the source is gone or does not match the store.
    """
    count, seed = check_count("sample", sample, 0), check_count("seed", seed, 0)
    budget = available_memory() // 2 if memory is None else byte_count("memory", memory)
    address = output_address(path)
    ledger = Ledger.of(address)
    _refuse(address, [*ledger.damaged_metadata()])
    result = open_decomposition(address)
    opened: Source | None = None
    try:
        opened = source_of(result.attrs["source"], result.shape, source)
    except (InputError, SourceNotFoundError, SourceReadError) as error:
        if source is not None:  # better said before all blocks are read
            raise
        gone = error
    with Progress(progress, len(ledger.plan.grid) + count * len(result.channels)) as shown:
        found = replace(
            _check_blocks(result, ledger, opened, shown), approximate=ledger.approximate
        )
        if opened is None:
            raise InputError(
                f"every block of {address} is what its run wrote, but the sum cannot be compared: "
                f"{gone}; name the source (--source)"
            ) from gone
        if count:
            samples = sample_channels(result, opened, count, seed, budget, shown)
            _check_kept(result, samples)
            found = replace(found, samples=samples)
    return found


def _refuse(address: str, damages: list[Damage]) -> None:
    """Raise where something is damaged, with a list of it."""
    if not damages:
        return
    shown = "\n".join(f"  {damage}" for damage in damages[:MOST_SHOWN])
    more = f"\n  and {len(damages) - MOST_SHOWN} more" if len(damages) > MOST_SHOWN else ""
    raise VerificationError(
        f"{address} is damaged, in {len(damages)} place{'s' * (len(damages) > 1)}:\n{shown}{more}\n"
        "`cdd-dask repair` mends what can be mended"
    )


def _check_blocks(
    result: Decomposition, ledger: Ledger, source: Source | None, shown: Progress
) -> Verification:
    """Whether all blocks are what was written, and how far their sum is from the source."""
    worst, where, largest = -1.0, (0,) * len(result.shape), 0.0
    grid, damages = ledger.plan.grid, []
    shown.stage("verify", len(grid))
    for number in range(len(grid)):
        core = grid.core(number)
        total: Any = 0.0
        for name in ledger.names:
            values, damage = ledger.damaged_block(name, number)
            if damage is not None:
                damages.append(damage)
            if values is not None:
                total = total + values.astype(np.float64)
        shown.advance(1)
        if damages or source is None:
            continue
        wanted = read_field(source, core, result.parameters)
        largest = max(largest, float(np.abs(wanted).max(where=~np.isnan(wanted), initial=0.0)))
        off = difference(total.astype(wanted.dtype), wanted)
        place = np.unravel_index(int(off.argmax()), off.shape)
        if off[place] > worst:
            worst = float(off[place])
            where = tuple(s.start + int(i) for s, i in zip(core, place, strict=True))
    _refuse(str(result.path), damages)
    found = Verification(worst, where, result.parameters.ulp(largest))
    if source is not None and found.worst_ulp > TOLERANCE:
        known = ledger.attributes["identity"]["source"]
        changed = content_change(known, source_identity(source))
        raise VerificationError(
            f"{result.path}: sum(channels) + residual differs from {source.description} by "
            f"{worst:.6g} ({found.worst_ulp:.3g} ulp of the maximum, {TOLERANCE} allowed) at voxel "
            f"{where}{f'; it is not what was decomposed: {changed}' if changed else ''}"
        )
    return found


def source_of(remembered: dict[str, Any], shape: tuple[int, ...], source: Any) -> Source:
    """What was decomposed: what a user names, or what the store remembers.

    Raises
    ------
    InputError
        If it is gone, or cannot be what was decomposed.
    """
    if source is None:
        if remembered["address"].startswith("object:"):
            raise InputError(
                f"the store was made from {remembered['description']}, which is gone: name the "
                "source (--source)"
            )
        source = remembered["address"]
    opened = open_source(source)
    if opened.shape != shape:
        raise InputError(
            f"source {opened.description} has shape {opened.shape}, the store {shape}: "
            "name the source that was decomposed"
        )
    return opened


def _check_kept(result: Decomposition, samples: tuple[Sample, ...]) -> None:
    if broken := [sample for sample in samples if sample.is_broken]:
        problems = "; ".join(f"{s} ({s.share:.2g} times what is allowed)" for s in broken)
        rtol = result.parameters.rtol
        raise VerificationError(f"{result.path}: rtol={rtol:g} is not kept: {problems}")
