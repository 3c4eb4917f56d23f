"""The CPU engine's compiled code: the same bits from all of it, and what guards its border."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdd_dask.blocks import Grid
from cdd_dask.engines import Diffusion, load_engine
from cdd_dask.engines.cpu import library, steppers, thread_team
from cdd_dask.engines.cpu.steppers import Axis, Fused, StepContext
from cdd_dask.errors import InputError, MissingDependencyError
from cdd_dask.identity import numeric_class
from cdd_dask.kernels import IDENTITY, smoothing_kernel
from cdd_dask.memory import TaskMemory
from cdd_dask.parameters import BOUNDARIES, Parameters
from cdd_dask.pyramid import StepGrids, coarse_levels
from cdd_dask.time_stepping import Steps

HERE = Path(__file__).parent
SMALL_OBJECTS = 500_000
"""Bytes of tables and of Python's objects, which a plan's `TASK_OVERHEAD` holds."""
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


def test_people_are_told_which_one_runs(tmp_path: Path):
    """In the first lines of a plan and by `doctor`."""
    name = library.available()[-1]
    np.save(tmp_path / "field.npy", np.ones((8, 8, 8), np.float32))
    for command in ("plan", "doctor"):
        done = subprocess.run(
            [sys.executable, "-m", "cdd_dask", command, "field.npy", "--engine", "cpu"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, library.VARIABLE: name},
        )
        assert f"cpu ({name}) on cpu" in done.stdout, done.stderr


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
    """Another type, byte order, other strides or another size never get there."""
    field = np.zeros((6, 4), np.float32)
    library.check(field, 24)
    others = field.astype("f2"), field.astype(">f4"), field.astype("i4")
    for bad, size in (*((one, 24) for one in others), (field[:, ::2], 12), (field, 23)):
        with pytest.raises(ValueError, match=r"field: .* of shape .* are needed"):
            library.check(bad, size)


def test_a_thread_that_cannot_start_stops_the_others(monkeypatch: pytest.MonkeyPatch):
    """Threads wait for each other: what has begun ends, and the error comes through."""
    monkeypatch.setattr(thread_team, "threads", 3)
    kernel, kind = smoothing_kernel("discrete", 0.7), np.dtype(np.float32)
    submit, steps = thread_team.ThreadPoolExecutor.submit, library.function("fused", kind, kind)
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


def test_sizes_are_the_same_in_both_languages():
    """What Python allocates for is what compiled code uses."""
    folder = Path(library.__file__).parent
    text = "".join(path.read_text() for path in sorted(folder.glob("*.hpp")))
    for module, names in (
        (steppers, ("BATCH", "LARGEST_RADIUS", "WIDTH", "CHUNK")),
        (steppers, ("SAVED_ROWS",)),
    ):
        for name in names:
            found = re.search(
                rf"constexpr \w+ {name.replace('SAVED_ROWS', 'LARGEST_DEPTH')} = (\d+);", text
            )
            assert found is not None, name
            ours = getattr(module, name)
            assert ours <= int(found[1]) if name == "SAVED_ROWS" else ours == int(found[1])
    (listed,) = re.findall(r"enum Constraint : Index \{ (.*) \};", text)
    assert [name.lower() for name in listed.split(", ")] == list(library.CONSTRAINTS)


def test_a_kernel_too_wide_for_a_pyramid():
    """Though only along an axis that stays fine, or on coarse cells still."""
    kernel, wide = smoothing_kernel("discrete", 5.5), smoothing_kernel("discrete", 11.1)
    field = np.random.default_rng(0).lognormal(size=(40, 41, 42))
    faces = (("reflect", "reflect"),) * 3
    for steps, levels in ((Steps(1, (kernel,) * 3), (0, 0, 2)), (Steps(1, (wide,) * 3), (1,) * 3)):
        full = Diffusion(steps, "constrained", faces)
        coarse = Diffusion(steps, "constrained", faces, levels=levels, phase=(0,) * 3)
        results = [load_engine("cpu").diffuse(field.copy(), one) for one in (full, coarse)]
        assert np.abs(results[0] - results[1]).max() <= 1e-3 * np.ptp(field)


@pytest.mark.parametrize("sigma", [0.7, 5.5])
def test_a_value_beyond_the_faces_is_the_same_along_all_axes(sigma: float):
    """Rounded to the field's type once, also where blank voxels have it computed in float64."""
    field = np.random.default_rng(0).lognormal(size=(96, 96)).astype(np.float32)
    field[40, 40] = np.nan
    kernels = (smoothing_kernel("discrete", sigma), IDENTITY)
    level = 1 if sigma > 2 else 0
    along = [
        load_engine("cpu").diffuse(
            (field if axis == 0 else field.T).copy("C"),
            Diffusion(
                Steps(5, kernels if axis == 0 else kernels[::-1]),
                "constrained",
                (("constant", "constant"),) * 2,
                cval=0.1,
                levels=(level, 0) if axis == 0 else (0, level),
                phase=(0, 0),
            ),
        )
        for axis in (0, 1)
    ]
    assert np.array_equal(along[0], along[1].T, equal_nan=True)


SHAPES = ((70, 70, 70), (90, 13, 70), (30, 5000), (9000,), (5, 20, 30, 50))


@pytest.mark.parametrize(("threads", "blanks"), [(1, False), (9, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_what_the_plan_says(shape: tuple[int, ...], threads: int, blanks: bool):
    """Of every way to step, along all axes or one: never more than `TaskMemory.work`."""
    engine = load_engine("cpu")
    ndim, grid = len(shape), Grid(shape, shape)
    footprint = engine.footprint(4, blanks, threads)
    before = engine.limit_threads(threads)
    try:
        for boundary, sigma in itertools.product(BOUNDARIES, (0.35, 1.39, 11.1)):
            kernel, narrow = (smoothing_kernel("discrete", one) for one in (sigma, 1.39))
            for axes, other in (
                (range(ndim), IDENTITY),
                ([0], narrow),
                ([max(0, ndim - 2)], IDENTITY),
            ):
                kernels = tuple(kernel if axis in axes else other for axis in range(ndim))
                levels = coarse_levels(Parameters(), Steps(1, kernels))
                planned = TaskMemory(
                    grid=grid,
                    haloed=shape,
                    footprint=footprint,
                    itemsize=4,
                    source_itemsize=4,
                    source_chunk=None,
                    grids=StepGrids.of(shape, shape, kernels, levels, boundary),
                ).work
                field = np.ones(shape, np.float32)
                field.flat[:: 7 if blanks else field.size] = np.nan if blanks else 1
                what = Diffusion(
                    Steps(4, kernels), "constrained", ((boundary,) * 2,) * ndim, 0.0, levels
                )
                tracemalloc.start()
                engine.diffuse(field, what)
                taken = field.nbytes + tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert taken <= planned + SMALL_OBJECTS, (boundary, sigma, axes, taken, planned)
    finally:
        engine.limit_threads(before)
