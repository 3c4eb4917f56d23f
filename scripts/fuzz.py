"""Feed the command line damaged and hostile configs, arguments, stores and files.

    python scripts/fuzz.py --what all --count 10000 --seed 0

Each input is one command, run as the shell would run it, in a process of limited memory. Found is
whatever ends in a traceback, a crash or a hang, and whatever writes outside the output folder; the
input is then saved, with the seed that makes it again. The exit status is 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile

KINDS = ("config", "arguments", "store", "chunks", "header")
MEMORY = 6_000_000_000
"""Bytes of address space for the commands: a hostile size must not take the machine down."""
LARGEST_FILE = 50_000_000
PATIENCE = 120.0
"""Seconds after which a command is looked at, and hangs if in as many again it does no block."""
STATUSES = {0: "done", 1: "failed", 2: "refused"}

Snapshot = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """One input: what makes it, and makes it again."""

    kind: str
    seed: int
    number: int

    @property
    def random(self) -> random.Random:
        return random.Random(f"{self.kind}/{self.seed}/{self.number}")

    def __str__(self) -> str:
        return f"--what {self.kind} --seed {self.seed} --first {self.number} --count 1"


class Sandbox:
    """A folder with the files to spoil, an output folder, and others that nobody may touch.

    ::

        templates/    whole files and stores
        in/           spoiled files
        out/          what commands may write to, with a spoiled store in it
        outside/      canaries
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.templates, self.inputs, self.out = (folder / n for n in ("templates", "in", "out"))
        canary = folder / "outside" / hostile.SCRATCH / "canary"
        canary.parent.mkdir(parents=True, exist_ok=True)
        canary.write_text("alive")

    def prepare(self, case: Case) -> list[str]:
        """The command line of a case, whose files are made."""
        for folder in (self.inputs, self.out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        random = case.random
        make = getattr(self, f"_{case.kind}")
        command: list[str] = make(random)
        return command

    def _config(self, random: random.Random) -> list[str]:
        config = self.inputs / "config.yaml"
        config.write_bytes(hostile.spoiled_config(random, self.templates / "config.yaml"))
        return ["plan", "64,64", "--config", str(config)]

    def _arguments(self, random: random.Random) -> list[str]:
        store, source = self._copied("store.zarr"), self.templates / "field.npy"
        return hostile.arguments(random, source, store, self.out)

    def _store(self, random: random.Random) -> list[str]:
        store = self._copied("store.zarr")
        hostile.spoil_metadata(random, store, self.folder)
        return self._store_command(random, store)

    def _chunks(self, random: random.Random) -> list[str]:
        store = self._copied("store.zarr")
        file = random.choice(sorted(p for p in store.rglob("image/c/**/*") if p.is_file()))
        file.write_bytes(hostile.spoiled(random, file.read_bytes()))
        return self._store_command(random, store)

    def _store_command(self, random: random.Random, store: Path) -> list[str]:
        again = ["decompose", str(self.templates / "field.npy"), str(store), *hostile.FAST]
        return random.choice(
            [
                ["info", str(store)],
                ["info", str(store), "--json", "--allow-incomplete"],
                ["spectrum", str(store)],
                ["verify", str(store), "--quiet"],
                ["verify", str(store), "--sample", "1", "--memory", "100MB", "--quiet"],
                ["repair", str(store), "--memory", "100MB", "--quiet"],
                ["doctor", str(self.templates / "field.npy"), str(store), *hostile.FAST[:-1]],
                *(
                    ["export", str(store), *to, "--out", str(self.out / "export"), "--quiet"]
                    for to in (["--to=npy"], ["--to=fits"], ["--to=tiff"])
                ),
                again,
                [*again, "--overwrite"],
            ]
        )

    def _header(self, random: random.Random) -> list[str]:
        whole = random.choice(sorted(self.templates.glob("field*")))
        path = self.inputs / whole.name
        if whole.is_dir():
            shutil.copytree(whole, path)
            hostile.spoil_metadata(random, path, self.folder)
        else:
            path.write_bytes(hostile.spoiled_file(random, whole))
        source = str(path / "0" if (path / "0").is_dir() else path)
        out = str(self.out / "new.zarr")
        return random.choice(
            [["plan", source], ["decompose", source, out, *hostile.FAST, "--memory", "200MB"]]
        )

    def _copied(self, name: str) -> Path:
        return Path(shutil.copytree(self.templates / name, self.out / name))

    def snapshot(self) -> Snapshot:
        """All that lies outside the output folder: sizes and times."""
        found: Snapshot = {}
        for folder, folders, files in os.walk(self.folder):
            if Path(folder) == self.folder:
                folders.remove(self.out.name)
            for name in (*folders, *files):
                state = os.lstat(path := os.path.join(folder, name))
                found[path] = state.st_size, state.st_mtime_ns
        return found


def run(command: list[str]) -> tuple[str, str]:
    """Outcome of a command, and the traceback if it ended in one."""
    from cdd_dask.cli import main

    sys.argv = ["cdd-dask", *command]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            main()
        return "done", ""
    except SystemExit as error:
        status = error.code or 0
        if "Traceback (most recent" in errors.getvalue() or status not in STATUSES:
            return "finding", f"exit status {status}\n{errors.getvalue()}"
        return STATUSES[int(status)], ""
    except BaseException:
        return "finding", traceback.format_exc()
    finally:
        logging.getLogger("cdd_dask").handlers.clear()


def work(folder: Path, cases: list[Case], connection: Any) -> None:
    """Run cases one after the other, in this process, up to the first finding; tell of each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "out" / "cache")
    warnings.simplefilter("ignore")
    # crashes are told by the parent; what libraries print is not of interest
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sandbox = Sandbox(folder)
    for case in cases:
        command = sandbox.prepare(case)
        connection.send(("begun", command))
        before = sandbox.snapshot()
        outcome, text = run(command)
        after = sandbox.snapshot()
        if changed := {path for path in before | after if before.get(path) != after.get(path)}:
            outcome, text = "finding", f"written outside the output: {sorted(changed)[:5]}"
        connection.send((outcome, text))
        if outcome == "finding":
            return  # its files must stay until they are kept


def fuzz(folder: Path, cases: list[Case], findings: Path) -> Counter[tuple[str, str]]:
    """Run all cases, in a process that is replaced when it dies, and count the outcomes."""
    counts: Counter[tuple[str, str]] = Counter()
    context = multiprocessing.get_context("spawn")
    left = cases
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(folder, left, sender))
        process.start()
        sender.close()
        command: list[str] = []
        outcome = ""
        while left and outcome not in ("finding", "long"):
            outcome, text = _message(receiver, process, folder / "out")
            if outcome == "begun":
                command = text
                continue
            case, left = left[0], left[1:]
            counts[case.kind, outcome] += 1
            if outcome == "finding":
                _save(case, command, text, folder, findings)
            if len(left) % 1000 == 0:
                print(f"{len(left)} inputs left", flush=True)
        process.join()
    return counts


def _message(receiver: Any, process: Any, out: Path) -> tuple[str, Any]:
    """What the process says next; that it hangs or died is a finding.

    A size that was edited may make a job long, and no other one.
    """
    try:
        if not receiver.poll(PATIENCE):
            before = _marks(out)
            if not receiver.poll(PATIENCE):
                process.kill()
                process.join()
                if _marks(out) != before:
                    return "long", ""
                return "finding", f"hangs for more than {2 * PATIENCE:g} s"
        outcome, text = receiver.recv()
        return outcome, text
    except EOFError:
        process.join()
        return "finding", f"died, exit code {process.exitcode}"


def _marks(out: Path) -> set[Path]:
    """Where done marks lie, of blocks and of whole passes."""
    return {*out.glob("**/done/pass_*/**/zarr.json")}


def _save(case: Case, command: list[str], text: str, folder: Path, findings: Path) -> None:
    """Print a finding, and keep its files."""
    kept = findings / f"{case.kind}-{case.seed}-{case.number}"
    shutil.rmtree(kept, ignore_errors=True)
    for name in ("in", "out"):
        shutil.copytree(folder / name, kept / name, symlinks=True)
    (kept / "finding.txt").write_text(f"{case}\n{command}\n{text}\n", errors="replace")
    last = text.strip().splitlines()[-1][:200]
    print(f"FINDING {last}\n  again: {case}\n  files: {kept}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("all", *KINDS), default="all")
    parser.add_argument("--count", type=int, default=10_000, help="inputs, of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    arguments = parser.parse_args()
    kinds = KINDS if arguments.what == "all" else (arguments.what,)
    numbers = range(arguments.first, arguments.first + arguments.count)
    cases = [Case(kinds[n % len(kinds)], arguments.seed, n) for n in numbers]
    with tempfile.TemporaryDirectory(prefix="cdd-dask-fuzz-") as name:
        folder = Path(name)
        hostile.make_templates(folder / "templates")
        counts = fuzz(folder, cases, arguments.findings)
    for kind in kinds:
        of_kind = {outcome: n for (k, outcome), n in sorted(counts.items()) if k == kind}
        shown = ", ".join(f"{n} {outcome}" for outcome, n in of_kind.items())
        print(f"{kind:10} {sum(of_kind.values()):6} inputs: {shown}")
    found = sum(n for (_, outcome), n in counts.items() if outcome == "finding")
    print(f"{sum(counts.values())} inputs, {found} findings")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
