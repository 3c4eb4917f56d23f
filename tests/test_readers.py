"""Every kind of source gives the same channels as the array in it, and is left as it was."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

import cdd_dask
from cdd_dask.errors import InputError, SourceReadError
from cdd_dask.readers import open_source
from cdd_dask.readers.base import Source

OPTIONS = {"max_scale": 2, "e_rel": 0.3, "block": (9, 20)}
SHAPE = (21, 20)


@pytest.fixture(scope="module")
def field(lognormal: Any) -> NDArray[np.float32]:
    """Whole numbers up to 200, which every numeric type down to uint8 and float16 holds."""
    return np.minimum(np.rint(lognormal(SHAPE)), 200).astype("float32")


@pytest.fixture(scope="module")
def channels(field: Any, outputs: Any) -> NDArray[np.float32]:
    """The channels of the NumPy array."""
    return outputs(field, **OPTIONS)


Make = Callable[[NDArray[Any], Path], Any]


def npy(array: NDArray[Any], folder: Path) -> Path:
    np.save(folder / "in.npy", array)
    return folder / "in.npy"


def fits_file(array: NDArray[Any], folder: Path) -> Path:
    fits = pytest.importorskip("astropy.io.fits")
    fits.writeto(folder / "in.fits", array)
    return folder / "in.fits"


def fits_extension(array: NDArray[Any], folder: Path) -> Path:
    fits = pytest.importorskip("astropy.io.fits")
    hdus = fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(array), fits.ImageHDU(array * 0)])
    hdus.writeto(folder / "in.fit")
    return folder / "in.fit"


def fits_scaled(array: NDArray[Any], folder: Path) -> Path:
    """16-bit integers with a scale and an offset: the values are ``0.5 * stored + 100``."""
    fits = pytest.importorskip("astropy.io.fits")
    hdu = fits.PrimaryHDU((array * 2 - 200).astype("int16"))
    hdu.header["BSCALE"], hdu.header["BZERO"], hdu.header["BLANK"] = 0.5, 100.0, -32768
    hdu.writeto(folder / "in.fts")
    return folder / "in.fts"


def fits_unsigned(array: NDArray[Any], folder: Path) -> Path:
    """FITS has no uint16: astropy stores them as int16 with ``BZERO = 32768``."""
    return fits_file(array.astype("uint16"), folder)


def zarr_path(array: NDArray[Any], folder: Path, **options: Any) -> Path:
    zarr.create_array(folder / "in.zarr", data=array, chunks=(8, 7), **options)
    return folder / "in.zarr"


def zarr_member(array: NDArray[Any], folder: Path) -> str:
    """An array inside a group, by a relative-looking text path."""
    group = zarr.open_group(folder / "in.zarr", mode="w")
    group.create_array("deep/image", data=array)
    return str(folder / "in.zarr" / "deep" / "image")


def zarr_in_memory(array: NDArray[Any], folder: Path) -> Any:
    return zarr.create_array(zarr.storage.MemoryStore(), data=array, chunks=(8, 7))


def torch_tensor(array: NDArray[Any], folder: Path) -> Any:
    return pytest.importorskip("torch").tensor(array).requires_grad_()


def dask_array(array: NDArray[Any], folder: Path) -> Any:
    return pytest.importorskip("dask.array").from_array(array, chunks=(8, 7))


def data_array(array: NDArray[Any], folder: Path) -> Any:
    return pytest.importorskip("xarray").DataArray(array, dims=("lat", "lon"))


def lazy_data_array(array: NDArray[Any], folder: Path) -> Any:
    """A variable of a store on disk, not loaded."""
    xarray = pytest.importorskip("xarray")
    xarray.Dataset({"rain": (("lat", "lon"), array)}).to_zarr(
        folder / "in.zarr", consolidated=False
    )
    return xarray.open_zarr(folder / "in.zarr", chunks=None, consolidated=False)["rain"]


SOURCES: dict[str, Make] = {
    "numpy": lambda a, _: a,
    "numpy big-endian": lambda a, _: a.astype(">f4"),
    "numpy float64": lambda a, _: a.astype("float64"),
    "numpy float16": lambda a, _: a.astype("float16"),
    "numpy uint8": lambda a, _: a.astype("uint8"),
    "numpy int64": lambda a, _: a.astype("int64"),
    "numpy longdouble": lambda a, _: a.astype("longdouble"),
    "numpy fortran": lambda a, _: np.asfortranarray(a),
    "numpy backwards": lambda a, _: a[::-1, ::-1].copy()[::-1, ::-1],
    "numpy memmap": lambda a, d: np.load(npy(a, d), mmap_mode="r"),
    "list of lists": lambda a, _: a.tolist(),
    "npy": npy,
    "npy big-endian": lambda a, d: npy(a.astype(">f4"), d),
    "npy fortran": lambda a, d: npy(np.asfortranarray(a), d),
    "npy as text": lambda a, d: str(npy(a, d)),
    "fits": fits_file,
    "fits float64": lambda a, d: fits_file(a.astype("float64"), d),
    "fits extension": fits_extension,
    "fits scaled": fits_scaled,
    "fits unsigned": fits_unsigned,
    "zarr 3": zarr_path,
    "zarr 3 sharded": lambda a, d: zarr_path(a, d, shards=(16, 14)),
    "zarr 3 big-endian": lambda a, d: zarr_path(a.astype(">f4"), d),
    "zarr 2": lambda a, d: zarr_path(a, d, zarr_format=2),
    "zarr 3 object": lambda a, d: zarr.open_array(zarr_path(a, d), mode="r"),
    "zarr 2 object": lambda a, d: zarr.open_array(zarr_path(a, d, zarr_format=2), mode="r"),
    "zarr member": zarr_member,
    "zarr in memory": zarr_in_memory,
    "torch": torch_tensor,
    "torch bfloat16": lambda a, d: torch_tensor(a, d).bfloat16(),
    "torch float16": lambda a, d: torch_tensor(a, d).half(),
    "dask": dask_array,
    "dask of numpy": lambda a, d: dask_array(a, d).rechunk(SHAPE),
    "xarray": data_array,
    "xarray of dask": lambda a, d: data_array(a, d).chunk(lat=8),
    "xarray lazy": lazy_data_array,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_channels(
    tmp_path: Path, outputs: Any, field: Any, channels: Any, kind: str
):
    """To the bit, whatever the file format, the byte order, the strides or the type."""
    source = SOURCES[kind](field, tmp_path)
    assert np.array_equal(outputs(source, tmp_path / "out.zarr", **OPTIONS), channels)


@pytest.mark.parametrize("kind", ["numpy", "torch", "dask of numpy", "xarray", "npy", "zarr 3"])
@pytest.mark.parametrize("block", [(9, 20), SHAPE])
@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_the_source_is_left_as_it_was(
    tmp_path: Path, outputs: Any, field: Any, kind: str, block: Any, engine: str
):
    """Engines compute in place, but never in the user's array, also where it would fit as it is."""
    if engine == "torch":
        pytest.importorskip("torch")
    mine = field.copy()
    source = SOURCES[kind](mine, tmp_path)
    if kind == "torch":
        source = pytest.importorskip("torch").from_numpy(mine)  # shares its memory
    before = contents(tmp_path)
    outputs(source, **{**OPTIONS, "block": block}, engine=engine, device="cpu")
    assert np.array_equal(mine, field)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    """All bytes in a folder."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_read_only_array_is_enough(outputs: Any, field: Any, channels: Any):
    """Nothing is written to a source, so one that refuses to be written serves."""
    locked = field.copy()
    locked.setflags(write=False)
    assert np.array_equal(outputs(locked, **OPTIONS), channels)


def test_truth_values_are_numbers(outputs: Any, field: Any):
    """A mask is a field of 0 and 1."""
    mask = field > 1
    assert np.array_equal(outputs(mask, **OPTIONS), outputs(mask.astype("float32"), **OPTIONS))


@pytest.mark.parametrize("shape", [(30,), (12, 9), (8, 7, 6), (5, 4, 3, 6)])
def test_one_to_four_axes(outputs: Any, lognormal: Any, shape: tuple[int, ...]):
    """And the lists of numbers for them."""
    field = lognormal(shape)
    expected = outputs(field, max_scale=2, e_rel=0.3)
    assert expected.shape[1:] == shape
    assert np.array_equal(outputs(field.tolist(), max_scale=2, e_rel=0.3), expected)


# FITS


def test_an_observed_kind_of_cube(tmp_path: Path, outputs: Any, fits_cube: Path):
    """Big-endian, of mixed sign, three axes in FITS order: the array astropy reads."""
    from astropy.io import fits

    data = fits.getdata(fits_cube)
    assert data.dtype.byteorder == ">"
    options = {"max_scale": 2, "e_rel": 0.3, "block": (5, 17, 10)}
    expected = outputs(data.astype("float32"), **options)
    assert np.array_equal(outputs(fits_cube, tmp_path / "out.zarr", **options), expected)


def test_the_header_goes_along(tmp_path: Path, fits_cube: Path):
    """The store holds the header, card for card, so that the world axes can be had again."""
    from astropy.io import fits
    from astropy.wcs import WCS

    result = cdd_dask.decompose(
        fits_cube, tmp_path / "out.zarr", max_scale=2, e_rel=0.3, progress=False
    )
    stored = fits.Header.fromstring(result.attrs["source"]["header"], sep="\n")
    original = fits.getheader(fits_cube)
    assert stored.tostring() == original.tostring()
    sky = [WCS(header).pixel_to_world_values(3, 4, 5) for header in (stored, original)]
    assert np.array_equal(*sky)
    assert result.channels[0].metadata.dimension_names == ("v", "y", "x")


def test_blank_integers_are_blank(tmp_path: Path):
    """A voxel of the value `BLANK` is NaN: it takes no part, and is not taken for -1998."""
    fits = pytest.importorskip("astropy.io.fits")
    hdu = fits.PrimaryHDU(np.full((4, 5), 7, "int16"))
    hdu.data[2, 3] = -999
    hdu.header["BLANK"], hdu.header["BSCALE"] = -999, 2.0
    hdu.writeto(tmp_path / "in.fits")
    source = open_source(tmp_path / "in.fits")
    values = source.read((slice(0, 4), slice(0, 5)))
    assert np.isnan(values[2, 3])
    assert np.nansum(values) == 19 * 14
    with pytest.raises(InputError, match=r"NaN at \(2, 3\)"):
        cdd_dask.decompose(tmp_path / "in.fits", nan="raise", progress=False)
    result = cdd_dask.decompose(tmp_path / "in.fits", progress=False)
    assert np.isnan(result.residual[2, 3])
    assert result.scale_spectrum()["count"].tolist() == [19] * (len(result.channels) + 1)


def test_a_cube_is_mapped_not_loaded(fits_cube: Path, tmp_path: Path, monkeypatch: Any):
    """Opening reads a header; a region reads itself. Whole files would not fit the memory."""
    read = []
    original = np.memmap.__getitem__

    def watched(self: Any, key: Any) -> Any:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(np.memmap, "__getitem__", watched)
    region = (slice(1, 2), slice(3, 5), slice(0, 19))
    values = open_source(fits_cube).read(region)
    assert read == [region]
    assert values.shape == (1, 2, 19)


def test_the_observed_cube_can_be_read(l1448: Path):
    """The real file opens as its header describes it."""
    from astropy.io import fits

    source = open_source(l1448)
    data = fits.getdata(l1448)
    assert source.shape == data.shape
    region = tuple(slice(n // 2, n // 2 + 5) for n in source.shape)
    assert np.array_equal(source.read(region), data[region], equal_nan=True)


# files that cannot be read


def truncated(path: Path) -> Path:
    """The file without its last half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.filterwarnings("ignore:File may have been truncated")  # astropy's
def test_truncated_fits_is_refused(fits_cube: Path):
    """With both numbers of bytes, before anything is computed."""
    with pytest.raises(SourceReadError, match=r"cube\.fits is truncated: .* promises \d+ bytes"):
        open_source(truncated(fits_cube))


def test_compressed_fits_is_refused(fits_cube: Path, tmp_path: Path):
    """It cannot be mapped; the message says how to uncompress it."""
    packed = tmp_path / "cube.fits.gz"
    with gzip.open(packed, "wb") as file, open(fits_cube, "rb") as original:
        shutil.copyfileobj(original, file)
    with pytest.raises(SourceReadError, match="compressed as a whole and cannot be mapped: uncomp"):
        open_source(packed)


@pytest.mark.parametrize("content", [b"", b"not a FITS file" * 300, b"SIMPLE  =  what" * 400])
def test_a_file_that_only_is_called_fits(tmp_path: Path, content: bytes):
    """The message names the file, and no warning of a parser escapes."""
    pytest.importorskip("astropy.io.fits")
    (tmp_path / "in.fits").write_bytes(content)
    with pytest.raises(SourceReadError, match=r"in\.fits (is no readable FITS|holds no FITS)"):
        open_source(tmp_path / "in.fits")


def test_a_fits_file_without_an_image(tmp_path: Path):
    """A table is no field."""
    fits = pytest.importorskip("astropy.io.fits")
    table = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.ones(3))])
    table.writeto(tmp_path / "in.fits")
    with pytest.raises(SourceReadError, match="holds no FITS image"):
        open_source(tmp_path / "in.fits")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array" * 100])
def test_a_file_that_only_is_called_npy(tmp_path: Path, content: bytes):
    """The message names the file."""
    (tmp_path / "in.npy").write_bytes(content)
    with pytest.raises(SourceReadError, match=r"in\.npy is no readable \.npy file"):
        open_source(tmp_path / "in.npy")


def test_truncated_npy_is_refused(tmp_path: Path, field: Any):
    """A file that ends early is never read as zeros."""
    with pytest.raises(SourceReadError, match=r"in\.npy is no readable \.npy file"):
        open_source(truncated(npy(field, tmp_path)))


def test_pickled_objects_are_refused(tmp_path: Path):
    """Reading them would run code from the file."""
    np.save(tmp_path / "in.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises((SourceReadError, InputError), match=r"in\.npy"):
        open_source(tmp_path / "in.npy")


# Zarr and xarray


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_group_lists_its_arrays(tmp_path: Path, zarr_format: int):
    """A group is refused with the paths that would do."""
    group = zarr.open_group(tmp_path / "in.zarr", mode="w", zarr_format=zarr_format)
    group.create_array("a/image", shape=(4,), dtype="f4")
    group.create_array("b", shape=(4,), dtype="f4")
    with pytest.raises(InputError, match="group: name one of its arrays") as refused:
        open_source(tmp_path / "in.zarr")
    for name in ("in.zarr/a/image", "in.zarr/b"):
        assert name in str(refused.value)
    with pytest.raises(InputError, match="Zarr group"):
        open_source(group)


def test_a_folder_without_zarr_is_refused(tmp_path: Path):
    """A folder is there but no array: another message than for a folder that is missing."""
    (tmp_path / "in.zarr").mkdir()
    with pytest.raises(SourceReadError, match="folder without a Zarr array"):
        open_source(tmp_path / "in.zarr")


def test_broken_zarr_metadata_is_refused(tmp_path: Path, field: Any):
    """Metadata that is no JSON."""
    (zarr_path(field, tmp_path) / "zarr.json").write_text("{")
    with pytest.raises(SourceReadError, match=r"in\.zarr is no readable Zarr array"):
        open_source(tmp_path / "in.zarr")


@pytest.mark.parametrize("kind", ["xarray", "xarray lazy", "xarray of dask"])
def test_names_of_axes_are_kept(tmp_path: Path, field: Any, kind: str):
    """`xarray` finds the user's dimensions again in every output."""
    xarray = pytest.importorskip("xarray")
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(SOURCES[kind](field, tmp_path), out, progress=False, **OPTIONS)
    for group in ("channel_00", "residual"):
        image = xarray.open_zarr(out, group=f"{group}/scale0", consolidated=False)["image"]
        assert image.dims == ("lat", "lon")


def test_names_of_a_zarr_source_are_kept(tmp_path: Path, field: Any):
    """Zarr 3 names its axes too."""
    source = zarr_path(field, tmp_path, dimension_names=("p", "q"))
    result = cdd_dask.decompose(source, tmp_path / "out.zarr", progress=False, **OPTIONS)
    assert result.residual.metadata.dimension_names == ("p", "q")


@pytest.mark.parametrize(
    "names", [("x", "x"), ("image", "x"), ("km/s", "x"), ("", "x"), ("..", "x")]
)
def test_names_that_cannot_be_stored_do_no_harm(
    tmp_path: Path, field: Any, channels: Any, names: tuple[str, str]
):
    """Axes whose names are no names of arrays beside the image: the default names serve."""
    out = tmp_path / "out.zarr"
    source = zarr_path(field, tmp_path, dimension_names=names)
    result = cdd_dask.decompose(source, out, progress=False, **OPTIONS)
    assert np.array_equal(result.channels[0][...], channels[0])
    assert sorted(path.name for path in (out / "residual" / "scale0").iterdir()) == [
        "image",
        "x",
        "y",
        "zarr.json",
    ]


def test_a_lazy_array_is_not_loaded(tmp_path: Path, field: Any):
    """Opening a variable of a file reads nothing of it: it may be larger than the memory."""
    variable = lazy_data_array(field, tmp_path)
    source = open_source(variable)
    assert not variable.variable._in_memory
    assert np.array_equal(source.read((slice(2, 5), slice(0, 4))), field[2:5, :4])
    assert not variable.variable._in_memory


def test_a_dask_array_is_computed_block_by_block(field: Any):
    """Reading a region computes the chunks in it, not the array."""
    import dask.array as da

    computed = []

    def watched(block: Any) -> Any:
        if block.size:
            computed.append(block.shape)
        return block

    array = da.from_array(field, chunks=(7, 20)).map_blocks(watched, meta=field[:0, :0])
    source: Source = open_source(array)
    assert computed == []
    source.read((slice(0, 7), slice(0, 20)))
    assert computed == [(7, 20)]


# what is lost of a Zarr array


def test_a_lost_block_of_our_own_is_no_zeros(field: Any, tmp_path: Path):
    """A channel may be decomposed again; none of its blocks is one that was never written."""
    out, again = tmp_path / "out.zarr", tmp_path / "again.zarr"
    cdd_dask.decompose(field, out, progress=False, **OPTIONS)
    cdd_dask.decompose(out / "residual/scale0/image", again, progress=False, **OPTIONS)
    next(path for path in (out / "residual/scale0/image/c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(SourceReadError, match=r"shard .* is not there"):
        cdd_dask.decompose(
            out / "residual/scale0/image", again, overwrite=True, progress=False, **OPTIONS
        )


def test_what_lies_beside_the_outputs_is_the_user_s(field: Any, tmp_path: Path):
    """A sparse array in our folder has chunks that were never written."""
    cdd_dask.decompose(field, tmp_path / "out.zarr", progress=False, **OPTIONS)
    path = tmp_path / "out.zarr/mask/scale0/image"
    zarr.create_array(path, shape=(32, 32), chunks=(8, 8), dtype="f4", fill_value=0.0)[:8] = 1
    assert open_source(path).read((slice(0, 32),) * 2).sum() == 8 * 32


def test_an_unfinished_decomposition_is_no_source(field: Any, tmp_path: Path):
    """It may hold zeros where nothing was written."""
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(field, out, progress=False, **OPTIONS)
    root = zarr.open_group(out, mode="r+")
    root.attrs["cdd_dask"] = {**root.attrs["cdd_dask"], "complete": False}
    with pytest.raises(InputError, match="part of a decomposition that is not complete"):
        open_source(out / "channel_00/scale0/image")


@pytest.mark.parametrize("more", [{"shards": (16, 16)}, {}, {"zarr_format": 2}])
def test_an_empty_object_is_no_zeros(more: dict[str, Any], tmp_path: Path):
    """A lost machine may leave such; one that is not there was never written."""
    values = np.ones((32, 32), "f4")
    options = {"chunks": (8, 8), "fill_value": 0.0, **more}
    array = zarr.create_array(tmp_path / "in.zarr", data=values, **options)
    key = array.metadata.encode_chunk_key((1, 1))
    (tmp_path / "in.zarr" / key).write_bytes(b"")
    source = open_source(tmp_path / "in.zarr")
    for region in ((slice(0, 32),) * 2, (slice(9, 18),) * 2):
        with pytest.raises(SourceReadError, match="is empty"):
            source.read(region)
    (tmp_path / "in.zarr" / key).unlink()
    assert source.read((slice(0, 32),) * 2).min() == 0
