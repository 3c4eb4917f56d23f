"""The main job: a spectral cube through the command line, out of core, block by block.

On the real L1448 cube where `CDD_TEST_DATA` has it, and always on a generated one with the
same traits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import cdd_dask
from cdd_dask.boundaries import CUT
from cdd_dask.cli import cli
from cdd_dask.engines import Diffusion, load_engine
from cdd_dask.parameters import Parameters
from cdd_dask.scales import scale_edges
from cdd_dask.time_stepping import channel_steps

fits = pytest.importorskip("astropy.io.fits")

MAX_SCALE, RTOL = 8, 1e-3


@pytest.fixture(params=["generated", "l1448"])
def cube(request: pytest.FixtureRequest) -> Path:
    """Path of a FITS cube."""
    return request.getfixturevalue({"generated": "fits_cube", "l1448": "l1448"}[request.param])


def whole_array_channels(field: np.ndarray) -> list[np.ndarray]:
    """Channels of the reference engine, run on the array as a whole, and the residual."""
    parameters, engine = Parameters(max_scale=MAX_SCALE), load_engine("reference")
    edges = scale_edges(parameters, field.shape)
    outputs, current = [], field.copy()
    for steps in channel_steps(parameters, edges, field.ndim):
        faces = (("reflect", "reflect"),) * field.ndim
        assert CUT not in faces[0]
        after = engine.diffuse(current.copy(), Diffusion(steps, "constrained", faces))
        outputs.append(current - after)
        current = after
    return [*outputs, current]


def test_cube_through_the_command_line(cube: Path, tmp_path: Path):
    """At least 8 blocks: the sum is the cube, and every channel is the whole array's."""
    out = tmp_path / "out.zarr"
    field = fits.getdata(cube).astype("f4")
    block = ",".join(str(-(-n // 2)) for n in field.shape)
    options = ["--max-scale", str(MAX_SCALE), "--block", block, "--quiet"]
    done = CliRunner().invoke(cli, ["decompose", str(cube), str(out), *options])
    assert done.exit_code == 0, done.output
    result = cdd_dask.open_decomposition(out)
    assert np.prod(result.attrs["plan"]["grid"]) >= 8

    ulp = np.spacing(np.abs(field).max())
    assert np.abs(result.reconstruct() - field).max() <= 4 * ulp

    allowed = RTOL * (field.max() - field.min())
    for ours, theirs in zip(
        (*result.channels, result.residual), whole_array_channels(field), strict=True
    ):
        difference = np.abs(ours[:] - theirs)
        assert np.linalg.norm(difference) <= 1e-3 * np.linalg.norm(theirs)
        assert np.mean(difference > allowed) <= 1e-4

    verified = CliRunner().invoke(cli, ["verify", str(out), "--quiet"])
    assert verified.exit_code == 0, verified.output
    assert "reconstruction error" in verified.output


def test_header_and_axes_are_kept(cube: Path, tmp_path: Path):
    """The store remembers the WCS header, and its axes are velocity, dec, ra."""
    header = fits.getheader(cube)
    result = cdd_dask.decompose(
        cube, tmp_path / "out.zarr", num_channels=1, e_rel=0.5, progress=False
    )
    kept = fits.Header.fromstring(result.attrs["source"]["header"], sep="\n")
    assert kept.tostring() == header.tostring()
    assert result.residual.metadata.dimension_names == ("v", "y", "x")
