"""Measure what the documentation states of planning, submitting and importing.

    python scripts/figures.py [--cube l1448_13co.fits]

With a cube, also how far a decomposition in 8 blocks is from one of the whole array.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cloudpickle
import numpy as np

import cdd_dask
from cdd_dask.task import Task, run_task


def planning() -> None:
    start = time.perf_counter()
    plan = cdd_dask.plan((4096,) * 3, max_scale=16, memory="4GB")
    seconds = time.perf_counter() - start
    print(f"plan of 4096³, max_scale=16: {seconds:.2f} s, {len(plan.grid)} blocks")
    last = len(plan.grid) - 1
    task = Task("/a/path/of/a/usual/length/to/an/output.zarr", "0123456789ab", (3,), last)
    print(f"a task on submission, function and all: {len(cloudpickle.dumps((run_task, task)))} B")


def importing() -> None:
    program = (
        "import time; t = time.perf_counter(); import cdd_dask; print(time.perf_counter() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True).stdout)
        for _ in range(5)
    ]
    print(f"import cdd_dask: {np.median(times):.3f} s (median of 5 processes)")


def blocks_against_whole(cube: str) -> None:
    options = {"max_scale": 8, "progress": False, "engine": "reference"}
    whole = cdd_dask.decompose(cube, **options)
    field = whole.reconstruct()
    spread = float(field.max() - field.min())
    with tempfile.TemporaryDirectory() as folder:
        block = tuple(-(-n // 2) for n in whole.shape)
        blocked = cdd_dask.decompose(cube, Path(folder) / "out.zarr", block=block, **options)
        found = cdd_dask.verify(blocked.path, progress=False)
        print(f"{cube} in {np.prod(blocked.attrs['plan']['grid'])} blocks: {found}")
        pairs = zip(
            (*blocked.channels, blocked.residual), (*whole.channels, whole.residual), strict=True
        )
        for k, (ours, theirs) in enumerate(pairs):
            off = np.abs(ours[:] - theirs[:])
            print(
                f"  output {k}: relative L2 {np.linalg.norm(off) / np.linalg.norm(theirs[:]):.1e}, "
                f"largest {off.max() / spread:.1e} of the range, "
                f"{np.mean(off > 1e-3 * spread):.1e} of the voxels beyond rtol"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cube", help="a cube to decompose in blocks and as a whole")
    arguments = parser.parse_args()
    planning()
    importing()
    if arguments.cube:
        blocks_against_whole(arguments.cube)


if __name__ == "__main__":
    main()
