"""HDF5, TIFF and NIfTI as the field writes them, and what arrays state of their axes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from examples import slowly

import cdd_dask
from cdd_dask.errors import InputError, MissingDependencyError, SourceReadError
from cdd_dask.readers import Source, open_source

RNG = np.random.default_rng(0)
VOLUME = RNG.lognormal(size=(12, 17, 19)).astype("float32")
FAST: dict[str, Any] = {"max_scale": 2, "e_rel": 0.3, "progress": False}
LIBRARIES = {"hdf5": "h5py", "tiff": "tifffile", "nifti": "nibabel"}


def whole(source: Source) -> Any:
    """All values of a source."""
    return source.read(tuple(slice(0, n) for n in source.shape))


def h5(path: Path, **datasets: Any) -> Path:
    """An HDF5 file of these datasets; ``a__b`` lies in a group."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name.replace("__", "/"), data=values)
    return path


def tif(path: Path, values: Any = VOLUME, **options: Any) -> Path:
    """A TIFF file."""
    pytest.importorskip("tifffile").imwrite(path, values, **options)
    return path


def nii(path: Path, values: Any = VOLUME, zooms: Any = None, units: Any = ()) -> Path:
    """A NIfTI file that shows `values` as nibabel does: x first."""
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(values.T, np.eye(4))
    if zooms is not None:
        image.header.set_zooms(zooms)
    if units:
        image.header.set_xyzt_units(*units)
    nibabel.save(image, path)
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "hdf5": lambda folder: h5(folder / "in.h5", image=VOLUME),
    "hdf5 by signature": lambda folder: h5(folder / "in.dat", image=VOLUME),
    "tiff": lambda folder: tif(folder / "in.tif"),
    "bigtiff": lambda folder: tif(folder / "in.btf", bigtiff=True, byteorder=">"),
    "packed tiff": lambda folder: tif(folder / "in.tif", compression="zlib"),
    "tiled tiff": lambda folder: tif(folder / "in.tif", tile=(16, 16), compression="zlib"),
    "tiff by signature": lambda folder: tif(folder / "in.lsm2"),
    "nifti": lambda folder: nii(folder / "in.nii"),
    "packed nifti": lambda folder: nii(folder / "in.nii.gz"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_format(tmp_path: Path, kind: str):
    """Whole, in regions, beyond its faces, and in a run of blocks in other processes."""
    path = MAKERS[kind](tmp_path)
    source = open_source(path)
    assert source.shape == VOLUME.shape
    assert np.array_equal(whole(source), VOLUME)
    region = (slice(9, 14), slice(-3, 5), slice(2, 3))
    expected = np.pad(VOLUME, 4, "wrap")[13:18, 1:9, 6:7]
    assert np.array_equal(source.read(region), expected)
    # the address alone says it all
    assert np.array_equal(open_source(source.address).read(region), expected)
    out = tmp_path / "out.zarr"
    result = cdd_dask.decompose(path, out, block=10, boundary="wrap", **FAST)
    assert np.allclose(result.reconstruct(), VOLUME, rtol=1e-6)
    assert cdd_dask.verify(out, progress=False).worst_ulp <= 4


@pytest.mark.parametrize("kind", ["hdf5", *slowly("packed tiff", "packed nifti")])
def test_every_format_in_other_processes(tmp_path: Path, kind: str):
    """Workers open the file by its address; nothing of it travels."""
    path = MAKERS[kind](tmp_path)
    pool = {"executor": "processes", "workers": 2, "block": 10}
    result = cdd_dask.decompose(path, tmp_path / "out.zarr", **pool, **FAST)
    assert np.allclose(result.reconstruct(), VOLUME, rtol=1e-6)


TYPES = ["uint8", "int16", "uint16", "int32", "float32", "float64", ">i2", ">f4", ">f8"]


@pytest.mark.parametrize("kind", [*TYPES, "float16"])
@pytest.mark.parametrize("make", ["h5", "tif", "nii", "npy"])
def test_every_type(tmp_path: Path, make: str, kind: str):
    """Of any size and byte order; NIfTI has no half precision."""
    if (make, kind) == ("nii", "float16"):
        pytest.skip("not in NIfTI")
    values = (10 * VOLUME).astype(kind)
    path = tmp_path / f"in.{make}"
    if make == "npy":
        np.save(path, np.asfortranarray(values))
    elif make == "h5":
        h5(path, a=values)
    else:
        {"tif": tif, "nii": nii}[make](path, values)
    source = open_source(path)
    assert np.array_equal(whole(source), values)
    result = cdd_dask.decompose(path, **FAST)
    assert np.allclose(result.reconstruct(), values.astype("float32"), rtol=1e-6)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_missing_library(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """The message says what to install."""
    path = MAKERS[kind](tmp_path)
    monkeypatch.setitem(sys.modules, LIBRARIES[kind], None)
    with pytest.raises(MissingDependencyError, match=rf"pip install .*cdd-dask\[{kind}\]"):
        open_source(path)


@pytest.mark.parametrize("kind", ["hdf5", "tiff", "packed tiff", "nifti", "packed nifti"])
@pytest.mark.parametrize("left", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_file(tmp_path: Path, kind: str, left: float):
    """Named in one line, at the latest when what is missing is read; no other error escapes."""
    path = MAKERS[kind](tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises((SourceReadError, cdd_dask.errors.BlockError), match=r"in\.") as error:
        cdd_dask.decompose(path, tmp_path / "out.zarr", **FAST)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["in.h5", "in.tif", "in.nii", "in.nii.gz", "in.hdr"])
def test_a_file_of_another_kind(tmp_path: Path, name: str):
    """What only is called so is named."""
    (tmp_path / name).write_bytes(b"neither fish nor fowl" * 300)
    with pytest.raises(SourceReadError, match=name.replace(".", r"\.")):
        open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["in.npy", "in.nii"])
def test_no_parts(tmp_path: Path, name: str):
    """A part of a file that has none is refused, not ignored."""
    path = tmp_path / name
    np.save(path, VOLUME) if name == "in.npy" else nii(path)
    with pytest.raises(InputError, match="has no parts: leave out ::2"):
        open_source(f"{path}::2")


def test_a_file_whose_name_looks_like_a_part(tmp_path: Path):
    """What is there by that name goes first."""
    np.save(tmp_path / "in::2.npy", VOLUME)
    assert open_source(tmp_path / "in::2.npy").shape == VOLUME.shape


# HDF5


def test_datasets_by_path(tmp_path: Path):
    """With and without a leading slash; the only dataset needs no name."""
    path = h5(tmp_path / "in.h5", raw__t0=VOLUME, raw__t1=VOLUME * 2, label=np.array(b"text"))
    for part in ("/raw/t1", "raw/t1"):
        source = open_source(f"{path}::{part}")
        assert np.array_equal(whole(source), VOLUME * 2)
        assert source.address == f"{path}::/raw/t1"
        assert np.array_equal(whole(open_source(source.address)), VOLUME * 2)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("", r"holds several datasets: name one of .*in\.h5::/raw/t0 \(12 × 17 × 19\), .*/raw/t1"),
        ("::/raw", r"::/raw is a group: name one of .*::/raw/t0 "),
        ("::/raw/t9", r"has no dataset /raw/t9: name one of .*::/other \(5\), .*::/raw/t0 "),
    ],
)
def test_datasets_that_are_not_clear(tmp_path: Path, part: str, message: str):
    """Those that are there are listed."""
    path = h5(tmp_path / "in.h5", raw__t0=VOLUME, raw__t1=VOLUME, other=np.ones(5))
    with pytest.raises(InputError, match=message):
        open_source(f"{path}{part}")


def test_no_dataset_of_numbers(tmp_path: Path):
    """A file of text is no field."""
    path = h5(tmp_path / "in.h5", text=np.array([b"a", b"b"]))
    with pytest.raises(SourceReadError, match="holds no dataset of real numbers"):
        open_source(path)


def test_dimension_scales(tmp_path: Path):
    """Names, spacing and units from coordinates, which are themselves no fields."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "in.nc", "w") as file:
        file["image"] = VOLUME
        for axis, (name, step, unit) in enumerate(
            [("depth", 2.0, "micrometer"), ("lat", -0.5, b"mm"), ("uneven", None, "mm")]
        ):
            n = VOLUME.shape[axis]
            file[name] = np.arange(n) * step if step else np.geomspace(1, 2, n)
            file[name].attrs["units"] = unit
            file[name].make_scale(name)
            file["image"].dims[axis].attach_scale(file[name])
    source = open_source(tmp_path / "in.nc")
    assert source.dimension_names == ("depth", "lat", "uneven")
    assert source.spacing == (2.0, 0.5, 1.0)
    assert source.units == ("µm", "mm", None)


@pytest.mark.parametrize(
    ("attributes", "spacing", "units"),
    [
        ({"element_size_um": [2.0, 0.5, 0.5]}, (2.0, 0.5, 0.5), ("µm",) * 3),
        ({"spacing": [2.0, 0.5, 0.5], "unit": "kpc"}, (2.0, 0.5, 0.5), ("kpc",) * 3),
        ({"voxel_size": 0.25, "units": "nanometer"}, (0.25,) * 3, ("nm",) * 3),
        ({"spacing": [2.0, 0.5]}, None, None),
        ({"spacing": [2.0, 0.0, 1.0]}, None, None),
        ({"spacing": "wide"}, None, None),
        ({"other": 1.0}, None, None),
    ],
)
def test_spacing_attributes(tmp_path: Path, attributes: Any, spacing: Any, units: Any):
    """What fits the volume is taken, what does not is not; all of it stays in the header."""
    path = h5(tmp_path / "in.h5", a=VOLUME)
    with pytest.importorskip("h5py").File(path, "a") as file:
        file["a"].attrs.update(attributes)
    source = open_source(path)
    assert (source.spacing, source.units) == (spacing, units)
    assert json.loads(source.header or "{}").keys() == attributes.keys()


def test_packed_values_with_blanks(tmp_path: Path):
    """CF's scale, offset and fill value: the blank voxel takes no part."""
    values = np.arange(60, dtype="int16").reshape(6, 10)
    path = h5(tmp_path / "in.h5", a=values)
    with pytest.importorskip("h5py").File(path, "a") as file:
        file["a"].attrs.update({"scale_factor": 0.5, "add_offset": 10.0})
        file["a"].attrs["_FillValue"] = np.int16(7)
    expected = 0.5 * values + 10
    expected[0, 7] = np.nan
    source = open_source(path)
    assert source.dtype == np.float64
    assert np.array_equal(whole(source), expected, equal_nan=True)
    result = cdd_dask.decompose(path, **FAST)
    assert np.isnan(result.residual[0, 7])


def test_hdf5_is_lazy(tmp_path: Path):
    """A dataset of four terabytes that nobody wrote: a region is read at once."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("a", (10**4,) * 3, "f4", chunks=(50,) * 3, fillvalue=3)
    source = open_source(tmp_path / "in.h5")
    assert source.chunk == (50, 50, 50)
    values = source.read((slice(5000, 5004), slice(0, 2), slice(9990, 10000)))
    assert np.array_equal(values, np.full((4, 2, 10), 3))


def test_too_many_axes(tmp_path: Path):
    """Axes of length 1 go only where there are more than 4."""
    path = h5(tmp_path / "in.h5", five=VOLUME[None, None], four=VOLUME[None])
    five, four = open_source(f"{path}::five"), open_source(f"{path}::four")
    assert (five.shape, five.file_shape) == (VOLUME.shape, (1, 1, 12, 17, 19))
    assert (four.shape, four.file_shape) == ((1, 12, 17, 19), None)
    assert np.array_equal(whole(five), VOLUME)


def test_a_virtual_dataset_whose_files_are_gone(tmp_path: Path):
    """HDF5 would read its fill value; with the file there it is read."""
    h5py = pytest.importorskip("h5py")
    layout = h5py.VirtualLayout(VOLUME.shape, "f4")
    layout[:] = h5py.VirtualSource("part.h5", "a", VOLUME.shape)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_virtual_dataset("a", layout, fillvalue=-1)
    with pytest.raises(SourceReadError, match=r"needs part\.h5, which is not there"):
        open_source(tmp_path / "in.h5")
    h5(tmp_path / "part.h5", a=VOLUME)
    assert np.array_equal(whole(open_source(tmp_path / "in.h5")), VOLUME)


def test_a_raw_file_that_is_truncated(tmp_path: Path):
    """HDF5 would read what it lacks as the fill value."""
    h5py = pytest.importorskip("h5py")
    raw = tmp_path / "raw.bin"
    with h5py.File(tmp_path / "in.h5", "w") as file:
        size = VOLUME.size * 4
        parts = [(str(raw), 8, size // 2), (str(raw), 8 + size // 2, h5py.h5f.UNLIMITED)]
        file.create_dataset("a", VOLUME.shape, "f4", external=parts)[...] = VOLUME
    assert np.array_equal(whole(open_source(tmp_path / "in.h5")), VOLUME)
    raw.write_bytes(raw.read_bytes()[:-4])
    with pytest.raises(SourceReadError, match=r"needs .*raw\.bin, which is truncated"):
        open_source(tmp_path / "in.h5")


@pytest.mark.parametrize("dtype", [">u2", ">u4", "<u2", "u1", ">i4"])
def test_any_byte_order(dtype: str, tmp_path: Path):
    """Whatever is stored is what is read."""
    values = np.arange(200).reshape(10, 20).astype(dtype)
    assert np.array_equal(whole(open_source(h5(tmp_path / "in.h5", a=values))), values)


@pytest.mark.parametrize("order", ["<", ">"])
def test_unsigned_values_that_are_stored_as_signed(order: str, tmp_path: Path):
    """As classic netCDF has to, which states blanks as they are stored."""
    h5py = pytest.importorskip("h5py")
    values = np.array([[1, 65534, 65535, 40000]] * 4, f"{order}u2")
    with h5py.File(tmp_path / "in.h5", "w") as file:
        dataset = file.create_dataset("a", data=values.view(f"{order}i2"))
        dataset.attrs["_Unsigned"] = "true"
        assert np.array_equal(whole(open_source(tmp_path / "in.h5")), values)
        dataset.attrs["_FillValue"] = np.int16(-1)
        file.flush()
        found = whole(open_source(tmp_path / "in.h5"))[0]
    assert np.array_equal(found, [1, 65534, np.nan, 40000], equal_nan=True)


def test_several_values_that_are_missing(tmp_path: Path):
    """CF has one number for it, or a list of them."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "in.h5", "w") as file:
        dataset = file.create_dataset("a", data=np.array([[1, 2, -99, -98]] * 4, "f4"))
        dataset.attrs["missing_value"] = np.array([-99, -98], "f4")
    found = whole(open_source(tmp_path / "in.h5"))[0]
    assert np.array_equal(found, [1, 2, np.nan, np.nan], equal_nan=True)


# TIFF


def test_a_file_of_an_image_that_is_gone(tmp_path: Path):
    """tifffile would read its planes as zeros."""
    tifffile = pytest.importorskip("tifffile")
    planes = "".join(
        f'<TiffData FirstZ="{z}" IFD="{z % 2}" PlaneCount="1"><UUID FileName="f{z // 2}.ome.tif">'
        f"urn:uuid:{z // 2}</UUID></TiffData>"
        for z in range(4)
    )
    values = np.arange(1, 257, dtype="u2").reshape(4, 8, 8)
    for number in range(2):
        xml = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{number}"><Image ID="Image:0"><Pixels ID="Pixels:0" Type="uint16" '
            'DimensionOrder="XYZCT" SizeX="8" SizeY="8" SizeZ="4" SizeC="1" SizeT="1">'
            f'<Channel ID="Channel:0:0"/>{planes}</Pixels></Image></OME>'
        )
        with tifffile.TiffWriter(tmp_path / f"f{number}.ome.tif", ome=False) as file:
            for plane in range(2):
                text = None if plane else xml
                file.write(values[2 * number + plane], description=text, metadata=None)
    assert np.array_equal(whole(open_source(tmp_path / "f0.ome.tif")), values)
    (tmp_path / "f1.ome.tif").unlink()
    with pytest.raises(SourceReadError, match="lacks pages: a file that its metadata name"):
        open_source(tmp_path / "f0.ome.tif")


def test_a_header_too_long_to_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The store would refuse it: it goes without, and says so."""
    monkeypatch.setattr("cdd_dask.run.LONGEST_HEADER", 100)
    path = tif(tmp_path / "in.tif", description="x" * 101, metadata=None)
    result = cdd_dask.decompose(path, tmp_path / "out.zarr", **FAST)
    assert result.attrs["source"]["header"] is None
    assert cdd_dask.verify(tmp_path / "out.zarr", progress=False)


def test_series_by_number(tmp_path: Path):
    """The first one unless another is named; a wrong one lists those that are there."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "in.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(VOLUME, metadata=None, photometric="minisblack")
        file.write(VOLUME[:, :9, :8] * 2, metadata=None, photometric="minisblack")
    assert open_source(path).shape == VOLUME.shape
    assert np.array_equal(whole(open_source(f"{path}::1")), VOLUME[:, :9, :8] * 2)
    for part in ("2", "x", "-1"):
        with pytest.raises(InputError, match=r"no series .*::0 \(12 × 17 × 19\), .*::1 \(12 × 9"):
            open_source(f"{path}::{part}")


def test_ome_tiff(tmp_path: Path):
    """Axes, spacing in one unit, and the length-1 axes left out."""
    metadata = {
        "axes": "TCZYX",
        "PhysicalSizeX": 0.5,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": 500.0,
        "PhysicalSizeYUnit": "nm",
        "PhysicalSizeZ": 0.002,
        "PhysicalSizeZUnit": "mm",
    }
    path = tif(tmp_path / "in.ome.tif", VOLUME[None, None], metadata=metadata, ome=True)
    source = open_source(path)
    assert source.dimension_names == ("z", "y", "x")
    assert source.spacing == pytest.approx((2.0, 0.5, 0.5))
    assert source.units == ("µm",) * 3
    assert "PhysicalSizeX" in (source.header or "")
    result = cdd_dask.decompose(path, spacing="header", num_channels=2, e_rel=0.3, progress=False)
    assert result.scales.tolist() == [0.5, 1.0]
    assert result.unit == "µm"


def test_imagej_stack(tmp_path: Path):
    """ImageJ's spacing and resolution, its unit spelt as it spells it."""
    values = VOLUME[:, None]
    metadata = {"axes": "ZCYX", "spacing": 2.0, "unit": "micron"}
    path = tif(tmp_path / "in.tif", values, imagej=True, resolution=(4, 2), metadata=metadata)
    source = open_source(path)
    assert source.shape == VOLUME.shape
    assert source.spacing == pytest.approx((2.0, 0.5, 0.25))
    assert source.units == ("µm",) * 3


def test_a_tiff_for_printing_has_no_spacing(tmp_path: Path):
    """300 dots to the inch say nothing of what is shown."""
    path = tif(tmp_path / "in.tif", resolution=(300, 300), resolutionunit=2)
    assert open_source(path).spacing is None


def test_tiff_reads_only_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A region of two of twelve pages decodes two."""
    tifffile = pytest.importorskip("tifffile")
    source = open_source(tif(tmp_path / "in.tif", compression="zlib"))
    assert source.chunk is not None
    assert source.chunk[0] == 1
    decoded = []
    original = tifffile.TIFF.DECOMPRESSORS[tifffile.COMPRESSION.ADOBE_DEFLATE]

    def counted(*args: Any, **options: Any) -> Any:
        decoded.append(1)
        return original(*args, **options)

    monkeypatch.setattr(type(tifffile.TIFF.DECOMPRESSORS), "__getitem__", lambda self, key: counted)
    source.read((slice(3, 5), slice(0, 17), slice(0, 19)))
    assert 0 < len(decoded) <= 2 * -(-17 // source.chunk[1])


@pytest.mark.parametrize("compression", [5, 50000])
def test_a_compression_that_needs_another_library(tmp_path: Path, compression: int):
    """Refused when it is opened, with what to install; nothing is begun."""
    tifffile = pytest.importorskip("tifffile")
    path = tif(tmp_path / "in.tif")
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages.first.tags["Compression"].overwrite(compression)
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match="pip install imagecodecs"):
            open_source(path)


def test_tiff_that_does_not_tell_where_its_strips_are(tmp_path: Path):
    """They would be read as zeros."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, np.ones((12, 10), "uint8"), rowsperstrip=12, compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[257].overwrite(1200)
    with pytest.raises(SourceReadError, match="tells where 1 of 100 parts of an image lie"):
        open_source(path)


# NIfTI


def test_nifti_of_a_negative_shape(tmp_path: Path):
    """Lengths are signed, and two of them may seem to be what the file holds."""
    path = nii(tmp_path / "in.nii")
    data = bytearray(path.read_bytes())
    data[42:46] = b"\xff" * 4  # of the first two axes
    path.write_bytes(data)
    with pytest.raises(SourceReadError, match=r"by its header its shape is .*-1, -1"):
        open_source(path)


def test_nifti_is_turned_to_its_own_order(tmp_path: Path):
    """nibabel's ``[i, j, k]`` is our ``[k, j, i]``, and so are spacing and units."""
    nibabel = pytest.importorskip("nibabel")
    path = nii(tmp_path / "in.nii.gz", zooms=(0.5, 0.75, 2.0), units=("mm", "sec"))
    source = open_source(path)
    assert np.array_equal(whole(source).T, np.asarray(nibabel.load(path).dataobj))
    assert source.dimension_names == ("z", "y", "x")
    assert source.spacing == (2.0, 0.75, 0.5)
    assert source.units == ("mm",) * 3
    film = np.stack([VOLUME, VOLUME * 2])
    path = nii(tmp_path / "film.nii", film, zooms=(0.5, 0.75, 2.0, 3.0), units=("micron", "msec"))
    source = open_source(path)
    assert np.array_equal(whole(source), film)
    assert source.dimension_names == ("t", "z", "y", "x")
    assert (source.spacing, source.units) == ((3.0, 2.0, 0.75, 0.5), ("ms", "µm", "µm", "µm"))
    assert json.loads(source.header or "")["pixdim"][1:4] == [0.5, 0.75, 2.0]


def test_scaled_nifti(tmp_path: Path):
    """Slope and intercept are applied."""
    nibabel = pytest.importorskip("nibabel")
    stored = (100 * VOLUME).astype("int16")
    image = nibabel.Nifti1Image(stored.T, np.eye(4))
    image.header.set_slope_inter(0.25, 10)
    nibabel.save(image, tmp_path / "in.nii")
    # nibabel divides by the slope when it writes: what is shown is what was given
    source = open_source(tmp_path / "in.nii")
    assert source.dtype == np.float64
    expected = np.asarray(nibabel.load(tmp_path / "in.nii").dataobj).T
    assert np.allclose(whole(source), expected, rtol=1e-12)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["Nifti1Pair", "Nifti1Image", "Nifti2Image"])
def test_nifti_of_every_byte_order(tmp_path: Path, kind: str, order: str):
    """One file or two, version 1 or 2, big-endian or little."""
    nibabel = pytest.importorskip("nibabel")
    image = getattr(nibabel, kind)
    header = image.header_class(endianness=order)
    header.set_data_dtype(np.dtype("int16").newbyteorder(order))
    values = (100 * VOLUME).astype("int16")
    path = tmp_path / ("in.hdr" if kind == "Nifti1Pair" else "in.nii")
    nibabel.save(image(values.T, np.eye(4), header), path)
    assert nibabel.load(path).header.endianness == order
    assert np.array_equal(whole(open_source(path)), values)


def test_a_packed_nifti_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However many blocks are read; a changed file is unpacked again, and nothing stays behind."""
    path = nii(tmp_path / "in.nii.gz")
    before = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    opened = []
    original = gzip.open
    monkeypatch.setattr(
        "cdd_dask.readers.nifti.gzip.open", lambda *a, **k: (opened.append(a), original(*a, **k))[1]
    )
    source = open_source(path)
    opened.clear()
    for z in range(12):
        assert np.array_equal(source.read((slice(z, z + 1), slice(0, 17), slice(0, 19)))[0],
                              VOLUME[z])  # fmt: skip
    assert len(opened) == 1
    nii(path, VOLUME * 2)
    os.utime(path, ns=(1, 1))
    assert np.array_equal(whole(open_source(path)), VOLUME * 2)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= len(before) + 2


def test_the_brain_template():
    """MNI's T1 template: zero around the head, whose blocks cost nothing."""
    folder = os.environ.get("CDD_TEST_DATA")
    if not folder or not (path := Path(folder) / "mni152_t1.nii.gz").is_file():
        pytest.skip("CDD_TEST_DATA is not set")
    pytest.importorskip("nibabel")
    source = open_source(path)
    assert (source.shape, source.spacing) == ((189, 233, 197), (1.0, 1.0, 1.0))
    options = {"num_channels": 1, "e_rel": 1, "block": 32, "progress": False}
    result = cdd_dask.decompose(path, **options)
    assert result.attrs["blocks"]["empty"] > 20
    assert np.array_equal(result.reconstruct(), whole(source))


# arrays


def test_xarray_coordinates():
    """Spacing and units from evenly spaced coordinates."""
    xarray = pytest.importorskip("xarray")
    coords = {
        "z": ("z", np.arange(12) * 2.0, {"units": "micrometer"}),
        "y": ("y", 30 - np.arange(17, dtype="float32") * 0.1),
        "x": ("x", np.geomspace(1, 2, 19)),
    }
    array = xarray.DataArray(VOLUME, dims=("z", "y", "x"), coords=coords)
    source = open_source(array)
    assert source.spacing == pytest.approx((2.0, 0.1, 1.0), rel=1e-5)
    assert source.units == ("µm", None, None)
    assert open_source(xarray.DataArray(VOLUME)).spacing is None


@pytest.mark.parametrize("kind", ["float32", "int16"])
def test_a_masked_array(kind: str):
    """Its masked voxels are blank, whatever lies beneath; the array stays as it was."""
    values = (10 * VOLUME).astype(kind)
    masked = np.ma.array(values, mask=VOLUME > 3)
    result = cdd_dask.decompose(masked, **FAST)
    expected = np.where(VOLUME > 3, np.nan, values.astype("float32"))
    assert np.allclose(result.reconstruct(), expected, rtol=1e-6, equal_nan=True)
    assert masked.mask.sum() == (VOLUME > 3).sum()
    assert masked.dtype == kind


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr(tmp_path: Path, version: int):
    """Scales of the data set and of the image multiply; odd metadata do not hurt."""
    root = zarr.open_group(tmp_path / "in.zarr", mode="w", zarr_format=version)
    image = root.create_group("scene").create_array("0", data=VOLUME, chunks=(8, 8, 8))
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    dataset = {
        "path": "0",
        "coordinateTransformations": [{"type": "scale", "scale": [4.0, 1.0, 1.0]}],
    }
    multiscales = [
        {
            "axes": axes,
            "datasets": [dataset],
            "coordinateTransformations": [{"type": "scale", "scale": [0.5, 0.5, 0.5]}],
        }
    ]
    scene: Any = root["scene"]
    if version == 2:
        scene.attrs["multiscales"] = multiscales
    else:
        scene.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    source = open_source(tmp_path / "in.zarr" / "scene" / "0")
    assert np.array_equal(whole(source), image[:])
    assert (source.spacing, source.units) == ((2.0, 0.5, 0.5), ("µm",) * 3)
    assert source.dimension_names == ("z", "y", "x")
    scene.attrs.update({"multiscales": 7, "ome": {"multiscales": [{"datasets": 3}]}})
    assert open_source(tmp_path / "in.zarr" / "scene" / "0").spacing is None


def test_a_channel_as_source(tmp_path: Path):
    """A channel of a store with a spacing states it."""
    out = tmp_path / "out.zarr"
    options = {"spacing": (2.0, 0.5, 0.5), "unit": "µm", "num_channels": 1, "e_rel": 0.3}
    cdd_dask.decompose(VOLUME, out, progress=False, **options)
    source = open_source(out / "residual" / "scale0" / "image")
    assert (source.spacing, source.units) == ((2.0, 0.5, 0.5), ("µm",) * 3)


def test_errors_on_the_command_line(tmp_path: Path):
    """One line and exit status 2, whatever the format."""
    h5(tmp_path / "in.h5", a=VOLUME, b=VOLUME)
    tif(tmp_path / "in.tif")
    for source in ("in.h5", "in.h5::/c", "in.tif::4", "in.nii.gz", "in.tif::"):
        done = subprocess.run(
            [sys.executable, "-m", "cdd_dask", "plan", source],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2, source
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
