"""Engines: each diffuses one block, on its own hardware, under one contract."""

from __future__ import annotations

import sys
from glob import glob
from importlib.util import find_spec

from cdd_dask.engines.base import Diffusion, Engine, Faces, Footprint
from cdd_dask.errors import DeviceError
from cdd_dask.parameters import check_choice

ENGINES = ("auto", "reference", "cpu", "torch")
GPU_FILES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/kfd", "/dev/dxg")
"""One of them is there where Linux can reach a GPU; else torch, which takes seconds to load, is not
asked for one."""

__all__ = ["ENGINES", "Diffusion", "Engine", "Faces", "Footprint", "load_engine"]


def load_engine(name: str = "auto", device: str | None = None) -> Engine:
    """The engine called `name`, ready on `device`.

    ``auto`` takes torch where a device other than the CPU is named or present, else the
    CPU engine. Ask the result's `name` and `device` what was chosen.

    Parameters
    ----------
    name
        One of `ENGINES`.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; None leaves the choice to the engine.

    Raises
    ------
    InputError
        If `name` is unknown.
    DeviceError
        If the device is absent, or the engine cannot compute on it.
    MissingDependencyError
        If the engine's library is not installed.
    """
    check_choice("engine", name, ENGINES)
    if name == "auto" and device is None and _may_have_gpu() and find_spec("torch"):
        from cdd_dask.engines.torch import check_device

        device = check_device(None)
    if name == "torch" or (name == "auto" and device not in (None, "cpu")):
        from cdd_dask.engines.torch import TorchEngine

        return TorchEngine(device)
    if device not in (None, "cpu"):
        raise DeviceError(
            f"device={device!r} is not for engine={name!r}, which computes on the CPU: "
            'use engine="torch"'
        )
    if name == "reference":
        from cdd_dask.engines.reference import ReferenceEngine

        return ReferenceEngine()
    from cdd_dask.engines.cpu import CpuEngine

    return CpuEngine()


def _may_have_gpu() -> bool:
    return sys.platform != "linux" or any(map(glob, GPU_FILES))
