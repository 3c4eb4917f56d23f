"""Measure what large scales cost, and what their regimes make of a channel.

python scripts/large_scales.py accuracy          # every regime against the whole at once
python scripts/large_scales.py scales --size 512 --memory 400MB   # time and cost by scale
python scripts/large_scales.py growth            # 192³ to 384³, same edges and memory
python scripts/large_scales.py plan              # 16384³ on 256 workers of 16 GB
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from turbulence import lognormal_turbulence

import cdd_dask
from cdd_dask.engines import Diffusion, load_engine
from cdd_dask.pyramid import coarse_levels
from cdd_dask.time_stepping import channel_steps

Field = NDArray[np.float32]
TILE = 128


class PassTimes(logging.Handler):
    """Seconds that every channel took, from the lines that a run logs when a pass begins."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: dict[int, float] = {}
        self._channel, self._since = -1, 0.0

    def emit(self, record: logging.LogRecord) -> None:
        self.end()
        named = re.search(r"decompose-ch(\d+)", record.getMessage())
        self._channel = int(named.group(1)) if named else -1

    def end(self) -> None:
        now = time.perf_counter()
        if self._channel >= 0:
            spent = self.seconds.get(self._channel, 0.0) + now - self._since
            self.seconds[self._channel] = spent
        self._channel, self._since = -1, now


def make_volume(path: Path, size: int) -> None:
    """A Zarr array of `size` voxels a side: a turbulence cube, repeated."""
    tile = lognormal_turbulence((min(size, TILE),) * 3)
    array = zarr.create_array(str(path), shape=(size,) * 3, chunks=(64,) * 3, dtype="float32")
    for z in range(0, size, TILE):
        slab = np.tile(tile, (1, -(-size // TILE), -(-size // TILE)))
        array[z : z + TILE] = slab[: size - z, :size, :size]


def timed_run(size: int, **options: Any) -> tuple[cdd_dask.Decomposition, dict[int, float], float]:
    """A run on disk, the seconds of every channel, and of all."""
    folder = Path(tempfile.mkdtemp(prefix="cdd-large-"))
    times = PassTimes()
    logger = logging.getLogger("cdd_dask")
    try:
        make_volume(folder / "cube.zarr", size)
        logger.addHandler(times)
        logger.setLevel(logging.INFO)
        start = time.perf_counter()
        result = cdd_dask.decompose(folder / "cube.zarr", folder / "out.zarr", **options)
        times.end()
        return result, times.seconds, time.perf_counter() - start
    finally:
        logger.removeHandler(times)
        shutil.rmtree(folder)


def stages(result: cdd_dask.Decomposition) -> list[dict[str, Any]]:
    """What the plan of a result says of every channel."""
    return [stage for stage in result.attrs["plan"]["stages"] if stage["number"] > 0]


def show_scales(size: int, memory: str, e_rel: float) -> None:
    """Time and cost of every channel of one run."""
    result, seconds, total = timed_run(size, memory=memory, e_rel=e_rel, nan="raise")
    print(f"{size}³ within {memory}, e_rel={e_rel:g}: {total:.0f} s")
    print("| scales | regime | passes | cost of a halo-free pass | ns per voxel |")
    print("|---|---|---|---|---|")
    voxels = size**3
    for stage in stages(result):
        cost = stage["voxel_steps"] / (stage["steps"] * voxels)
        spent = seconds.get(stage["number"] - 1, 0.0) / voxels
        print(
            f"| {stage['scale_from']:g} - {stage['scale_to']:g} | {stage['regime']} "
            f"| {len(stage['parts'])} | {cost:.2f} | {1e9 * spent:.0f} |"
        )


def show_growth(memory: str, e_rel: float) -> None:
    """How the time grows with the volume, everything else being the same."""
    options = {"memory": memory, "e_rel": e_rel, "block": 48, "max_scale": 32, "nan": "raise"}
    spent = {}
    for size in (192, 384):
        start = time.process_time()
        wall = timed_run(size, **options)[2]
        spent[size] = wall, time.process_time() - start
    for name, small, large in zip(("time", "processor time"), spent[192], spent[384], strict=True):
        times = f"{large / small:.2f} times for 8 times the voxels"
        print(f"{name}: 192³ {small:.1f} s, 384³ {large:.1f} s, {times}")


def signed_turbulence(shape: tuple[int, ...]) -> Field:
    """7% of the voxels are negative: of as many of both signs nothing is left at large scales."""
    return np.log(lognormal_turbulence(shape)).astype(np.float32) + np.float32(1.5)


def blobs(shape: tuple[int, ...]) -> Field:
    rng, total = np.random.default_rng(3), np.zeros(shape)
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    for _ in range(25):
        centre, width = rng.random(len(shape)) * shape, 2 ** (2 + 2.5 * rng.random())
        square = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True))
        total += rng.random() * np.exp(-square / (2 * width**2))
    return (total + 0.01).astype(np.float32)


def in_one_piece(result: cdd_dask.Decomposition, k: int, field: Field) -> Field:
    """The field after the steps of channel `k`, with full kernels or a pyramid."""
    parameters, edges = result.parameters, tuple(map(float, result.scales))
    steps = channel_steps(parameters, edges, field.ndim)[k]
    rule = (parameters.boundary,) * 2
    levels, phase = coarse_levels(parameters, steps), (0,) * field.ndim
    what = Diffusion(
        steps, parameters.constraint, (rule,) * field.ndim, parameters.cval, levels, phase
    )
    return load_engine("cpu").diffuse(field.copy(), what)


def show_accuracy(only: str | None) -> None:
    """Relative L2 error of every channel on cells, in blocks, against one piece.

    Each channel alone, from the field that it starts from in the run.
    """
    cube, square = (128, 128, 128), (512, 512)
    noise = np.random.default_rng(0).random(cube).astype(np.float32)
    fields: dict[str, tuple[Field, dict[str, Any]]] = {
        "blobs": (blobs(cube), {}),
        "turbulence, slope 2": (lognormal_turbulence(cube, 2.0), {}),
        "turbulence, slope 3": (lognormal_turbulence(cube, 3.0), {}),
        "turbulence, slope 3.7": (lognormal_turbulence(cube, 3.7), {}),
        "turbulence, slope 3, 2-D": (lognormal_turbulence(square, 3.0), {}),
        "white noise": (noise, {}),
        "signed turbulence": (signed_turbulence(cube), {}),
        "turbulence, streamed": (lognormal_turbulence(cube, 3.0), {"rtol": 2e-4, "block": 32}),
        "unconstrained": (signed_turbulence(cube), {"constrained": False}),
    }
    print("| field | channel: regime, relative L2 error |\n|---|---|")
    for name, (field, more) in fields.items():
        if only not in (None, name):
            continue
        options = {"max_scale": 64, "block": 64, "progress": False, **more}
        parts = cdd_dask.decompose(field, **options)
        errors = []
        start = np.array(parts.residual[...], np.float64) + sum(c[...] for c in parts.channels)
        for k, (stage, part) in enumerate(zip(stages(parts), parts.channels, strict=True)):
            begin = start.astype(np.float32)
            start -= part[...]
            if stage["regime"] in ("closure", "linear", "stream"):
                whole = begin - in_one_piece(parts, k, begin)
                off = np.linalg.norm(whole - part[...]) / np.linalg.norm(whole)
                errors.append(f"{stage['scale_to']:g}: {stage['regime']}, {off:.1e}")
        ulp = np.spacing(np.abs(field).max())
        sums = float(np.abs(parts.reconstruct() - field).max() / ulp)
        print(f"| {name} | {'; '.join(errors)} (sum within {sums:.1f} ulp) |", flush=True)


def show_plan() -> None:
    start = time.perf_counter()
    plan = cdd_dask.plan(
        (16384,) * 3, memory=256 * 16_000_000_000, workers=256, executor="processes"
    )
    print(f"made in {time.perf_counter() - start:.1f} s\n{plan}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("accuracy", "scales", "growth", "plan"))
    parser.add_argument("--size", type=int, default=512, help="voxels a side, for scales")
    parser.add_argument("--field", help='one of those of `accuracy`, like "signed turbulence"')
    parser.add_argument("--memory", default="400MB")
    parser.add_argument("--e-rel", type=float, default=0.03)
    chosen = parser.parse_args()
    if chosen.what == "accuracy":
        show_accuracy(chosen.field)
    elif chosen.what == "scales":
        show_scales(chosen.size, chosen.memory, chosen.e_rel)
    elif chosen.what == "growth":
        show_growth(chosen.memory, chosen.e_rel)
    else:
        show_plan()


if __name__ == "__main__":
    main()
