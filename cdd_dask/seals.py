"""Seals: plain JSON values that carry a checksum of themselves, so that any edit shows."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeGuard

SEAL = "seal"


def seal_of(values: Any) -> str:
    """A checksum of plain JSON values, whatever the order of their keys.

    Examples
    --------
    >>> seal_of({"a": 1, "b": (2,)}) == seal_of({"b": [2], "a": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, allow_nan=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The values with their seal, in place of one that they had."""
    plain = {key: value for key, value in values.items() if key != SEAL}
    return {**plain, SEAL: seal_of(plain)}


def is_sealed(values: Any) -> TypeGuard[dict[str, Any]]:
    """Whether values are as they were when they were sealed.

    Examples
    --------
    >>> is_sealed(sealed({"a": 1})), is_sealed({**sealed({"a": 1}), "a": 2})
    (True, False)
    """
    return isinstance(values, dict) and values.get(SEAL) == sealed(values)[SEAL]
