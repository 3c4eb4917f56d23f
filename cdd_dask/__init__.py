"""Constrained diffusion decomposition of volumes larger than memory, on Dask and Zarr."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdd_dask.api import decompose, plan
    from cdd_dask.checkup import doctor
    from cdd_dask.compat import constrained_diffusion_decomposition
    from cdd_dask.decomposition import Decomposition, open_decomposition
    from cdd_dask.exporting import export
    from cdd_dask.plans import Plan
    from cdd_dask.preflight import Preflight
    from cdd_dask.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Decomposition",
    "Plan",
    "Preflight",
    "Repair",
    "Verification",
    "constrained_diffusion_decomposition",
    "decompose",
    "doctor",
    "export",
    "open_decomposition",
    "plan",
    "repair",
    "verify",
]

_HOME = {
    "Decomposition": "decomposition",
    "Plan": "plans",
    "Preflight": "preflight",
    "Repair": "mending",
    "Verification": "verification",
    "constrained_diffusion_decomposition": "compat",
    "decompose": "api",
    "doctor": "checkup",
    "export": "exporting",
    "open_decomposition": "decomposition",
    "plan": "api",
    "repair": "mending",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # nothing heavy is imported before it is asked for
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
