"""What decides a result: the parameters of a decomposition, checked when made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

from cdd_dask.errors import InputError

MODES = ("log", "lin")
KERNELS = ("discrete", "sampled")
BOUNDARIES = ("reflect", "mirror", "nearest", "wrap", "constant")
DTYPES = ("float32", "float64")
MAX_NDIM = 4


@dataclass(frozen=True)
class Parameters:
    """Everything that decides a decomposition's values.

    Raises
    ------
    InputError
        If a value is out of its bounds; the message says which.
    """

    min_scale: float | None = None
    """First scale edge in voxels; None is 1 voxel."""
    max_scale: float | None = None
    """Largest scale in voxels that an edge may reach; None is half of the largest axis."""
    num_channels: int | None = None
    """Number of channels in log mode; given, it decides the edges instead of `max_scale`."""
    mode: str = "log"
    """Spacing of the scale edges: ``log`` (a constant ratio) or ``lin`` (a constant step)."""
    log_scale_base: float = 2.0
    """Ratio of one edge to the one before, log mode."""
    linear_scale_step: float | None = None
    """Distance of one edge to the one before in voxels, lin mode."""
    e_rel: float = 3e-2
    """Largest step in time relative to the time where a channel begins; part of the method."""
    constrained: bool = True
    """Apply the sign constraint after every smoothing step."""
    inverted: bool = False
    """Invert the constraint: positive voxels may only grow. Counts only when constrained."""
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
        ):
            check_choice(name, getattr(self, name), allowed)
        for name in ("constrained", "inverted"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("min_scale", "max_scale", "linear_scale_step"):
            if getattr(self, name) is not None:
                self._check_number(name, above=0.0)
        self._check_number("log_scale_base", above=1.0)
        self._check_number("e_rel", above=0.0)
        self._check_number("cval")
        self._check_number("rtol", at_least=0.0)
        self._check_edges()

    def _check_number(
        self, name: str, *, above: float = -math.inf, at_least: float = -math.inf
    ) -> None:
        value = getattr(self, name)
        bound = f"> {above:g}" if above > -math.inf else f">= {at_least:g}"
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{name}={value!r} is no number") from None
        if isinstance(value, bool | str) or not math.isfinite(number):
            raise InputError(f"{name}={value!r} must be a finite number")
        if number <= above or number < at_least:
            raise InputError(f"{name}={value!r} must be {bound}")
        object.__setattr__(self, name, number)

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
        low = 1.0 if self.min_scale is None else self.min_scale
        if self.max_scale is not None and self.max_scale <= low:
            raise InputError(
                f"max_scale={self.max_scale:g} must be larger than min_scale={low:g} (voxels)"
            )

    @property
    def constraint(self) -> str:
        """The rule a step applies: ``constrained``, ``inverted`` or ``unconstrained``."""
        if not self.constrained:
            return "unconstrained"
        return "inverted" if self.inverted else "constrained"

    @property
    def itemsize(self) -> int:
        """Bytes per voxel of the working field."""
        return 4 if self.dtype == "float32" else 8

    def as_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return asdict(self)


def check_count(name: str, value: Any) -> int:
    """The `value` of the argument `name`, which must be a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name}={value!r} must be a whole number >= 1")
    return int(value)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a `value` of the argument `name` that is not one of `allowed`."""
    if value not in allowed:
        raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}")
