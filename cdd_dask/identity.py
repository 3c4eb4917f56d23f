"""What decides the values of an output, so that a run may go on with what another has done."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from cdd_dask import store
from cdd_dask.blocks import Region
from cdd_dask.errors import DifferentRunError, SourceReadError
from cdd_dask.plans import Plan
from cdd_dask.readers import Source
from cdd_dask.readers.versions import file_versions, zarr_versions

SAMPLES = 64
"""Regions of a large source whose content is hashed, at the most; fewer where chunks are large."""
FEWEST_SAMPLES = 8
"""Such regions, however large the chunks: two corners, the centre, and others."""
SAMPLE_SIDE = 16
"""Their side, in voxels."""
SMALL = 16_000_000
"""Bytes of a source that is hashed as a whole; of arrays in this process, all that NumPy holds."""
CONTENT = ("shape", "dtype", "content")
"""What of a source's identity decides values: a file that was moved is still the same."""
ARITHMETIC = {"cpu": " (arithmetic 2)"}
"""What tells an engine from an earlier one of its name that rounds otherwise."""
GEOMETRY = (
    "regime", "steps", "parts", "levels", "depth", "blank_depth", "cell_domain", "cell_block",
    "cell_depth", "refinement", "tile", "blank_tile",
)  # fmt: skip
"""What of a stage decides the bits."""


def identity_of(plan: Plan, source: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the values of an output, as plain JSON values.

    Parameters
    ----------
    plan
        The run's plan.
    source
        From `source_identity`.
    """
    stages = [stage for stage in plan.as_dict()["stages"] if stage["number"] > 0]
    identity: dict[str, Any] = _plain(
        {
            "format version": store.FORMAT_VERSION,
            **plan.parameters.as_dict(),
            "edges": plan.edges,
            "engine": numeric_class(plan.resources.engine, plan.resources.device),
            "block": plan.block,
            "stages": [{name: stage[name] for name in GEOMETRY} for stage in stages],
            "source": source,
        }
    )
    return identity


def numeric_class(engine: str, device: str) -> str:
    """What computes, as far as it decides the last bit: not how many threads or which GPU."""
    return f"{engine}{ARITHMETIC.get(engine, '')} on {device.split(':')[0]}"


def fingerprint_of(identity: dict[str, Any]) -> str:
    """A short name of an identity, which done marks carry."""
    text = json.dumps(identity, sort_keys=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_same(begun: dict[str, Any], wanted: dict[str, Any], address: str) -> None:
    """Refuse to go on with an output that was begun otherwise.

    Raises
    ------
    DifferentRunError
        The message names the first field that differs, with both values.
    """
    # runs that began before there was `crossing` do not tell: `resuming` looks at their field
    begun = {"crossing": wanted.get("crossing"), **begun}
    if difference := difference_of(begun, wanted):
        raise DifferentRunError(
            f"out={address} was begun with {difference}: go on with what it was begun with, name "
            "another output, or start anew with overwrite=True (--overwrite)"
        )


def difference_of(begun: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first field that differs between two identities, with both values; "" if none does."""
    for name, old, new in _differences(begun, wanted):
        return f"{name}={_shown(name, old)}, and now {name}={_shown(name, new)}"
    return ""


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            below = f"{name} {key}".strip()
            yield from _differences(old.get(key), new.get(key), below)
    elif old != new:
        yield name, old, new


def _shown(name: str, value: Any) -> str:
    if name.endswith("modified") and isinstance(value, int):  # in ns since the epoch
        return datetime.fromtimestamp(value / 1e9).astimezone().isoformat()
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 100 else f"{text[:97]}…"


def _plain(value: Any) -> Any:
    """The same with lists for tuples, as JSON gives it back."""
    plain: Any = json.loads(json.dumps(value, allow_nan=True))
    return plain


def source_identity(source: Source) -> dict[str, Any]:
    """What a source is: where it lies, its shape and type, when it was written, what it holds.

    The content is hashed whole where it is small or in NumPy's memory, else in samples; files and
    objects say besides how large they are and when they were last written, or their ETag.

    Raises
    ------
    SourceReadError
        If it cannot be read.
    """
    known: dict[str, Any] = {"shape": source.shape, "dtype": source.dtype.str}
    if source.portable:
        known["address"] = source.address
    known |= _versions(source, list(_sampled_regions(source)))
    identity: dict[str, Any] = _plain({**known, "content": content_of(source)})
    return identity


def content_change(known: dict[str, Any], found: dict[str, Any]) -> str:
    """What decides values and differs between two identities of sources; "" if nothing does."""
    wanted, given = ({"source": {name: one[name] for name in CONTENT}} for one in (known, found))
    return difference_of(wanted, given)


def change_of(known: dict[str, Any], found: dict[str, Any]) -> str:
    """What differs between two identities of sources, wherever these lie; "" if nothing does."""
    return difference_of(known, {**found, "address": known.get("address")})


def is_surely_same(source: Source, known: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether a source holds what it did, by its identities, wherever it lies now.

    Its content is hashed as a whole, or its files say that nobody has written to them.
    """
    if content_change(known, found):
        return False
    by_files = bool(known.keys() - {*CONTENT, "address"}) and not change_of(known, found)
    return by_files or is_hashed_whole(source)


def _versions(source: Source, regions: Sequence[Region]) -> dict[str, Any]:
    """What is said of a source's files, without reading them."""
    try:
        if source.is_zarr:
            return zarr_versions(source.address, regions)
        return file_versions(source.files) if source.files else {}
    except Exception as error:  # it may be gone, and storage fails in any way
        raise SourceReadError(
            f"{source.description} cannot be read: {type(error).__name__}: {error}"
        ) from error


def content_of(source: Source) -> str:
    """A hash of what a source holds, or of samples of it.

    Raises
    ------
    SourceReadError
        If it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for region in _sampled_regions(source):
        digest.update(np.ascontiguousarray(source.read(region)).tobytes())
    return digest.hexdigest()


def is_hashed_whole(source: Source) -> bool:
    """Whether the hash of a source's content is of all of it: it is small, or in memory."""
    return _size(source) <= SMALL or not (source.portable or source.lazy)


def _size(source: Source) -> int:
    return int(np.prod(source.shape, dtype=object)) * source.dtype.itemsize


def _sampled_regions(source: Source) -> Iterator[Region]:
    """All of a source that is hashed as a whole, slab by slab; else regions at random."""
    shape, size = source.shape, _size(source)
    if is_hashed_whole(source):
        thick = max(1, SMALL * shape[0] // size)
        rest = tuple(slice(0, n) for n in shape[1:])
        for start in range(0, shape[0], thick):
            yield (slice(start, min(start + thick, shape[0])), *rest)
        return
    rng = np.random.default_rng(0)
    decoded = int(np.prod(source.chunk or (1,), dtype=object)) * source.dtype.itemsize
    count = max(FEWEST_SAMPLES, min(SAMPLES, 4 * SMALL // decoded))
    last = tuple(max(0, n - SAMPLE_SIDE) for n in shape)
    corners = [tuple(0 for _ in shape), last, tuple(n // 2 for n in last)]
    at_random = (tuple(int(rng.integers(0, n + 1)) for n in last) for _ in itertools.count())
    for corner in itertools.islice(itertools.chain(corners, at_random), count):
        yield tuple(
            slice(at, min(at + SAMPLE_SIDE, n)) for at, n in zip(corner, shape, strict=True)
        )
