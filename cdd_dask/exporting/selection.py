"""Which channels and which region of them are written."""

from __future__ import annotations

import operator
import re
from typing import Any

from cdd_dask.blocks import Region
from cdd_dask.decomposition import Decomposition
from cdd_dask.errors import InputError
from cdd_dask.exporting.base import Output
from cdd_dask.store import RESIDUAL


def parse_channels(text: str) -> list[int | str]:
    """Channels from text; what is no number stays as it is.

    Examples
    --------
    >>> parse_channels("0, 2,residual")
    [0, 2, 'residual']
    """
    names = [name.strip() for name in text.split(",")]
    return [int(name) if re.fullmatch(r"\d{1,18}", name) else name for name in names]


def parse_region(text: str) -> Region:
    """Slices from text.

    Examples
    --------
    >>> parse_region("10:20, :, -5:")
    (slice(10, 20, None), slice(None, None, None), slice(-5, None, None))
    """
    try:
        ends = [[int(end) if end.strip() else None for end in part.split(":")]
                for part in text.split(",")]  # fmt: skip
        if any(len(pair) != 2 for pair in ends):
            raise ValueError
    except ValueError:
        raise InputError(
            f"region={text!r} must be start:stop for every axis, for example 10:20,:,-5:"
        ) from None
    return tuple(slice(*pair) for pair in ends)


def whole_region(region: Region | slice | None, shape: tuple[int, ...]) -> Region:
    """`region` with explicit ends on every axis of a volume of `shape`.

    Examples
    --------
    >>> whole_region((slice(-3, None),), (10, 4))
    (slice(7, 10, None), slice(0, 4, None))
    """
    given = () if region is None else region if isinstance(region, tuple | list) else (region,)
    if len(given) > len(shape):
        raise InputError(f"region={given} has {len(given)} axes, the volume has shape {shape}")
    found = []
    for part, size in zip((*given, *[slice(None)] * (len(shape) - len(given))), shape, strict=True):
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise InputError(f"region={given} must be slices without steps, one per axis")
        try:
            start, stop, _ = part.indices(size)
        except TypeError as error:
            raise InputError(f"region={given} must have whole numbers as ends") from error
        if start >= stop:
            raise InputError(
                f"region={given} holds no voxels: {part.start}:{part.stop} of an axis of {size}, "
                f"the volume has shape {shape}"
            )
        found.append(slice(start, stop))
    return tuple(found)


def select(result: Decomposition, channel: Any, region: Region | slice | None) -> list[Output]:
    """The outputs that `channel` names, each once."""
    count = len(result.channels)
    names = channel if isinstance(channel, list | tuple) else [channel]
    if channel is None:
        names = [*range(count), RESIDUAL]
    if not names:
        raise InputError("channel=[] selects nothing: None selects all")
    numbers = dict.fromkeys(_output_number(name, count) for name in names)
    where, known = whole_region(region, result.shape), list(result.outputs())
    arrays = (*result.channels, result.residual)
    return [
        Output(
            name=known[k][0],
            number=k if k < count else None,
            scales=known[k][1:3],
            array=arrays[k],
            region=where,
            attributes=result.attrs,
        )
        for k in numbers
    ]


def _output_number(name: Any, count: int) -> int:
    """Place among channels and residual."""
    if isinstance(name, str) and name == RESIDUAL:
        return count
    try:
        number = operator.index(name)
    except TypeError:
        number = -1
    if isinstance(name, bool) or not 0 <= number < count:
        raise InputError(
            f'channel={name!r} is none of this store\'s: choose 0 … {count - 1}, "{RESIDUAL}" or '
            "a list of these"
        )
    return number
