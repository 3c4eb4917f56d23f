"""FITS as observatories write it: many HDUs, degenerate axes, scaled integers, every world."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cdd_dask
from cdd_dask.errors import InputError, SourceReadError
from cdd_dask.readers import Source, open_source

fits = pytest.importorskip("astropy.io.fits")
WCS = pytest.importorskip("astropy.wcs").WCS

RNG = np.random.default_rng(0)
IMAGE = RNG.lognormal(size=(12, 17, 19)).astype("float32")
FAST = {"max_scale": 2, "e_rel": 0.3, "progress": False}


def whole(source: Source) -> Any:
    """All values of a source."""
    return source.read(tuple(slice(0, n) for n in source.shape))


def world(ndim: int, **cards: Any) -> Any:
    """A header with a linear world: velocity, declination, right ascension."""
    header = fits.Header()
    axes = [
        ("RA---TAN", "deg", 51.4, -0.0065, 9.0),
        ("DEC--TAN", "deg", 30.75, 0.0065, 8.0),
        ("VRAD", "m/s", 4000.0, 66.4, 6.0),
        ("STOKES", "", 1.0, 1.0, 1.0),
    ]
    for number, (kind, unit, value, step, pixel) in enumerate(axes[:ndim], start=1):
        header[f"CTYPE{number}"], header[f"CUNIT{number}"] = kind, unit
        header[f"CRVAL{number}"], header[f"CDELT{number}"] = value, step
        header[f"CRPIX{number}"] = pixel
    header.update(cards)
    return header


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A file with a table and three images, two of one name."""
    path = tmp_path / "several.fits"
    table = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.ones(3))], name="TAB")
    images = [fits.ImageHDU(IMAGE * (k + 1), name=name) for k, name in enumerate(["SCI", "ERR"])]
    images.append(fits.ImageHDU(IMAGE[:5] * 3, name="SCI", ver=2))
    fits.HDUList([fits.PrimaryHDU(), table, *images]).writeto(path)
    return path


@pytest.mark.parametrize(
    ("part", "factor"),
    [("", 1), ("::2", 1), ("::SCI", 1), ("::sci,1", 1), ("::ERR", 2), ("::3", 2), ("::SCI,2", 3)],
)
def test_an_hdu_by_number_and_by_name(several: Path, part: str, factor: int):
    """Each way of naming an HDU reads that one, and its address opens it again."""
    source = open_source(f"{several}{part}")
    expected = IMAGE[: source.shape[0]] * np.float32(factor)
    assert np.array_equal(whole(source), expected)
    assert source.shape[0] == (5 if factor == 3 else 12)
    assert source.description == f"{several}{part}"
    assert np.array_equal(whole(open_source(source.address)), expected)


@pytest.mark.parametrize("part", ["7", "0", "1", "TAB", "NOPE", "SCI,5", ""])
def test_an_hdu_that_is_no_image(several: Path, part: str):
    """The images that are there are listed, by number and name."""
    with pytest.raises(InputError, match=r"no image in HDU .*2 \(SCI, 12 × 17 × 19\), 3 \(ERR"):
        open_source(f"{several}::{part}")


def test_a_run_over_an_hdu_in_other_processes(several: Path, tmp_path: Path):
    """Tasks open the HDU that was named; output may not go where the file is."""
    out = tmp_path / "out.zarr"
    result = cdd_dask.decompose(
        f"{several}::ERR", out, executor="processes", workers=2, block=10, **FAST
    )
    assert np.allclose(result.reconstruct(), 2 * IMAGE, rtol=1e-6)
    assert cdd_dask.verify(out, progress=False).worst_ulp <= 4
    with pytest.raises(InputError, match="is the source"):
        cdd_dask.decompose(f"{several}::ERR", several, **FAST)


@pytest.mark.parametrize(
    ("full", "kept"),
    [
        ((1, 12, 17, 19), (12, 17, 19)),
        ((1, 1, 12, 1, 17, 19), (12, 17, 19)),
        ((1, 1), (1,)),
    ],
)
def test_degenerate_axes_are_left_out(tmp_path: Path, full: tuple[int, ...], kept: Any):
    """Axes of length 1 do not count; the shape in the file is remembered."""
    fits.writeto(tmp_path / "in.fits", IMAGE[:1, :1, :1].reshape(full) if kept == (1,) else
                 IMAGE.reshape(full))  # fmt: skip
    source = open_source(tmp_path / "in.fits")
    assert (source.shape, source.file_shape) == (kept, full)
    assert np.array_equal(whole(source), IMAGE.reshape(kept) if kept != (1,) else [IMAGE[0, 0, 0]])


def test_names_and_spacing_of_degenerate_axes(tmp_path: Path):
    """What is left keeps its own name and spacing, though FITS counts the other way round."""
    fits.writeto(tmp_path / "in.fits", IMAGE[None], world(4))
    source = open_source(tmp_path / "in.fits")
    assert source.dimension_names == ("v", "y", "x")
    assert source.spacing == pytest.approx((66.4, 0.0065, 0.0065))
    assert source.units == ("m/s", "deg", "deg")


def test_a_round_trip_keeps_world_and_shape(tmp_path: Path):
    """Cube with a Stokes axis → store → FITS: the same axes, the same world, the same values."""
    fits.writeto(tmp_path / "in.fits", IMAGE[None], world(4, BUNIT="K"))
    cdd_dask.decompose(tmp_path / "in.fits", tmp_path / "out.zarr", block=9, **FAST)
    files = cdd_dask.export(tmp_path / "out.zarr", "fits", out=tmp_path / "back", progress=False)
    before = fits.getheader(tmp_path / "in.fits")
    for file in files:
        after = fits.getheader(file)
        assert WCS(after).to_header() == WCS(before).to_header()
        assert [after[f"NAXIS{n}"] for n in (1, 2, 3, 4)] == [19, 17, 12, 1]
        assert after["BUNIT"] == "K"
    total = sum(fits.getdata(file).astype("float64") for file in files)
    assert np.allclose(total, IMAGE[None], rtol=0, atol=4 * np.spacing(IMAGE.max()))


def test_an_export_never_replaces_its_source(several: Path, tmp_path: Path):
    """Not even an HDU of it that was named, and not with `overwrite`."""
    before = several.read_bytes()
    result = cdd_dask.decompose(f"{several}::ERR", tmp_path / "out.zarr", **FAST)
    with pytest.raises(InputError, match="is what was decomposed"):
        cdd_dask.export(result, "fits", out=several, channel=0, overwrite=True, progress=False)
    assert several.read_bytes() == before


INTEGERS = {
    "uint8": np.arange(60, dtype="uint8"),
    "int16": np.arange(60, dtype="int16") - 30,
    "uint16": np.arange(60, dtype="uint16") + 40000,
    "int32": np.arange(60, dtype="int32") * 1000,
    "int64": np.arange(60, dtype="int64"),
    "float32": np.linspace(0, 1, 60, dtype="float32"),
    "float64": np.linspace(0, 1, 60),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_every_type(tmp_path: Path, kind: str):
    """All types that FITS has, and the unsigned ones it fakes by BZERO."""
    values = INTEGERS[kind].reshape(6, 10)
    fits.writeto(tmp_path / "in.fits", values)
    assert np.array_equal(whole(open_source(tmp_path / "in.fits")), values)


def test_scaled_integers(tmp_path: Path):
    """BSCALE and BZERO are applied, and BLANK is compared before."""
    hdu = fits.PrimaryHDU(np.arange(60, dtype="int16").reshape(6, 10))
    hdu.header["BSCALE"], hdu.header["BZERO"], hdu.header["BLANK"] = 0.5, 100.0, 7
    hdu.writeto(tmp_path / "in.fits")
    expected = 0.5 * np.arange(60.0) + 100
    expected[7] = np.nan
    values = whole(open_source(tmp_path / "in.fits"))
    assert np.array_equal(values, expected.reshape(6, 10), equal_nan=True)


@pytest.mark.parametrize("kind", ["RICE_1", "GZIP_1", "HCOMPRESS_1"])
def test_a_compressed_image_is_read_by_tiles(tmp_path: Path, kind: str):
    """Lazily: a region decodes its own tiles. The task opens the file again by its name."""
    values = RNG.integers(0, 1000, (40, 60)).astype("int16")
    hdu = fits.CompImageHDU(values, compression_type=kind, tile_shape=(10, 20), name="COMP")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "in.fits.fz")
    source = open_source(tmp_path / "in.fits.fz")
    assert source.chunk == (10, 20)
    assert np.array_equal(whole(source), values)
    # beyond the faces positions count modulo the shape
    region = (slice(35, 45), slice(-3, 5))
    expected = np.pad(values, 10, "wrap")[45:55, 7:15]
    assert np.array_equal(source.read(region), expected)
    result = cdd_dask.decompose(tmp_path / "in.fits.fz", tmp_path / "out.zarr", block=25, **FAST)
    assert np.allclose(result.reconstruct(), values, rtol=1e-6)


def test_a_damaged_tile(tmp_path: Path):
    """One line that names the file, when the tile is met."""
    values = RNG.integers(0, 1000, (40, 60)).astype("int16")
    hdu = fits.CompImageHDU(values, compression_type="GZIP_1")
    path = tmp_path / "in.fits"
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"\x1f\x8b", 2880)  # the first tile
    content[start + 10 :] = bytes(len(content) - start - 10)
    path.write_bytes(content)
    with pytest.raises(SourceReadError, match=r"in\.fits"):
        whole(open_source(path))


@pytest.mark.parametrize("matrix", ["cd", "pc", "cdelt", "crota"])
def test_spacing_of_every_world(tmp_path: Path, matrix: str):
    """CDELT, a rotated CD or PC matrix: pixels keep their size, 0.01 by 0.02 degrees."""
    header, turn = world(2), np.deg2rad(30)
    for number, step in ((1, 0.01), (2, 0.02)):
        header[f"CDELT{number}"] = step
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    if matrix == "cd":
        del header["CDELT?"]
    for i, j in np.ndindex(2, 2):
        if matrix == "cd":
            header[f"CD{i + 1}_{j + 1}"] = (rotation * [0.01, 0.02])[i, j]
        elif matrix == "pc":
            # the steps belong to the world's axes, so the matrix holds their ratio
            header[f"PC{i + 1}_{j + 1}"] = (rotation * [[1, 2], [0.5, 1]])[i, j]
    fits.writeto(tmp_path / "in.fits", IMAGE[0], header)
    source = open_source(tmp_path / "in.fits")
    assert source.spacing == pytest.approx((0.02, 0.01), rel=1e-9)
    assert source.units == ("deg", "deg")


@pytest.mark.parametrize(
    "cards", [{"CTYPE1": "RA---XXX", "CTYPE2": "GLAT-TAN"}, {"CDELT1": 0.0}, {"CUNIT1": "furlong"}]
)
def test_a_broken_world_keeps_nothing_from_being_read(tmp_path: Path, cards: dict[str, Any]):
    """No spacing then, and no warning of a parser either."""
    fits.writeto(tmp_path / "in.fits", IMAGE[0], world(2, **cards), output_verify="ignore")
    source = open_source(tmp_path / "in.fits")
    assert source.spacing is None
    assert np.array_equal(whole(source), IMAGE[0])


def test_no_world_no_spacing(tmp_path: Path):
    """A header without steps states none, rather than 1."""
    fits.writeto(tmp_path / "in.fits", IMAGE)
    source = open_source(tmp_path / "in.fits")
    assert (source.spacing, source.units) == (None, None)
    with pytest.raises(InputError, match=r"spacing=.header., but .* states no spacing"):
        cdd_dask.plan(tmp_path / "in.fits", spacing="header")


def test_spacing_from_the_header(fits_cube: Path, tmp_path: Path):
    """Velocity and sky do not mix; along the sky's axes scales are in degrees."""
    with pytest.raises(InputError, match=r"different units \(axis 0: m/s, axis 1: deg, .*axes="):
        cdd_dask.plan(fits_cube, spacing="header")
    options = {"spacing": "header", "axes": (1, 2), "e_rel": 0.3, "progress": False}
    result = cdd_dask.decompose(fits_cube, tmp_path / "out.zarr", num_channels=2, **options)
    assert result.scales == pytest.approx([0.0065, 0.013])
    assert result.unit == "deg"
    assert "scales (deg)" in result.table()
    assert "states a spacing of 66.4 m/s × 0.0065 deg × 0.0065 deg" in repr(result)
    plain = cdd_dask.decompose(fits_cube, axes=(1, 2), num_channels=2, e_rel=0.3, progress=False)
    for ours, theirs in zip(result.channels, plain.channels, strict=True):
        assert np.allclose(ours[:], theirs[:], rtol=0, atol=1e-6 * np.abs(theirs[:]).max())
    with pytest.raises(InputError, match=r"unit='arcsec', but .* states its spacing in 'deg'"):
        cdd_dask.plan(fits_cube, unit="arcsec", spacing="header", axes=(1, 2))


@pytest.mark.parametrize(
    ("key", "place", "count"),
    [("NAXIS", 0, 0), ("TFIELDS", 1, 1), ("NAXIS", 2, 3), ("NAXIS", 4, 3)],
)
@pytest.mark.parametrize("damaged", [10**15, 1000, -1])
def test_a_header_that_promises_too_much(
    several: Path, key: str, place: int, count: int, damaged: int
):
    """Axes and columns beyond the standard are refused at once, in whichever HDU."""
    with fits.open(several) as hdus:
        start = hdus[place].fileinfo()["hdrLoc"]
    content = several.read_bytes()
    card = f"{key:8}= {count:20}".encode()
    at = content.index(card, start)
    several.write_bytes(content[:at] + f"{key:8}= {damaged:20}".encode() + content[at + 30 :])
    with pytest.raises(SourceReadError, match=rf"{key} = {damaged} in the header at byte {start}"):
        open_source(several)


def test_a_damaged_file_on_the_command_line(tmp_path: Path):
    """One line, exit status 2, no traceback."""
    (tmp_path / "in.fits").write_bytes(b"SIMPLE  =                    T" + b" " * 50)
    done = subprocess.run(
        [sys.executable, "-m", "cdd_dask", "decompose", "in.fits", "out.zarr"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "in.fits" in done.stderr
