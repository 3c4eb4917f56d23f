"""What an error says about trying again, and trying again.

The libraries that reach stores raise classes of their own. They are told by their looks (a status,
a code, a name), through their causes, so that none of them need be installed.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

from cdd_dask.errors import CddError, ClusterError, InputError, StoreError

CALL_TRIES = 6
"""How often a call to storage is tried that fails for a passing reason."""
EXPIRED_TRIES = 2
"""How often it is tried where credentials have expired: another try takes fresh ones, if any."""
FIRST_WAIT = 0.5
"""Longest time before the second try, in seconds; it doubles from try to try."""
LONGEST_WAIT = 30.0
"""Longest time before any try, in seconds."""

PASSING_ERRNOS = frozenset(
    (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY)
)
NOT_THERE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
"""What is said of a path that leads to no file."""
FULL_ERRNOS = frozenset((errno.ENOSPC, errno.EDQUOT))
PASSING_STATUSES = frozenset((408, 425, 429, *range(500, 600))) - {501, 505, 507}
"""HTTP: too late, too early, too many, and a server's troubles that are not the request's."""
FULL_STATUS = 507
"""HTTP's "insufficient storage"."""
PASSING_CODES = frozenset(
    (
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    )
)
"""Codes of S3 and its kin."""
EXPIRED_CODES = frozenset(
    (
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",  # temporary keys are forgotten when they have expired
        "InvalidToken",
        "RequestExpired",
        "TokenRefreshRequired",
    )
)
LIBRARIES = frozenset(
    (
        *("aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google"),
        *("httpcore", "httpx", "obstore", "requests", "s3fs", "urllib3"),
    )
)
"""Whose errors are told by their class's name and their text."""
PASSING_NAMES = re.compile(
    "Timeout|Connect|Disconnected|NetworkError|TransportError|ProtocolError|IncompleteRead|Payload"
)
STATUS_IN_TEXT = re.compile(r"\bstatus\b[^\d]{0,20}\b([1-5]\d\d)\b", re.IGNORECASE)
PASSING_TEXT = re.compile(
    "timed out|connection (reset|closed|refused)|error sending request|slow ?down", re.IGNORECASE
)


class Fault(StrEnum):
    """What becomes of a block whose task failed."""

    PASSING = "passing"
    """It is tried again."""
    EXPIRED = "expired"
    """It is tried again, once: the credentials have expired."""
    FULL = "full"
    """The run stops: a disk is full."""
    FATAL = "fatal"
    """The run stops: what is wrong is wrong for every block."""
    STAYING = "staying"
    """It is given up, and the other blocks go on."""


def fault_of(error: BaseException) -> Fault:
    """What becomes of a block whose task failed with `error`.

    Examples
    --------
    >>> fault_of(TimeoutError()).value, fault_of(OSError(28, "full")).value
    ('passing', 'full')
    """
    marks = [mark for one in _chain(error) if (mark := getattr(one, "fault", None))]
    if marks:
        return Fault(marks[0])
    if is_disk_full(error):
        return Fault.FULL
    if stops(error):
        return Fault.FATAL
    if is_expired_credentials(error):
        return Fault.EXPIRED
    return Fault.PASSING if is_passing(error) else Fault.STAYING


def mark(error: BaseException, fault: Fault | None = None) -> None:
    """Note `error`'s fault on it: between processes its causes may be left behind."""
    error.fault = (fault or fault_of(error)).value  # type: ignore[attr-defined]


def is_passing(error: BaseException) -> bool:
    """Whether an error, or one that caused it, may be gone at the next try.

    Examples
    --------
    >>> is_passing(TimeoutError()), is_passing(PermissionError()), is_passing(ValueError())
    (True, False, False)
    """
    return any(map(_passes, _chain(error)))


def is_expired_credentials(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that credentials were good once."""
    return any(map(_says_expired, _chain(error)))


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a disk or a quota is full."""
    return any(
        (isinstance(one, OSError) and one.errno in FULL_ERRNOS) or _status(one) == FULL_STATUS
        for one in _chain(error)
    )


def stops(error: BaseException) -> bool:
    """Whether an error, or one that caused it, ends a run: it needs data, a store and a cluster."""
    return any(isinstance(one, ClusterError | InputError | StoreError) for one in _chain(error))


def is_understood(error: BaseException) -> bool:
    """Whether the last cause of an error is one that its message explains: no traceback helps."""
    *_, last = _chain(error)
    return isinstance(last, CddError | OSError | MemoryError)


def wait_before(tries: int, draw: Callable[[], float] = random.random) -> float:
    """Seconds to wait after so many tries, drawn anew for every worker ("full jitter").

    Workers that failed together would else come back together (Brooker 2015, "Exponential backoff
    and jitter", AWS Architecture Blog).
    """
    return draw() * min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (tries - 1))


def tries_of(error: BaseException) -> int:
    """How often a call to storage may be made that failed with `error`."""
    return {Fault.PASSING: CALL_TRIES, Fault.EXPIRED: EXPIRED_TRIES}.get(fault_of(error), 1)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, as a traceback would show them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        if error.__cause__ is None and not error.__suppress_context__:
            error = error.__context__
        else:
            error = error.__cause__


def _passes(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in PASSING_ERRNOS:
        return True
    if _status(error) in PASSING_STATUSES or _code(error) in PASSING_CODES:
        return True
    return is_of_library(error) and (
        any(PASSING_NAMES.search(kind.__name__) for kind in type(error).__mro__)
        or bool(PASSING_TEXT.search(str(error)))
    )


def _says_expired(error: BaseException) -> bool:
    if _code(error) in EXPIRED_CODES:
        return True
    refused = _status(error) in (401, 403) or isinstance(error, PermissionError)
    return (refused or is_of_library(error)) and "expired" in str(error).lower()


def is_of_library(error: BaseException) -> bool:
    """Whether a library that reaches stores made an error in a class of its own."""
    return any(kind.__module__.partition(".")[0] in LIBRARIES for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    response = getattr(error, "response", None)
    candidates = [
        _item(_item(response, "ResponseMetadata"), "HTTPStatusCode"),  # botocore
        getattr(response, "status_code", None),  # requests, httpx
        getattr(response, "status", None),
        getattr(error, "status", None),  # aiohttp
        getattr(error, "status_code", None),  # azure
        getattr(error, "code", None),  # google, gcsfs, urllib
    ]
    for candidate in candidates:
        number = str(candidate)
        if number.isdecimal() and 100 <= int(number) < 600:
            return int(number)
    if is_of_library(error) and (found := STATUS_IN_TEXT.search(str(error))):  # obstore
        return int(found[1])
    return None


def _code(error: BaseException) -> str | None:
    """The code of S3's protocol that an error carries."""
    code = _item(_item(getattr(error, "response", None), "Error"), "Code")
    return code if isinstance(code, str) else None


def _item(mapping: Any, key: str) -> Any:
    return mapping.get(key) if isinstance(mapping, dict) else None
