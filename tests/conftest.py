"""Fields and files that several tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

import cdd_dask

with suppress(ImportError):  # the engines' suite runs where hypothesis is not installed
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None, print_blob=True)  # busy machines are slow
    settings.register_profile("nightly", settings.get_profile("untimed"), max_examples=200)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "untimed"))


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no process that one starts, sees or touches the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def lognormal() -> Callable[..., NDArray[Any]]:
    """A factory of small positive fields like turbulence: ``lognormal(shape, seed, dtype)``."""

    def make(shape: tuple[int, ...], seed: int = 0, dtype: str = "float32") -> NDArray[Any]:
        noise = np.random.default_rng(seed).standard_normal(shape)
        # structure at two scales, so that no channel is empty
        mixed = noise + 3 * gaussian_filter(noise, 1.5, mode="wrap")
        return np.exp(mixed).astype(dtype)

    return make


@pytest.fixture(scope="session")
def outputs() -> Callable[..., NDArray[Any]]:
    """The channels and the residual of a decomposition, stacked: ``outputs(source, **options)``."""

    def make(source: Any, *args: Any, **options: Any) -> NDArray[Any]:
        result = cdd_dask.decompose(source, *args, progress=False, **options)
        return np.stack([part[...] for part in (*result.channels, result.residual)])

    return make


@pytest.fixture(scope="session")
def put_in_place() -> Callable[[Path, str], None]:
    """Replaces a file or a folder, if there is one: ``put_in_place(path, "pipe")``."""

    def put(path: Path, what: str) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if what == "folder":
            path.mkdir()
            (path / "more").write_text("within")
        elif what == "file":
            path.write_text("something")
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "loop":
            path.symlink_to(path.name)
        else:
            raise ValueError(what)

    return put


@pytest.fixture
def free_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further pass costs no more than its bytes, as in blocks far larger than those here."""
    monkeypatch.setattr("cdd_dask.drafts.REOPENING", 0.0)


@pytest.fixture
def fits_cube(tmp_path: Path, lognormal: Callable[..., NDArray[Any]]) -> Path:
    """A FITS file with the traits of an observed cube: big-endian, a world, a tenth negative."""
    fits = pytest.importorskip("astropy.io.fits")
    values = lognormal((12, 17, 19), seed=5)
    values -= np.quantile(values, 0.1).astype("float32")
    header = fits.Header()
    header["BUNIT"] = "K km/s"
    axes = [
        ("RA---TAN", "deg", 51.4, -0.0065, 9.0),
        ("DEC--TAN", "deg", 30.75, 0.0065, 8.0),
        ("VRAD", "m/s", 4000.0, 66.4, 6.0),
    ]
    for number, (kind, unit, value, step, pixel) in enumerate(axes, start=1):
        header[f"CTYPE{number}"], header[f"CUNIT{number}"] = kind, unit
        header[f"CRVAL{number}"], header[f"CDELT{number}"] = value, step
        header[f"CRPIX{number}"] = pixel
    header["SPECSYS"], header["RESTFRQ"] = "LSRK", 110.201354e9
    path = tmp_path / "cube.fits"
    fits.writeto(path, values, header)
    return path


@pytest.fixture
def l1448() -> Path:
    """The observed ¹³CO cube of L1448, where the folder `CDD_TEST_DATA` holds it."""
    folder = os.environ.get("CDD_TEST_DATA")
    if not folder:
        pytest.skip("CDD_TEST_DATA is not set")
    path = Path(folder) / "l1448_13co.fits"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return path
