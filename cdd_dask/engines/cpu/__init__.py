"""The CPU engine: a Python face on code that is compiled from the C++ beside it."""

from cdd_dask.engines.cpu.engine import CpuEngine
from cdd_dask.engines.cpu.library import instruction_set

__all__ = ["CpuEngine", "instruction_set"]
