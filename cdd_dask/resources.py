"""What a run may use: engine, executor, workers and memory, resolved before anything else."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from cdd_dask.calibration import cores, load
from cdd_dask.engines import Engine, load_engine
from cdd_dask.errors import DeviceError, InputError
from cdd_dask.executors import EXECUTORS, IN_PROCESS
from cdd_dask.memory import available_memory, byte_count
from cdd_dask.parameters import Parameters, check_choice, check_count
from cdd_dask.plans import Resources, Speeds

BASELINE = 140_000_000
"""Bytes a Dask worker with this package holds before any task."""
BASELINE_TORCH = 320_000_000
"""The same with torch."""
SPEED_IN_MEMORY = 1e9
"""Bytes per second that tasks move together where the output lives in memory, roughly."""


def resolve_resources(
    parameters: Parameters,
    *,
    engine: str,
    device: str | None,
    memory: int | str | None,
    executor: str,
    workers: int | None,
    client: Any,
    in_memory: bool,
    blanks: bool,
) -> Resources:
    """Turn what the user asked for into what the run will use.

    `blanks` says whether there may be blank voxels, for which engines need more memory.

    Raises
    ------
    InputError
        If the arguments contradict each other.
    DeviceError
        If the device is absent.
    """
    name = _executor_name(executor, workers, client, in_memory)
    budget = None if memory is None else byte_count("memory", memory)
    if client is not None:
        return _on_client((engine, device, parameters.itemsize, blanks), budget, client)
    count = _worker_count(name, workers)
    chosen = load_engine(engine, device)
    threads = max(1, cores() // count)
    free = chosen.free_device_memory()
    return Resources(
        engine=chosen.name,
        device=chosen.device,
        executor=name,
        workers=count,
        tasks_per_budget=count,
        memory=budget or available_memory() // 2,
        threads=threads,
        footprint=chosen.footprint(parameters.itemsize, threads=threads),
        blank_footprint=chosen.footprint(parameters.itemsize, blanks, threads),
        speeds=_speeds(chosen, count, threads, parameters.itemsize, in_memory),
        has_pyramid=chosen.has_pyramid,
        device_memory=None if free is None else free // count,
        in_memory=in_memory,
        instruction_set=chosen.instruction_set,
    )


def _executor_name(executor: str, workers: int | None, client: Any, in_memory: bool) -> str:
    check_choice("executor", executor, EXECUTORS)
    if workers is not None:
        check_count("workers", workers)
    if executor == "auto":
        several = "threads" if in_memory else "distributed"
        chosen = several if workers is not None and workers > 1 else "serial"
        executor = "distributed" if client is not None else chosen
    if client is not None and executor != "distributed":
        raise InputError(f"client is given, but executor={executor!r}: leave one of them out")
    if client is not None and workers is not None:
        raise InputError(f"workers={workers} with a client: the cluster decides, leave it out")
    if executor == "serial" and workers is not None and workers > 1:
        raise InputError(f'workers={workers} with executor="serial": use "threads" or "processes"')
    if in_memory and executor not in IN_PROCESS:
        raise InputError(
            f"out=None keeps the result in this process, which executor={executor!r} cannot "
            'reach: give out=, or use executor="threads"'
        )
    return executor


def _worker_count(executor: str, workers: int | None) -> int:
    return 1 if executor == "serial" else int(workers or cores())


def _speeds(engine: Engine, workers: int, threads: int, itemsize: int, in_memory: bool) -> Speeds:
    """What was measured on this machine, else what is roughly so on any."""
    calibration = load(engine.name, engine.device)
    if calibration is None:
        return Speeds.rough(engine.voxel_steps_per_second)
    speeds = calibration.per_task(workers, threads, itemsize)
    if in_memory:
        return replace(speeds, read=SPEED_IN_MEMORY / workers, written=SPEED_IN_MEMORY / workers)
    return speeds


def _on_client(
    wanted: tuple[str, str | None, int, bool], budget: int | None, client: Any
) -> Resources:
    """Resources of the workers of a user's cluster, asked for what `_probe_engine` takes."""
    from cdd_dask.executors.dask import all_have_gpus, losses_told, workers_of

    info = workers_of(client)
    with losses_told():
        probes = client.run(_probe_engine, *wanted, workers=[*info])  # others may join meanwhile
    names = {probe["engine"] for probe in probes.values()}
    if len(names) > 1:
        raise DeviceError(
            f"engine={wanted[0]!r} is not the same on all workers ({sorted(names)}): name an "
            "engine and a device that all have"
        )
    name, on_device = names.pop()
    one_task = all_have_gpus(info)
    threads = 1 if one_task else max(worker["nthreads"] for worker in info.values())
    free = []
    for address, probe in probes.items():
        if probe["device_memory"] is not None:
            host = info[address]["host"]
            sharing = sum(worker["host"] == host for worker in info.values())
            alone = one_task and sharing <= probe["devices"]
            free.append(probe["device_memory"] // (1 if alone else sharing * threads))
    limits = [
        worker["memory_limit"] - probes[address]["baseline"]
        for address, worker in info.items()
        if worker["memory_limit"]
    ]
    any_probe = next(iter(probes.values()))
    return Resources(
        engine=name,
        device=on_device,
        executor="distributed",
        workers=len(info) if one_task else sum(worker["nthreads"] for worker in info.values()),
        tasks_per_budget=threads,
        memory=budget or (max(1, min(limits)) if limits else available_memory() // 2 // len(info)),
        threads=1,
        footprint=any_probe["footprint"],
        blank_footprint=any_probe["blank_footprint"],
        speeds=Speeds.rough(any_probe["speed"]),
        has_pyramid=any_probe["has_pyramid"],
        device_memory=min(free) if free else None,
        instruction_set=any_probe["instruction_set"],
    )


def _probe_engine(engine: str, device: str | None, itemsize: int, blanks: bool) -> dict[str, Any]:
    """What a worker has."""
    chosen = load_engine(engine, device)
    return {
        "engine": (chosen.name, chosen.device),
        "device_memory": chosen.free_device_memory(),
        "devices": chosen.device_count(),
        "footprint": chosen.footprint(itemsize),
        "blank_footprint": chosen.footprint(itemsize, blanks),
        "speed": chosen.voxel_steps_per_second,
        "has_pyramid": chosen.has_pyramid,
        "instruction_set": chosen.instruction_set,
        "baseline": BASELINE_TORCH if "torch" in sys.modules else BASELINE,
    }
