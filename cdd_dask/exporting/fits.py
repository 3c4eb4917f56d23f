"""FITS files: the source's header with the channel's own type, shape and place."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from cdd_dask.errors import MissingDependencyError, StoreError
from cdd_dask.exporting.base import Layout, Output, ascii_text

RECORD = 2880
"""A FITS file's header and data are padded to whole records of so many bytes."""
HISTORY = 72
"""Characters of a card of history."""

REPLACED = re.compile(
    r"SIMPLE|XTENSION|BITPIX|NAXIS\d*|EXTEND|INHERIT|PCOUNT|GCOUNT|GROUPS|BLOCKED"
    r"|BSCALE|BZERO|BLANK|DATAMIN|DATAMAX|CHECKSUM|DATASUM"
    r"|TFIELDS|THEAP|T(TYPE|FORM|UNIT|NULL|SCAL|ZERO|DISP|DIM|BCOL)\d+"
    r"|Z(IMAGE|SIMPLE|TENSION|BITPIX|NAXIS\d*|EXTEND|PCOUNT|GCOUNT|BLOCKED|TILE\d+|CMPTYPE"
    r"|NAME\d+|VAL\d+|QUANTIZ|DITHER0|MASKCMP|BLANK|SCALE|ZERO|HECKSUM|DATASUM)"
    r"|CDD(CHAN|LOW|HIGH|UNIT)"
)
"""Cards that tell of the source's type, shape, values or compression: a channel has its own."""

WORLD = re.compile(
    r"(?:CTYPE|CUNIT|CRVAL|CRPIX|CDELT|CROTA|CNAME)\d+([A-Z]?)|(?:PC|CD|PV|PS)\d+_\d+([A-Z]?)"
)
"""Cards of a world coordinate system; the letter tells alternative ones apart."""


def create(path: Path, output: Output) -> Layout:
    """Make the FITS file at `path`, without its voxels.

    Raises
    ------
    MissingDependencyError
        If astropy is not installed.
    StoreError
        If what the store remembers of the source's header cannot be used.
    """
    text = image_header(output).tostring().encode("ascii")
    with path.open("xb") as file:
        file.write(text)
        file.truncate(len(text) + -(-output.nbytes // RECORD) * RECORD)
    axes = tuple(range(len(output.shape)))
    return Layout(len(text), output.dtype.newbyteorder(">"), axes)


def import_fits() -> Any:
    """The module `astropy.io.fits`."""
    try:
        from astropy.io import fits
    except ImportError as error:
        raise MissingDependencyError(
            'writing FITS files needs astropy: pip install "cdd-dask[fits]"'
        ) from error
    return fits


def image_header(output: Output) -> Any:
    """The header of the file: structure, the source's cards, scales, history."""
    fits = import_fits()
    kept = _kept_axes(output)
    header = fits.Header()
    header["SIMPLE"] = True, "conforms to FITS standard"
    header["BITPIX"] = -8 * output.dtype.itemsize, "array data type"
    header["NAXIS"] = len(kept), "number of array dimensions"
    for number, axis in reversed(list(zip(range(len(kept), 0, -1), kept, strict=True))):
        header[f"NAXIS{number}"] = 1 if axis is None else output.shape[axis]
    header["EXTEND"] = True
    text = str(output.attributes["source"].get("header"))
    # another kind of source may have left another kind of text
    known = text.startswith(("SIMPLE", "XTENSION"))
    for card in (_parsed(fits, text) if known else _simple_world(fits, output)).cards:
        if not REPLACED.fullmatch(card.keyword):
            header.append(card, useblanks=False, end=True)
    _shift(header, output, kept)
    _append_scales(header, output)
    return header


def _parsed(fits: Any, text: str) -> Any:
    try:
        header = fits.Header.fromstring(text, sep="\n")
        header.tostring().encode("ascii")  # cards are not looked at before
    except (ValueError, TypeError, AttributeError, fits.VerifyError) as error:
        raise StoreError(f"the source's FITS header in the store is damaged: {error}") from error
    return header


def _kept_axes(output: Output) -> list[int | None]:
    """The file's axes in NumPy's order: the store's axis each is, None for one left out.

    The store leaves axes of length 1 out, and the exported file has them again::

        file_shape  (1, 60, 1, 80)   →   [None, 0, None, 1]   for a store of 60 × 80
    """
    shape, full = output.array.shape, output.attributes["source"].get("file_shape")
    if not full:
        return list(range(len(shape)))
    kept: list[int | None] = []
    axis = 0
    for size in full:
        here = axis < len(shape) and size == shape[axis]
        if not here and size != 1:
            break
        kept.append(axis if here else None)
        axis += here
    if axis < len(shape) or len(kept) < len(full):
        raise StoreError(f"the source's file_shape {full} in the store does not fit {shape}")
    return kept


def _simple_world(fits: Any, output: Output) -> Any:
    """A linear world that counts from the volume's first voxel."""
    header = fits.Header()
    spacing = output.spacing or (1.0,) * len(output.shape)
    axes = zip(
        reversed(output.dimension_names), reversed(spacing), reversed(output.units), strict=True
    )
    for number, (name, step, unit) in enumerate(axes, start=1):
        # a longer name may be one that FITS gives a meaning of its own, like LAT or FREQ
        kind = name.upper() if re.fullmatch("[A-Za-z]", name) else "LINEAR"
        header[f"CTYPE{number}"] = kind, f"axis {ascii_text(name)}"[:40]
        known = None if output.spacing is None else _fits_unit(unit)
        if known is not None:
            header[f"CUNIT{number}"] = known
        header[f"CRPIX{number}"], header[f"CRVAL{number}"] = 1.0, 0.0
        header[f"CDELT{number}"] = step
    return header


def _fits_unit(unit: str | None) -> str | None:
    """`unit` as FITS spells it; None where it has no word for it."""
    from astropy.units import Unit

    if unit is None:
        return None
    try:
        spelt: str = Unit(unit).to_string("fits")
    except (ValueError, TypeError):
        return None
    return spelt


def _shift(header: Any, output: Output, kept: list[int | None]) -> None:
    """Move the reference pixel of every world by where the region starts."""
    found = [WORLD.fullmatch(keyword) for keyword in header]
    worlds = {"", *("".join(match.groups("")) for match in found if match)}
    for number, axis in zip(range(len(kept), 0, -1), kept, strict=True):
        start = 0 if axis is None else output.region[axis].start
        for world in sorted(worlds) if start else ():
            keyword = f"CRPIX{number}{world}"
            try:
                # where there is none, it is 0
                header[keyword] = float(header.get(keyword, 0.0)) - start
            except (TypeError, ValueError) as error:
                raise StoreError(f"{keyword} of the source's header is no number") from error


def _append_scales(header: Any, output: Output) -> None:
    low, high = output.scales
    channel = "residual" if output.number is None else output.number
    unit = _fits_unit(output.unit) or ascii_text(output.unit)
    cards: list[tuple[str, Any, str]] = [
        ("CDDCHAN", channel, "channel of the decomposition"),
        ("CDDLOW", low, "smallest scale of the channel"),
        ("CDDUNIT", unit, "unit of the scales"),
    ]
    if high is not None:
        cards.insert(2, ("CDDHIGH", high, "largest scale of the channel"))
    for card in cards:
        header.append(card, useblanks=False, end=True)
    for note in output.notes():
        for line in textwrap.wrap(note, HISTORY, break_on_hyphens=False):
            header.add_history(line)
