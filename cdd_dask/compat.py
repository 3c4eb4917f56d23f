"""A drop-in for `constrained_diffusion_decomposition` of the package constrained-diffusion 1.2.5.

Same signature, same channels: for results to be compared with older ones. For new work
`cdd_dask.decompose` is more accurate, and needs no memory for the whole volume.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdd_dask.engines import Diffusion, Engine, load_engine
from cdd_dask.engines.reference import ReferenceEngine, constrain, smooth_into
from cdd_dask.errors import InputError
from cdd_dask.parameters import BOUNDARIES, Parameters, check_choice, check_number
from cdd_dask.scales import scale_edges
from cdd_dask.time_stepping import channel_steps

SYNONYMS = {"grid-mirror": "reflect", "grid-wrap": "wrap", "grid-constant": "constant"}
"""Other names that the filters of `scipy.ndimage` have for boundary modes."""


def constrained_diffusion_decomposition(
    data: Any,
    num_channels: int | None = None,
    max_scale: float | None = None,
    min_scale: float = 1,
    mode: str = "log",
    log_scale_base: float = 2.0,
    linear_scale_step: float | None = None,
    e_rel: float = 3e-2,
    sm_mode: str = "reflect",
    up_sample: bool = True,
    switch_scale: float = 5.0,
    zoom_factor: float = 4.0,
    constrained: bool = True,
    inverted: bool = False,
    return_scales: bool = False,
    use_gpu: bool = False,
    device: Any = None,
    verbose: bool = True,
) -> tuple[Any, ...]:
    """Decompose a field in memory as constrained-diffusion 1.2.5 does (Li 2022, arXiv:2201.05484).

    It smooths with a *sampled* Gaussian, which at the finest scales does not diffuse at all. To
    cure that, the edges up to `switch_scale` are computed on an enlarged grid; those beyond then
    begin anew, at the time 0, from what that grid leaves. The way to the enlarged grid and back
    is not exact: with `up_sample` the channels and the residual do not add up to `data`, and at
    some lengths of an axis (at a `zoom_factor` of 4: 22, 30, 62, 63, 95, 104, 105, …) its last
    voxels come back as 0, all of it as in the original. Without it they add up, to rounding.

    Beyond the original: numbers of any real type, blank voxels, axes of any length, and the CPU's
    result on a GPU, but for the rounding of float32 (up to 5e-5 of the maximum).

    Parameters
    ----------
    data
        The field: an array, nested lists or a torch tensor. float32, and what float32 holds
        exactly (bool, float16, integers of up to 16 bits), is computed in float32; all else in
        float64, but on MPS, which has none. NaN and masked voxels are blank: they take no part,
        and are NaN in all results.
    num_channels
        Number of channels in log mode; given, it decides the edges instead of `max_scale`.
        Ignored in lin mode.
    max_scale
        Largest scale that an edge may reach, in voxels; None is half of the longest axis.
    min_scale
        First scale edge, in voxels.
    mode
        Spacing of the scale edges, ``log`` or ``lin``.
    log_scale_base
        Ratio of one edge to the one before in log mode, > 1.
    linear_scale_step
        Distance of one edge to the one before in lin mode, in voxels, > 0.
    e_rel
        Largest step in time relative to the time where a channel begins.
    sm_mode
        Extension beyond the edges of the field: a boundary mode of `scipy.ndimage`.
    up_sample
        Compute the edges up to `switch_scale` on an enlarged grid.
    switch_scale
        Largest edge computed there, in voxels.
    zoom_factor
        Cells of that grid per voxel and axis, >= 1. No edge there is below 1 voxel: smaller ones
        are raised to it and become one channel.
    constrained
        Apply the sign constraint after every smoothing step.
    inverted
        Invert the constraint. Counts only when `constrained`.
    return_scales
        Return the scale edges too.
    use_gpu
        Compute with PyTorch.
    device
        Its device, for example ``"cuda:0"``; None is the best one present. Counts only with
        `use_gpu`.
    verbose
        Print a line per channel.

    Returns
    -------
    channels : list
        One for each scale edge, from fine to coarse, of the shape of `data`: arrays, but tensors
        on the CPU if `data` is a tensor and `use_gpu` is set.
    residual : ndarray or tensor
        What is larger than the last edge.
    scales : ndarray
        Only if `return_scales`: the upper scale edge of every channel, in voxels.

    Raises
    ------
    InputError
        A `ValueError`: if `data` is empty, infinite or not numeric, or an option is out of its
        bounds.
    DeviceError, MissingDependencyError
        If `device` is absent, or PyTorch is.

    Examples
    --------
    >>> field = np.exp(np.sin(np.arange(64.0)))
    >>> channels, residual = constrained_diffusion_decomposition(
    ...     field, num_channels=2, up_sample=False
    ... )
    channel 0: scale < 1, 33 steps
    channel 1: scale < 2, 100 steps
    >>> bool(np.allclose(sum(channels) + residual, field))
    True
    """
    boundary = SYNONYMS.get(sm_mode, sm_mode)
    if boundary not in BOUNDARIES:
        check_choice("sm_mode", sm_mode, (*BOUNDARIES, *SYNONYMS))
    zoom_factor = check_number("zoom_factor", zoom_factor, at_least=1.0)
    parameters = Parameters(
        min_scale=min_scale,
        max_scale=max_scale,
        mode=mode,
        e_rel=e_rel,
        kernel="sampled",
        constrained=bool(constrained),
        inverted=bool(inverted),
        crossing=True,
        # what the other mode needs is ignored, whatever it is
        **(
            {"linear_scale_step": linear_scale_step}
            if mode == "lin"
            else {"log_scale_base": log_scale_base, "num_channels": num_channels}
        ),
    )
    engine: Engine = RoundingEngine()
    if use_gpu:
        engine = load_engine("torch", None if device is None else str(device))
    is_tensor = hasattr(data, "detach")
    field = _field(data.detach().cpu() if is_tensor else data)
    if engine.device.startswith("mps"):
        field = field.astype(np.float32)

    edges = _edges(parameters, field.shape)
    enlarged = [edge for edge in edges if up_sample and edge <= switch_scale]
    # edges on the grid → in voxels; of those raised to the same value the last gives the name
    on_fine_grid = {max(edge * zoom_factor, zoom_factor): edge for edge in enlarged}
    on_grid = {edge: edge for edge in edges[len(enlarged) :]}

    channels: list[Any] = []
    scales = [*on_fine_grid.values(), *on_grid.values()]
    for zoom, stage in ((zoom_factor, on_fine_grid), (1.0, on_grid)):
        if not stage:
            continue
        before = _zoom(field, tuple(round(size * zoom) for size in field.shape))
        for steps in channel_steps(parameters, tuple(stage), field.ndim):
            if verbose:
                number = len(channels)
                print(f"channel {number}: scale < {scales[number]:g}, {steps.count} steps")
            faces = ((boundary, boundary),) * field.ndim
            diffusion = Diffusion(steps, parameters.constraint, faces)
            after = engine.diffuse(before.copy(), diffusion)
            channels.append(_zoom(before - after, field.shape))
            before = after
        field = _zoom(before, field.shape)

    results = [*channels, field]
    if is_tensor and use_gpu:
        import torch

        results = [torch.from_numpy(result) for result in results]
    *channels, residual = results
    return (channels, residual, np.array(scales)) if return_scales else (channels, residual)


class RoundingEngine(ReferenceEngine):
    """SciPy as the original uses it: a float32 field is rounded after every axis.

    Under ``min`` rounding does not average out: within one channel of hundreds of small steps it
    takes up to 3e-5 of the maximum, and around 0 it decides which way a voxel goes.
    """

    def diffuse(self, field: NDArray[Any], diffusion: Diffusion) -> NDArray[Any]:
        if field.dtype == np.float64 or np.isnan(field).any():
            return super().diffuse(field, diffusion)
        smooth = np.empty_like(field)
        for _ in range(diffusion.steps.count):
            smooth_into(field, diffusion, diffusion.cval, out=smooth)
            constrain(field, smooth, diffusion.constraint)
        return field


def _field(data: Any) -> NDArray[Any]:
    """A copy of `data` in its working type, C-contiguous, NaN where it is blank."""
    given = np.ma.asarray(data)
    if given.dtype.kind not in "biuf":
        raise InputError(f"data of dtype {given.dtype} cannot be decomposed: give real numbers")
    if not given.size or not given.ndim:
        raise InputError(f"data of shape {given.shape} is empty: give at least 1 axis and 1 voxel")
    single = np.can_cast(given.dtype, np.float32)
    field: NDArray[Any] = np.ma.filled(
        given.astype(np.float32 if single else np.float64, "C"), np.nan
    )
    if count := np.isinf(field).sum():
        raise InputError(
            f"data has {count} infinite voxels of {field.size}: "
            "make them NaN (blank) or finite first"
        )
    return field


def _edges(parameters: Parameters, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Scale edges in voxels, as many as the original has.

    In lin mode it counts without a margin for rounding: there are 6 steps of 0.1 in 1 … 1.7.
    """
    edges = scale_edges(parameters, shape)
    if parameters.linear_scale_step is None:
        return edges
    high = max(shape) / 2 if parameters.max_scale is None else parameters.max_scale
    return edges[: math.floor((high - edges[0]) / parameters.linear_scale_step) + 1]


def _zoom(field: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """`field` on a grid of `shape`, interpolated linearly; the outermost voxels stay outermost.

    Blank voxels take no part: ``Z(I M) / Z(M)``, `M` being 0 there and 1 elsewhere. A cell is
    blank where its nearest voxel is, so the way to more cells and back leaves `M` as it was. For
    that a last cell must not be lost where rounding puts it beyond the last voxel; without blank
    voxels it becomes 0 there, as in the original.
    """
    from scipy.ndimage import zoom

    if field.shape == shape:
        return field
    factors = [after / before for after, before in zip(shape, field.shape, strict=True)]
    valid = ~np.isnan(field)
    if valid.all():
        zoomed: NDArray[Any] = zoom(field, factors, order=1)
        return zoomed
    total, weight, nearest_valid = (
        zoom(values, factors, order=order, mode="nearest")
        for values, order in (
            (np.where(valid, field, 0), 1),
            (valid.astype(field.dtype), 1),
            (valid.view(np.uint8), 0),
        )
    )
    cells: NDArray[Any] = np.full_like(total, np.nan)
    np.divide(total, weight, out=cells, where=nearest_valid.view(bool))
    return cells
