"""Nothing is lost, and little is redone, when workers, clients and schedulers are killed.

`scripts/kill.py` does it at any length; here are a few kills.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import kill

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no such signals")


def test_killed_at_random_moments(tmp_path: Path):
    """The same store as that of an undisturbed run; redone is only what was in flight."""
    killer = kill.hunt(tmp_path, kills=6, seed=0, kinds=("cells",))
    assert kill.report(killer)


@pytest.mark.slow
@pytest.mark.parametrize("torn", [0.0, 0.02])
def test_killed_more_often(tmp_path: Path, torn: float):
    """All kinds of jobs, and with writes torn by the kill."""
    assert kill.report(kill.hunt(tmp_path, kills=40, seed=1, torn=torn))


@pytest.mark.slow
def test_without_done_marks_more_is_redone(tmp_path: Path):
    """What the marks are for: the script notices that they lack."""
    killer = kill.hunt(tmp_path, kills=6, seed=0, marks=False, kinds=("cells",))
    executions = kill.Executions.of(killer.cluster.records, killer.found.times)
    assert executions.unexplained > 10
    assert killer.found.wrong == 0
