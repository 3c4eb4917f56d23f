"""How many examples the slow property tests try: few in CI, many in a nightly run."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("hypothesis")
from hypothesis import settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def few(number: int) -> settings:
    """So many examples, and those of the profile with ``HYPOTHESIS_PROFILE=nightly``."""
    return settings() if NIGHTLY else settings(max_examples=number)
