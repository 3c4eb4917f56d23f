"""Measure how fast the machine, the engines and whole decompositions are, side by side.

    python scripts/benchmark.py                                  # steps and a 128³ decomposition
    python scripts/benchmark.py --peer                           # beside constrained-diffusion
    python scripts/benchmark.py --peer --size 256                # whose time is extrapolated
    python scripts/benchmark.py --size 512 --ndim 2 --upsample 4 --json figures.json
    python scripts/benchmark.py --only block --size 512          # what a large block costs
    python scripts/benchmark.py --only signs                     # fields of both signs
    python scripts/benchmark.py --before PYTHON --size 192       # beside another state
    python scripts/benchmark.py --before PYTHON --cube l1448_13co.fits    # and whole commands

Everything is repeated and interleaved, and given as median and spread: machines differ and are
noisy, so only the ratios within one run say much. The torch engine joins where CUDA is present.
PYTHON is that of an environment in which another state of this package is installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from turbulence import lognormal_turbulence

from cdd_dask.engines import Diffusion, Engine, load_engine
from cdd_dask.kernels import smoothing_kernel
from cdd_dask.parameters import Parameters
from cdd_dask.pyramid import pyramid_level
from cdd_dask.scales import scale_edges
from cdd_dask.time_stepping import Steps, channel_steps

SIGMAS = (0.174, 0.346, 0.693, 1.386, 2.77, 5.54, 11.1, 22.2)
"""What octaves from 1 to 256 voxels smooth with."""
LONGEST_PEER = 3e6
"""Voxels up to which the peer package is timed as a whole; beyond, from a few steps."""
FEW = 3
"""Steps of a sample."""

Field = NDArray[np.float32]
Times = dict[str, list[float]]


def interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> Times:
    """Seconds of every case, `repeats` times in turn."""
    times: Times = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def _arithmetic(rounds: int) -> None:
    """Mere arithmetic: many steps of a field that stays in the cache, in one call."""
    engine_steps(load_engine("cpu"), np.ones((8, 16, 128), np.float32), SIGMAS[3], rounds)()


def together(run: Callable[[], object]) -> None:
    """Run the same twice at once, on two threads."""
    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(run) for _ in range(2)]:
            task.result()


def in_place_voxels_per_second(voxels: int = 1 << 26) -> float:
    """The limit of one thread: voxels read and written in place."""
    field = np.ones(voxels, np.float32)
    times = interleaved({"": lambda: np.multiply(field, np.float32(1), out=field)}, 5)[""]
    return voxels / min(times)


def engine_steps(
    engine: Engine, field: Field, sigma: float, count: int, copy: bool = True
) -> Callable[[], object]:
    """`count` steps as a run at the default `rtol` takes them."""
    kernel = smoothing_kernel("discrete", sigma)
    level = pyramid_level(kernel) if engine.has_pyramid else 0
    ndim = field.ndim
    what = Diffusion(
        Steps(count, (kernel,) * ndim),
        "constrained",
        (("reflect", "reflect"),) * ndim,
        levels=(level,) * ndim,
        phase=(0,) * ndim,
    )
    return lambda: engine.diffuse(field.copy() if copy else field, what)


def map_overlap_step(field: Field, sigma: float) -> Callable[[], object]:
    """One step as a user would write it himself with Dask and SciPy."""
    import dask.array as da
    from scipy.ndimage import gaussian_filter

    radius = int(4 * sigma + 0.5)
    chunks = tuple(max(radius, -(-n // 2)) for n in field.shape)

    def step(block: Field) -> Field:
        return np.minimum(block, gaussian_filter(block, sigma, mode="reflect"))

    lazy = da.from_array(field, chunks).map_overlap(step, depth=radius, boundary="reflect")
    return lambda: lazy.compute(scheduler="threads")


def step_figures(engine: Engine, field: Field, repeats: int, limit: float) -> list[dict[str, Any]]:
    """Voxel-steps per second of one engine, on one and on all threads, for each sigma."""
    few, many, rows = 4, 24, []
    for sigma in SIGMAS:
        if sigma > min(field.shape) / 8:
            continue
        before = engine.limit_threads(1)
        cases: dict[str, Callable[[], object]] = {}
        for threads in (1, before) if before > 1 else (1,):
            for count in (few, many):

                def run(threads: int = threads, count: int = count) -> None:
                    engine.limit_threads(threads)
                    engine_steps(engine, field, sigma, count)()  # noqa: B023

                cases[f"{threads} {count}"] = run
        cases[f"1 {few}"]()
        cases["overlap"] = map_overlap_step(field, sigma)
        times = interleaved(cases, repeats)
        engine.limit_threads(before)

        # what is done once per call is not a step's: the difference of many and few
        def speeds(threads: int, times: Times = times) -> list[float]:
            pairs = zip(times[f"{threads} {many}"], times[f"{threads} {few}"], strict=True)
            return [field.size * (many - few) / max(a - b, 1e-9) for a, b in pairs]

        one, both = statistics.median(speeds(1)), statistics.median(speeds(max(before, 1)))
        rows.append(
            {
                "engine": f"{engine.name} on {engine.device}",
                "sigma": sigma,
                "voxel_steps_per_second": one,
                "spread": [min(speeds(1)), max(speeds(1))],
                "of_in_place": one / limit,
                "threads": before,
                "all_threads": both,
                "map_overlap": field.size / statistics.median(times["overlap"]),
            }
        )
    return rows


BLOCK = """
import sys
import numpy as np
from benchmark import engine_steps, peak_kilobytes
from cdd_dask.engines import load_engine
size, sigma = int(sys.argv[2]), float(sys.argv[3])
engine = load_engine(sys.argv[1])
engine_steps(engine, np.ones((32,) * 3, np.float32), sigma, 1)()
field = np.ones((size,) * 3, np.float32)
run = engine_steps(engine, field, sigma, 2, copy=False)
open("/proc/self/clear_refs", "w").write("5")
before = peak_kilobytes()
run()
print((peak_kilobytes() - before) * 1024 / field.nbytes + 1)
"""


def peak_kilobytes() -> int:
    """Largest resident memory of this process since it was last asked to forget it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def block_figures(engine: Engine, size: int, repeats: int) -> list[dict[str, Any]]:
    """What a large block costs: its time beside that of 128³, two tasks beside one, memory."""
    small, large = (lognormal_turbulence((n,) * 3) for n in (128, size))
    few, many, rows = 2, 12, []
    before = engine.limit_threads(1)
    for sigma in SIGMAS:
        if sigma > 128 / 8:
            continue
        cases: dict[str, Callable[[], object]] = {
            "mere": partial(_arithmetic, 10_000),
            "two mere": partial(together, partial(_arithmetic, 10_000)),
        }
        for name, field in (("small", small), ("large", large)):
            for count in (few, many):
                cases[f"{name} {count}"] = engine_steps(engine, field, sigma, count)
        cases["two"] = partial(together, cases[f"small {many}"])
        times = interleaved(cases, repeats)

        # what is done once per call is not a step's: the difference of many and few
        def per_voxel(name: str, voxels: int, times: Times = times) -> float:
            pairs = zip(times[f"{name} {many}"], times[f"{name} {few}"], strict=True)
            return statistics.median(a - b for a, b in pairs) / voxels

        medians = {name: statistics.median(values) for name, values in times.items()}
        memory = subprocess.run(
            [sys.executable, "-c", BLOCK, engine.name, str(size), str(sigma)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        ).stdout
        rows.append(
            {
                "sigma": sigma,
                "times_of_small": per_voxel("large", large.size) / per_voxel("small", small.size),
                "two_tasks": 2 * medians[f"small {many}"] / medians["two"],
                "two_threads_of_arithmetic": 2 * medians["mere"] / medians["two mere"],
                "memory_of_field": float(memory),
            }
        )
    engine.limit_threads(before)
    return rows


def peer_seconds(field: Field, options: dict[str, Any], whole: bool) -> float:
    """Seconds that constrained-diffusion takes, or would take by a few steps of each sigma."""
    from constrained_diffusion import constrained_diffusion_decomposition as theirs

    def timed(**more: Any) -> float:
        start = time.perf_counter()
        theirs(field, **more, verbose=False)
        return time.perf_counter() - start

    if whole:
        return timed(**options)
    parameters = Parameters()
    steps = channel_steps(parameters, scale_edges(parameters, field.shape), field.ndim)
    total = 0.0
    for part in steps:
        # the first of its channels ends at `scale` after FEW steps of this sigma
        scale = part.kernels[0].sigma * FEW**0.5
        sample = {"min_scale": scale, "max_scale": 1.5 * scale, "num_channels": 1}
        total += timed(**sample, e_rel=1 / FEW, up_sample=False) / FEW * part.count
    return total


PROGRAM = """
import json, sys, time
import numpy as np
field = np.load(sys.argv[1])
options = json.loads(sys.argv[2])
import cdd_dask
def timed(field):
    start = time.perf_counter()
    cdd_dask.decompose(field, progress=False, **options)
    return time.perf_counter() - start
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
first = timed(field)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
second = timed(field)
print(json.dumps({"first": first, "second": second, "kilobytes": peak() - before}))
"""


def in_fresh_process(field: Field, options: dict[str, Any]) -> dict[str, float]:
    """Times of a process's first and second decomposition, and the memory they take."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/field.npy", field)
        text = subprocess.run(
            [sys.executable, "-c", PROGRAM, f"{folder}/field.npy", json.dumps(options)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    fresh: dict[str, float] = json.loads(text.splitlines()[-1])
    return fresh


SERVER = """
import json, sys, time
import numpy as np
from cdd_dask.engines import Diffusion, load_engine
from cdd_dask.kernels import smoothing_kernel
from cdd_dask.pyramid import pyramid_level
from cdd_dask.time_stepping import Steps
size, engine = int(sys.argv[1]), load_engine("cpu")
plain = np.exp(np.random.default_rng(0).normal(size=(size,) * 3))
fields = {"float32": plain.astype("f4"), "float64": plain}
fields["blanks"] = np.where(np.random.default_rng(1).random(plain.shape) < 0.1, np.nan, plain)
fields["blanks"] = fields["blanks"].astype("f4")
for line in sys.stdin:
    kind, sigma, threads, count = json.loads(line)
    engine.limit_threads(threads)
    kernel = smoothing_kernel("discrete", sigma)
    what = Diffusion(
        Steps(count, (kernel,) * 3), "constrained", (("reflect", "reflect"),) * 3,
        levels=(pyramid_level(kernel),) * 3, phase=(0, 0, 0),
    )
    field = fields[kind].copy()
    start = time.perf_counter()
    engine.diffuse(field, what)
    print(time.perf_counter() - start, flush=True)
"""


class Server:
    """Diffuses in a process of an environment of its own, when told to."""

    def __init__(self, python: str, size: int) -> None:
        self._process = subprocess.Popen(
            [python, "-c", SERVER, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tempfile.gettempdir(),  # not this checkout's package
        )

    def step(self, kind: str, sigma: float, threads: int) -> float:
        """Seconds of a step: the difference of many and few, without what is done once per call."""
        few, many = 4, 16
        return max(
            self._ask(kind, sigma, threads, many) - self._ask(kind, sigma, threads, few), 1e-9
        ) / (many - few)

    def warm_up(self, sigma: float) -> None:
        """Compile what another state may compile only now."""
        self._ask("float32", sigma, 1, 1)

    def _ask(self, *what: Any) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def report_before(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure and print what steps take beside another state of the package."""
    now, before = (Server(python, chosen.size) for python in (sys.executable, chosen.before))
    rows = []
    print("\n| sigma | threads | ns a voxel now | times as fast as before | float64 | blanks |")
    print("|---|---|---|---|---|---|")
    for sigma in (*SIGMAS[:4], 2.3, *SIGMAS[4:6]):
        if sigma > chosen.size / 8:
            continue
        before.warm_up(sigma)
        for threads in dict.fromkeys((1, len(os.sched_getaffinity(0)))):
            cases = {
                "before": partial(before.step, "float32", sigma, threads),
                **{
                    kind: partial(now.step, kind, sigma, threads)
                    for kind in ("float32", "float64", "blanks")
                },
            }
            taken: Times = {name: [] for name in cases}
            for _ in range(chosen.repeats):
                for name, run in cases.items():
                    taken[name].append(run())

            def ratio(name: str, taken: Times = taken) -> float:
                pairs = zip(taken[name], taken["float32"], strict=True)
                return statistics.median(a / b for a, b in pairs)

            row = {"sigma": sigma, "threads": threads, "seconds": taken}
            rows.append(row)
            middle, least = statistics.median(taken["float32"]), min(taken["float32"])
            print(
                f"| {sigma:g} | {threads} | {middle / chosen.size**3 * 1e9:.3f} "
                f"| {ratio('before'):.2f} (least times: {min(taken['before']) / least:.2f}) "
                f"| {ratio('float64'):.2f} times as long | {ratio('blanks'):.2f} times as long |",
                flush=True,
            )
    figures: dict[str, Any] = {"steps": rows}
    if chosen.cube:
        figures["commands"] = report_commands(chosen)
    return figures


def processor_seconds(command: list[str], **how: Any) -> float:
    """What a command takes; `how` as for `subprocess.run`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, **how)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report_commands(chosen: argparse.Namespace) -> dict[str, list[float]]:
    """Measure and print the processor time of whole commands, now and before."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(chosen.repeats + 1):
            for name, python in (("now", sys.executable), ("before", chosen.before)):
                command = [python, "-m", "cdd_dask", "decompose", os.path.abspath(chosen.cube)]
                spent = processor_seconds(
                    [*command, f"{folder}/{name}-{number}.zarr"],
                    cwd=folder,
                    env={**os.environ, "NUMBA_CACHE_DIR": f"{folder}/cache"},
                )
                seconds.setdefault(name, []).append(spent)
    print(f"\nprocessor seconds of `cdd-dask decompose` of {os.path.basename(chosen.cube)}")
    print("| | first run | later runs | first / later |\n|---|---|---|---|")
    for name, (first, *later) in seconds.items():
        middle = statistics.median(later)
        print(f"| {name} | {first:.2f} | {middle:.2f} | {first / middle:.2f} |")
    return seconds


def decomposition_figures(
    field: Field, engine: str, upsample: int, peer: bool, repeats: int
) -> dict[str, Any]:
    """Seconds of whole decompositions, in memory and to disk, beside the peer package."""
    import cdd_dask

    options: dict[str, Any] = {"engine": engine, "upsample": upsample}
    cdd_dask.decompose(field, progress=False, **options)
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()
        cases: dict[str, Callable[[], object]] = {
            "in memory": lambda: cdd_dask.decompose(field, progress=False, **options),
            "to disk": lambda: cdd_dask.decompose(
                field, out=f"{folder}/{next(numbers)}.zarr", progress=False, **options
            ),
        }
        figures: dict[str, Any] = {}
        times = interleaved(cases, repeats)
        if peer:
            whole = field.size <= LONGEST_PEER or upsample > 1
            figures["peer_extrapolated"] = not whole
            times["peer"] = []
            for _ in range(2):  # it takes minutes: ours before it and after
                times["peer"].append(peer_seconds(field, {"up_sample": upsample > 1}, whole))
                for name, more in interleaved(cases, repeats).items():
                    times[name] += more
    figures |= {name: summary(values) for name, values in times.items()}
    if peer:
        figures["times_faster"] = figures["peer"]["median"] / figures["in memory"]["median"]
    fresh = in_fresh_process(field, options)
    figures["start_up_seconds"] = fresh["first"] - fresh["second"]
    figures["peak_megabytes"] = fresh["kilobytes"] * 1.024e-3
    return figures


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def report_steps(field: Field, chosen: argparse.Namespace, limit: float) -> list[dict[str, Any]]:
    """Measure and print what single steps take."""
    engines, rows = [load_engine(chosen.engine)], []
    if find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            engines.append(load_engine("torch", "cuda"))
    print("\nmillion voxel-steps per second")
    print("| engine | sigma | one thread | of in place | all threads | map_overlap + SciPy |")
    print("|---|---|---|---|---|---|")
    for engine in engines:
        for row in step_figures(engine, field, chosen.repeats, limit):
            rows.append(row)
            low, high = (value / 1e6 for value in row["spread"])
            print(
                f"| {row['engine']} | {row['sigma']:g} "
                f"| {row['voxel_steps_per_second'] / 1e6:.0f} ({low:.0f} to {high:.0f}) "
                f"| {row['of_in_place']:.3f} | {row['all_threads'] / 1e6:.0f} "
                f"| {row['map_overlap'] / 1e6:.1f} |"
            )
    return rows


def report_signs(field: Field, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print what a step takes on a field of both signs, against one of one sign."""
    both, rows = np.log(field), []
    print("\n| engine | sigma | both signs against one: median (least times) |\n|---|---|---|")
    engines = ["reference", "cpu"] + ["torch"] * bool(find_spec("torch"))
    for name, sigma in itertools.product(engines, (SIGMAS[1], SIGMAS[3])):
        engine, count = load_engine(name), 24 if name == "cpu" else 1
        cases = {
            "one": engine_steps(engine, field, sigma, count),
            "both": engine_steps(engine, both, sigma, count),
        }
        cases["one"]()
        times = interleaved(cases, 4 * chosen.repeats)
        ratios = [b / a for a, b in zip(times["one"], times["both"], strict=True)]
        ratio, least = statistics.median(ratios), min(times["both"]) / min(times["one"])
        rows.append({"engine": name, "sigma": sigma, "ratio": ratio, "least": least})
        print(f"| {name} on {engine.device} | {sigma:g} | {ratio:.3f} ({least:.3f}) |", flush=True)
    return rows


def report_block(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print what a large block costs."""
    rows = block_figures(load_engine(chosen.engine), chosen.size, chosen.repeats)
    print(
        f"\n| sigma | {chosen.size}³ beside 128³, per voxel | two tasks at once "
        "| two threads of mere arithmetic | memory |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['sigma']:g} | {row['times_of_small']:.2f} times as long "
            f"| {row['two_tasks']:.2f} times as fast "
            f"| {row['two_threads_of_arithmetic']:.2f} times as fast "
            f"| {row['memory_of_field']:.2f} times the field |"
        )
    return rows


def report_decomposition(field: Field, chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure and print what whole decompositions take."""
    found = decomposition_figures(
        field, chosen.engine, chosen.upsample, chosen.peer, chosen.repeats
    )
    print("\n| decomposition | seconds |\n|---|---|")
    for name in ("in memory", "to disk", "peer"):
        if name in found:
            what = f"{name}, extrapolated" if found.get(f"{name}_extrapolated") else name
            value = found[name]
            print(
                f"| {what} | {value['median']:.2f} ({value['least']:.2f} to {value['most']:.2f}) |"
            )
    print(f"| a process's first call over its second | {found['start_up_seconds']:.2f} |")
    print(f"\npeak memory: {found['peak_megabytes']:.0f} MB", end="")
    print(f" ({found['peak_megabytes'] * 1e6 / field.nbytes:.1f} times the field, with all")
    print("channels, which stay in memory)")
    if chosen.peer:
        print(f"{found['times_faster']:.0f} times as fast as constrained-diffusion")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis")
    parser.add_argument("--ndim", type=int, default=3, help="number of axes")
    parser.add_argument("--engine", default="cpu", help="engine of the decomposition")
    parser.add_argument("--upsample", type=int, default=1, help="as decompose takes it")
    parser.add_argument("--peer", action="store_true", help="time constrained-diffusion, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only", choices=("steps", "block", "decomposition", "signs"), help="one kind of figures"
    )
    parser.add_argument("--before", metavar="PYTHON", help="compare steps with another state's")
    parser.add_argument("--cube", help="with --before: a file whose decomposition to time")
    parser.add_argument("--json", help="file to write all figures to")
    chosen = parser.parse_args()
    if chosen.peer and not find_spec("constrained_diffusion"):
        parser.error("--peer needs the package: pip install constrained-diffusion==1.2.5")
    return chosen


def main() -> None:
    chosen = parse_arguments()
    shape = (chosen.size,) * chosen.ndim
    limit = in_place_voxels_per_second()
    figures: dict[str, Any] = {
        "shape": shape,
        "cores": len(os.sched_getaffinity(0)),
        "in_place_voxels_per_second": limit,
    }
    print(f"{' × '.join(map(str, shape))} float32, {figures['cores']} cores")
    print(f"in place, one thread: {limit / 1e6:.0f} million voxels/s ({limit * 8 / 1e9:.1f} GB/s)")
    if chosen.before:
        figures["before"] = report_before(chosen)
    elif chosen.only == "block":
        figures["block"] = report_block(chosen)
    elif chosen.only == "signs":
        figures["signs"] = report_signs(lognormal_turbulence(shape), chosen)
    else:
        field = lognormal_turbulence(shape)
        if chosen.only != "decomposition":
            figures["steps"] = report_steps(field, chosen, limit)
        if chosen.only != "steps":
            figures["decomposition"] = report_decomposition(field, chosen)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
