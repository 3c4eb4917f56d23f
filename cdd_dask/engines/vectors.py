"""What the fused step does at one vector of places of its rows, written out when it is compiled.

A vector is a cache line of the working type. With vectors written as such, a row of any length
takes nothing else: what is left at its end is a vector with some lanes masked. Working memory is
padded, so that lanes beyond a row's end do no harm there.

Smoothing is written in differences, ``a + Σ w_j ((a_{-j} + a_{+j}) / 2 - a)`` with twice the
weights, so that a constant field comes back to the bit and rounding does not wear others down.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cdd_dask.engines.rows import constant, mark_read, mark_written, moved_value, multiply_add

BATCH = 4
"""Rows (or planes) that are smoothed at once, so that each is loaded from memory less often."""
LINE = 64
"""Bytes of a cache line, and of a vector of the working type."""
_WORD, _INDEX, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_BITS = {"float": 32, "double": 64}


def _sum_of_taps(builder: Any, weights: list[Any], value: Callable[[int], Any]) -> Any:
    """The smoothing of the values at all distances, from the outermost pair inwards.

    Every other pair is written ``w_j / 2 ((a_{-j} + a_{+j}) - 2 a)``: the same to the bit, but a
    sum where the first is a product, and processors have units for both.
    """
    centre, total = value(0), None
    half = constant(centre.type, 0.5)
    for distance in range(len(weights), 0, -1):
        pair, weight = builder.fadd(value(-distance), value(distance)), weights[distance - 1]
        if distance % 2:
            excess = multiply_add(builder, half, pair, builder.fneg(centre))
        else:
            excess = builder.fsub(pair, builder.fadd(centre, centre))
            weight = builder.fmul(half, weight)
        if total is None:
            total = builder.fmul(weight, excess)
        else:
            total = multiply_add(builder, weight, excess, total)
    return centre if total is None else builder.fadd(centre, total)


def _at(values: list[Any], distance: int) -> Any:
    """The value at a distance from the middle one."""
    return values[len(values) // 2 + distance]


class _Vectors:
    """Writes code for the vectors at one place of rows.

    `count` says how many lanes lie within the field, where that is not all.
    """

    def __init__(self, context: Any, builder: Any, work: Any, place: Any, count: Any) -> None:
        self._context, self._builder, self._place = context, builder, place
        self.lanes = LINE * 8 // work.bitwidth
        self._work = self._vector(work)
        self._mask = None
        if count is not None:
            numbers = ir.Constant(ir.VectorType(_WORD, self.lanes), list(range(self.lanes)))
            self._mask = builder.icmp_unsigned("<", numbers, self._splat(count))

    def weights(self, weights: Any, radius: int) -> list[Any]:
        """A kernel's weights, each in all lanes."""
        return [self._splat(self._builder.extract_value(weights, j)) for j in range(radius)]

    def rows(self, kind: Any, table: Any) -> Callable[[int], Any]:
        """Reader of the addresses in a table of rows."""
        made = self._context.make_array(kind)(self._context, self._builder, table)

        def row(i: int) -> Any:
            entry = self._builder.gep(made.data, [ir.Constant(_WORD, i)])
            return mark_read(self._builder, self._builder.load(entry))

        return row

    def load(self, dtype: Any, row: Any, ahead: int = 0) -> Any:
        """A row's vector, `ahead` values further on, in the working type; no lane is masked."""
        value = self._builder.load(self._pointer(dtype, row, ahead))
        value.align = dtype.bitwidth // 8
        return self._cast(mark_read(self._builder, value), self._work)

    def load_field(self, dtype: Any, row: Any) -> Any:
        """The vector of a row that ends with the field, in the field's type."""
        if self._mask is None:
            value = self._builder.load(self._pointer(dtype, row, 0))
            value.align = dtype.bitwidth // 8
        else:
            vector = self._vector(dtype)
            others = constant(vector, 1.0)  # in masked lanes
            args = [self._pointer(dtype, row, 0), _alignment(dtype), self._mask, others]
            value = self._masked("load", vector, args, vector)
        return mark_read(self._builder, value)

    def store(self, dtype: Any, row: Any, value: Any) -> None:
        """Write a row's vector, rounded to `dtype`; no lane is masked."""
        rounded = self._cast(value, self._vector(dtype))
        stored = self._builder.store(rounded, self._pointer(dtype, row, 0))
        stored.align = dtype.bitwidth // 8
        mark_written(self._builder, stored)

    def store_field(self, dtype: Any, row: Any, value: Any) -> None:
        """Write the vector of a row that ends with the field."""
        if self._mask is None:
            self.store(dtype, row, value)
            return
        rounded = self._cast(value, self._vector(dtype))
        args = [rounded, self._pointer(dtype, row, 0), _alignment(dtype), self._mask]
        mark_written(self._builder, self._masked("store", rounded.type, args, ir.VoidType()))

    def load_for_work(self, dtype: Any, row: Any) -> Any:
        """As `load_field`, in the working type."""
        return self._cast(self.load_field(dtype, row), self._work)

    def fetch(self, dtype: Any, row: Any, ahead: Any) -> None:
        """Have the values that lie `ahead` of a row's vector brought to the cache."""
        pointer = self._builder.inttoptr(row, self._context.get_value_type(dtype).as_pointer())
        place = self._builder.add(self._place, ahead)
        byte = self._builder.bitcast(self._builder.gep(pointer, [place]), _BYTE.as_pointer())
        module, name = self._builder.module, "llvm.prefetch.p0"
        function = module.globals.get(name) or ir.Function(
            module,
            ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INDEX, _INDEX, _INDEX]),
            name,
        )
        to_read, keep, data = (ir.Constant(_INDEX, flag) for flag in (0, 3, 1))
        self._builder.call(function, [byte, to_read, keep, data])

    def between(self, low: Any, high: Any, shift: int) -> Any:
        """The vector that begins `shift` lanes after `low`, which `high` follows."""
        lanes = [ir.Constant(_INDEX, shift + i) for i in range(self.lanes)]
        order = ir.Constant(ir.VectorType(_INDEX, self.lanes), lanes)
        return self._builder.shuffle_vector(low, high, order)

    def moved(self, rule: Any, share: Any, field: Any, rows: tuple[Any, Any], smooth: Any) -> Any:
        """The field's vector after a step, see `rows.moved`; `rows` are its and the share's."""
        centre, part = rows
        if isinstance(share, types.Array):
            smooth = self._builder.fdiv(smooth, self.load_for_work(share.dtype, part))
        if len(rule) == 0:
            return smooth
        smooth = self._cast(smooth, self._vector(field))
        return moved_value(self._builder, rule, self.load_field(field, centre), smooth)

    def _vector(self, dtype: Any) -> Any:
        return ir.VectorType(self._context.get_value_type(dtype), self.lanes)

    def _splat(self, value: Any) -> Any:
        vector = ir.VectorType(value.type, self.lanes)
        nothing = ir.Constant(vector, ir.Undefined)
        one = self._builder.insert_element(nothing, value, ir.Constant(_INDEX, 0))
        return self._builder.shuffle_vector(
            one, nothing, ir.Constant(ir.VectorType(_INDEX, self.lanes), None)
        )

    def _pointer(self, dtype: Any, row: Any, ahead: int) -> Any:
        pointer = self._builder.inttoptr(row, self._context.get_value_type(dtype).as_pointer())
        place = self._builder.add(self._place, ir.Constant(_WORD, ahead))
        pointer = self._builder.gep(pointer, [place])
        return self._builder.bitcast(pointer, self._vector(dtype).as_pointer())

    def _masked(self, what: str, vector: Any, args: list[Any], result: Any) -> Any:
        name = f"llvm.masked.{what}.v{self.lanes}{vector.element.intrinsic_name}.p0"
        module = self._builder.module
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(result, [arg.type for arg in args]), name
        )
        return self._builder.call(function, args)

    def _cast(self, value: Any, wanted: Any) -> Any:
        before, after = (_BITS[str(vector.element)] for vector in (value.type, wanted))
        if before < after:
            return self._builder.fpext(value, wanted)
        return self._builder.fptrunc(value, wanted) if before > after else value


def _alignment(dtype: Any) -> Any:
    return ir.Constant(_INDEX, dtype.bitwidth // 8)


def _count(kind: Any, value: Any) -> Any:
    """How many lanes lie within the field; None, all of them, where it is a tuple."""
    return value if isinstance(kind, types.Integer) else None


@intrinsic
def smooth_across(
    _: Any,
    field: Any,
    sources: Any,
    ahead: Any,
    work: Any,
    targets: Any,
    weights: Any,
    x: Any,
    count: Any,
) -> Any:
    """Smooth `BATCH` neighbouring rows of `work`'s type across the field's rows in `sources`.

    What lies `ahead` values further is wanted soon.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, work.dtype, args[6], _count(count, args[7]))
        source, target = vectors.rows(sources, args[1]), vectors.rows(targets, args[4])
        radius = len(weights)
        taps = vectors.weights(args[5], radius)
        for b in range(BATCH):
            vectors.fetch(field.dtype, source(2 * radius + b), args[2])
        values = [vectors.load_for_work(field.dtype, source(i)) for i in range(BATCH + 2 * radius)]
        for b in range(BATCH):
            own = values[b : b + 2 * radius + 1]
            smooth = _sum_of_taps(builder, taps, partial(_at, own))
            vectors.store(work.dtype, target(b), smooth)
        return context.get_dummy_value()

    return types.void(field, sources, ahead, work, targets, weights, x, count), generate


def _smoothed_along(vectors: _Vectors, builder: Any, like: Any, row: Any, taps: list[Any]) -> Any:
    """A row's vector, smoothed along the row.

    Loads that cross a cache line take twice as long, and shuffles have a unit of their own: every
    other neighbour is loaded, the rest is made of whole lines.
    """
    lines: dict[int, Any] = {}

    def line(number: int) -> Any:
        if number not in lines:
            lines[number] = vectors.load(like.dtype, row, number * vectors.lanes)
        return lines[number]

    def value(distance: int) -> Any:
        number, shift = divmod(distance, vectors.lanes)
        if shift == 0:
            return line(number)
        if distance % 2:
            return vectors.load(like.dtype, row, distance)
        return vectors.between(line(number), line(number + 1), shift)

    return _sum_of_taps(builder, taps, value)


@intrinsic
def smooth_along(_: Any, like: Any, row: Any, target: Any, weights: Any, x: Any) -> Any:
    """Smooth a row of `like`'s type along itself, into `target`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, like.dtype, args[4], None)
        taps = vectors.weights(args[3], len(weights))
        smooth = _smoothed_along(vectors, builder, like, args[1], taps)
        vectors.store(like.dtype, args[2], smooth)
        return context.get_dummy_value()

    return types.void(like, row, target, weights, x), generate


@intrinsic
def move_along(
    _: Any,
    like: Any,
    row: Any,
    field: Any,
    out: Any,
    places: Any,
    share: Any,
    weights: Any,
    rule: Any,
    x: Any,
    count: Any,
) -> Any:
    """As `smooth_along`, and the field's row moved; `places` are its address, the result's, and
    that of the share."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, like.dtype, args[8], _count(count, args[9]))
        old, new, part = (builder.extract_value(args[4], i) for i in range(3))
        taps = vectors.weights(args[6], len(weights))
        smooth = _smoothed_along(vectors, builder, like, args[1], taps)
        moved = vectors.moved(rule, share, field.dtype, (old, part), smooth)
        vectors.store_field(out.dtype, new, moved)
        return context.get_dummy_value()

    return types.void(like, row, field, out, places, share, weights, rule, x, count), generate


@intrinsic
def move_across(
    _: Any,
    like: Any,
    sources: Any,
    field: Any,
    out: Any,
    tables: Any,
    share: Any,
    weights: Any,
    rule: Any,
    x: Any,
    count: Any,
) -> Any:
    """Smooth across rows of `like`'s type, and move `BATCH` rows of the field; `tables` hold the
    addresses of the results, of the field's rows, and of the shares."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, like.dtype, args[8], _count(count, args[9]))
        source = vectors.rows(sources, args[1])
        target, centre, part = (
            vectors.rows(kind, builder.extract_value(args[4], i)) for i, kind in enumerate(tables)
        )
        radius = len(weights)
        taps = vectors.weights(args[6], radius)
        values = [vectors.load(like.dtype, source(i)) for i in range(BATCH + 2 * radius)]
        for b in range(BATCH):
            own = values[b : b + 2 * radius + 1]
            smooth = _sum_of_taps(builder, taps, partial(_at, own))
            moved = vectors.moved(rule, share, field.dtype, (centre(b), part(b)), smooth)
            vectors.store_field(out.dtype, target(b), moved)
        return context.get_dummy_value()

    return types.void(like, sources, field, out, tables, share, weights, rule, x, count), generate
