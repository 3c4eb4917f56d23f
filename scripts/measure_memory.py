"""Measure the peak memory of `cdd-dask decompose` and compare it with its plan.

    python scripts/measure_memory.py --size 512 --memory 64MB --workers 2

The peak is that of the private (not file-backed) pages of the whole process tree, less that of
the same command on a 16³ volume. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from dask.utils import parse_bytes
from turbulence import lognormal_turbulence

SECONDS_BETWEEN_SAMPLES = 0.004


def private_bytes(root: int) -> int:
    """Anonymous resident bytes of a process and all its descendants."""
    total, processes = 0, [(root, b"")]
    while processes:
        number, parents_command = processes.pop()
        folder = Path(f"/proc/{number}")
        try:
            command = (folder / "cmdline").read_bytes()
            if command == parents_command:
                continue  # forked, and about to become another program: its pages are its parent's
            for line in (folder / "status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
            for thread in (folder / "task").iterdir():
                children = map(int, (thread / "children").read_text().split())
                processes += [(child, command) for child in children]
        except (OSError, ProcessLookupError):
            continue  # it ended while it was looked at
    return total


def peak_of(command: list[str]) -> int:
    """Largest number of private bytes that a command held, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return peak


def make_volume(path: Path, size: int, blank: float) -> None:
    """A positive float32 cube, written slab by slab: a small turbulence cube, repeated.

    The share `blank` of its voxels is NaN.
    """
    tile = lognormal_turbulence((64, 64, 64))
    tile[np.random.default_rng(0).random(tile.shape) < blank] = np.nan
    volume = np.lib.format.open_memmap(path, "w+", np.float32, (size,) * 3)
    repeats = -(-size // 64)
    for start in range(0, size, 64):
        slab = np.tile(tile, (1, repeats, repeats))[: size - start, :size, :size]
        volume[start : start + 64] = slab
    volume.flush()


def measure(size: int, memory: str, options: list[str], blank: float = 0.0) -> dict[str, float]:
    """Volume, budget, projected and measured peak in bytes, for one run of the CLI."""
    cli = [sys.executable, "-m", "cdd_dask"]
    options = [*options, "--memory", memory, "--quiet", "--overwrite"]
    folder = Path(tempfile.mkdtemp(prefix="cdd-memory-"))
    try:
        small, large, out = folder / "small.npy", folder / "large.npy", str(folder / "out.zarr")
        make_volume(small, 16, blank)
        make_volume(large, size, blank)
        plan = subprocess.run(
            [*cli, "plan", str(large), "--json", *options], check=True, capture_output=True
        )
        baseline = peak_of([*cli, "decompose", str(small), out, *options])
        peak = peak_of([*cli, "decompose", str(large), out, *options])
    finally:
        shutil.rmtree(folder)
    return {
        "volume": float(size**3 * 4),
        "budget": float(parse_bytes(memory)),
        "projected": float(json.loads(plan.stdout)["peak_memory"]),
        "measured": float(peak - baseline),
        "baseline": float(baseline),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="voxels a side")
    parser.add_argument("--memory", default="64MB")
    parser.add_argument("--blank", type=float, default=0.0, help="share of blank voxels")
    arguments, options = parser.parse_known_args()
    # few steps: the peak does not depend on how many there are
    result = measure(
        arguments.size, arguments.memory, ["--e-rel", "0.3", *options], arguments.blank
    )
    for name, value in result.items():
        print(f"{name:10} {value / 1e6:9.1f} MB")
    print(f"measured / projected = {result['measured'] / result['projected']:.2f}")
    print(f"volume / budget      = {result['volume'] / result['budget']:.1f}")


if __name__ == "__main__":
    main()
