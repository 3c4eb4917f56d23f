"""What the CPU engine's kernels do at one place of a row, written out when they are compiled.

A row is a contiguous line of an array, given by its address. The radius of a kernel and the axes
of a pyramid are lengths of tuples, known when code is made, so that a place takes no loop; the
loop along the row around it is left to the compiler, which makes vector instructions of it. For
that it must know that a loop never reads what it wrote before. `load` and `store` promise that of
the function in which they stand, which is why each such loop is a function of its own.

Where a product and a sum are rounded once is said, never left to the compiler: a voxel's bits must
not depend on whether it lies in a vector or in what is left of a row.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_STAMP = sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:12]


def compiled(function: Any) -> Any:
    """Compile a function when it is first called, and keep it on disk where that can be done.

    Numba looks whether the file of a function has changed, but not those that it calls: here its
    name stands for all of them.
    """
    function.__qualname__ += f"_{_STAMP}"
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for it can be written
        return njit(**options)(function)


_WORD = ir.IntType(64)


def _scope(builder: Any) -> Any:
    module = builder.module
    domain = module.add_metadata(["cdd-dask"])
    return module.add_metadata([module.add_metadata([builder.function.name, domain])])


def mark_read(builder: Any, instruction: Any) -> Any:
    """Say that what one function reads it never writes before."""
    instruction.set_metadata("alias.scope", _scope(builder))
    return instruction


def mark_written(builder: Any, instruction: Any) -> None:
    """Say that what one function writes it never reads afterwards."""
    instruction.set_metadata("noalias", _scope(builder))


def constant(kind: Any, value: float) -> Any:
    """A constant number, or a vector of it."""
    many = isinstance(kind, ir.VectorType)
    return ir.Constant(kind, [value] * kind.count if many else value)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a b + c`` of numbers or vectors, rounded once."""
    kind, module = a.type, builder.module
    if not isinstance(kind, ir.VectorType):
        return builder.fma(a, b, c)
    name = f"llvm.fma.v{kind.count}{kind.element.intrinsic_name}"
    function = module.globals.get(name) or ir.Function(
        module, ir.FunctionType(kind, [kind] * 3), name
    )
    return builder.call(function, [a, b, c])


def _read(context: Any, builder: Any, dtype: Any, row: Any, place: Any) -> Any:
    pointer = builder.inttoptr(row, context.get_value_type(dtype).as_pointer())
    value = builder.load(builder.gep(pointer, [place], inbounds=True))
    value.align = dtype.bitwidth // 8
    return mark_read(builder, value)


@intrinsic
def address(_: Any, array: Any, index: Any) -> Any:
    """Address of an element, where a row begins."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(builder.gep(made.data, [args[1]]), _WORD)

    return types.uintp(array, index), generate


@intrinsic
def load(_: Any, like: Any, row: Any, place: Any) -> Any:
    """Value at a place of a row of `like`'s type."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _read(context, builder, like.dtype, args[1], args[2])

    return like.dtype(like, row, place), generate


@intrinsic
def store(_: Any, like: Any, row: Any, place: Any, value: Any) -> Any:
    """Write a value to a place of a row of `like`'s type, which nothing in the loop reads."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[1], context.get_value_type(like.dtype).as_pointer())
        rounded = context.cast(builder, args[3], value, like.dtype)
        stored = builder.store(rounded, builder.gep(pointer, [args[2]], inbounds=True))
        stored.align = like.dtype.bitwidth // 8
        mark_written(builder, stored)
        return context.get_dummy_value()

    return types.void(like, row, place, value), generate


def moved_value(builder: Any, rule: Any, old: Any, smooth: Any) -> Any:
    """A value, or a vector of them, moved to `smooth` as far as the rule lets it."""
    towards = ("<", ">") if len(rule) == 1 else (">", "<")
    zero = constant(old.type, 0.0)
    positive, negative = (
        builder.select(builder.fcmp_ordered(sense, smooth, old), smooth, old) for sense in towards
    )
    result = builder.select(builder.fcmp_ordered("<", old, zero), negative, old)
    return builder.select(builder.fcmp_ordered(">", old, zero), positive, result)


@intrinsic
def moved(
    _: Any, rule: Any, share: Any, field: Any, centre: Any, shares: Any, place: Any, smooth: Any
) -> Any:
    """The field's value moved to `smooth` as far as the rule lets it: see `RULES`.

    Where blanks take part of the kernel, `share` is an array, not a tuple, and `smooth` is divided
    by what is left of the kernel.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        new = args[6]
        if isinstance(share, types.Array):
            part = _read(context, builder, share.dtype, args[4], args[5])
            new = builder.fdiv(new, context.cast(builder, part, share.dtype, smooth))
        if len(rule) == 0:
            return new
        new = context.cast(builder, new, smooth, field.dtype)
        old = _read(context, builder, field.dtype, args[3], args[5])
        return moved_value(builder, rule, old, new)

    result = field.dtype if len(rule) else smooth
    return result(rule, share, field, centre, shares, place, smooth), generate


def _mean_of_four(builder: Any, values: list[Any]) -> Any:
    """``[1, 3, 3, 1] / 8``, exact for equal values: each half of it is."""
    eighth, three = (ir.Constant(values[0].type, weight) for weight in (0.125, 0.375))
    low = builder.fma(three, values[1], builder.fmul(eighth, values[0]))
    high = builder.fma(three, values[2], builder.fmul(eighth, values[3]))
    return builder.fadd(low, high)


def _between(builder: Any, near: Any, far: Any) -> Any:
    """``3/4 near + 1/4 far``, exact for equal values."""
    excess = builder.fsub(far, near)
    return builder.fma(ir.Constant(near.type, 0.25), excess, near)


def _from_rows(context: Any, builder: Any, work: Any, like: Any, rows: Any, args: Any) -> Any:
    """Reader of the values at one place of all rows of a table."""
    base = builder.ptrtoint(context.make_array(rows)(context, builder, args[0]).data, _WORD)

    def value(i: int) -> Any:
        row = _read(context, builder, rows.dtype, base, ir.Constant(_WORD, i))
        read = _read(context, builder, like.dtype, row, args[1])
        return context.cast(builder, read, like.dtype, work.dtype)

    return value


@intrinsic
def gathered(_: Any, work: Any, like: Any, rows: Any, halve: Any, place: Any) -> Any:
    """Cells from voxels across rows: 4 rows along every axis that `halve` counts, 4 by 4 if two."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _from_rows(context, builder, work, like, rows, (args[2], args[4]))
        count = 4 ** len(halve)
        values = [value(i) for i in range(count)]
        while len(values) > 1:
            values = [_mean_of_four(builder, values[i : i + 4]) for i in range(0, len(values), 4)]
        return values[0]

    return work.dtype(work, like, rows, halve, place), generate


@intrinsic
def blended(_: Any, like: Any, rows: Any, halve: Any, place: Any) -> Any:
    """Voxels from cells across rows: near and far along every axis that `halve` counts."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _from_rows(context, builder, like, like, rows, (args[1], args[3]))
        values = [value(i) for i in range(2 ** len(halve))]
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [_between(builder, near, far) for near, far in pairs]
        return values[0]

    return like.dtype(like, rows, halve, place), generate


@intrinsic
def mean_along(_: Any, like: Any, row: Any, place: Any) -> Any:
    """The mean of the four values of a row from `place` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = [builder.add(args[2], ir.Constant(_WORD, i)) for i in range(4)]
        return _mean_of_four(
            builder, [_read(context, builder, like.dtype, args[1], at) for at in places]
        )

    return like.dtype(like, row, place), generate


@intrinsic
def between_along(_: Any, like: Any, row: Any, near: Any, far: Any) -> Any:
    """Three quarters of a row's value at `near` and one of that at `far`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = (_read(context, builder, like.dtype, args[1], at) for at in args[2:])
        return _between(builder, *values)

    return like.dtype(like, row, near, far), generate


RULES = {"unconstrained": (), "constrained": (0,), "inverted": (0, 0)}
"""A constraint as the length of a tuple, which is known when a kernel is compiled."""


@intrinsic
def row_of(_: Any, array: Any, index: Any, otherwise: Any) -> Any:
    """Address of an array's element; `otherwise` where there is a tuple instead of an array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not isinstance(array, types.Array):
            return args[2]
        made = context.make_array(array)(context, builder, args[0])
        return builder.ptrtoint(builder.gep(made.data, [args[1]]), _WORD)

    return types.uintp(array, index, otherwise), generate
