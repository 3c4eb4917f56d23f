"""The errors users meet, each a subclass of the standard exception a caller would expect.

Every message names the argument, the value given, the bound it broke and the remedy.
"""

from __future__ import annotations


class CddError(Exception):
    """Base of all errors that this package raises on purpose."""


class InputError(CddError, ValueError):
    """An argument or the data given cannot be used as they are."""


class SourceNotFoundError(CddError, FileNotFoundError):
    """The source to decompose does not exist."""


class SourceReadError(CddError, OSError):
    """The source exists but cannot be read (truncated, damaged, of an unknown kind)."""


class OutputExistsError(CddError, FileExistsError):
    """The output exists and may not be replaced."""


class OutputAccessError(CddError, PermissionError):
    """The output cannot be written."""


class StoreError(CddError, ValueError):
    """A path holds no decomposition store, an incomplete one, a damaged or another run's."""


class BudgetError(CddError, MemoryError):
    """The plan needs more memory than it may use."""


class DiskSpaceError(CddError, OSError):
    """The output does not fit on its disk."""


class CalibrationError(CddError, OSError):
    """How fast the machine is could not be measured, or not be kept."""


class MissingDependencyError(CddError, ImportError):
    """An optional library that the request needs is not installed."""


class DeviceError(CddError, RuntimeError):
    """The device asked for is absent or cannot do what is asked."""


class RunError(CddError, RuntimeError):
    """A run that had begun could not go on."""


class BlockError(RunError):
    """A block could not be computed; the message names the block and its region."""


class VerificationError(CddError, RuntimeError):
    """A store does not hold what it promises."""
