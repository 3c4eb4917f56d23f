"""How much more a first run after installation costs than later ones, in processor time.

    python scripts/first_run.py cube.fits
    python scripts/first_run.py cube.fits --environments 5

Installs the package into new environments, and decomposes the file there again and again. The exit
status is 1 if a first run takes more than 1.2 times as long as those just after it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmark import processor_seconds

LONGER = 1.2
"""How many times as long a first run may take."""
LATER = 3
"""Later runs for each first one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cube", type=Path, help="file to decompose")
    parser.add_argument("--environments", type=int, default=3)
    chosen = parser.parse_args()
    # without a setting that keeps Python from what it would write for later runs
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    project = Path(__file__).resolve().parents[1]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(chosen.environments):
            place = Path(folder, str(number))
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
            pip = [place / "bin/python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, f"{project}[fits]"], check=True)
            command = [str(place / "bin/cdd-dask"), "decompose", str(chosen.cube)]
            first, *later = (
                processor_seconds([*command, f"{place}/{run}.zarr"], env=clean)
                for run in range(1 + LATER)
            )
            ratios.append(first / statistics.median(later))
            print(
                f"first run {first:.2f} s, later ones {', '.join(f'{s:.2f}' for s in later)} s: "
                f"{ratios[-1]:.2f} times",
                flush=True,
            )
    print(f"median: {statistics.median(ratios):.2f} times (at most {LONGER:g})")
    return int(statistics.median(ratios) > LONGER)


if __name__ == "__main__":
    sys.exit(main())
