"""The compiled code: which of its variants runs here, and how Python calls it.

`scripts/build_kernels.py` makes a library per instruction set of ``kernels.cpp``. All give the same
bits; the widest that the processor runs is loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.errors import InputError, MissingDependencyError

VARIABLE = "CDD_DASK_CPU"
"""Environment variable that names the instruction set to use."""
INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")
"""The variants there can be, the fastest first; ``portable`` runs anywhere, slowly."""
LINE = 64
"""Bytes of a cache line, where arrays begin."""
CONSTRAINTS = {"unconstrained": 0, "constrained": 1, "inverted": 2}
"""As ``smoothing.hpp`` numbers them."""


_INTEGER, _ADDRESS, _FLAG = ctypes.c_int64, ctypes.c_void_p, ctypes.c_bool
_ARGUMENTS: dict[str, list[Any]] = {
    "lanes": [],
    "survey": [_ADDRESS, _INTEGER, _ADDRESS],
    **dict.fromkeys(
        ("fused_scratch", "fused_saved", "fused_tiles", "pyramid_scratch"), [_ADDRESS]
    ),
    **dict.fromkeys(("fused", "pyramid"), [_ADDRESS, _INTEGER]),
    **dict.fromkeys(
        ("to_striped", "to_plain", "smooth_axis", "move"), [_ADDRESS, _INTEGER, _INTEGER]
    ),
}
"""Parameters of the functions in ``kernels.cpp``; the last are a thread and how many there are."""


def _present() -> dict[str, Path]:
    """The libraries that were built, the fastest first."""
    suffix = ".dll" if os.name == "nt" else ".so"
    paths = {name: Path(__file__).with_name(f"kernels_{name}{suffix}") for name in INSTRUCTION_SETS}
    return {name: path for name, path in paths.items() if path.is_file()}


def available() -> list[str]:
    """The instruction sets that were compiled for and run here, the fastest first."""
    present = _present()
    if not present:
        return []
    asked = ctypes.CDLL(str(list(present.values())[-1])).cdd_runs  # the least demanding
    return [name for name in present if asked(name.encode())]


@cache
def instruction_set() -> str:
    """The instruction set whose code this process uses.

    Raises
    ------
    MissingDependencyError
        If no library was compiled.
    InputError
        If the environment asks for one that is not there, or does not run here.
    """
    names = available()
    if not names:
        raise MissingDependencyError(
            "the compiled library of engine='cpu' is missing: install cdd-dask with a C++17 "
            'compiler (pip install --force-reinstall cdd-dask), or use engine="reference" or '
            '"torch"'
        )
    asked = os.environ.get(VARIABLE)
    if asked and asked not in names:
        raise InputError(
            f"{VARIABLE}={asked!r} does not run here: unset it, or choose from {', '.join(names)}"
        )
    return asked or names[0]


@lru_cache(maxsize=len(INSTRUCTION_SETS))
def _loaded(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_present()[name]))


@cache
def function(name: str, *types: Any) -> Any:
    """A compiled function for a field's type and that of what is computed from it.

    Calls take integers and addresses, and release Python's lock.
    """
    result = getattr(_loaded(instruction_set()), f"cdd_{name}_{''.join(np.dtype(t).char for t in types)}")
    result.argtypes, result.restype = _ARGUMENTS[name], ctypes.c_int64
    return result


def lanes(dtype: Any) -> int:
    """Values of a vector."""
    return int(function("lanes", dtype)())


def aligned(shape: int | tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of zeros that begins where a cache line does."""
    size, dtype = int(np.prod(shape)), np.dtype(dtype)
    array = np.zeros(size + LINE // dtype.itemsize, dtype)
    start = -array.ctypes.data % LINE // dtype.itemsize
    return array[start : start + size].reshape(shape)


def address(array: NDArray[Any], dtype: Any, size: int) -> int:
    """Where an array's values begin, after a look at what compiled code cannot check.

    Raises
    ------
    ValueError
        If the array is of another type, not contiguous, or of another size than ``size`` values.
    """
    if array.dtype != dtype or not array.flags.c_contiguous or array.size != size:
        raise ValueError(
            f"array: {array.dtype} of shape {array.shape} and strides {array.strides}, where "
            f"{size} contiguous values of {np.dtype(dtype)} are needed"
        )
    return int(array.ctypes.data)


def integers(values: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """An array of compiled code's integers."""
    return np.ascontiguousarray(values, np.int64)


class Record(ctypes.Structure):
    """A structure of C++, which keeps the arrays that it points to."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.arrays: list[Any] = []
        for name, value in values.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        """Set a member: a number, a structure, an array, or a list of numbers or arrays."""
        if isinstance(value, np.ndarray):
            self.arrays.append(value)
            value = value.ctypes.data
        elif isinstance(value, list):
            self.arrays += value
            parts = [v.ctypes.data if isinstance(v, np.ndarray) else v for v in value]
            value = type(getattr(self, name))(*parts)
        elif isinstance(value, ctypes.Structure):
            self.arrays.append(value)
        setattr(self, name, value)


def _record(name: str, *fields: tuple[str, Any]) -> type[Record]:
    return type(name, (Record,), {"_fields_": list(fields)})


class Survey(ctypes.Structure):
    """As in ``survey.hpp``."""

    _fields_ = [("least", ctypes.c_double), ("most", ctypes.c_double), ("blank", _INTEGER)]  # noqa: RUF012


Team = _record("Team", *((name, _INTEGER) for name in ("size", "abandoned", "arrived", "passed")))
"""As in ``team.hpp``."""
Rows = _record(
    "Rows",
    ("field", _ADDRESS),
    ("copy", _ADDRESS),
    *((name, _INTEGER) for name in ("count", "size", "length", "first")),
    ("scale", ctypes.c_double),
    ("mask", _FLAG),
    ("scratch", _ADDRESS),
)
"""As in ``striped.hpp``."""


class Structures:
    """The structures of C++ whose members depend on the type that is computed with."""

    def __init__(self, number: Any) -> None:
        places = [(name, _INTEGER) for name in ("length", "first", "last", "begin", "end")]
        self.Ends = _record("Ends", *places, ("from", _ADDRESS), ("outside", number))
        self.Move = _record(
            "Move", ("constraint", _INTEGER), ("share", _ADDRESS), ("rounds", _FLAG)
        )
        self.FusedSteps = _record(
            "FusedSteps",
            ("field", _ADDRESS),
            ("nz", _INTEGER),
            ("ny", _INTEGER),
            ("ends", self.Ends),
            ("z_from", _ADDRESS),
            ("y_from", _ADDRESS),
            ("radius", _INTEGER * 3),
            ("weights", _ADDRESS * 3),
            ("move", self.Move),
            *((name, _INTEGER) for name in ("count", "depth", "skew", "rows")),
            ("wraps", _FLAG * 2),
            *((name, _ADDRESS) for name in ("scratch", "saved", "progress", "team")),
        )
        self.Level = _record(
            "Level",
            ("values", _ADDRESS),
            ("nz", _INTEGER),
            ("ny", _INTEGER),
            ("ends", self.Ends),
            ("halved", _FLAG * 3),
            *((f"{axis}_{what}", _ADDRESS) for what in ("from",) for axis in "zy"),
            *((f"{axis}_{what}", _ADDRESS) for axis in "zy" for what in ("near", "far")),
        )
        self.Pyramid = _record(
            "Pyramid",
            ("levels", _ADDRESS),
            ("depth", _INTEGER),
            ("next", _ADDRESS),
            ("smoothing", _ADDRESS),
            ("move", self.Move),
            ("count", _INTEGER),
            *((name, _ADDRESS) for name in ("order", "ready", "first", "last")),
            ("scratch", _ADDRESS),
            ("team", _ADDRESS),
        )
        self.SmoothAxis = _record(
            "SmoothAxis",
            ("field", _ADDRESS),
            ("out", _ADDRESS),
            *((name, _INTEGER) for name in ("n", "inner", "radius")),
            ("from", _ADDRESS),
            ("weights", _ADDRESS),
            ("outside", number),
            ("scratch", _ADDRESS),
            ("sums", _ADDRESS),
            ("lines", _INTEGER),
        )
        self.MovePlain = _record(
            "MovePlain",
            *((name, _ADDRESS) for name in ("field", "smooth", "share")),
            ("constraint", _INTEGER),
            ("count", _INTEGER),
        )


@cache
def structures(dtype: Any) -> Structures:
    """Those for computing with numbers of `dtype`."""
    return Structures({4: ctypes.c_float, 8: ctypes.c_double}[np.dtype(dtype).itemsize])
