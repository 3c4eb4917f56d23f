"""The memory promise, measured on the command line from outside.

`scripts/measure_memory.py` proves it at any size; here a small volume goes through the same
function.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cdd_dask
from cdd_dask.errors import InputError
from cdd_dask.memory import available_memory, byte_count

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from measure_memory import measure

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux_only
def test_measured_peak_keeps_the_plan():
    """A volume of 3 budgets: peak under the budget, and 0.5 to 1.0 of the plan's."""
    result = measure(290, "32MB", ["--e-rel", "1", "--num-channels", "1", "--engine", "reference"])
    assert result["volume"] >= 3 * result["budget"]
    assert result["measured"] <= result["budget"]
    assert 0.5 <= result["measured"] / result["projected"] <= 1.0


@linux_only
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_volume_of_8_budgets(workers: str):
    """512³ voxels (537 MB) in 64 MB, with one worker and on a cluster of two."""
    result = measure(512, "64MB", ["--e-rel", "0.5", "--max-scale", "2", "--workers", workers])
    assert result["volume"] >= 8 * result["budget"]
    assert result["measured"] <= result["budget"]
    # a block is diffused within a few milliseconds, about as long as looking at a process takes:
    # samples may miss the highest peak
    assert 0.3 <= result["measured"] / result["projected"] <= 1.0


def test_default_budget_is_half_of_what_is_free():
    """Without `memory` the plan takes half of the free memory, not all."""
    plan = cdd_dask.plan((64, 64), max_scale=4)
    assert plan.resources.memory == pytest.approx(available_memory() / 2, rel=0.2)


@pytest.mark.parametrize("value", ["lots", "", "-5MB", 0, -1, True, float("nan"), [1]])
def test_amounts_that_are_none(value: object):
    """A budget that is no amount of bytes is refused by name."""
    with pytest.raises(InputError, match="memory="):
        byte_count("memory", value)
