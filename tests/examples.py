"""How many examples tests try: few in CI, many with `bash scripts/test.sh --slow`."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def few(number: int) -> settings:
    """So many examples, and those of the profile with ``HYPOTHESIS_PROFILE=nightly``."""
    return settings() if NIGHTLY else settings(max_examples=number)


def slowly(*values: Any) -> list[Any]:
    """Parameters that show little more than those beside them, for the slow runs only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
