"""What decides a result: the parameters of a decomposition, checked when made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np

from cdd_dask.addresses import UNPRINTABLE
from cdd_dask.errors import InputError

MODES = ("log", "lin")
KERNELS = ("discrete", "sampled")
BOUNDARIES = ("reflect", "mirror", "nearest", "wrap", "constant")
DTYPES = ("float32", "float64")
BLANKS = ("mask", "raise", "fill")
UPSAMPLINGS = (1, 2, 4)
LONGEST_UNIT = 100
"""Characters of a unit's name."""
MAX_NDIM = 4
LARGEST = {"float32": 4.2e37, "float64": 2.2e307}
"""Largest absolute value of a field: sums and differences with a few others stay finite."""
SWITCH_SCALE = 5.0
"""Default of `switch_scale`, in units of the smallest spacing."""


@dataclass(frozen=True)
class Parameters:
    """Everything that decides a decomposition's values.

    Raises
    ------
    InputError
        If a value is out of its bounds; the message says which.
    """

    min_scale: float | None = None
    """First scale edge; None is the smallest spacing (1 voxel)."""
    max_scale: float | None = None
    """Largest scale that an edge may reach; None is half of the largest decomposed axis."""
    num_channels: int | None = None
    """Number of channels in log mode; given, it decides the edges instead of `max_scale`."""
    mode: str = "log"
    """Spacing of the scale edges: ``log`` (a constant ratio) or ``lin`` (a constant step)."""
    log_scale_base: float = 2.0
    """Ratio of one edge to the one before, log mode."""
    linear_scale_step: float | None = None
    """Distance of one edge to the one before, lin mode."""
    e_rel: float = 3e-2
    """Largest step in time relative to the time where a channel begins; part of the method."""
    constrained: bool = True
    """Apply the sign constraint after every smoothing step."""
    inverted: bool = False
    """Invert the constraint: positive voxels may only grow. Counts only when constrained."""
    crossing: bool = False
    """Let voxels cross zero within a step, as the package ``constrained-diffusion`` does. Counts
    only when constrained and not inverted."""
    kernel: str = "discrete"
    """Smoothing kernel: ``discrete`` (Lindeberg's) or ``sampled`` (a sampled Gaussian)."""
    boundary: str = "reflect"
    """Extension beyond the volume, with the meaning of `scipy.ndimage`'s ``mode``."""
    cval: float = 0.0
    """Value beyond the volume for ``boundary="constant"``, in the field's unit."""
    rtol: float = 1e-3
    """Error allowed by cutting into blocks, relative to the field's range; 0: bit-identical."""
    dtype: str = "float32"
    """Working type of the field: ``float32`` or ``float64``."""
    axes: tuple[int, ...] | None = None
    """Axes to decompose along, each slice across the others by itself; None is all."""
    spacing: tuple[float, ...] | float | str | None = None
    """Distance of neighbouring voxels along every axis of the volume, in `unit`: scales are then
    in `unit` too. One number is for all axes, ``header`` takes what the source states; None
    counts in voxels."""
    unit: str | None = None
    """Unit of `spacing` and of all scales, for example ``µm``."""
    nan: str = "mask"
    """Blank (NaN) voxels: ``mask`` (they take no part), ``raise`` or ``fill``."""
    fill_value: float = 0.0
    """What blank voxels become with ``nan="fill"``, in the field's unit."""
    upsample: int = 1
    """Cells per voxel and axis, 1, 2 or 4, of the grid that computes edges up to
    `switch_scale`."""
    switch_scale: float | None = None
    """Largest edge that is computed on the refined grid; None is 5 times the smallest spacing."""

    def __post_init__(self) -> None:
        dtype: Any = self.dtype
        if not isinstance(dtype, str):  # np.float32, or an array's dtype
            name = getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)
            object.__setattr__(self, "dtype", name)
        for name, allowed in (
            ("mode", MODES),
            ("kernel", KERNELS),
            ("boundary", BOUNDARIES),
            ("dtype", DTYPES),
            ("nan", BLANKS),
        ):
            check_choice(name, getattr(self, name), allowed)
        for name in ("constrained", "inverted", "crossing"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        for name in ("min_scale", "max_scale", "linear_scale_step", "switch_scale"):
            if getattr(self, name) is not None:
                self._check_number(name, above=0.0)
        self._check_number("log_scale_base", above=1.0)
        self._check_number("e_rel", above=0.0)
        self._check_number("cval")
        self._check_number("rtol", at_least=0.0)
        self._check_number("fill_value")
        for name in ("fill_value", "cval"):
            if abs(value := getattr(self, name)) > LARGEST[self.dtype]:
                raise InputError(
                    f"{name}={value:g} is too large for dtype={self.dtype!r}: it must be "
                    f"within ±{LARGEST[self.dtype]:.3g}"
                )
        upsample: Any = self.upsample
        whole = isinstance(upsample, Integral) and not isinstance(upsample, bool)
        if not whole or upsample not in UPSAMPLINGS:
            raise InputError(f"upsample={upsample!r} must be 1, 2 or 4")
        object.__setattr__(self, "upsample", int(upsample))
        self._check_axes()
        self._check_spacing()
        self._check_edges()

    def _check_number(
        self, name: str, *, above: float = -math.inf, at_least: float = -math.inf
    ) -> None:
        number = check_number(name, getattr(self, name), above=above, at_least=at_least)
        object.__setattr__(self, name, number)

    def _check_axes(self) -> None:
        if self.axes is None:
            return
        given = self.axes if isinstance(self.axes, Iterable) else (self.axes,)
        axes = tuple(given)
        if not axes or any(isinstance(a, bool) or not isinstance(a, Integral) for a in axes):
            raise InputError(f"axes={self.axes!r} must be numbers of axes, for example (1, 2)")
        object.__setattr__(self, "axes", tuple(map(int, axes)))

    def _check_spacing(self) -> None:
        spacing: Any = self.spacing
        unit: Any = self.unit
        if unit is not None and not (
            isinstance(unit, str)
            and unit.strip()
            and len(unit) <= LONGEST_UNIT
            and not UNPRINTABLE.search(unit)
        ):
            raise InputError(f'unit={unit!r:.80} must be the name of a unit, for example "µm"')
        if spacing is None:
            if self.unit is not None:
                raise InputError(
                    f"unit={self.unit!r} without spacing: give the spacing of the voxels in it, "
                    'or spacing="header"'
                )
        elif isinstance(spacing, str):
            if spacing != "header":
                raise InputError(
                    f'spacing={spacing!r} must be "header", or a number for every axis'
                )
        elif isinstance(spacing, Iterable):
            sides = tuple(check_number("spacing", side, above=0.0) for side in spacing)
            object.__setattr__(self, "spacing", sides)
        else:
            self._check_number("spacing", above=0.0)

    def _check_edges(self) -> None:
        count = self.num_channels
        if self.mode == "lin":
            if count is not None:
                raise InputError(
                    f"num_channels={count!r} has no meaning in mode='lin': "
                    "give max_scale and linear_scale_step instead"
                )
            if self.linear_scale_step is None:
                raise InputError("mode='lin' needs linear_scale_step > 0, in voxels")
        elif self.linear_scale_step is not None:
            raise InputError(
                f"linear_scale_step={self.linear_scale_step!r} has no meaning in mode='log': "
                "give log_scale_base, or mode='lin'"
            )
        if count is not None:
            object.__setattr__(self, "num_channels", check_count("num_channels", count))
        # where min_scale depends on the spacing, `scale_edges` compares the two
        low = 1.0 if self.min_scale is None and self.spacing is None else self.min_scale
        if self.max_scale is not None and low is not None and self.max_scale <= low:
            raise InputError(f"max_scale={self.max_scale:g} must be larger than min_scale={low:g}")

    def decomposed_axes(self, ndim: int) -> tuple[int, ...]:
        """Numbers of the axes to decompose along, ascending, for a volume of `ndim` axes.

        Raises
        ------
        InputError
            If `axes` names one that is not there, or one twice.
        """
        if self.axes is None:
            return tuple(range(ndim))
        numbers = [axis + ndim if axis < 0 else axis for axis in self.axes]
        if not all(0 <= axis < ndim for axis in numbers):
            raise InputError(
                f"axes={self.axes} must lie within 0 … {ndim - 1}: the volume has {ndim} axes"
            )
        if len(set(numbers)) < len(numbers):
            raise InputError(f"axes={self.axes} names an axis twice")
        return tuple(sorted(numbers))

    def voxel_spacing(self, ndim: int) -> tuple[float, ...]:
        """Spacing along every axis of a volume of `ndim` axes, 1 where scales are in voxels.

        Raises
        ------
        InputError
            If `spacing` has another number of axes.
        """
        if self.spacing is None:
            return (1.0,) * ndim
        if isinstance(self.spacing, str):
            raise InputError(
                'spacing="header" needs a source that states its spacing: give the numbers'
            )
        if isinstance(self.spacing, float):
            return (self.spacing,) * ndim
        spacing: Any = self.spacing
        if len(spacing) != ndim:
            raise InputError(
                f"spacing={spacing} has {len(spacing)} values, but the volume has {ndim} axes: "
                "give one number, or one for every axis, also for those not in axes="
            )
        return tuple(spacing)

    def ulp(self, largest: float) -> float:
        """Unit in the last place of all values, where the field's absolute ones reach `largest`.

        Beyond the faces there is `cval`, which the smoothing mixes in.
        """
        beyond = abs(self.cval) if self.boundary == "constant" else 0.0
        return float(np.spacing(np.array(max(largest, beyond), self.dtype)))

    def smallest_spacing(self, ndim: int) -> float:
        """The smallest spacing along the axes that are decomposed."""
        spacing = self.voxel_spacing(ndim)
        return min(spacing[axis] for axis in self.decomposed_axes(ndim))

    def resolved(self, ndim: int) -> Parameters:
        """The same with every axis and every spacing spelled out, where some are given."""
        return replace(
            self,
            axes=self.axes and self.decomposed_axes(ndim),
            spacing=self.spacing and self.voxel_spacing(ndim),
        )

    @property
    def scale_unit(self) -> str:
        """What scales are counted in, for people."""
        return self.unit or ("voxels" if self.spacing is None else "units of spacing")

    @property
    def constraint(self) -> str:
        """The rule a step applies, see `engines.Engine`."""
        if not self.constrained:
            return "unconstrained"
        return "inverted" if self.inverted else "crossing" if self.crossing else "constrained"

    @property
    def itemsize(self) -> int:
        """Bytes per voxel of the working field."""
        return 4 if self.dtype == "float32" else 8

    def as_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return asdict(self)

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Parameters:
        """From what `as_dict` gives. Before there was a choice, all runs let voxels cross zero."""
        return cls(**{"crossing": True, **values})


def check_number(
    name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf
) -> float:
    """The `value` of the argument `name`, which must be a finite number within its bound."""
    bound = f"> {above:g}" if above > -math.inf else f">= {at_least:g}"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}={value!r} is no number") from None
    if isinstance(value, bool | str) or not math.isfinite(number):
        raise InputError(f"{name}={value!r} must be a finite number")
    if number <= above or number < at_least:
        raise InputError(f"{name}={value!r} must be {bound}")
    return number


def check_count(name: str, value: Any, least: int = 1) -> int:
    """The `value` of the argument `name`, which must be a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number >= {least}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """The `value` of the argument `name`, which must be True or False: a word is always true."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name}={value!r} must be True or False")
    return bool(value)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a `value` of the argument `name` that is not one of `allowed`."""
    if value not in allowed:
        raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}")
