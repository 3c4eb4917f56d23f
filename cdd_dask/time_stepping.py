"""From scale edges to steps in time: a scale `l` is reached at ``t = l**2 / 2``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cdd_dask.errors import InputError
from cdd_dask.kernels import IDENTITY, Kernel, smoothing_kernel
from cdd_dask.parameters import SWITCH_SCALE, Parameters

MOST_STEPS = 1_000_000
"""Largest number of steps accepted for one channel."""


@dataclass(frozen=True)
class Steps:
    """Consecutive equal steps of diffusion."""

    count: int
    """Number of steps."""
    kernels: tuple[Kernel, ...]
    """Smoothing kernel of one step, one per axis, in cells of the grid they run on."""
    refinement: int = 1
    """Cells of that grid per voxel, along every axis that is decomposed; 1: the volume's grid."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The decomposed axes; along the others the kernel is the identity."""
        return tuple(axis for axis, kernel in enumerate(self.kernels) if kernel.sigma > 0)

    @property
    def reach(self) -> tuple[int, ...]:
        """Strict dependence radius ``n * r`` per axis, in cells."""
        return tuple(self.count * kernel.radius for kernel in self.kernels)

    def in_cells(self, voxels: tuple[int, ...]) -> tuple[int, ...]:
        """A shape in voxels, in cells of the grid that the steps run on.

        Examples
        --------
        >>> from cdd_dask.kernels import IDENTITY, discrete_gaussian
        >>> Steps(1, (IDENTITY, discrete_gaussian(0.5)), refinement=2).in_cells((30, 40))
        (30, 80)
        """
        factors = (self.refinement if kernel.sigma > 0 else 1 for kernel in self.kernels)
        return tuple(n * factor for n, factor in zip(voxels, factors, strict=True))


def channel_steps(parameters: Parameters, edges: tuple[float, ...], ndim: int) -> tuple[Steps, ...]:
    """The steps of every channel, from the finest to the coarsest.

    ``dt_max = e_rel * t_{k-1}`` (``e_rel * t_k`` for the first channel),
    ``n = max(1, int((t_k - t_{k-1}) / dt_max + 0.5))``, and each step smooths with
    ``sigma = sqrt(2 dt)`` (Li 2022, arXiv:2201.05484).

    Parameters
    ----------
    parameters
        Gives `e_rel`, the kind of kernel, and what decides the grid: axes, spacing, upsampling.
    edges
        Scale edges, ascending, in the unit of the spacing (else in voxels).
    ndim
        Number of axes of the volume.

    Raises
    ------
    InputError
        If a channel would take more than a million steps.

    Examples
    --------
    >>> steps = channel_steps(Parameters(), (1.0, 2.0, 4.0), ndim=3)
    >>> [s.count for s in steps], [round(s.kernels[0].sigma, 2) for s in steps]
    ([33, 100, 100], [0.17, 0.17, 0.35])
    """
    axes, spacing = parameters.decomposed_axes(ndim), parameters.voxel_spacing(ndim)
    refined = refined_channels(parameters, edges, ndim)
    steps = []
    before = 0.0
    for k, edge in enumerate(edges):
        time = edge**2 / 2
        dt_max = parameters.e_rel * (before or time)
        wanted = (time - before) / dt_max if dt_max > 0 else math.inf
        if wanted > MOST_STEPS:
            raise InputError(
                f"e_rel={parameters.e_rel:g} asks for more than {MOST_STEPS} steps for the channel "
                f"that ends at scale {edge:g}: raise e_rel, or space the scale edges closer"
            )
        count = max(1, int(wanted + 0.5))
        sigma = math.sqrt(2 * (time - before) / count)
        refinement = parameters.upsample if k < refined else 1
        kernels = tuple(
            smoothing_kernel(parameters.kernel, sigma / spacing[axis] * refinement)
            if axis in axes
            else IDENTITY
            for axis in range(ndim)
        )
        steps.append(Steps(count, kernels, refinement))
        before = time
    return tuple(steps)


def refined_channels(parameters: Parameters, edges: tuple[float, ...], ndim: int) -> int:
    """How many channels, the finest, are computed on the refined grid."""
    if parameters.upsample == 1:
        return 0
    switch = parameters.switch_scale
    if switch is None:
        switch = SWITCH_SCALE * parameters.smallest_spacing(ndim)
    return sum(edge <= switch * (1 + 1e-9) for edge in edges)
