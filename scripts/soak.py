"""Run jobs back to back on one cluster, and see whether the memory of its processes stays flat.

    python scripts/soak.py --minutes 30
    python scripts/soak.py --minutes 30 --profile    # must fail: Dask keeps samples of all stacks

After the first `WARM_UP` jobs no process may hold more than 10% more, or less, than it then did.
The scheduler of a `LocalCluster` lives in the client's process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil
from distributed import Client, LocalCluster
from turbulence import lognormal_turbulence

import cdd_dask

WARM_UP = 3
"""Jobs after which everything is loaded and compiled: one of each kind."""
ALLOWED = 0.1
"""Largest change of a process's memory after that, relative."""
JOBS: dict[str, dict[str, Any]] = {
    "halos": {"max_scale": 8, "e_rel": 0.3},
    "cells": {"min_scale": 16, "max_scale": 32, "e_rel": 0.4},
    "stream": {"min_scale": 16, "max_scale": 32, "e_rel": 0.4, "rtol": 2e-4},
}
LINES = 40
"""Rows of the table, at the most."""


def run_job(client: Client, folder: Path, number: int, rng: np.random.Generator) -> str:
    """One job of a random shape, and what it was; nothing of it is left behind."""
    kind = [*JOBS][number % len(JOBS)]
    shape = tuple(int(n) for n in rng.integers(24, 49, 3))
    field = lognormal_turbulence((48, 48, 48), seed=number)[tuple(slice(0, n) for n in shape)]
    if kind == "stream":
        field = np.log(field)  # of both signs
    in_memory = bool(rng.integers(2))
    source, out = folder / f"field_{number}.npy", folder / f"out_{number}.zarr"
    if not in_memory:
        np.save(source, field)
    result = cdd_dask.decompose(
        field if in_memory else source, out, client=client, block=16, progress=False, **JOBS[kind]
    )
    if not np.allclose(result.reconstruct(), field, rtol=1e-4, atol=1e-4):
        raise SystemExit(f"job {number}: the channels do not sum up to the field")
    shutil.rmtree(out)
    source.unlink(missing_ok=True)
    return f"{kind} {shape}{' in memory' * in_memory}"


def held(cluster: LocalCluster) -> dict[str, float]:
    """What every process holds now, in MB."""
    processes = {"client and scheduler": psutil.Process()}
    for name, nanny in cluster.workers.items():
        processes[f"worker {name}, process {nanny.pid}"] = psutil.Process(nanny.pid)
    return {name: one.memory_info().rss / 1e6 for name, one in processes.items()}


def soak(minutes: float, seed: int, profile: bool) -> list[tuple[str, dict[str, float]]]:
    """Every job in words, and what the processes held when it was done."""
    rng, samples = np.random.default_rng(seed), []
    folder = Path(tempfile.mkdtemp(prefix="cdd-soak-"))
    end = time.monotonic() + 60 * minutes
    try:
        with (
            # the setting of the clusters that `decompose` makes itself
            dask.config.set({"distributed.worker.profile.enabled": profile}),
            LocalCluster(2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster) as client,
        ):
            while time.monotonic() < end or len(samples) <= WARM_UP:
                job = run_job(client, folder, len(samples), rng)
                samples.append((job, held(cluster)))
                numbers = "  ".join(f"{value:7.1f}" for value in samples[-1][1].values())
                print(f"{len(samples):5}  {numbers}  {job}", flush=True)
    finally:
        shutil.rmtree(folder)
    return samples


def judged(samples: list[tuple[str, dict[str, float]]]) -> bool:
    """Print how the memory went, and whether it was flat."""
    names = [*samples[WARM_UP - 1][1]]
    print("\n| jobs | " + " | ".join(f"{name}, MB" for name in names) + " |")
    print("|---|" + "---|" * len(names))
    for row in sorted({*np.linspace(WARM_UP, len(samples), LINES, dtype=int).tolist()}):
        # a worker that was restarted is another process: it lacks here, and fails below
        values = (f"{samples[row - 1][1].get(name, float('nan')):.0f}" for name in names)
        print(f"| {row} | " + " | ".join(values) + " |")
    flat = True
    for name in names:
        series = np.array([found.get(name, np.nan) for _, found in samples[WARM_UP - 1 :]])
        low, high = (100 * (extreme(series) / series[0] - 1) for extreme in (np.min, np.max))
        good = -100 * ALLOWED <= low and high <= 100 * ALLOWED
        flat &= good
        print(f"{name}: {low:+.1f}% to {high:+.1f}%, {'flat' if good else 'NOT FLAT'}")
    print(f"{len(samples)} jobs: {'flat' if flat else 'NOT FLAT'}, ±{ALLOWED:.0%} allowed")
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="leave Dask's profiler on")
    arguments = parser.parse_args()
    sys.exit(not judged(soak(arguments.minutes, arguments.seed, arguments.profile)))


if __name__ == "__main__":
    main()
