"""The CPU engine's compiled code: the same bits from all of it, and what guards its border."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdd_dask.engines import load_engine
from cdd_dask.engines.cpu import library, thread_team
from cdd_dask.engines.cpu.steppers import Axis, Fused, StepContext
from cdd_dask.errors import InputError, MissingDependencyError
from cdd_dask.identity import numeric_class
from cdd_dask.kernels import smoothing_kernel

HERE = Path(__file__).parent
THREADS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cpu_cases import checksums
print(json.dumps(checksums(int(sys.argv[2]))))
"""


@pytest.mark.parametrize(
    ("name", "threads"),
    [*((name, 1) for name in library.available()), *((n, 3) for n in library.available()[:1])],
)
def test_same_bits_everywhere(name: str, threads: int):
    """Each instruction set that runs here, and any number of threads, gives the known checksums."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(HERE), str(threads)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, library.VARIABLE: name},
    )
    expected = json.loads((HERE / "data" / "cpu_checksums.json").read_text())
    found = json.loads(done.stdout)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == set()


def test_the_widest_instruction_set_is_chosen(monkeypatch: pytest.MonkeyPatch):
    """The engine says which one runs; a plan's header repeats it."""
    monkeypatch.delenv(library.VARIABLE, raising=False)
    library.instruction_set.cache_clear()
    assert load_engine("cpu").instruction_set == library.available()[0]
    assert library.available()[-1] in ("portable", "neon")


def test_another_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The message names the variable, its value, and what there is."""
    monkeypatch.setenv(library.VARIABLE, "mmx")
    library.instruction_set.cache_clear()
    try:
        with pytest.raises(InputError, match=r"CDD_DASK_CPU='mmx'.*portable"):
            load_engine("cpu")
    finally:
        library.instruction_set.cache_clear()


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    """Whoever has no compiled code learns how to get it, and what works without."""
    monkeypatch.setattr(library, "_present", dict)
    library.instruction_set.cache_clear()
    try:
        with pytest.raises(MissingDependencyError, match=r"compiler.*reference"):
            load_engine("cpu")
        assert load_engine("reference").name == "reference"
    finally:
        library.instruction_set.cache_clear()


def test_what_compiled_code_cannot_check_is_checked():
    """Another type, other strides or another size never get there."""
    field = np.zeros((6, 4), np.float32)
    assert library.address(field, np.float32, 24) == field.ctypes.data
    for bad, size in ((field.astype("f8"), 24), (field[:, ::2], 12), (field, 23)):
        with pytest.raises(ValueError, match=r"array: float\d\d of shape .* are needed"):
            library.address(bad, np.float32, size)


def test_a_thread_that_cannot_start_stops_the_others(monkeypatch: pytest.MonkeyPatch):
    """Threads wait for each other: what has begun ends, and the error comes through."""
    monkeypatch.setattr(thread_team, "threads", 3)
    kernel, kind = smoothing_kernel("discrete", 0.7), np.dtype(np.float32)
    submit, steps = thread_team.ThreadPoolExecutor.submit, library.function("fused", kind)
    started: list[Any] = []

    def one_only(self: Any, *args: Any) -> Any:
        if args[0] is steps and started:
            raise RuntimeError("can't start new thread")
        future = submit(self, *args)
        started.extend([future] * (args[0] is steps))
        return future

    monkeypatch.setattr(thread_team.ThreadPoolExecutor, "submit", one_only)
    axes = [Axis(64, kernel, ("reflect", "reflect"))] * 3
    field = np.ones((64, 64, 64), kind)
    with thread_team.ThreadTeam(field.size) as team:
        stepper = Fused(axes, StepContext(kind, kind, 0.0, 1.0, team))
        with pytest.raises(RuntimeError, match="new thread"):
            stepper.run(field, False, "constrained", 50)
    assert started[0].done()  # the test's time would be over, if it still waited


def test_a_run_of_the_engine_before_is_not_gone_on_with():
    """What another arithmetic computed differs in last bits: its runs have another fingerprint."""
    assert numeric_class("cpu", "cpu") not in ("cpu on cpu", numeric_class("reference", "cpu"))
