"""PyTorch, on CUDA, Apple's MPS or the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.boundaries import OUTSIDE, extension_index
from cdd_dask.engines.base import Diffusion, Engine, Footprint
from cdd_dask.errors import DeviceError, MissingDependencyError
from cdd_dask.kernels import Kernel

if TYPE_CHECKING:
    import torch


class TorchEngine(Engine):
    """Diffuses on a PyTorch device, in the field's own dtype.

    Every 1-D smoothing is written in differences, ``a + Σ w_j ((a_{-j} - a) + (a_{+j} - a))``,
    so a constant field comes back to the bit and float32 keeps errors below 1e-6 of the maximum.

    Parameters
    ----------
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; None takes CUDA, else MPS, else the CPU.

    Raises
    ------
    MissingDependencyError
        If torch is not installed.
    DeviceError
        If the device is unknown or absent.
    """

    name = "torch"
    voxel_steps_per_second = 1.0e7

    def __init__(self, device: str | None = None) -> None:
        self.device = check_device(device)

    def diffuse(self, field: NDArray[Any], diffusion: Diffusion) -> NDArray[Any]:
        import torch

        if field.dtype == np.float64 and self.device.startswith("mps"):
            raise DeviceError('device="mps" has no float64: use dtype="float32" or device="cpu"')
        with torch.inference_mode():
            # non-native strides or byte order never get here: a task hands over plain arrays
            values = torch.from_numpy(field).to(self.device)
            for _ in range(diffusion.steps.count):
                values = _constrain(values, _smooth(values, diffusion), diffusion.constraint)
            result: NDArray[Any] = values.cpu().numpy()
            return result

    def footprint(self, itemsize: int) -> Footprint:
        # the field, its extended copy, the sum, two differences and what the allocator rounds up
        work = 6 * itemsize
        on_host = self.device == "cpu"
        return Footprint(host=work if on_host else 2 * itemsize, device=0 if on_host else work)

    def free_device_memory(self) -> int | None:
        import torch

        if self.device.startswith("cuda"):
            return int(torch.cuda.mem_get_info(self.device)[0])
        if self.device == "mps":
            return int(torch.mps.recommended_max_memory())
        return None

    def limit_threads(self, count: int) -> None:
        import torch

        torch.set_num_threads(count)


def check_device(device: str | None) -> str:
    """The name of a device that is present; None picks the best one.

    Raises
    ------
    MissingDependencyError
        If torch is not installed.
    DeviceError
        If the device is unknown or absent.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            'engine="torch" needs PyTorch: pip install "cdd-dask[torch]"'
        ) from error
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    for number in reversed(range(torch.cuda.device_count())):
        present.insert(0, f"cuda:{number}")
    wanted = present[0] if device is None else "cuda:0" if device == "cuda" else device
    if wanted not in present:
        raise DeviceError(f"device={device!r} is not present: choose one of {', '.join(present)}")
    return wanted


def _smooth(values: torch.Tensor, diffusion: Diffusion) -> torch.Tensor:
    """``S = G_sigma * I``, one axis after the other."""
    for axis, (kernel, rules) in enumerate(
        zip(diffusion.steps.kernels, diffusion.faces, strict=True)
    ):
        values = _smooth_axis(values, axis, kernel, rules, diffusion.cval)
    return values


def _smooth_axis(
    values: torch.Tensor, axis: int, kernel: Kernel, rules: tuple[str, str], cval: float
) -> torch.Tensor:
    import torch

    size, radius = values.shape[axis], kernel.radius
    if radius == 0:
        return values
    low = extension_index(rules[0], size, -radius, 0)
    high = extension_index(rules[1], size, size, size + radius)
    extended = torch.cat(
        [_take(values, axis, low, cval), values, _take(values, axis, high, cval)], dim=axis
    )
    del values
    centre = extended.narrow(axis, radius, size)
    total = torch.zeros_like(centre, memory_format=torch.contiguous_format)
    for distance, weight in enumerate(kernel.wings, start=1):
        pair = extended.narrow(axis, radius - distance, size) - centre
        pair += extended.narrow(axis, radius + distance, size) - centre
        # multiplied first, added after: a fused multiply-add would make the last bit depend
        # on where in the array a voxel lies
        pair *= weight
        total += pair
    total += centre
    return total


def _take(values: torch.Tensor, axis: int, index: NDArray[np.intp], cval: float) -> torch.Tensor:
    """The slices of `values` at `index` along `axis`, `cval` where that is `OUTSIDE`."""
    import torch

    if (index == OUTSIDE).all():
        shape = list(values.shape)
        shape[axis] = len(index)
        return values.new_full(shape, cval)
    return values.index_select(axis, torch.from_numpy(index).to(values.device))


def _constrain(field: torch.Tensor, smooth: torch.Tensor, constraint: str) -> torch.Tensor:
    """`field` moved to `smooth` as far as the sign constraint lets it."""
    import torch

    if constraint == "unconstrained":
        return smooth
    lower, upper = torch.minimum(field, smooth), torch.maximum(field, smooth)
    if constraint == "inverted":
        lower, upper = upper, lower
    return torch.where(field > 0, lower, torch.where(field < 0, upper, field))
