"""Kill workers, clients and schedulers at random moments, and look whether anything is lost.

    python scripts/kill.py --kills 200 --seed 0
    python scripts/kill.py --kills 40 --without-marks    # must fail: every block is redone
    python scripts/kill.py --kills 40 --torn 0.02        # workers also die in the middle of writes

Jobs run as on a cluster: a scheduler, a worker under a nanny and one without, and a client, each a
process of its own. What ends is started again; the client with the same command, until the job is
done; then the next job begins, with an output of its own, until so many were killed.

Executions are counted on the disk (`recording.py`). A block may be executed again only if an
execution of it was in flight when something was killed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import recording
from turbulence import lognormal_turbulence

import cdd_dask

JOBS: dict[str, dict[str, Any]] = {
    "halos": {"max_scale": 8, "block": (16, 32, 32)},
    "cells": {"min_scale": 16, "max_scale": 32, "block": 32},
    "stream": {"min_scale": 16, "max_scale": 32, "block": 32, "rtol": 2e-4},
}
"""Small jobs with halos, on cells, and on cells with values of both signs."""
SIDE = 64
KINDS = {"worker": 0.4, "client": 0.3, "scheduler": 0.2, "all": 0.1}
"""What is killed, how often."""
MOST_BETWEEN = 20
"""Tasks that begin from one kill to the next, at the most."""
AT_ANY_TIME = 0.2
"""Share of kills that do not wait for tasks to begin: they hit processes that are starting."""
SECONDS_BETWEEN = 10.0
"""Longest time from one kill to such a next one."""
SECONDS_TO_END = 45.0
"""How long a client may live that has lost its scheduler."""
SECONDS_TO_GIVE_UP = 240.0
"""Without any progress."""
DONE_COPY = "done/zarr.json"
"""The copy of the root's attributes, which name the run."""


@dataclass
class Found:
    """What was killed, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    times: list[int] = field(default_factory=list)
    """When something was killed, in nanoseconds since the epoch."""
    runs: int = 0
    clients: Counter[str] = field(default_factory=Counter)
    """How clients ended that were not killed: exit statuses, or ``hung``."""
    wrong: int = 0
    """Voxels that differ from those of an undisturbed run."""
    differences: list[str] = field(default_factory=list)
    """Whatever else differs."""


class Cluster:
    """A scheduler and two workers, each a process of its own that is started again if it ends."""

    def __init__(self, folder: Path, torn: float) -> None:
        self.records = folder / "records"
        self.records.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self._folder = folder
        self._log = (folder / "cluster.log").open("ab")
        self._environment = {
            **os.environ,
            recording.FOLDER: str(self.records),
            recording.TORN: str(torn),
            # a killed worker must not take its block's good name with it
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "20",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def tend(self) -> None:
        """Start what is not running, but no worker where there is no scheduler."""
        port = self.address.rpartition(":")[2]
        common = ["--no-dashboard", "--host", "127.0.0.1"]
        worker = [
            *("worker", self.address, *common, "--nthreads", "1", "--memory-limit", "0"),
            *("--local-directory", str(self._folder / "spill"), "--death-timeout", "20"),
            *("--preload", recording.__file__),
        ]
        commands = {
            "scheduler": ["scheduler", *common, "--port", port],
            "worker": [*worker, "--no-nanny"],
            "nanny": [*worker, "--nanny"],
        }
        for name, command in commands.items():
            if name not in self.processes or self.processes[name].poll() is not None:
                self.processes[name] = self._start(command)

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *command],
            env=self._environment,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def workers(self) -> list[psutil.Process]:
        """The processes that a worker consists of: itself, its nanny."""
        found = []
        for name in ("worker", "nanny"):
            with suppress(psutil.Error):
                parent = psutil.Process(self.processes[name].pid)
                found += [parent, *(one for one in parent.children() if _is_worker(one))]
        return found

    def close(self) -> None:
        """Kill everything."""
        for process in self.processes.values():
            kill_tree(process)
        self._log.close()


def _is_worker(process: psutil.Process) -> bool:
    return any("spawn_main" in part for part in process.cmdline())


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all that it started, at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command_of(kind: str, source: Path, out: Path, scheduler: str) -> list[str]:
    """The client's command line for a job."""
    options = []
    for name, value in {**JOBS[kind], "e_rel": 0.3}.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        options += [f"--{name.replace('_', '-')}", text]
    return [
        *(sys.executable, "-m", "cdd_dask", "decompose", str(source), str(out)),
        *("--scheduler", scheduler, "--quiet", *options),
    ]


class Killer:
    """Runs jobs on a cluster, and kills at random moments."""

    def __init__(self, folder: Path, kills: int, seed: int, marks: bool, torn: float) -> None:
        self.found = Found()
        self.cluster = Cluster(folder, torn)
        self._folder, self._marks = folder, marks
        self._left = kills
        self._rng = np.random.default_rng(seed)
        self._client: subprocess.Popen[bytes] | None = None
        self._orphaned = float("inf")
        """When the client lost its scheduler."""

    def job(self, kind: str, source: Path, out: Path) -> None:
        """One job, from its first client to the one that ends well."""
        command = command_of(kind, source, out, self.cluster.address)
        self._plan_kill()
        progress, seen = time.monotonic(), 0
        while True:
            self.cluster.tend()
            if self._client is None:
                self._client = self._start_client(command, out)
            status = self._client.poll()
            if status is not None:
                self.found.clients[str(status)] += 1
                self._client, self._orphaned = None, float("inf")
                if status == 0:
                    break
            elif time.monotonic() > self._orphaned + SECONDS_TO_END:
                self.found.clients["hung"] += 1
                kill_tree(self._client)
                self._client, self._orphaned = None, float("inf")
            if self._left and self._is_time():
                self._kill(self._rng.choice([*KINDS], p=[*KINDS.values()]))
            if (begun := self._begun()) != seen:
                progress, seen = time.monotonic(), begun
            if time.monotonic() > progress + SECONDS_TO_GIVE_UP:
                raise SystemExit(f"no progress with {out}; see {self._folder}")
            time.sleep(0.02)
        self.found.runs += 1

    def _start_client(self, command: list[str], out: Path) -> subprocess.Popen[bytes]:
        if not self._marks:
            shutil.rmtree(out / "done", ignore_errors=True)
        with (self._folder / "clients.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def _begun(self) -> int:
        return sum(1 for name in os.listdir(self.cluster.records) if name.startswith("begun"))

    def _plan_kill(self) -> None:
        self._at_count = self._begun() + int(self._rng.integers(0, MOST_BETWEEN + 1))
        wait = self._rng.uniform(0, SECONDS_BETWEEN)
        hasty = self._rng.random() < AT_ANY_TIME
        self._at_time = time.monotonic() + wait if hasty else float("inf")

    def _is_time(self) -> bool:
        if self._begun() >= self._at_count:
            time.sleep(self._rng.uniform(0, 0.2))
            return True
        return time.monotonic() >= self._at_time

    def _kill(self, kind: str) -> None:
        processes = self.cluster.processes
        if kind == "worker":
            victims = self.cluster.workers()
            victims = [victims[self._rng.integers(len(victims))]] if victims else []
            for victim in victims:
                with suppress(psutil.Error):
                    victim.kill()
        else:
            names = {"client": [], "scheduler": ["scheduler"], "all": [*processes]}[kind]
            victims = [processes[name] for name in names]
            if kind != "scheduler" and self._client is not None:
                victims.append(self._client)
            for victim in victims:
                kill_tree(victim)
        self.found.times.append(time.time_ns())
        if kind == "scheduler" and self._client is not None:
            self._orphaned = time.monotonic()
        elif kind in ("client", "all"):
            self._client, self._orphaned = None, float("inf")
        if victims:
            self.found.kills[kind] += 1
            self._left -= 1
        self._plan_kill()

    @property
    def left(self) -> int:
        """Kills to come."""
        return self._left

    def close(self) -> None:
        """End everything."""
        if self._client is not None:
            kill_tree(self._client)
        self.cluster.close()


def differences(out: Path, whole: Path) -> tuple[int, list[str]]:
    """How many voxels of a store differ from those of another, and what else does."""
    result, expected = map(cdd_dask.open_decomposition, (out, whole))
    wrong = sum(
        int(np.count_nonzero(one[...] != other[...]))
        for one, other in zip(
            (*result.channels, result.residual),
            (*expected.channels, expected.residual),
            strict=True,
        )
    )
    free = {"run", "plan", "versions", "seal"}  # what may be otherwise in another run
    found = [
        f"{out.name}: attribute {name}"
        for name in {*result.attrs, *expected.attrs} - free
        if result.attrs.get(name) != expected.attrs.get(name)
    ]
    files = files_of(whole)
    known = files_of(out)
    # a task that outlives its run may leave a mark beside those that were gathered
    extra = {name for name in known.keys() - files.keys() if "/blocks/" not in name}
    found += [f"{out.name}: {name} is left over" for name in sorted(extra)]
    found += [f"{out.name}: {name} differs" for name in files if known.get(name) != files[name]]
    return wrong, found


def files_of(store: Path) -> dict[str, bytes]:
    """All files of a store but those that say how it was made."""
    names = (path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())
    return {
        name: (store / name).read_bytes() for name in names if name not in ("zarr.json", DONE_COPY)
    }


def hunt(
    folder: Path,
    kills: int,
    seed: int,
    marks: bool = True,
    torn: float = 0.0,
    kinds: tuple[str, ...] = tuple(JOBS),
) -> Killer:
    """Run jobs of some `kinds` in `folder` until so many processes were killed."""
    field = lognormal_turbulence((SIDE,) * 3)
    for kind in kinds:
        np.save(folder / f"{kind}.npy", np.log(field) if kind == "stream" else field)
        options: dict[str, Any] = {**JOBS[kind], "e_rel": 0.3, "progress": False}
        cdd_dask.decompose(folder / f"{kind}.npy", folder / f"{kind}.zarr", **options)
    killer = Killer(folder, kills, seed, marks, torn)
    try:
        while killer.left:
            kind = kinds[killer.found.runs % len(kinds)]
            out = folder / f"{kind}_{killer.found.runs}.zarr"
            killer.job(kind, folder / f"{kind}.npy", out)
            wrong, others = differences(out, folder / f"{kind}.zarr")
            killer.found.wrong += wrong
            killer.found.differences += others
            if not (wrong or others):
                shutil.rmtree(out)
    finally:
        killer.close()
    return killer


def report(killer: Killer) -> bool:
    """Print what was found, and whether it is as it must be."""
    found = killer.found
    executions = recording.Executions.of(killer.cluster.records, found.times)
    rows = {
        **{f"kills of {kind}": count for kind, count in sorted(found.kills.items())},
        "jobs completed": found.runs,
        "clients that ended, by status": dict(found.clients),
        "tasks": executions.tasks,
        "executions": executions.count,
        "redone": executions.redone,
        "in flight at kills": executions.in_flight,
        "redone, but not in flight": executions.unexplained,
        "wrong voxels": found.wrong,
        "other differences": len(found.differences),
    }
    print("| what | count |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    for difference in found.differences[:20]:
        print(difference)
    bars = {
        "no voxel is wrong, and stores are the same": not (found.wrong or found.differences),
        "no more is redone than was in flight": (
            executions.unexplained == 0 and executions.redone <= executions.in_flight
        ),
        "clients end by themselves": set(found.clients) <= {"0", "1", "2"},
    }
    for name, good in bars.items():
        print(f"{name}: {'yes' if good else 'NO'}")
    return all(bars.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torn", type=float, default=0.0, help="share of writes that are torn")
    parser.add_argument("--without-marks", action="store_true", help="delete the done marks")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the others too
    folder = Path(tempfile.mkdtemp(prefix="cdd-kill-"))
    killer = hunt(
        folder, arguments.kills, arguments.seed, not arguments.without_marks, arguments.torn
    )
    good = report(killer)
    if good:
        shutil.rmtree(folder)
    else:
        print(f"logs and records are in {folder}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
