"""What a store's metadata may say: data that anybody may have edited, checked before use.

A *rule* is called with the name of a value, as ``plan.block[0]``, and the value; it refuses what
nobody could work with. `ROOT` and `GROUP` are the rules of all that lies under `store.KEY`; keys
that they do not name are left alone.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NoReturn

from cdd_dask.addresses import UNPRINTABLE, check_address
from cdd_dask.blocks import Grid, storage_chunks
from cdd_dask.engines import ENGINES, Footprint
from cdd_dask.errors import InputError, StoreError
from cdd_dask.layout import usable_names
from cdd_dask.parameters import MAX_NDIM, Parameters
from cdd_dask.plans import Resources, Speeds, Stage, Volume
from cdd_dask.readers.base import LARGEST_VOLUME
from cdd_dask.scales import MOST_CHANNELS, scale_edges
from cdd_dask.store import FORMAT_VERSION, SCRATCH_NAME

Rule = Callable[[str, Any], None]

LARGEST_BLOCK = 2**38
"""Voxels of the largest block: what no machine's memory holds, none has computed."""
LONGEST_TEXT = 4096
"""Characters of a name or an address."""
LONGEST_HEADER = 2**24
"""Characters of a source's header."""
CODECS = ("BytesCodec", "ZstdCodec", "Crc32cCodec")
"""Classes of the codecs that chunks of ours pass, one after the other."""


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise ValueError(f"its attribute {name}={reprlib.repr(value)} must be {wanted}: was it edited?")


def _whole(least: int = 0, most: int = 2**63 - 1) -> Rule:
    def rule(name: str, value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(name, value, f"a whole number from {least} to {most}")

    return rule


def _number(name: str, value: Any) -> None:
    # a whole number in JSON may be beyond any float
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        _refuse(name, value, "a finite number")


def _sum(name: str, value: Any) -> None:
    """A sum or an extreme: infinite where float64 does not suffice, NaN where there was nothing."""
    if type(value) is not float and (type(value) is not int or abs(value) > sys.float_info.max):
        _refuse(name, value, "a number")


def _flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        _refuse(name, value, "true or false")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or UNPRINTABLE.search(value):
        _refuse(name, value, f"a text of at most {LONGEST_TEXT} printable characters")


def _header(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > LONGEST_HEADER:
        _refuse(name, value, f"a text of at most {LONGEST_HEADER} characters")


def _address(name: str, value: Any) -> None:
    _text(name, value)
    check_address(name, value)


def _name(length: int) -> Rule:
    def rule(name: str, value: Any) -> None:
        if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{length}}}", value):
            _refuse(name, value, f"{length} hexadecimal digits")

    return rule


def _choice(*allowed: str) -> Rule:
    def rule(name: str, value: Any) -> None:
        if value not in allowed:
            _refuse(name, value, f"one of {', '.join(allowed)}")

    return rule


def _axis(name: str, value: Any) -> None:
    """Name, spacing and unit of an axis; its coordinates lie under its name."""
    _list(lambda *_: None, 3, 3)(name, value)
    _text(f"{name}[0]", value[0])
    _number(f"{name}[1]", value[1])
    _optional(_text)(f"{name}[2]", value[2])


def _optional(rule: Rule) -> Rule:
    return lambda name, value: None if value is None else rule(name, value)


def _list(rule: Rule, least: int = 0, most: int = MAX_NDIM) -> Rule:
    def each(name: str, value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            _refuse(name, value, f"a list of {least} to {most} items")
        for number, item in enumerate(value):
            rule(f"{name}[{number}]", item)

    return each


def _mapping(
    required: Mapping[str, Rule] | None = None, optional: Mapping[str, Rule] | None = None
) -> Rule:
    needed, also = required or {}, optional or {}

    def each(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            _refuse(name, value, "a mapping")
        prefix = f"{name}." if name else ""
        for key in needed:
            if key not in value:
                raise ValueError(f"its attribute {prefix}{key} is missing")
        for key, rule in {**needed, **also}.items():
            if key in value:
                rule(prefix + key, value[key])

    return each


_SHAPE = _list(_whole(1), 1)
_COUNTS = _list(_whole())
_STATISTICS = _mapping(
    {"count": _whole(), **dict.fromkeys(("sum", "sum_abs", "sum_squares", "min", "max"), _sum)},
    {"negative": _whole()},
)
_MANY = _list(_whole(), 0, sys.maxsize)
_TYPES = {
    "int": _whole(),
    "float": _number,
    "str": _text,
    "bool": _flag,
    "int | None": _optional(_whole()),
    "tuple[int, ...]": _MANY,
    "tuple[int, ...] | None": _optional(_MANY),
}
"""Rules of the fields of records, by their types."""


def _record(kind: type[Any]) -> Rule:
    """What a dataclass of ours is made of: each of its fields, and nothing else."""
    names = {field.name: _TYPES[str(field.type)] for field in fields(kind)}
    known = _mapping(names)

    def rule(name: str, value: Any) -> None:
        known(name, value)
        if odd := sorted(set(value) - set(names)):
            raise ValueError(f"its attribute {name}.{odd[0]!a:.60} is unknown: was it edited?")

    return rule


_TYPES |= {kind.__name__: _record(kind) for kind in (Footprint, Speeds)}


ROOT = _mapping(
    {
        "run": _name(12),
        "fingerprint": _name(32),
        "identity": _mapping(),
        "scratch": _optional(_address),
        "parameters": _mapping(),
        "edges": _list(_number, 1, MOST_CHANNELS),
        "axes": _list(_axis, 1),
        "plan": _mapping(
            {
                "parameters": _mapping(),
                "volume": _record(Volume),
                "resources": _record(Resources),
                "edges": _list(_number, 1, MOST_CHANNELS),
                "block": _SHAPE,
                "copy_in": _flag,
                "stages": _list(_record(Stage), 1, MOST_CHANNELS + 1),
                **dict.fromkeys(("peak_memory", "disk_bytes", "files", "scratch_bytes"), _whole()),
            }
        ),
        "source": _mapping(
            {"description": _text, "address": _address},
            {
                "shape": _SHAPE,
                "file_shape": _optional(_list(_whole(1), 1, 64)),
                "dtype": _text,
                "spacing": _optional(_list(_number, 1)),
                "units": _optional(_list(_optional(_text), 1)),
                "header": _optional(_header),
            },
        ),
    },
    {"versions": _mapping()},
)
"""What the root of every store remembers."""
FINISHED = _mapping(
    {
        "source_statistics": _STATISTICS,
        "error": _text,
        "blocks": _mapping({"computed": _whole(), "empty": _whole()}),
    }
)
"""What the root of a complete one remembers besides."""
GROUP = _mapping({"scale_from": _number, "scale_to": _optional(_number)})
"""What the group of every output remembers."""
HOW = {
    "regime": _text,
    "passes": _whole(),
    "levels": _COUNTS,
    "halo": _COUNTS,
    "halo_cells": _COUNTS,
    "error": _mapping({"kind": _text, "rtol": _number, "relative_l2": _number}),
}
RESIDUAL = _mapping({"statistics": _STATISTICS})
CHANNEL = _mapping({"statistics": _STATISTICS, **HOW})
"""What the groups of a complete store's outputs remember besides."""


def check_root(address: str, attributes: Any) -> None:
    """Refuse a root's attributes that nobody could work with.

    Parameters
    ----------
    address
        Of the store, for the message.
    attributes
        All that lies under `store.KEY`.

    Raises
    ------
    StoreError
        If the format version is another one; else, naming the attribute, if something is missing,
        is of another type or out of bounds, or contradicts the rest.
    """
    _guarded(address, _check_root, address, attributes)


def check_group(
    address: str, name: str, attributes: Any, scales: tuple[float, float | None], complete: bool
) -> None:
    """Refuse the attributes of an output's group that nobody could work with.

    Parameters
    ----------
    address
        Of the store, for the message.
    name
        Of the group.
    attributes
        All that lies under `store.KEY`.
    scales
        What the root's edges say of it.
    complete
        Whether there must be statistics, and what is known of a channel's error.

    Raises
    ------
    StoreError
        Likewise.
    """
    _guarded(address, _check_group, name, attributes, scales, complete)


def check_image(address: str, name: str, array: Any, parameters: Parameters, grid: Grid) -> None:
    """Refuse an array called `name` that is none of `grid`'s blocks as a run stores them.

    What is decoded at once is then no more than a block, and passes no codec that could do anything
    but decompress.

    Raises
    ------
    StoreError
        If it is no array, or its shape, type, chunks or codecs are others.
    """
    _guarded(address, _check_image, name, array, parameters, grid)


def _guarded(address: str, check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except StoreError:
        raise
    except ValueError as error:
        raise StoreError(f"{address} is damaged: {error}") from error


def _check_root(address: str, known: Any) -> None:
    _mapping({"format_version": _whole(), "complete": _flag})("", known)
    if (version := known["format_version"]) != FORMAT_VERSION:
        raise StoreError(
            f"{address} has format version {version}, this version of cdd-dask reads "
            f"{FORMAT_VERSION}: install the one that wrote it"
        )
    ROOT("", known)
    if known["complete"]:
        FINISHED("", known)
    _check_scratch(known["scratch"])
    plan, shape = known["plan"], known["plan"]["volume"]["shape"]
    _SHAPE("plan.volume.shape", shape)
    _choice(*ENGINES[1:])("plan.resources.engine", plan["resources"]["engine"])
    if math.prod(shape) > LARGEST_VOLUME:
        _refuse("plan.volume.shape", shape, f"of at most {LARGEST_VOLUME} voxels")
    block = plan["block"]
    fits = len(block) == len(shape) and all(b <= n for b, n in zip(block, shape, strict=True))
    if not fits or math.prod(block) > LARGEST_BLOCK:
        _refuse("plan.block", block, f"within the shape {shape}, of at most {LARGEST_BLOCK} voxels")
    names = tuple(axis[0] for axis in known["axes"])
    if usable_names(names, len(shape)) != names:
        _refuse("axes", names, f"{len(shape)} names of arrays")
    _check_parameters(known["parameters"], known["edges"], tuple(shape))
    for key in ("parameters", "edges"):
        if plan[key] != known[key]:
            raise ValueError(f"its attributes {key} and plan.{key} are not the same")
    _check_stages(plan, len(known["edges"]))


def _check_scratch(scratch: str | None) -> None:
    """What is deleted when a run is done must be what a run makes, and nothing else."""
    if scratch is None:
        return
    *folders, name = scratch.split("/")
    absolute = scratch.startswith("/") or "://" in scratch or re.match(r"[A-Za-z]:", scratch)
    named = SCRATCH_NAME.fullmatch(name)
    if not named or ".." in folders or not absolute:
        _refuse("scratch", scratch, "an absolute path that ends with /cdd-dask-<run>.zarr")


def _check_parameters(stated: dict[str, Any], edges: list[float], shape: tuple[int, ...]) -> None:
    known = {field.name for field in fields(Parameters)}
    if odd := (set(stated) | {"crossing"}) ^ known:  # which stores were begun without
        raise ValueError(f"its attribute parameters.{min(odd)} is missing or unknown")
    if stated["unit"] is not None:
        _text("parameters.unit", stated["unit"])
    try:
        parameters = Parameters.of_dict(stated).resolved(len(shape))
        expected = scale_edges(parameters, shape)
    except (InputError, TypeError, ArithmeticError) as error:
        raise ValueError(f"its attribute parameters cannot be used: {error}") from error
    same = len(edges) == len(expected) and all(map(math.isclose, edges, expected))
    if not same:
        _refuse("edges", edges, f"those of its parameters, {reprlib.repr(expected)}")


def _check_stages(plan: dict[str, Any], channels: int) -> None:
    numbers = range(0 if plan["copy_in"] else 1, channels + 1)
    if [stage["number"] for stage in plan["stages"]] != list(numbers):
        raise ValueError(
            f"its attribute plan.stages must be of the numbers {numbers.start} to {channels}, one "
            "for every edge: was it edited?"
        )
    ndim = len(plan["block"])
    for place, stage in enumerate(plan["stages"]):
        for key in ("levels", "depth", "blank_depth", "tile", "blank_tile"):
            if len(stage[key]) != ndim:
                _refuse(f"plan.stages[{place}].{key}", stage[key], f"{ndim} numbers")
        cells = [stage[key] for key in ("cell_domain", "cell_block", "cell_depth")]
        if {*map(len, cells)} not in ({0}, {ndim}) or 0 in cells[1]:
            _refuse(f"plan.stages[{place}].cell_domain, block and depth", cells, f"{ndim} numbers")


def _check_group(name: str, known: Any, scales: tuple[float, float | None], complete: bool) -> None:
    GROUP(name, known)
    if complete:
        (RESIDUAL if scales[1] is None else CHANNEL)(name, known)
    if (stated := (known["scale_from"], known["scale_to"])) != scales:
        _refuse(f"{name}.scale_from, scale_to", stated, f"{scales}, which its edges are")


def _check_image(name: str, array: Any, parameters: Parameters, grid: Grid) -> None:
    from zarr import Array
    from zarr.codecs.bytes import Endian

    def check(what: str, found: object, *allowed: object) -> None:
        if found not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(f"{name} has {what} {found}, not {wanted}: was it edited?")

    check("nodes of type", type(array), Array)
    check("the shape", array.shape, grid.shape)
    check("the type", str(array.dtype), parameters.dtype)
    shards, chunks = storage_chunks(grid)
    # in memory a chunk is a block
    check("shards and chunks", (array.shards, array.chunks), (shards, chunks), (None, grid.block))
    for codec in _codecs(array.metadata.codecs):
        check("the codec", type(codec).__name__, *CODECS)
        check("the byte order", getattr(codec, "endian", None), None, Endian.little)
    keys = array.metadata.chunk_key_encoding.to_dict()
    check("the keys", keys, {"name": "default", "configuration": {"separator": "/"}})
    check("the fill value", float(array.fill_value), 0.0)
    for axis in array.metadata.dimension_names or ():
        _optional(_text)(f"{name}.dimension_names", axis)


def _codecs(codecs: Any) -> list[Any]:
    """All codecs of an array, with those inside its shards."""
    from zarr.codecs import ShardingCodec

    found: list[Any] = []
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            found += [*_codecs(codec.codecs), *_codecs(codec.index_codecs)]
        else:
            found.append(codec)
    return found
