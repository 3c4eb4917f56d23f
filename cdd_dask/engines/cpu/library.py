"""The compiled code: which of its variants runs here, and how Python calls it.

`scripts/build_kernels.py` makes a library per instruction set of ``kernels.cpp``. All give the same
bits; the widest that the processor runs is loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.errors import InputError, MissingDependencyError

VARIABLE = "CDD_DASK_CPU"
"""Environment variable that names the instruction set to use."""
INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")
"""The variants there can be, the fastest first; ``portable`` runs anywhere, slowly."""
LINE = 64
"""Bytes of a cache line, where arrays begin, and of the longest vector of any variant."""
CONSTRAINTS = {"unconstrained": 0, "constrained": 1, "inverted": 2, "crossing": 3}
"""As ``smoothing.hpp`` numbers them."""

_STRUCTURES = {
    "Team": "size:int abandoned:int arrived:int passed:int",
    "Rows": "field:at copy:at count:int size:int length:int first:int scale:double mask:bool "
    "scratch:at",
    "Ends": "length:int first:int last:int begin:int end:int to:at source:at outside:T",
    "Move": "constraint:int share:at",
    "FusedSteps": "field:at nz:int ny:int ends:Ends z_from:at y_from:at radius:int:3 taps:at:3 "
    "move:Move count:int depth:int skew:int rows:int wraps:bool:2 scratch:at saved:at "
    "progress:at team:at",
    "Level": "values:at nz:int ny:int ends:Ends even_ends:Ends halved:bool:3 z_from:at y_from:at "
    "z_near:at z_far:at y_near:at y_far:at",
    "Pyramid": "levels:at depth:int next:at smoothing:at move:Move count:int order:at ready:at "
    "first:at last:at scratch:at team:at",
    "SmoothAxis": "field:at out:at n:int inner:int radius:int source:at weights:at outside:T "
    "scratch:at sums:at lines:int",
    "MovePlain": "field:at smooth:at share:at constraint:int count:int",
}
"""The members of the structures in C++, in their order, and their types: ``at`` is a pointer, ``T``
the type of the values, a number the length of an array."""


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


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_present()[instruction_set()]))


@cache
def function(name: str, *types: Any) -> Any:
    """A compiled function for a field's type and that of what is computed from it.

    Calls take a structure's address, the number of a thread and how many there are, and release
    Python's lock.
    """
    result = _library()[f"cdd_{name}_{''.join(np.dtype(t).char for t in types)}"]
    result.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    result.restype = ctypes.c_int64
    return result


def lanes(dtype: Any) -> int:
    """Values of a vector."""
    return int(_library().cdd_vector_bytes() // np.dtype(dtype).itemsize)


def aligned(shape: int | tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of zeros that begins where a cache line does."""
    size, dtype = int(np.prod(shape)), np.dtype(dtype)
    array = np.zeros(size + LINE // dtype.itemsize, dtype)
    start = -array.ctypes.data % LINE // dtype.itemsize
    return array[start : start + size].reshape(shape)


def check(array: NDArray[Any], size: int) -> None:
    """Raise `ValueError` where an array is not what compiled code takes it for."""
    kinds = (np.float32, np.float64)
    if array.dtype not in kinds or not array.flags.c_contiguous or array.size != size:
        raise ValueError(
            f"field: {array.dtype} of shape {array.shape} and strides {array.strides}, where "
            f"{size} contiguous values of float32 or float64 are needed"
        )


def integers(values: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """An array of compiled code's integers."""
    return np.ascontiguousarray(values, np.int64)


class Record(ctypes.Structure):
    """A structure of C++, which keeps the arrays and structures that it points to."""

    def __init__(self, **members: Any) -> None:
        super().__init__()
        self.kept: list[Any] = []
        for name, value in members.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        """Set a member, to a list where it is an array; a pointer to an array or a structure."""
        self.kept.append(value)
        kind: Any = dict(self._fields_)[name]  # type: ignore[arg-type]
        if isinstance(value, list):
            value = kind(*map(_at, value))
        elif kind is ctypes.c_void_p:
            value = _at(value)
        setattr(self, name, value)


def _at(value: Any) -> Any:
    """The address of an array or a structure; else the value itself."""
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    return ctypes.addressof(value) if isinstance(value, (ctypes.Structure, ctypes.Array)) else value


@cache
def structures(dtype: Any) -> SimpleNamespace:
    """The structures of C++ for computing with numbers of `dtype`, by name."""
    kinds = {
        "int": ctypes.c_int64,
        "bool": ctypes.c_bool,
        "at": ctypes.c_void_p,
        "double": ctypes.c_double,
        "T": {4: ctypes.c_float, 8: ctypes.c_double}[np.dtype(dtype).itemsize],
    }
    made: dict[str, Any] = {}
    for name, text in _STRUCTURES.items():
        fields = []
        for part in text.split():
            member, kind, *count = part.split(":")
            whole: Any = kinds.get(kind) or made[kind]
            fields.append((member, whole * int(count[0]) if count else whole))
        made[name] = type(name, (Record,), {"_fields_": fields})
    return SimpleNamespace(**made)
