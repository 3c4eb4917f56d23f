"""Names of units, one for each."""

from __future__ import annotations

from cdd_dask.addresses import UNPRINTABLE
from cdd_dask.parameters import LONGEST_UNIT

PLAIN = {
    "angstrom": "Å", "nanometer": "nm", "nanometre": "nm", "micrometer": "µm",
    "micrometre": "µm", "micron": "µm", "microns": "µm", "um": "µm", "\u03bcm": "µm",
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm",
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "parsec": "pc",
    "second": "s", "sec": "s", "millisecond": "ms", "msec": "ms", "minute": "min", "hour": "h",
    "degree": "deg", "degrees": "deg",
    "": None, "pixel": None, "pixels": None, "voxel": None, "inch": "in", "unknown": None,
    "dimensionless": None, "1": None,
}  # fmt: skip
"""What files call units, and what we call them; None is no unit."""


def plain_unit(name: object) -> str | None:
    """The unit that a file calls `name`, always under the same name.

    Examples
    --------
    >>> plain_unit("micrometer"), plain_unit("km/s"), plain_unit("pixel")
    ('µm', 'km/s', None)
    """
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name or "")
    text = text.strip().rstrip("\0").replace("\\u00B5", "µ")
    if UNPRINTABLE.search(text) or len(text) > LONGEST_UNIT:
        return None
    return PLAIN.get(text.lower() if len(text) > 3 else text, text)
