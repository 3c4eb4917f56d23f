"""Addresses: paths and URLs that users, config files and stores give, looked at before use."""

from __future__ import annotations

import re
from urllib.parse import unquote

from cdd_dask.errors import InputError, redacted

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that command a terminal or that no terminal can show."""
INDIRECT = re.compile(r"(?:^|::)reference(?:::|:/)")
"""URLs of a file that names other files, anywhere, and may hold templates to evaluate."""

NOWHERE = re.compile("[^/]*:/+")
"""A URL of a scheme and nothing else."""


def check_address(name: str, address: str) -> None:
    """Refuse an `address` given as the argument `name` that must not be kept, shown or opened.

    Raises
    ------
    InputError
        If it holds credentials, which the message does not repeat; or characters that cannot be
        printed; or is a URL that names no place, or hands over to others.

    Examples
    --------
    >>> check_address("source", "s3://bucket/cube.zarr")
    >>> check_address("source", "https://example.org/cube.zarr?sig=abcd")
    Traceback (most recent call last):
        ...
    cdd_dask.errors.InputError: source=https://example.org/cube.zarr?sig=*** holds credentials, \
which would be kept in the store and in logs: leave them out, and put them into the environment \
or the config files of the storage library (fsspec, s3fs, …)
    """
    plain = unquote(address)
    if (shown := redacted(plain)) != plain:
        raise InputError(
            f"{name}={shown} holds credentials, which would be kept in the store and in logs: "
            "leave them out, and put them into the environment or the config files of the storage "
            "library (fsspec, s3fs, …)"
        )
    if UNPRINTABLE.search(address):
        raise InputError(f"{name}={address!a} holds characters that cannot be printed: rename it")
    if NOWHERE.fullmatch(address):
        raise InputError(f"{name}={address} names no place: add a bucket or a folder")
    if INDIRECT.search(address):
        raise InputError(
            f"{name}={address} may name files anywhere: open it yourself and give the Zarr array"
        )
