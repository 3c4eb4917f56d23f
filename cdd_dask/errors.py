"""The errors users meet, each a subclass of the standard exception a caller would expect.

Every message names the argument, the value given, the bound it broke and the remedy.
"""

from __future__ import annotations

import re

USER_INFO = re.compile(
    r"(\bhttps?:/+)[^/?#\s]+@"  # user:password@ or token@
    # of other schemes a name alone is no secret (a user's, a container's); what follows a colon
    # and is no port is a password
    r"|((?<![a-z0-9+.-])[a-z][a-z0-9+.-]+:/+)[^/?#\s@\[:]*:(?!\d*(?:[/?#\s]|$))\S*@",
    re.IGNORECASE,
)
"""What stands before the host in a URL that logs in by itself."""
SECRET = re.compile(
    r"([?&;#][^\s=?&;#]*"
    r"(?:sig|signature|token|key|keyid|accessid|secret|password|passwd|pwd|auth|credentials?|sas)=)"
    r"[^\s&;#'\"]+",
    re.IGNORECASE,
)
"""A parameter of a URL that opens what it names to everybody."""

AGAIN = "run the same command again (without --overwrite)"
"""What a user does whose run was stopped."""


def redacted(text: str) -> str:
    """`text` without the credentials of URLs in it.

    Examples
    --------
    >>> redacted("GET https://me:pw@example.org/a?X-Amz-Signature=12ab&part=3: 403")
    'GET https://***@example.org/a?X-Amz-Signature=***&part=3: 403'
    """
    return SECRET.sub(r"\1***", USER_INFO.sub(r"\1\2***@", text))


class CddError(Exception):
    """Base of all errors that this package raises on purpose.

    What libraries of storage report may quote a signed URL: no message repeats a secret.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(arg) if isinstance(arg, str) else arg for arg in args))


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


class DamagedError(StoreError):
    """A chunk of a store is missing or unsound."""


class LeaseError(CddError, BlockingIOError):
    """Another run writes to the output."""


class DifferentRunError(OutputExistsError):
    """The output was begun with other parameters or of another source."""


class BudgetError(CddError, MemoryError):
    """The plan needs more memory than it may use."""

    # that of MemoryError refuses to make subclasses of others, as unpickling asks it to
    __new__ = Exception.__new__  # type: ignore[assignment]


class DiskSpaceError(CddError, OSError):
    """The output does not fit on its disk."""


class CalibrationError(CddError, OSError):
    """How fast the machine is could not be measured, or not be kept."""


class MissingDependencyError(CddError, ImportError):
    """An optional library that the request needs is not installed."""


class DeviceError(CddError, RuntimeError):
    """The device asked for is absent or cannot do what is asked."""


class PreflightError(CddError, RuntimeError):
    """This machine or a worker is not fit for the run; nothing has begun."""


class RunError(CddError, RuntimeError):
    """A run that had begun could not go on."""


class ClusterError(RunError):
    """A run lost its cluster's scheduler."""


class BlockError(RunError):
    """A block could not be computed; the message names the block and its region."""


class BlocksFailedError(BlockError):
    """Some blocks could not be computed, while the others were; the message lists them."""


class DiskFullError(BlockError):
    """A disk is full: the run stopped, and can go on when there is space."""


class VerificationError(CddError, RuntimeError):
    """A store does not hold what it promises."""
