"""Nothing is lost, and little is redone, when workers, clients and schedulers are killed.

`scripts/kill.py` does it at any length; here are a few kills.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import kill
import recording

import cdd_dask
from cdd_dask import run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no such signals")


def test_killed_at_random_moments(tmp_path: Path):
    """The same store as that of an undisturbed run; redone is only what was in flight."""
    killer = kill.hunt(tmp_path, kills=3, seed=0, kinds=("cells",))
    assert kill.report(killer)


def test_a_client_whose_scheduler_is_killed_ends(tmp_path: Path):
    """By itself, soon, and in one line that says what to do."""
    np.save(tmp_path / "field.npy", np.ones((kill.SIDE,) * 3, "float32"))
    out = tmp_path / "out.zarr"
    with closing(kill.Cluster(tmp_path, torn=0.0)) as cluster:
        cluster.tend()
        command = kill.command_of("halos", tmp_path / "field.npy", out, cluster.address)
        client = Popen(command, stderr=PIPE, text=True)
        while not list(cluster.records.glob("begun*")):
            if client.poll() is not None:  # no worker was there yet
                client.communicate()
                client = Popen(command, stderr=PIPE, text=True)
            time.sleep(0.1)
        kill.kill_tree(cluster.processes["scheduler"])
        _, told = client.communicate(timeout=kill.SECONDS_TO_END)
    assert client.returncode == 1
    assert "scheduler" in told
    assert "run the same command again" in told
    assert len(told.splitlines()) == 1, told


def test_killed_before_marks_are_gathered(
    tmp_path: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch
):
    """The next run gathers them, though nothing of that pass is left to do."""
    np.save(tmp_path / "field.npy", lognormal((48, 48, 30)))
    options: dict[str, Any] = {"max_scale": 4, "e_rel": 0.3, "block": 16, "progress": False}

    gather = run.gather_marks

    def killed(address: str, fingerprint: str, number: int, marks: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        gather(address, fingerprint, number, marks)

    monkeypatch.setattr(run, "gather_marks", killed)
    with pytest.raises(KeyboardInterrupt):
        cdd_dask.decompose(tmp_path / "field.npy", tmp_path / "out.zarr", **options)
    monkeypatch.undo()
    done = tmp_path / "out.zarr/done/pass_0001"
    assert len(list(done.glob("blocks/0*"))) == 18
    cdd_dask.decompose(tmp_path / "field.npy", tmp_path / "out.zarr", **options)
    assert {path.name for path in done.iterdir()} == {"zarr.json", "copy"}


@pytest.mark.slow
@pytest.mark.parametrize("torn", [0.0, 0.02])
def test_killed_more_often(tmp_path: Path, torn: float):
    """All kinds of jobs, and with writes torn by the kill."""
    assert kill.report(kill.hunt(tmp_path, kills=40, seed=1, torn=torn))


@pytest.mark.slow
def test_without_done_marks_more_is_redone(tmp_path: Path):
    """What the marks are for: the script notices that they lack."""
    killer = kill.hunt(tmp_path, kills=6, seed=0, marks=False, kinds=("cells",))
    executions = recording.Executions.of(killer.cluster.records, killer.found.times)
    assert executions.unexplained > 10
    assert killer.found.wrong == 0
