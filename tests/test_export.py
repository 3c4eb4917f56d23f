"""`export`: what other programs read is what the store holds, and nothing half-written stays."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import cdd_dask
from cdd_dask import cli
from cdd_dask.errors import (
    CddError,
    DiskSpaceError,
    InputError,
    MissingDependencyError,
    OutputAccessError,
    OutputExistsError,
    StoreError,
    VerificationError,
)
from cdd_dask.exporting import export, parse_region

SHAPE = (12, 17, 19)
BLOCK = (8, 10, 10)
FORMATS = ["fits", "npy", "tiff"]
LIBRARY = {"fits": "astropy", "tiff": "tifffile"}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, lognormal: Callable[..., Any]) -> Path:
    """A store of 2 channels in 8 blocks, made from an array; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out.zarr"
    cdd_dask.decompose(lognormal(SHAPE), out, max_scale=2, block=BLOCK, progress=False)
    return out


@pytest.fixture(scope="session")
def in_memory(lognormal: Callable[..., Any]) -> Callable[..., cdd_dask.Decomposition]:
    """Decompositions in memory, in several blocks, by shape and type."""

    @functools.cache
    def make(shape: tuple[int, ...], dtype: str = "float32") -> cdd_dask.Decomposition:
        return cdd_dask.decompose(
            lognormal(shape), max_scale=2, dtype=dtype, block=5, executor="serial", progress=False
        )

    return make


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, alone in its folder."""
    return Path(shutil.copytree(made, tmp_path / "data" / "out.zarr"))


@pytest.fixture
def cube_store(fits_cube: Path, tmp_path: Path) -> Path:
    """The decomposition of a FITS file."""
    out = tmp_path / "cube.zarr"
    cdd_dask.decompose(fits_cube, out, num_channels=2, progress=False)
    return out


def edit(store: Path, **source: object) -> None:
    """Change what a store remembers of its source."""
    root = zarr.open_group(store, mode="r+")
    attributes: Any = root.attrs["cdd_dask"]
    root.attrs["cdd_dask"] = {**attributes, "source": {**attributes["source"], **source}}


def needs(to: str) -> None:
    """Skip where the format's library is not installed."""
    if to in LIBRARY:
        pytest.importorskip(LIBRARY[to])


def read(path: Path) -> Any:
    """The voxels of an exported file, whatever its format."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".fits":
        from astropy.io import fits

        return fits.getdata(path)
    import tifffile

    return tifffile.imread(path)


def parts(store: Path) -> list[Any]:
    """All outputs of a store as arrays."""
    result = cdd_dask.open_decomposition(store)
    return [part[...] for part in (*result.channels, result.residual)]


@pytest.mark.parametrize("to", FORMATS)
def test_files_hold_what_the_store_holds(store: Path, to: str):
    """Every output is a file of its own beside the store, to the bit."""
    needs(to)
    paths = export(store, to, progress=False)
    ending = ".ome.tif" if to == "tiff" else f".{to}"
    names = ["channel_00", "channel_01", "residual"]
    assert paths == [store.parent / f"out_{name}{ending}" for name in names]
    assert sorted(store.parent.iterdir()) == sorted([store, *paths])
    for path, values in zip(paths, parts(store), strict=True):
        np.testing.assert_array_equal(read(path), values, strict=to != "fits")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(40,), (20, 30), (9, 10, 11), (5, 6, 7, 8)])
def test_dimensions_and_types(
    tmp_path: Path, in_memory: Callable[..., Any], shape: tuple[int, ...], dtype: str, to: str
):
    """1 to 4 axes and both types; TIFF has no image of one axis."""
    needs(to)
    result = in_memory(shape, dtype)
    if to == "tiff" and len(shape) == 1:
        with pytest.raises(InputError, match="npy"):
            export(result, to, out=tmp_path, progress=False)
        return
    target = tmp_path / "new" / f"c1.{to}"
    assert export(result, to, out=target, channel=1, progress=False) == [target]
    values = read(target)
    assert values.dtype.newbyteorder("=") == dtype
    np.testing.assert_array_equal(values, result.channels[1][...])


def test_blank_voxels_stay_blank(store: Path):
    """NaN is written as NaN."""
    pytest.importorskip("astropy")
    array = zarr.open_array(store / "channel_00/scale0/image", mode="r+")
    array[3, 4, 5] = np.nan
    (path,) = export(store, "fits", channel=0, progress=False)
    assert [*map(tuple, np.argwhere(np.isnan(read(path))))] == [(3, 4, 5)]


@pytest.mark.parametrize("to", FORMATS)
def test_no_read_is_larger_than_a_block(store: Path, to: str, monkeypatch: pytest.MonkeyPatch):
    """Every block is read once, and never more than one at a time."""
    needs(to)
    sizes, original = [], zarr.Array.__getitem__

    def spy(array: Any, selection: Any) -> Any:
        values = original(array, selection)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(zarr.Array, "__getitem__", spy)
    export(store, to, progress=False)
    assert max(sizes) == np.prod(BLOCK)
    assert sum(sizes) == 3 * np.prod(SHAPE)
    assert len(sizes) == 3 * 8


def test_large_blocks_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run with much memory has large blocks; exporting them needs no more than a part does."""
    field = np.random.default_rng(0).random((130, 70, 5), "f4")
    result = cdd_dask.decompose(field, tmp_path / "a.zarr", num_channels=1, progress=False)
    assert result.channels[0].chunks == (44, 35, 5)
    sizes, original = [], zarr.Array.__getitem__

    def spy(array: Any, selection: Any) -> Any:
        values = original(array, selection)
        sizes.append(values.shape)
        return values

    monkeypatch.setattr(zarr.Array, "__getitem__", spy)
    monkeypatch.setattr("cdd_dask.exporting.base.READ_BYTES", 4 * 90 * 70 * 5)
    (path,) = export(result, "npy", channel=0, progress=False)
    assert sizes == [(88, 70, 5), (42, 70, 5)]
    monkeypatch.undo()
    np.testing.assert_array_equal(np.load(path), result.channels[0][...])


# --- FITS


def test_fits_round_trip(fits_cube: Path, tmp_path: Path):
    """Header and world are the source's, and the channels' sum is the source."""
    fits = pytest.importorskip("astropy.io.fits")
    from astropy.wcs import WCS

    cube_store = tmp_path / "cube.zarr"
    fits.setval(fits_cube, "OBJECT", value="L1448")
    with fits.open(fits_cube, mode="update") as hdus:
        hdus[0].header.add_history("reduced")
    cdd_dask.decompose(fits_cube, cube_store, max_scale=2, block=BLOCK, progress=False)
    paths = export(cube_store, "fits", progress=False)
    source, before = fits.getdata(fits_cube, header=True)
    total = np.sum([fits.getdata(path) for path in paths], axis=0, dtype="f8")
    assert np.abs(total - source).max() <= 4 * np.spacing(np.abs(source).max())
    for path in paths:
        after = fits.getheader(path)
        old, new = WCS(before), WCS(after)
        assert old.to_header(relax=True) == new.to_header(relax=True)
        assert repr(old.pixel_to_world(3, 4, 5)) == repr(new.pixel_to_world(3, 4, 5))
        assert all(after[key] == before[key] for key in before if key != "HISTORY")
        assert after["HISTORY"][0] == "reduced"
        assert "cdd-dask" in after["HISTORY"][1]
        with fits.open(path) as hdus:
            hdus.verify("exception")
        assert path.stat().st_size % 2880 == 0
    cards = [fits.getheader(path) for path in paths]
    assert [card["CDDCHAN"] for card in cards] == [0, 1, "residual"]
    assert [(card["CDDLOW"], card.get("CDDHIGH")) for card in cards] == [(0, 1), (1, 2), (2, None)]
    assert {card["CDDUNIT"] for card in cards} == {"voxel"}


def test_fits_structure_is_the_channels_own(tmp_path: Path, lognormal: Callable[..., Any]):
    """Scaled integers in an extension with checksums: of these, nothing is carried over."""
    fits = pytest.importorskip("astropy.io.fits")
    values = (lognormal((9, 10)) * 100).astype("i2")
    hdu = fits.ImageHDU(values, name="SCI")
    hdu.header["BLANK"] = -32768
    hdu.header["DATAMIN"], hdu.header["DATAMAX"] = 0.0, 7.0
    hdu.header["OBSERVER"] = ("Li", "who")
    hdu.header["BLANKET"] = 1  # begins like a structural one
    path = tmp_path / "a.fits"
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, checksum=True)
    with fits.open(path, "update", do_not_scale_image_data=True, checksum=True) as hdus:
        hdus[1].header["BSCALE"], hdus[1].header["BZERO"] = 0.5, 3.0
    cdd_dask.decompose(path, tmp_path / "a.zarr", max_scale=2, progress=False)
    (written,) = export(tmp_path / "a.zarr", "fits", channel=0, progress=False)
    header = fits.getheader(written)
    gone = ["XTENSION", "PCOUNT", "GCOUNT", "BSCALE", "BZERO", "BLANK", "DATAMIN", "DATAMAX"]
    assert not {*gone, "CHECKSUM", "DATASUM"} & {*header}
    assert (header["BITPIX"], header["NAXIS1"], header["NAXIS2"]) == (-32, 10, 9)
    assert (header["OBSERVER"], header.comments["OBSERVER"]) == ("Li", "who")
    assert (header["BLANKET"], header["EXTNAME"]) == (1, "SCI")
    with fits.open(written) as hdus:
        hdus.verify("exception")


@pytest.mark.parametrize(
    "full", [(1, 12, 17, 19), (12, 1, 17, 19), (1, 12, 17, 1, 19, 1), (12, 17, 19)]
)
def test_fits_axes_of_length_1_return(cube_store: Path, full: tuple[int, ...]):
    """The file has the axes of the source's file, also the ones that the store leaves out."""
    pytest.importorskip("astropy")
    edit(cube_store, file_shape=list(full))
    (path,) = export(cube_store, "fits", channel=1, progress=False)
    values = read(path)
    assert values.shape == full
    np.testing.assert_array_equal(values.reshape(SHAPE), parts(cube_store)[1])


def test_fits_source_with_axes_of_length_1(tmp_path: Path, lognormal: Callable[..., Any]):
    """From file to file, Stokes axis and all: shape and world are the same."""
    fits = pytest.importorskip("astropy.io.fits")
    from astropy.wcs import WCS

    header = fits.Header()
    for number, kind in enumerate(["RA---SIN", "DEC--SIN", "FREQ", "STOKES"], start=1):
        header[f"CTYPE{number}"], header[f"CRPIX{number}"] = kind, 2.0
        header[f"CRVAL{number}"], header[f"CDELT{number}"] = 10.0, 0.5
    header["SPECSYS"] = "LSRK"
    path = tmp_path / "alma.fits"
    fits.writeto(path, lognormal((1, 6, 8, 9)), header)
    cdd_dask.decompose(path, tmp_path / "alma.zarr", max_scale=2, progress=False)
    (written,) = export(tmp_path / "alma.zarr", "fits", channel=0, progress=False)
    before, after = fits.getheader(path), fits.getheader(written)
    assert fits.getdata(written).shape == (1, 6, 8, 9)
    assert WCS(before).to_header() == WCS(after).to_header()


def test_fits_region_moves_every_world(cube_store: Path):
    """A voxel of the part has the coordinates that it has in the whole, in alternative worlds too.

    Where a world has no reference pixel, that is 0.
    """
    fits = pytest.importorskip("astropy.io.fits")
    from astropy.wcs import WCS

    text = zarr.open_group(cube_store).attrs["cdd_dask"]["source"]["header"]
    before = fits.Header.fromstring(text, sep="\n")
    for number in (1, 2, 3):
        before[f"CTYPE{number}A"], before[f"CRVAL{number}A"] = "LINEAR", 7.0
        before[f"CDELT{number}A"] = 2.0
    before["CRPIX2A"] = 5.5
    edit(cube_store, header=before.tostring(sep="\n"), file_shape=[1, *SHAPE])
    where = (slice(3, -1), slice(None), slice(5, 11))
    (path,) = export(cube_store, "fits", channel=0, region=where, progress=False)
    after = fits.getheader(path)
    assert fits.getdata(path).shape == (1, 8, 17, 6)
    np.testing.assert_array_equal(fits.getdata(path)[0], parts(cube_store)[0][where])
    assert [after[f"CRPIX{n}"] for n in (1, 2, 3)] == [4.0, 8.0, 3.0]
    assert [after.get(f"CRPIX{n}A") for n in (1, 2, 3)] == [-5.0, 5.5, -3.0]
    for key in (" ", "A"):
        whole, part = (WCS(header, key=key, naxis=3) for header in (before, after))
        np.testing.assert_array_equal(
            whole.wcs_pix2world([[7, 4, 5]], 0), part.wcs_pix2world([[2, 4, 2]], 0)
        )


def test_fits_without_a_header_has_a_simple_world(store: Path):
    """Spacing and units become a linear world; units are spelt as FITS does."""
    fits = pytest.importorskip("astropy.io.fits")
    edit(store, spacing=[2.0, 0.5, 0.25], units=["µm", None, "parrots"])
    (path,) = export(store, "fits", channel=0, region=(slice(2, 9),), progress=False)
    header = fits.getheader(path)
    assert [header[f"CTYPE{n}"] for n in (1, 2, 3)] == ["X", "Y", "Z"]
    assert [header[f"CDELT{n}"] for n in (1, 2, 3)] == [0.25, 0.5, 2.0]
    assert [header[f"CRPIX{n}"] for n in (1, 2, 3)] == [1.0, 1.0, -1.0]
    assert [header[f"CRVAL{n}"] for n in (1, 2, 3)] == [0.0, 0.0, 0.0]
    assert [header.get(f"CUNIT{n}") for n in (1, 2, 3)] == [None, None, "um"]
    edit(store, spacing=None, units=None, header="<OME>no FITS</OME>")
    (path,) = export(store, "fits", channel=1, progress=False)
    assert fits.getheader(path)["CDELT2"] == 1.0
    assert "CUNIT1" not in fits.getheader(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_shape": [12, 17, 20]}, "does not fit"),
        ({"file_shape": [12, 17]}, "does not fit"),
        ({"file_shape": 5}, "edited"),
        ({"spacing": [1.0]}, "edited"),
        ({"units": ["m", "m"]}, "edited"),
        ({"header": "SIMPLE  = Ä"}, "damaged"),
        ({"header": "SIMPLE  =                    T\nCRPIX3  = 'four'"}, "CRPIX3"),
    ],
)
def test_edited_metadata_is_refused(store: Path, change: dict[str, Any], message: str):
    """What nobody could work with is named, and no file is left."""
    pytest.importorskip("astropy")
    edit(store, **change)
    with pytest.raises(StoreError, match=message):
        export(store, "fits", region=(slice(1, 5),), progress=False)
    assert [*store.parent.iterdir()] == [store]


# --- TIFF


def test_tiff_has_axes_sizes_and_scales(store: Path):
    """OME's axes, the spacing where it is one of space, and the scale range."""
    tifffile = pytest.importorskip("tifffile")
    edit(store, spacing=[2.0, 0.5, 0.25], units=["micrometer", "µm", "deg"])
    (path,) = export(store, "tiff", channel=1, progress=False)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert not tiff.is_bigtiff
        assert tiff.series[0].axes == "ZYX"
        assert len(tiff.pages) == SHAPE[0]
        described = tiff.pages[0].description
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
    assert "channel_01, scales 1 to 2 voxel" in described
    assert (pixels["PhysicalSizeZ"], pixels["PhysicalSizeZUnit"]) == (2.0, "µm")
    assert (pixels["PhysicalSizeY"], pixels["PhysicalSizeYUnit"]) == (0.5, "µm")
    assert "PhysicalSizeX" not in pixels  # degrees are no length


def test_tiff_of_a_run_with_spacing(tmp_path: Path, lognormal: Callable[..., Any]):
    """What the run was told counts, and a spacing without a unit is none in micrometres."""
    tifffile = pytest.importorskip("tifffile")
    field = lognormal((10, 12))
    for unit, known in (("nm", "nm"), (None, "reference frame")):
        result = cdd_dask.decompose(
            field, num_channels=1, spacing=(3.0, 2.0), unit=unit, progress=False
        )
        (path,) = export(result, "tiff", out=tmp_path / f"{unit}.tif", channel=0, progress=False)
        with tifffile.TiffFile(path) as tiff:
            pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeXUnit"]) == (2.0, known)
        assert pixels["PhysicalSizeY"] == 3.0


@pytest.mark.parametrize(
    ("names", "order", "axes"),
    [
        (("x", "y", "z"), (2, 1, 0), "ZYX"),
        (("v", "y", "x"), (0, 1, 2), "CYX"),
        (("y", "x", "t"), (2, 0, 1), "TYX"),
        (("depth", "lat", "lon"), (0, 1, 2), "ZYX"),
    ],
)
def test_tiff_axes_are_in_its_order(
    tmp_path: Path, lognormal: Callable[..., Any], names: Any, order: tuple[int, ...], axes: str
):
    """Where y and x are not the last, axes are reordered, and a region with them."""
    tifffile = pytest.importorskip("tifffile")
    field = tmp_path / "field.zarr"
    array = zarr.create_array(field, shape=(9, 10, 11), dtype="f4", dimension_names=names)
    array[...] = lognormal((9, 10, 11))
    result = cdd_dask.decompose(field, max_scale=2, block=4, progress=False, executor="serial")
    where = (slice(1, 7), slice(2, 9), slice(0, 10))
    target = tmp_path / "a.ome.tif"
    export(result, "tiff", out=target, channel=0, region=where, progress=False)
    with tifffile.TiffFile(target) as tiff:
        assert tiff.series[0].axes == axes
    np.testing.assert_array_equal(read(target), result.channels[0][where].transpose(order))


def test_tiff_of_four_axes(tmp_path: Path, in_memory: Callable[..., Any]):
    """A fourth axis that OME does not know is time to it."""
    tifffile = pytest.importorskip("tifffile")
    (path,) = export(
        in_memory((5, 6, 7, 8)), "tiff", out=tmp_path, channel="residual", progress=False
    )
    with tifffile.TiffFile(path) as tiff:
        assert (tiff.series[0].axes, tiff.series[0].shape) == ("TZYX", (5, 6, 7, 8))
    assert path.name == "decomposition_residual.ome.tif"


def test_tiff_beyond_4_gb_is_bigtiff(store: Path, monkeypatch: pytest.MonkeyPatch):
    """Addresses have 64 bits where 32 do not reach."""
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr("cdd_dask.exporting.tiff.LARGEST_CLASSIC", 4 * np.prod(SHAPE))
    (path,) = export(store, "tiff", channel=0, progress=False)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
    np.testing.assert_array_equal(read(path), parts(store)[0])


# --- what is selected


@pytest.mark.parametrize(
    ("channel", "names"),
    [
        (1, ["channel_01"]),
        (np.int64(0), ["channel_00"]),
        ("residual", ["residual"]),
        (["residual", 0, 0], ["residual", "channel_00"]),
        (None, ["channel_00", "channel_01", "residual"]),
    ],
)
def test_channels(store: Path, channel: Any, names: list[str]):
    """One, several in the order given, each once, or all."""
    paths = export(store, "npy", channel=channel, progress=False)
    assert [path.stem for path in paths] == [f"out_{name}" for name in names]


@pytest.mark.parametrize("channel", [2, -1, True, 0.5, "channel_00", "", [], [0, "x"]])
def test_channels_that_are_not_there(store: Path, channel: Any):
    """The message names what there is."""
    with pytest.raises(InputError, match="channel="):
        export(store, "npy", channel=channel, progress=False)


@pytest.mark.parametrize(
    "text",
    [
        "2:9,3:12,:",
        "-5:",
        ":, -3 :, 1:2",
        "7:8,9:10,10:11",
        ":",
        "4:100,:-1",
        "::1".replace("::1", ":"),
    ],
)
def test_region_is_numpys(store: Path, text: str):
    """Parts of the volume, block faces crossed or not, are what NumPy makes of the same text."""
    where = parse_region(text)
    (path,) = export(store, "npy", channel=0, region=where, progress=False)
    np.testing.assert_array_equal(np.load(path), parts(store)[0][where])


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((slice(12, 20),), r"12:20 of an axis of 12.*\(12, 17, 19\)"),
        ((slice(5, 5),), "holds no voxels"),
        ((slice(None), slice(9, 2)), "9:2 of an axis of 17"),
        ((slice(None),) * 4, r"4 axes.*\(12, 17, 19\)"),
        ((slice(0, 9, 2),), "without steps"),
        ((slice(9, 0, -1),), "without steps"),
        ((3,), "slices"),
        (3, "slices"),
        (..., "slices"),
        ((slice(0.5, 3),), "whole numbers"),
    ],
)
def test_regions_that_are_refused(store: Path, region: Any, message: str):
    """Empty ones, ones outside of the volume, and what is no region."""
    with pytest.raises(InputError, match=message):
        export(store, "npy", region=region, progress=False)


@pytest.mark.parametrize("text", ["", "3", "1:2:3", "a:b", "1:2,,", "1.5:2"])
def test_text_that_is_no_region(text: str):
    """The message shows one that is."""
    with pytest.raises(InputError, match="10:20"):
        parse_region(text)


# --- where the files go


def test_out_is_a_folder_or_the_file(store: Path, tmp_path: Path):
    """One output may be named; several go to a folder, which is made."""
    folder = tmp_path / "a" / "b.v2"
    paths = export(str(store), "npy", out=str(folder), progress=False)
    assert [path.parent for path in paths] == [folder] * 3
    single = tmp_path / "one.npy"
    assert export(store, "npy", out=single, channel=0, progress=False) == [single]
    with pytest.raises(InputError, match="3 outputs are selected"):
        export(store, "npy", out=tmp_path / "two.npy", progress=False)
    (tmp_path / "dir.npy").mkdir()
    assert len(export(store, "npy", out=tmp_path / "dir.npy", progress=False)) == 3


@pytest.mark.parametrize(
    ("to", "out", "message"),
    [
        ("png", None, "fits, npy, tiff"),
        ("npy", "", "no path"),
        ("npy", "s3://bucket/x", "no path"),
        ("npy", "x.fits", r"end it with \.npy"),
        ("npy", "{store}", "lies in the store"),
        ("npy", "{store}/channel_00/x.npy", "lies in the store"),
    ],
)
def test_places_that_are_refused(store: Path, to: str, out: str | None, message: str):
    """Wrong formats, places elsewhere and the store itself."""
    place = out if out is None else out.format(store=store)
    with pytest.raises(InputError, match=message):
        export(store, to, out=place, channel=0, progress=False)


def test_a_store_in_memory_needs_a_place(tmp_path: Path, in_memory: Callable[..., Any]):
    """Nobody knows where it lies."""
    result = in_memory((20, 30))
    with pytest.raises(InputError, match="--out"):
        export(result, "npy", progress=False)
    assert len(export(result, "npy", out=tmp_path, progress=False)) == 3


def test_files_that_are_there_stay(store: Path):
    """Without overwrite nothing is written, not even the files that are not there."""
    there = store.parent / "out_channel_01.npy"
    there.write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export(store, "npy", progress=False)
    assert sorted(store.parent.iterdir()) == [store, there]
    assert there.read_text() == "mine"
    export(store, "npy", overwrite=True, progress=False)
    np.testing.assert_array_equal(np.load(there), parts(store)[1])


def test_folders_and_the_source_are_never_replaced(tmp_path: Path, lognormal: Callable[..., Any]):
    """Also with overwrite."""
    source = tmp_path / "field.npy"
    np.save(source, lognormal((9, 9)))
    cdd_dask.decompose(source, tmp_path / "out.zarr", max_scale=2, progress=False)
    with pytest.raises(InputError, match="what was decomposed"):
        export(tmp_path / "out.zarr", "npy", out=source, channel=0, overwrite=True, progress=False)
    (tmp_path / "out_residual.npy").mkdir()
    with pytest.raises(OutputExistsError, match="exists: name another place"):
        export(tmp_path / "out.zarr", "npy", overwrite=True, progress=False)


def test_places_that_cannot_be_written(store: Path, tmp_path: Path, monkeypatch: Any):
    """A file where a folder should be, a loop of links, a folder that is read-only."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputAccessError, match="is no folder"):
        export(store, "npy", out=tmp_path / "file" / "sub", progress=False)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputAccessError, match="loop"):
        export(store, "npy", out=tmp_path / "loop" / "sub", progress=False)
    with pytest.raises(OutputAccessError, match="name too long"):
        export(store, "npy", out=tmp_path / f"{'x' * 300}.npy", channel=0, progress=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputAccessError, match="no permission"):
        export(store, "npy", out=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_disk_space_is_checked_first(store: Path, monkeypatch: Any, overwrite: bool):
    """Room for one file is enough to replace three of its size one by one."""
    usage = namedtuple("usage", "free")
    if overwrite:
        export(store, "npy", progress=False)
    monkeypatch.setattr("cdd_dask.exporting.targets.METADATA_BYTES", 128)
    size = 4 * int(np.prod(SHAPE)) + 128
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(size))
    if overwrite:
        assert len(export(store, "npy", overwrite=True, progress=False)) == 3
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(size - 1))
    with pytest.raises(DiskSpaceError, match=r"needs .* free"):
        export(store, "npy", overwrite=overwrite, progress=False)


# --- what goes wrong


@pytest.mark.parametrize("to", ["fits", "tiff"])
def test_missing_libraries_are_named(store: Path, to: str, monkeypatch: pytest.MonkeyPatch):
    """With the command that installs them."""
    for name in ("astropy.io", "astropy", "tifffile"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "cdd-dask\[{to}\]"'):
        export(store, to, progress=False)


def test_missing_shards_are_not_zeros(store: Path):
    """Zarr would read them as such; an output that is not exported may lack some."""
    (store / "channel_01/scale0/image/c/1/0/1").unlink()
    with pytest.raises(VerificationError, match=r"channel_01 lacks 1 "):
        export(store, "npy", progress=False)
    assert [*store.parent.iterdir()] == [store]
    assert len(export(store, "npy", channel=0, progress=False)) == 1


def test_a_flipped_bit_is_named(store: Path):
    """The message names output and region; files before it are whole, this one is not there."""
    shard = store / "residual/scale0/image/c/0/1/0"
    data = bytearray(shard.read_bytes())
    data[20] ^= 4
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match=r"residual, region \[0:8, 10:17, 0:10\].*checksum"):
        export(store, "npy", progress=False)
    left = {path.name for path in store.parent.iterdir()}
    assert left == {"out.zarr", "out_channel_00.npy", "out_channel_01.npy"}


def test_incomplete_stores_are_refused(store: Path):
    """By path, and opened all the same."""
    root = zarr.open_group(store, mode="r+")
    root.attrs["cdd_dask"] = {**root.attrs["cdd_dask"], "complete": False}
    with pytest.raises(StoreError, match="not complete"):
        export(store, "npy", progress=False)
    opened = cdd_dask.open_decomposition(store, allow_incomplete=True)
    with pytest.raises(StoreError, match="not complete"):
        export(opened, "npy", progress=False)
    with pytest.raises(FileNotFoundError):
        export(store.parent / "none.zarr", "npy", progress=False)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_export_leaves_nothing(
    store: Path, to: str, existing: bool, monkeypatch: pytest.MonkeyPatch
):
    """No temporary file; a file that was to be replaced is still the old one."""
    needs(to)
    (path,) = export(store, to, channel=0, progress=False)
    old = path.read_bytes()
    if not existing:
        path.unlink()
    before = sorted(store.parent.iterdir())
    original, calls = zarr.Array.__getitem__, itertools.count()

    def read_until(array: Any, selection: Any) -> Any:
        if next(calls) == 5:
            assert len([*store.parent.glob(".*.part")]) == 1
            raise KeyboardInterrupt
        return original(array, selection)

    monkeypatch.setattr(zarr.Array, "__getitem__", read_until)
    with pytest.raises(KeyboardInterrupt):
        export(store, to, channel=0, overwrite=True, progress=False)
    assert sorted(store.parent.iterdir()) == before
    assert not existing or path.read_bytes() == old


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, DiskSpaceError), (errno.EACCES, OutputAccessError)]
)
def test_a_disk_that_fills_up(store: Path, code: int, kind: type[CddError], monkeypatch: Any):
    """The space is taken before the first block; what the system says is in the message."""

    def refuse(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(kind, match=rf"out_channel_00\.npy.*{os.strerror(code)}"):
        export(store, "npy", progress=False)
    assert [*store.parent.iterdir()] == [store]


def test_file_systems_that_cannot_take_space_ahead(store: Path, monkeypatch: pytest.MonkeyPatch):
    """There the files are written all the same."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    export(store, "npy", channel=0, progress=False)
    monkeypatch.delattr(os, "posix_fallocate")
    (path,) = export(store, "npy", channel=0, overwrite=True, progress=False)
    np.testing.assert_array_equal(np.load(path), parts(store)[0])


# --- the faces


def test_command_line(store: Path, tmp_path: Path):
    """Files are printed one per line; channels and regions are text."""

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.cli, ["export", *map(str, arguments)])

    done = run(store, "--to", "npy", "--quiet")
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(p) for p in sorted(store.parent.glob("*.npy"))]
    options = [
        "--channel",
        "1,residual",
        "--region",
        "-3:,2:5",
        "--out",
        tmp_path / "parts",
        "--quiet",
    ]
    done = run(store, "--to", "npy", *options)
    assert done.output.split() == [
        str(tmp_path / "parts" / f"out_{name}.npy") for name in ("channel_01", "residual")
    ]
    np.testing.assert_array_equal(np.load(done.output.split()[1]), parts(store)[2][-3:, 2:5])


def test_exit_status(store: Path):
    """2 where the request is refused, 1 where the store is damaged; one line each."""

    def status(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "cdd_dask", "export", str(store), "--to", "npy"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    code, said = status("--region", "5:5")
    assert (code, said.count("\n"), "holds no voxels" in said) == (2, 1, True)
    (store / "residual/scale0/image/c/1/0/1").unlink()
    code, said = status()
    assert (code, said.count("\n"), "lacks 1" in said) == (1, 1, True)
