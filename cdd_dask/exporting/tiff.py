"""OME-TIFF files: one page per plane, the axes and spacing that microscopists' tools read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cdd_dask.errors import MissingDependencyError
from cdd_dask.exporting.base import Layout, Output

LETTERS = {"z": "Z", "t": "T", "c": "C", "v": "C", "f": "C", "w": "C", "s": "C"}
"""OME's axes for names of ours; to OME, anything spectral is a channel."""

LENGTHS = {
    **{unit: unit for unit in ("km", "m", "cm", "mm", "µm", "nm", "pm", "Å", "pc", "ly", "pixel")},
    "kilometer": "km", "meter": "m", "centimeter": "cm", "millimeter": "mm", "micrometer": "µm",
    "um": "µm", "μm": "µm", "micron": "µm", "nanometer": "nm", "angstrom": "Å", "Angstrom": "Å",
    "parsec": "pc", "lyr": "ly", "au": "ua", "AU": "ua", "pix": "pixel", "voxel": "pixel",
}  # fmt: skip
"""Units of length as OME spells them."""

LARGEST_CLASSIC = 4_000_000_000
"""Bytes that a TIFF file with addresses of 32 bits may have."""
PAGE = 1024
"""Bytes that a page takes besides its voxels, at most."""


def create(path: Path, output: Output) -> Layout:
    """Make the OME-TIFF file at `path`, without its voxels.

    Raises
    ------
    MissingDependencyError
        If tifffile is not installed.
    """
    order, letters = image_axes(output.dimension_names)
    shape = tuple(output.shape[axis] for axis in order)
    size = output.nbytes + PAGE * math.prod(shape[:-2])
    mapped = import_tifffile().memmap(
        path,
        shape=shape,
        dtype=output.dtype,
        ome=True,
        bigtiff=size > LARGEST_CLASSIC,
        photometric="minisblack",
        metadata={
            "axes": letters,
            "Name": output.name,
            "Description": "\n".join(output.notes()),
            **_physical_sizes(output, order, letters),
        },
    )
    return Layout(mapped.offset, output.dtype, order)


def import_tifffile() -> Any:
    """The module `tifffile`."""
    try:
        import tifffile
    except ImportError as error:
        raise MissingDependencyError(
            'writing TIFF files needs tifffile: pip install "cdd-dask[tiff]"'
        ) from error
    return tifffile


def image_axes(names: tuple[str, ...]) -> tuple[tuple[int, ...], str]:
    """The order that OME wants the axes in, and their letters in that order.

    The last two must be Y and X. An axis that OME has no letter for gets one that is free.

    Examples
    --------
    >>> image_axes(("v", "y", "x")), image_axes(("x", "y", "z"))
    (((0, 1, 2), 'CYX'), ((2, 1, 0), 'ZYX'))
    """
    left = list(range(len(names)))
    x = names.index("x") if "x" in names else [a for a in left if names[a] != "y"][-1]
    left.remove(x)
    y = names.index("y") if "y" in names else left[-1]
    left.remove(y)
    letters: dict[int, str] = {}
    for axis in left:
        letter = LETTERS.get(names[axis])
        if letter is not None and letter not in letters.values():
            letters[axis] = letter
    for axis in reversed(left):
        if axis not in letters:
            letters[axis] = next(a for a in "ZTC" if a not in letters.values())
    return (*left, y, x), "".join(letters[axis] for axis in left) + "YX"


def _physical_sizes(output: Output, order: tuple[int, ...], letters: str) -> dict[str, Any]:
    """The spacing of space axes, where it is one of space."""
    if output.spacing is None:
        return {}
    sizes: dict[str, Any] = {}
    for axis, letter in zip(order, letters, strict=True):
        unit = output.units[axis]
        # without a unit OME would read micrometres: its word for an arbitrary one is this
        known = "reference frame" if unit is None else LENGTHS.get(unit)
        if letter in "XYZ" and known is not None:
            sizes[f"PhysicalSize{letter}"] = output.spacing[axis]
            sizes[f"PhysicalSize{letter}Unit"] = known
    return sizes
