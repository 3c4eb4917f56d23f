"""NumPy files: nothing but shape, type and voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cdd_dask.exporting.base import Layout, Output


def create(path: Path, output: Output) -> Layout:
    """Make the `.npy` file at `path`, without its voxels."""
    mapped = np.lib.format.open_memmap(path, "w+", output.dtype, output.shape)
    return Layout(mapped.offset, output.dtype, tuple(range(len(output.shape))))
