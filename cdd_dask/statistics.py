"""Statistics of a field, gathered block by block, and how far two of them are apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 1 << 14
"""Values whose sums are taken at once: few enough for the cache."""


def difference(values: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """Absolute differences; none where both are blank, infinite where one is.

    Examples
    --------
    >>> difference(np.array([1.0, np.nan, np.nan]), np.array([3.0, np.nan, 0.0])).tolist()
    [2.0, 0.0, inf]
    """
    off: NDArray[np.float64] = np.abs(values.astype(np.float64) - others)
    off[np.isnan(off)] = np.inf
    off[np.isnan(values) & np.isnan(others)] = 0.0
    return off


@dataclass(frozen=True)
class Statistics:
    """Sums and extremes of a region's values, in float64; those of disjoint regions add up.

    Blank (NaN) voxels do not count; where all are, the extremes are infinite.

    Examples
    --------
    >>> both = Statistics.of(np.array([1.0, -2.0])) + Statistics.of(np.array([4.0]))
    >>> both.count, both.sum, both.sum_abs, both.min, both.max, both.negative
    (3, 3.0, 7.0, -2.0, 4.0, 1)
    """

    count: int
    sum: float
    sum_abs: float
    sum_squares: float
    min: float
    max: float
    negative: int | None
    """How many are below zero; None where it was not counted, in stores of earlier versions."""

    @staticmethod
    def of(values: NDArray[Any]) -> Statistics:
        """The statistics of an array that is not empty."""
        flat = values.reshape(-1)
        found, buffer = Statistics(0, 0.0, 0.0, 0.0, math.inf, -math.inf, 0), np.empty(AT_ONCE)
        for start in range(0, flat.size, AT_ONCE):
            part = flat[start : start + AT_ONCE]
            low, high = float(part.min()), float(part.max())
            if math.isnan(low):
                part = part[~np.isnan(part)]
                low, high = float(part.min(initial=np.inf)), float(part.max(initial=-np.inf))
            negative = int(np.count_nonzero(part < 0)) if low < 0 else 0
            exact = buffer[: part.size]
            exact[...] = part
            with np.errstate(over="ignore", invalid="ignore"):  # of values near the largest
                total, squares = float(exact.sum()), float(np.einsum("i,i->", exact, exact))
                total_abs = float(np.abs(exact, out=exact).sum())
            found += Statistics(part.size, total, total_abs, squares, low, high, negative)
        return found

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            count=self.count + other.count,
            sum=self.sum + other.sum,
            sum_abs=self.sum_abs + other.sum_abs,
            sum_squares=self.sum_squares + other.sum_squares,
            min=min(self.min, other.min),
            max=max(self.max, other.max),
            negative=_sum(self.negative, other.negative),
        )

    def agrees_with(self, other: Statistics, off: float) -> bool:
        """Whether both could be of the same values, but for errors of at most `off` each."""
        if self.count != other.count or not self.count:
            return self.count == other.count
        of_squares = 2 * off * other.sum_abs + self.count * off**2
        return (
            max(abs(self.min - other.min), abs(self.max - other.max)) <= off
            and abs(self.sum - other.sum) <= self.count * off
            and abs(self.sum_squares - other.sum_squares) <= of_squares
        )

    def as_dict(self) -> dict[str, Any]:
        """The statistics as plain JSON values; no extremes where nothing counted."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return known | ({} if self.count else {"min": None, "max": None})

    @staticmethod
    def of_dict(values: dict[str, Any]) -> Statistics:
        """The statistics of what `as_dict` made.

        Examples
        --------
        >>> blank = Statistics.of(np.array([np.nan]))
        >>> Statistics.of_dict(blank.as_dict()) == blank
        True
        """
        low, high = values["min"], values["max"]
        return Statistics(
            count=int(values["count"]),
            sum=float(values["sum"]),
            sum_abs=float(values["sum_abs"]),
            sum_squares=float(values["sum_squares"]),
            min=np.inf if low is None else float(low),
            max=-np.inf if high is None else float(high),
            negative=values.get("negative"),
        )


def _sum(count: int | None, other: int | None) -> int | None:
    return None if count is None or other is None else count + other
