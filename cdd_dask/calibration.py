"""How fast this machine is, measured once and kept in the user's cache folder.

Plans take their estimates of time from it, and nothing else: results do not depend on it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask import layout, store
from cdd_dask.blocks import Grid
from cdd_dask.engines import Diffusion, Engine, load_engine
from cdd_dask.errors import CalibrationError, InputError
from cdd_dask.kernels import smoothing_kernel
from cdd_dask.output import output_address
from cdd_dask.parameters import Parameters
from cdd_dask.plans import Speeds
from cdd_dask.pyramid import pyramid_level
from cdd_dask.time_stepping import Steps

FORMAT_VERSION = 1
SIGMAS = {"narrow": 0.174, "medium": 0.693, "wide": 1.386, "pyramid": 2.77}
"""What octaves smooth with that have the kernels of `plans.Speeds`, in voxels."""
SIDE = 160
"""Voxels a side of the field that is timed: more than most caches hold."""
SECONDS = 0.35
"""How long one speed is measured, again and again: the best is the least disturbed."""
LEAST_SECONDS = 0.05
"""How long one such measurement lasts at least, once it has enough steps."""
SHARDS = 3
"""Shards that are written and read at a time, of the field's size."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What one engine does on one machine."""

    host: str
    """Name of the machine."""
    cpu: str
    """Name of its processor."""
    cores: int
    """Cores that the measuring process could use."""
    engine: str
    device: str
    measured: str
    """When, as ISO 8601."""
    speeds: Speeds
    """Of one thread, or of the device, in float32; and of the disk, with all cores."""
    gain: float
    """How many times as fast all cores are together; 1 for a device."""

    def __post_init__(self) -> None:
        if self.cores < 1 or not 0 < self.gain < math.inf:
            raise InputError(f"cores={self.cores!r} and gain={self.gain!r} must be positive")

    @property
    def key(self) -> tuple[str, str, str]:
        """What there is one calibration of."""
        return self.host, self.engine, self.device

    def per_task(self, workers: int, threads: int, itemsize: int) -> Speeds:
        """The speeds of one of `workers` tasks, each with so many `threads`, that run at once.

        Between one core and all the gain is taken to be linear; a step takes as long as the field
        has bytes per voxel (`itemsize`), and tasks share the disk.
        """
        busy = min(self.cores, workers * threads)
        together = 1 + (self.gain - 1) * (busy - 1) / max(1, self.cores - 1)
        share = together / workers * 4 / itemsize
        alone = self.speeds
        stepping = {name: getattr(alone, name) * share for name in SIGMAS}
        return replace(
            alone, **stepping, read=alone.read / workers, written=alone.written / workers
        )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def calibrate(engine_name: str, device: str, out: str | Path | None) -> None:
    """Measure an engine and the disk that `out` would lie on, and keep what is found.

    Raises
    ------
    CalibrationError
        If the disk cannot be measured, or nothing be kept in the user's cache folder.
    """
    folder = None
    if out is not None and "://" not in (address := output_address(out)):
        folder = next(parent for parent in Path(address).parents if parent.is_dir())
    log.info("measuring how fast engine %s on %s and the disk are", engine_name, device)
    save(measure(engine_name, device, folder))


# measuring


def measure(engine_name: str, device: str | None, folder: Path | None) -> Calibration:
    """Time an engine's steps and the disk, in about 5 s (and what compiling takes the first time).

    Parameters
    ----------
    engine_name, device
        As `load_engine` takes them.
    folder
        A folder on the disk to measure, for temporary files of 100 MB; None is the system's own for
        such files.

    Raises
    ------
    CalibrationError
        If `folder` cannot be written.
    """
    engine = load_engine(engine_name, device)
    field = np.random.default_rng(0).lognormal(size=(SIDE,) * 3).astype(np.float32)
    before = engine.limit_threads(1)
    try:
        together = one = _stepping_speeds(engine, field)
        if engine.device == "cpu" and cores() > 1:
            engine.limit_threads(cores())
            together = _stepping_speeds(engine, field)
    finally:
        engine.limit_threads(before)
    try:
        read, written = _disk_speeds(field, folder)
    except OSError as error:
        raise CalibrationError(
            f"the disk cannot be measured in {folder or tempfile.gettempdir()}: {error}; go to "
            "another folder, or name one with out="
        ) from error
    return Calibration(
        host=platform.node(),
        cpu=cpu_name(),
        cores=cores(),
        engine=engine.name,
        device=engine.device,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        speeds=Speeds(**one, read=read, written=written, calibrated=True),
        gain=statistics.harmonic_mean(together.values()) / statistics.harmonic_mean(one.values()),
    )


def _stepping_speeds(engine: Engine, field: NDArray[Any]) -> dict[str, float]:
    """Voxel-steps per second by the kernel's kind."""
    return {name: _stepping_speed(engine, field, sigma) for name, sigma in SIGMAS.items()}


def _stepping_speed(engine: Engine, field: NDArray[Any], sigma: float) -> float:
    """Voxel-steps per second, of ever more steps until they take long enough to be timed."""
    kernel = smoothing_kernel("discrete", sigma)
    levels = (pyramid_level(kernel) if engine.has_pyramid else 0,) * 3
    faces = (("reflect", "reflect"),) * 3

    def seconds(values: NDArray[Any], count: int) -> float:
        steps = Steps(count, (kernel,) * 3)
        what = Diffusion(steps, "constrained", faces, levels=levels, phase=(0, 0, 0))
        own = values.copy()
        return _seconds(lambda: engine.diffuse(own, what))

    count, best = 1, 0.0
    end = time.perf_counter() + SECONDS
    while not best or time.perf_counter() < end:
        taken = seconds(field, count)
        best = max(best, field.size * count / taken)
        count *= 1 if taken > LEAST_SECONDS else 2
    return best


def _disk_speeds(field: NDArray[Any], folder: Path | None) -> tuple[float, float]:
    """Bytes read and written per second, before compression, through a store like a run's."""
    side = len(field)
    grid = Grid((SHARDS * side, side, side), field.shape)
    axes = tuple(layout.Axis(name, 1.0, None) for name in "zyx")
    paths = [store.image_path(name) for name in (store.channel_name(0), store.RESIDUAL)]
    store.rehearse()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".cdd-dask-") as scratch:
        address = f"{scratch}/disk.zarr"
        layout.Layout(grid, (1.0,), axes, {"parameters": Parameters().as_dict()}).create(address)

        def write(path: str) -> None:
            for number in range(SHARDS):
                store.write_block(address, path, grid.core(number), field)
            _flush(Path(address, path))

        def read(path: str) -> None:
            for number in range(SHARDS):
                store.read_block(address, path, grid.core(number))

        written = min(_seconds(partial(write, path)) for path in paths)
        size = SHARDS * field.nbytes
        read_seconds = min(_seconds(partial(read, path)) for path in paths)
        return size / read_seconds, size / written


def _flush(folder: Path) -> None:
    """Have the system write the files to the disk, and forget them, where it can be told to."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# keeping


def cache_file() -> Path:
    """Where the calibrations of all machines lie that share the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        folder = Path(home)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path.home() / ".cache"
    return folder / "cdd-dask" / "calibration.json"


def load(engine: str, device: str) -> Calibration | None:
    """The calibration of an engine on this machine, as long as it has the same processor."""
    wanted = (platform.node(), engine, device)
    for known in _read(cache_file()):
        if known.key == wanted and known.cpu == cpu_name():
            return known
    return None


def save(calibration: Calibration) -> Path:
    """Keep a calibration, in place of the one before; returns where.

    Raises
    ------
    CalibrationError
        If the user's cache folder cannot be written.
    """
    path = cache_file()
    others = [known for known in _read(path) if known.key != calibration.key]
    entries = [asdict(known) for known in [*others, calibration]]
    text = json.dumps({"format_version": FORMAT_VERSION, "calibrations": entries}, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in a folder beside the file, so that nobody ever reads half of it
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            whole.write_text(text)
            os.replace(whole, path)
    except OSError as error:
        raise CalibrationError(
            f"the calibration cannot be kept in {path}: {error}; name a folder that can be "
            "written in the environment variable XDG_CACHE_HOME"
        ) from error
    return path


def _read(path: Path) -> list[Calibration]:
    """All calibrations in a file; none if it is absent, or not one of ours."""
    try:
        content = json.loads(path.read_text())
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format_version is not {FORMAT_VERSION}")
        return [
            Calibration(**{**entry, "speeds": Speeds(**entry["speeds"])})
            for entry in content["calibrations"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s is no calibration and is ignored (%r): calibrate anew", path, error)
        return []
