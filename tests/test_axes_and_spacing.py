"""Slices decomposed by themselves, and scales in physical units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from examples import few
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import cdd_dask
from cdd_dask import api, cli
from cdd_dask.errors import InputError
from cdd_dask.parameters import Parameters
from cdd_dask.readers import open_source

QUICK: dict[str, Any] = {"max_scale": 4, "e_rel": 0.2}

# axes


@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (-1, -2), (0,), 1, (0, 2)])
def test_every_slice_by_itself(axes: Any, lognormal: Any, outputs: Any):
    """The channels of each slice are those of that slice alone.

    To the bit, unless another axis lies between: an engine may then smooth along them in another
    order, and rounds otherwise.
    """
    field, options = lognormal((7, 24, 20), seed=3), {"max_scale": 2, "e_rel": 0.2}
    numbers = {a % 3 for a in ((axes,) if isinstance(axes, int) else axes)}
    others = [a for a in range(3) if a not in numbers]
    ours = outputs(field, axes=axes, **options)
    places = [*np.ndindex(*(field.shape[a] for a in others))]
    for place in places[:: 1 + len(places) // 15]:
        where: list[Any] = [slice(None)] * 3
        for a, i in zip(others, place, strict=True):
            where[a] = i
        alone = outputs(np.ascontiguousarray(field[tuple(where)]), **options)
        mine = ours[(slice(None), *where)]
        if numbers == {0, 2}:
            assert np.abs(mine - alone).max() <= 1e-6 * field.max()
        else:
            assert np.array_equal(mine, alone)


@few(5)
@given(
    axes=st.sampled_from([(0,), (1, 2), (0, 2)]),
    block=st.tuples(*(st.integers(6, 30),) * 3),
    boundary=st.sampled_from(["reflect", "mirror", "wrap"]),
    rtol=st.sampled_from([0, 1e-3]),
)
def test_blocks_agree(axes: Any, block: Any, boundary: str, rtol: float, lognormal: Any,
                      outputs: Any):  # fmt: skip
    """Cut anywhere: within `rtol`; across the slices nothing is approximate at all."""
    field = lognormal((30, 28, 26))
    options = {"max_scale": 2, "e_rel": 0.3, "axes": axes, "boundary": boundary, "rtol": rtol}
    whole, parts = outputs(field, **options), outputs(field, block=block, **options)
    assert np.abs(parts - whole).max() <= rtol * np.ptp(field)
    slices = [30 if a in axes else b for a, b in enumerate(block)]
    assert np.array_equal(outputs(field, block=slices, **options), whole)


def test_no_halo_across_slices():
    """A volume that does not fit is cut between slices, where nothing is read twice."""
    plan = cdd_dask.plan((400, 1000, 1000), axes=(1, 2), max_scale=32, memory="2GB")
    assert plan.grid.counts[1:] == (1, 1)
    assert len(plan.grid) > 1
    for stage in plan.stages:
        assert stage.depth == (0, 0, 0)
        assert stage.haloed_voxels == 400 * 1000 * 1000
        assert stage.error == "exact"
    forced = cdd_dask.plan((64, 64, 64), axes=(1, 2), max_scale=4, block=32)
    assert all(stage.depth[0] == 0 < stage.depth[1] for stage in forced.stages)


def test_default_scale_is_of_the_decomposed_axes():
    """The axis of slices, however long, decides no scale."""
    assert cdd_dask.plan((1000, 16, 16), axes=(1, 2)).edges == (1, 2, 4, 8)
    assert cdd_dask.plan((1000, 16, 16), axes=0).edges[-1] == 256


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((1, 3), r"axes=\(1, 3\) must lie within 0 … 2"),
        ((-4,), r"axes=\(-4,\) must lie within"),
        ((1, 1), r"axes=\(1, 1\) names an axis twice"),
        ((2, -1), r"names an axis twice"),
        ((), r"axes=\(\) must be numbers of axes"),
        ((1.5,), r"axes=\(1\.5,\) must be numbers"),
        ((True,), r"must be numbers of axes"),
        ("xy", r"axes='xy' must be numbers"),
    ],
)
def test_axes_that_are_none(axes: Any, message: str):
    """Out of range, repeated, or no numbers: named with what there is."""
    with pytest.raises(InputError, match=message):
        cdd_dask.plan((8, 9, 10), axes=axes)


# spacing


def blob(*coordinates: NDArray[Any], width: float) -> NDArray[Any]:
    """A round blob in the middle of the axes of these coordinates."""
    total = sum(
        ((x - 15.75) ** 2).reshape([-1 if a == b else 1 for b in range(len(coordinates))])
        for a, x in enumerate(coordinates)
    )
    return np.exp(-total / (2 * width**2))


def test_a_round_blob_on_an_anisotropic_grid(outputs: Any):
    """Slices four times as far apart as pixels give the isotropic grid's channels, to 3%."""
    fine = np.arange(64) * 0.5
    coarse = np.arange(16) * 2.0 + 0.75  # in the middle between two fine planes
    options = {"min_scale": 1, "max_scale": 8, "e_rel": 0.3, "engine": "reference"}
    isotropic = outputs(blob(fine, fine, fine, width=3.0), spacing=0.5, **options)
    ours = outputs(blob(coarse, fine, fine, width=3.0), spacing=(2.0, 0.5, 0.5), **options)
    wrong = outputs(blob(coarse, fine, fine, width=3.0), spacing=0.5, **options)
    for expected, channel, other in zip(isotropic, ours, wrong, strict=True):
        expected = (expected[1::4] + expected[2::4]) / 2
        assert np.linalg.norm(channel - expected) <= 0.03 * np.linalg.norm(expected)
        assert np.linalg.norm(other - expected) > 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("spacing", [0.25, (0.25, 0.25), 8])
def test_a_spacing_only_names_the_scales_otherwise(spacing: Any, lognormal: Any, outputs: Any):
    """The same for all axes, it multiplies the edges and nothing else."""
    field = lognormal((30, 32))
    step = spacing if isinstance(spacing, int | float) else spacing[0]
    result = cdd_dask.decompose(field, spacing=spacing, unit="kpc", progress=False)
    plain = cdd_dask.decompose(field, progress=False)
    assert result.scales.tolist() == [step * edge for edge in plain.scales]
    for ours, theirs in zip(result.channels, plain.channels, strict=True):
        assert np.array_equal(ours[:], theirs[:])


def test_halos_follow_the_spacing():
    """The halo is the same length along every axis, so it is fewer of the larger voxels."""
    plan = cdd_dask.plan((99, 99, 99), spacing=(2.0, 0.5, 0.5), max_scale=8, block=50)
    z, y, x = plan.stages[-1].depth
    assert y == x
    assert 0.2 * y <= z <= 0.35 * y
    assert plan.edges[0] == 0.5
    sliced = cdd_dask.plan((99, 99, 99), spacing=(0.1, 0.5, 0.5), axes=(1, 2))
    assert sliced.edges[0] == 0.5
    assert sliced.edges[-1] <= 99 * 0.5 / 2


def test_blocks_agree_on_anisotropic_grids(lognormal: Any, outputs: Any):
    """Within `rtol`, with halos of another depth along each axis."""
    field = lognormal((30, 40, 20))
    options = {"spacing": (2.0, 0.5, 1.0), "max_scale": 4, "e_rel": 0.2, "engine": "reference"}
    whole, parts = outputs(field, **options), outputs(field, block=(9, 17, 11), **options)
    assert np.abs(parts - whole).max() <= 1e-3 * np.ptp(field)


def test_coordinates_and_metadata(tmp_path: Path, lognormal: Any):
    """All that the store says is in the unit of the scales, and OME readers take it."""
    image = pytest.importorskip("ome_zarr_models.v05.image")
    import zarr

    out = tmp_path / "out.zarr"
    options = {"spacing": (2.0, 0.5, 0.5), "unit": "µm", "max_scale": 2, "progress": False}
    result = cdd_dask.decompose(lognormal((8, 10, 12)), out, **options)
    assert result.unit == "µm"
    assert "scales (µm)" in result.table()
    assert "0.5, 1, 2 µm" in repr(result)
    group: Any = zarr.open_group(out / "channel_01", mode="r")
    assert group.attrs["cdd_dask"]["unit"] == "µm"
    assert group["scale0/z"][:].tolist() == [2.0 * i for i in range(8)]
    assert group["scale0/x"].attrs["units"] == "µm"
    opened = image.Image.from_zarr(group).ome_attributes.multiscales[0]
    assert [axis.unit for axis in opened.axes] == ["micrometer"] * 3
    scale = opened.datasets[0].coordinateTransformations[0].scale
    assert list(scale) == [2.0, 0.5, 0.5]
    assert cdd_dask.verify(out, lognormal((8, 10, 12)), progress=False).worst_ulp <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": 0}, r"spacing=0 must be > 0"),
        ({"spacing": (1, 2, -3)}, r"spacing=-3 must be > 0"),
        ({"spacing": (1, 2)}, r"spacing=\(1\.0, 2\.0\) has 2 values, but .* 3 axes"),
        ({"spacing": (1, 2), "axes": (1, 2)}, r"has 2 values.* also for those not in axes="),
        ({"spacing": float("nan")}, r"spacing=nan must be a finite number"),
        ({"spacing": (1, "a", 2)}, r"spacing='a' is no number"),
        ({"spacing": "file"}, r"spacing='file' must be .header., or a number"),
        ({"spacing": "header"}, r"needs a source that states its spacing"),
        ({"unit": "mm"}, r"unit='mm' without spacing"),
        ({"unit": " ", "spacing": 1}, r"unit=' ' must be the name of a unit"),
        ({"spacing": (1000.0, 1e-3, 1e-3), "max_scale": 1}, r"min_scale=0\.001 is less than"),
        ({"spacing": 2, "max_scale": 1}, r"max_scale=1 must be larger than min_scale=2"),
    ],
)
def test_spacings_that_are_none(options: Any, message: str):
    """Named with the value and what would do."""
    with pytest.raises(InputError, match=message):
        cdd_dask.plan((8, 9, 10), **options)


@pytest.mark.parametrize(
    ("units", "options", "unit"),
    [
        (("mm", "mm", "mm"), {}, "mm"),
        (("m/s", "deg", "deg"), {"axes": (1, 2)}, "deg"),
        (("m/s", "deg", "deg"), {"axes": 0}, "m/s"),
        (("mm", "mm", "mm"), {"unit": "mm"}, "mm"),
        ((None, None, None), {"unit": "pc"}, "pc"),
        (None, {}, None),
    ],
)
def test_what_the_header_states(units: Any, options: Any, unit: Any):
    """Its spacing and its unit, which a unit given besides may only repeat."""
    source = replace(open_source(np.ones((8, 9, 10))), spacing=(3.0, 0.5, 0.5), units=units)
    parameters = api.with_header_spacing(Parameters(spacing="header", **options), source)
    assert parameters.spacing == (3.0, 0.5, 0.5)
    assert parameters.unit == unit


@pytest.mark.parametrize(
    ("units", "options", "message"),
    [
        (("m/s", "deg", "deg"), {}, r"different units \(axis 0: m/s, axis 1: deg.*choose axes="),
        (("µm", None, None), {}, r"different units \(axis 0: µm, axis 1: none"),
        (("mm", "mm", "mm"), {"unit": "µm"}, r"unit='µm', but .* states its spacing in 'mm'"),
    ],
)
def test_headers_that_contradict(units: Any, options: Any, message: str):
    """Units that differ, from each other or from the one given."""
    source = replace(open_source(np.ones((8, 9, 10))), spacing=(3.0, 0.5, 0.5), units=units)
    with pytest.raises(InputError, match=message):
        api.with_header_spacing(Parameters(spacing="header", **options), source)


def test_from_a_config_file_and_the_command_line(tmp_path: Path, lognormal: Any):
    """Lists in YAML, commas on the command line, which wins; `info` shows what came out."""
    np.save(tmp_path / "in.npy", lognormal((8, 20, 22)))
    (tmp_path / "c.yaml").write_text("spacing: [2, 0.5, 0.5]\nunit: µm\naxes: [1, 2]\n")
    out = str(tmp_path / "out.zarr")
    common = ["decompose", str(tmp_path / "in.npy"), out, "--config", str(tmp_path / "c.yaml")]
    done = CliRunner().invoke(cli.cli, [*common, "--num-channels", "1", "--axes", "-1,-2"])
    assert done.exit_code == 0, done.output
    assert "scales (µm)" in done.output
    attributes = cdd_dask.open_decomposition(out).attrs["parameters"]
    assert attributes["axes"] == [1, 2]
    assert attributes["spacing"] == [2.0, 0.5, 0.5]
    one = ["--overwrite", "--num-channels", "1", "--spacing", "3", "--unit", "nm"]
    assert CliRunner().invoke(cli.cli, [*common, *one]).exit_code == 0
    assert cdd_dask.open_decomposition(out).attrs["parameters"]["spacing"] == [3.0] * 3
    for wrong in (["--spacing", "a,b"], ["--axes", "x"]):
        assert CliRunner().invoke(cli.cli, [*common, *wrong]).exit_code == 2


@pytest.mark.parametrize("unit", ["a\nb", "u" * 101, "\ud800"])
def test_units_that_no_store_could_keep(unit: str, tmp_path: Path):
    """Refused where they are given, and left out where a source states them."""
    with pytest.raises(InputError, match=r"unit=.* must be the name of a unit"):
        cdd_dask.plan((8, 8), spacing=1.0, unit=unit)
    xarray = pytest.importorskip("xarray")
    along = xarray.Variable("x", np.arange(8.0) * 2, {"units": unit})
    field = xarray.DataArray(np.ones((8, 8)), dims=("y", "x"), coords={"x": along})
    result = cdd_dask.decompose(field, tmp_path / "out.zarr", max_scale=2, progress=False)
    assert result.attrs["source"]["units"] == [None, None]


@pytest.mark.parametrize("name", ["zarr.json", "n" * 300, "image", "a/b"])
def test_names_of_axes_that_no_folder_can_have(name: str, tmp_path: Path):
    """The usual ones are taken."""
    xarray = pytest.importorskip("xarray")
    field = xarray.DataArray(np.ones((8, 8)), dims=("y", name))
    out = tmp_path / "out.zarr"
    cdd_dask.decompose(field, out, max_scale=2, progress=False)
    assert {path.name for path in (out / "residual/scale0").iterdir()} >= {"y", "x", "image"}
