"""PyTorch, on CUDA, Apple's MPS or the CPU."""

from __future__ import annotations

import math
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
    Where there are blank voxels that is not enough: dividing by what they leave of the kernel
    rounds again, at every step, so there the smoothing is in float64 (but not on MPS, which has
    none).

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
            values = torch.from_numpy(field).to(self.device)
            work = _Workspace(values, diffusion)
            for _ in range(diffusion.steps.count):
                work.step()
            result: NDArray[Any] = work.result().cpu().numpy()
            return result

    def footprint(self, itemsize: int, blanks: bool = False, threads: int = 1) -> Footprint:
        # the field, its smoothed copy, two differences, the extended copy (up to twice a
        # block), masks and what the allocator rounds up
        work = 7 * itemsize
        if blanks:  # the same in float64, what is left of the kernel, and all in this type
            work = 7 * 8 + 4 * itemsize
        on_host = self.device == "cpu"
        return Footprint(host=work if on_host else 2 * itemsize, device=0 if on_host else work)

    def free_device_memory(self) -> int | None:
        import torch

        if self.device.startswith("cuda"):
            return int(torch.cuda.mem_get_info(self.device)[0])
        if self.device == "mps":
            return int(torch.mps.recommended_max_memory())
        return None

    def device_count(self) -> int:
        import torch

        return int(torch.cuda.device_count()) if self.device.startswith("cuda") else 1

    def limit_threads(self, count: int) -> int:
        import torch

        before = int(torch.get_num_threads())
        torch.set_num_threads(count)
        return before


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


class _Workspace:
    """A block on the device and the buffers that all its steps share."""

    def __init__(self, field: torch.Tensor, diffusion: Diffusion) -> None:
        import torch

        self._field, self._diffusion = field, diffusion
        blank = torch.isnan(field)
        masked = diffusion.as_if_blank or bool(blank.any())
        self._blank = blank if masked else None
        double = masked and field.device.type != "mps"
        self._smooth, self._left, self._right = (
            torch.empty_like(field, dtype=torch.float64 if double else field.dtype)
            for _ in range(3)
        )
        # the differences are no longer needed when the field is constrained
        self._lower, self._upper = (
            (torch.empty_like(field), torch.empty_like(field))
            if double
            else (self._left, self._right)
        )
        self._parts = [
            _parts(field.shape, axis, kernel.radius)
            for axis, kernel in enumerate(diffusion.steps.kernels)
        ]
        self._extended = self._smooth.new_empty(
            max(
                field[parts[0]].numel() // size * (size + 2 * kernel.radius)
                for parts, size, kernel in zip(
                    self._parts, field.shape, diffusion.steps.kernels, strict=True
                )
            )
        )
        self._edges = [
            [
                _index(rule, size, start, start + kernel.radius, field.device)
                for rule, start in zip(rules, (-kernel.radius, size), strict=True)
            ]
            for size, kernel, rules in zip(
                field.shape, diffusion.steps.kernels, diffusion.faces, strict=True
            )
        ]
        self._share = None
        if masked:
            # what is left of the kernel where blank voxels take no part
            self._smooth_all(torch.logical_not(blank).to(field.dtype), 1.0)
            self._share = self._smooth.masked_fill(blank, 1.0)
            field.masked_fill_(blank, 0.0)

    def step(self) -> None:
        """Smooth, and move the field to its smoothed copy as far as the constraint lets it."""
        self._smooth_all(self._field, self._diffusion.cval)
        if self._share is not None and self._blank is not None:
            self._smooth.div_(self._share).masked_fill_(self._blank, 0.0)
        self._constrain()

    def result(self) -> torch.Tensor:
        """The field, NaN where it is blank."""
        if self._blank is not None:
            self._field.masked_fill_(self._blank, math.nan)
        return self._field

    def _smooth_all(self, values: torch.Tensor, cval: float) -> None:
        """``S = G_sigma * I``, one axis after the other."""
        source = values
        for axis, kernel in enumerate(self._diffusion.steps.kernels):
            if kernel.radius == 0:
                continue
            for part in self._parts[axis]:
                self._smooth_part(source[part], part, axis, kernel, cval)
            source = self._smooth
        if source is values:  # no kernel reaches any neighbour
            self._smooth.copy_(values)

    def _smooth_part(
        self,
        values: torch.Tensor,
        part: tuple[slice, ...],
        axis: int,
        kernel: Kernel,
        cval: float,
    ) -> None:
        import torch

        size, radius = values.shape[axis], kernel.radius
        extended = self._extend(values, axis, radius, cval)
        centre = extended.narrow(axis, radius, size)
        difference, other = self._left[part], self._right[part]
        total = self._smooth[part].zero_()
        for distance, weight in enumerate(kernel.wings, start=1):
            torch.sub(extended.narrow(axis, radius - distance, size), centre, out=difference)
            torch.sub(extended.narrow(axis, radius + distance, size), centre, out=other)
            # multiplied first, added after: a fused multiply-add could make the last bit
            # depend on where in the array a voxel lies
            total += difference.add_(other).mul_(weight)
        total += centre

    def _extend(self, values: torch.Tensor, axis: int, radius: int, cval: float) -> torch.Tensor:
        """`values` with `radius` more slices at both ends of `axis`, by the faces' rules."""
        size = values.shape[axis]
        shape = list(values.shape)
        shape[axis] = size + 2 * radius
        extended = self._extended[: math.prod(shape)].view(shape)
        extended.narrow(axis, radius, size).copy_(values)
        for index, start in zip(self._edges[axis], (0, radius + size), strict=True):
            edge = extended.narrow(axis, start, radius)
            if index is None:
                edge.fill_(cval)
            else:
                edge.copy_(values.index_select(axis, index))
        return extended

    def _constrain(self) -> None:
        """Move the field to its smoothed copy as far as the sign constraint lets it."""
        import torch

        field, constraint = self._field, self._diffusion.constraint
        if constraint == "unconstrained":
            field.copy_(self._smooth)
            return
        smooth = self._smooth.to(field.dtype)
        if constraint == "constrained":
            lower = torch.clamp(field, max=0, out=self._lower)
            upper = torch.clamp(field, min=0, out=self._upper)
            torch.maximum(torch.minimum(smooth, upper, out=smooth), lower, out=field)
            return
        lower = torch.minimum(field, smooth, out=self._lower)
        upper = torch.maximum(field, smooth, out=self._upper)
        if constraint == "inverted":
            lower, upper = upper, lower
        negative = torch.where(field < 0, upper, field, out=smooth)
        torch.where(field > 0, lower, negative, out=field)


def _parts(shape: tuple[int, ...], axis: int, radius: int) -> list[tuple[slice, ...]]:
    """Parts of a block to smooth along `axis` in turn, so that no extended copy exceeds twice it.

    One part, unless the axis is shorter than the kernel; then it is cut along the longest other.
    """
    widening = (shape[axis] + 2 * radius) / shape[axis]
    other = max((a for a in range(len(shape)) if a != axis), key=lambda a: shape[a], default=axis)
    length = shape[other] if other == axis else max(1, int(shape[other] * min(1, 2 / widening)))
    return [
        (slice(None),) * other + (slice(start, start + length),)
        for start in range(0, shape[other], length)
    ]


def _index(
    rule: str, size: int, start: int, stop: int, device: torch.device
) -> torch.Tensor | None:
    """Where the slices beyond an edge come from; None where they are `cval`."""
    import torch

    index = extension_index(rule, size, start, stop)
    if len(index) and index[0] == OUTSIDE:  # beyond a constant face everything is
        return None
    return torch.from_numpy(index).to(device)
