"""The package's layers, and what stays unimported until it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cdd_dask"
LAYERS = (
    ("errors", "faults", "addresses", "parameters", "tables", "statistics"),
    (
        "scales",
        "kernels",
        "time_stepping",
        "boundaries",
        "refinement",
        "halo",
        "pyramid",
        "closure",
        "cell_evolution",
    ),
    ("engines",),
    ("blocks", "memory", "regimes", "plans", "drafts", "planner", "working", "cone"),
    (
        "readers",
        "store",
        "whole",
        "images",
        "layout",
        "attributes",
        "probes",
        "objects",
        "retrying",
        "seals",
        "marks",
        "lease",
    ),
    ("cell_tasks", "task"),
    ("executors",),
    (
        "progress",
        "calibration",
        "resources",
        "output",
        "decomposition",
        "identity",
        "resuming",
        "run",
        "facts",
        "preflight",
    ),
    (
        "api",
        "checkup",
        "compat",
        "config",
        "exporting",
        "sampling",
        "soundness",
        "verification",
        "mending",
    ),
    ("cli", "__main__"),
)
"""From the ground up; a file imports from its own layer and those below."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = ("torch", "scipy", "zarr", "dask", "distributed", "astropy", "xarray", "rich")


def unit(path: Path) -> str:
    """The module or subpackage of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cdd_dask"):
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found.update(name for name in names if not name.startswith("__"))
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_its_own_layer_and_below(path: Path):
    """Nothing below knows of anything above: a numeric file imports no store."""
    above = {name for name in imported_units(path) if RANK[name] > RANK[unit(path)]}
    assert not above


def test_only_the_dask_executor_imports_distributed():
    """Every other file works without it; the CLI connects a client on request."""
    allowed = {PACKAGE / "executors" / "dask.py", PACKAGE / "cli.py"}
    for path in set(FILES) - allowed:
        assert "from distributed" not in path.read_text(), path
        assert "import distributed" not in path.read_text(), path


def test_import_is_light():
    """`import cdd_dask` loads none of the heavy libraries, and the verbs are there all the same."""
    program = (
        "import sys, cdd_dask; "
        f"print([name for name in {HEAVY} if name in sys.modules]); "
        "print(sorted(cdd_dask.__all__), callable(cdd_dask.plan))"
    )
    lines = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[0] == "[]"
    assert "decompose" in lines[1]
    assert lines[1].endswith("True")
