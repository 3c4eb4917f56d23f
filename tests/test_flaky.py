"""Storage that fails one call in twenty changes nothing but the time that a run takes."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import zarr
from examples import slowly
from fsspec.implementations.memory import MemoryFileSystem
from zarr.abc.store import Store
from zarr.storage import WrapperStore

import cdd_dask
from cdd_dask import faults, retrying, run
from cdd_dask.errors import CddError, RunError
from cdd_dask.readers import open_source

OPTIONS: dict[str, dict[str, Any]] = {
    "halos": {"max_scale": 4, "e_rel": 0.3},
    "cells": {"min_scale": 16, "max_scale": 32, "e_rel": 0.4},
}
BASE: dict[str, Any] = {"block": 16, "progress": False}


class Refused(Exception):
    """What a server answers instead of doing what it is asked for, with HTTP's `status`."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text or f"the server says {status}")
        self.status = status


class Weather:
    """When storage fails and how, by a seed."""

    KINDS = ("torn write", "lost acknowledgement", "timeout", "503", "429")
    OF_READING = KINDS[2:]

    def __init__(self, seed: int, share: float) -> None:
        self._random, self._share, self._lock = random.Random(seed), share, threading.Lock()
        # in turn, so that none is missed, whatever order threads come in
        self._kinds = {True: itertools.cycle(self.KINDS), False: itertools.cycle(self.OF_READING)}
        self.failures: Counter[str] = Counter()
        self.calls = 0

    def now(self, writes: bool) -> str:
        """How the present call fails; nothing if it does not."""
        with self._lock:
            self.calls += 1
            if self._random.random() >= self._share:
                return ""
            kind = next(self._kinds[writes])
            self.failures[kind] += 1
            return kind


def fail(kind: str) -> None:
    if kind == "timeout":
        raise OSError(110, "Connection timed out")
    if kind:
        raise Refused(429 if kind == "429" else 503, kind)


class FlakyStore(WrapperStore[Store]):
    """A store in any weather."""

    weather: Weather

    async def _read(self, call: Callable[[], Any]) -> Any:
        fail(self.weather.now(writes=False))
        return await call()

    async def _write(self, call: Callable[[], Any], torn: Callable[[], Any] | None = None) -> None:
        kind = self.weather.now(writes=True)
        if kind == "torn write" and torn is not None:
            await torn()
        elif kind == "lost acknowledgement":
            await call()
        fail(kind)
        await call()

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        return await self._read(lambda: self._store.get(key, prototype, byte_range))

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
        ranges = list(key_ranges)
        return await self._read(lambda: self._store.get_partial_values(prototype, ranges))

    async def exists(self, key: str) -> bool:
        return bool(await self._read(lambda: self._store.exists(key)))

    async def getsize(self, key: str) -> int:
        return int(await self._read(lambda: self._store.getsize(key)))

    async def is_empty(self, prefix: str) -> bool:
        return bool(await self._read(lambda: self._store.is_empty(prefix)))

    async def set(self, key: str, value: Any) -> None:
        half = value[: len(value) // 2]
        await self._write(lambda: self._store.set(key, value), lambda: self._store.set(key, half))

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        await self._write(lambda: self._store.set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        await self._write(lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        await self._write(lambda: self._store.delete_dir(prefix))

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        fail(self.weather.now(writes=False))
        async for name in self._store.list_dir(prefix):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        fail(self.weather.now(writes=False))
        async for name in self._store.list_prefix(prefix):
            yield name

    async def list(self) -> AsyncIterator[str]:
        fail(self.weather.now(writes=False))
        async for name in self._store.list():
            yield name


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Weather]:
    """Puts weather beneath all stores, ``flaky(seed, share=0.05, retry=True)``, and returns it."""
    original = retrying.RetryingStore

    def put(seed: int, share: float = 0.05, retry: bool = True) -> Weather:
        weather = Weather(seed, share)
        monkeypatch.setattr(FlakyStore, "weather", weather, raising=False)
        monkeypatch.setattr(
            retrying,
            "RetryingStore",
            lambda beneath: (original if retry else lambda same: same)(FlakyStore(beneath)),
        )
        monkeypatch.setattr(faults, "FIRST_WAIT", 0.0)
        return weather

    return put


@pytest.fixture(scope="module")
def field() -> Any:
    return np.random.default_rng(0).lognormal(size=(40, 48)).astype("float32")


@pytest.fixture(scope="module")
def undisturbed(field: Any) -> dict[str, list[Any]]:
    """The outputs of every case in memory."""
    return {
        name: outputs_of(cdd_dask.decompose(field, **BASE, **more))
        for name, more in OPTIONS.items()
    }


def outputs_of(result: cdd_dask.Decomposition) -> list[Any]:
    return [part[...] for part in (*result.channels, result.residual)]


def assert_same(wanted: list[Any], found: list[Any]) -> None:
    for one, other in zip(wanted, found, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("executor", ["threads", *slowly("serial")])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_completes_to_the_same_bits(
    name: str, executor: str, field: Any, undisturbed: Any, flaky: Any, tmp_path: Path
):
    """In all weathers, and so do verifying and repairing."""
    out = tmp_path / "out.zarr"
    workers = {"executor": executor, "workers": 1 if executor == "serial" else 2}
    weather = flaky(7)
    cdd_dask.decompose(field, out, **BASE, **OPTIONS[name], **workers)
    assert set(weather.failures) == set(Weather.KINDS)
    assert weather.failures.total() > 0.04 * weather.calls > 20
    assert_same(undisturbed[name], outputs_of(cdd_dask.open_decomposition(out)))
    next((out / "residual" / "scale0" / "image").rglob("c/1/1")).unlink()
    assert cdd_dask.repair(out, field, progress=False).repaired
    cdd_dask.verify(out, field, progress=False)
    assert_same(undisturbed[name], outputs_of(cdd_dask.open_decomposition(out)))


def test_without_trying_again_it_does_not(field: Any, flaky: Any, tmp_path: Path):
    """The same weather ends the run; not for good."""
    out = tmp_path / "out.zarr"
    flaky(7, retry=False)
    with pytest.raises((CddError, OSError, Refused)):
        cdd_dask.decompose(field, out, **BASE, **OPTIONS["halos"])


@pytest.mark.parametrize("status", [403, 404, 507])
def test_what_does_not_pass_is_said_at_once(
    status: int,
    field: Any,
    undisturbed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """And when it has passed after all, the run goes on with what is left."""
    out, original, refused = tmp_path / "out.zarr", retrying.RetryingStore, [0]

    class Forbidden(WrapperStore[Store]):
        async def set(self, key: str, value: Any) -> None:
            if key == "channel_01/scale0/image/c/1/1":
                refused[0] += 1
                raise Refused(status)
            await self._store.set(key, value)

    monkeypatch.setattr(retrying, "RetryingStore", lambda beneath: original(Forbidden(beneath)))
    with pytest.raises(RunError, match=rf"block 4.*channel 1.*{status}"):
        cdd_dask.decompose(field, out, **BASE, **OPTIONS["halos"])
    assert refused == [1]
    monkeypatch.undo()
    executed, run_task = set(), run.run_task

    def counted(task: Any) -> Any:
        executed.add((task.number, task.block))
        return run_task(task)

    monkeypatch.setattr(run, "run_task", counted)
    result = cdd_dask.decompose(field, out, **BASE, **OPTIONS["halos"])
    assert not any(number == 0 for number, _ in executed)
    assert any(block == 4 for _, block in executed)
    assert_same(undisturbed["halos"], outputs_of(result))


@pytest.mark.parametrize("lasts", [False, True])
def test_expired_credentials_are_tried_again_once(
    lasts: bool, field: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another try takes fresh ones, if there are any."""
    original, refused = retrying.RetryingStore, Counter[str]()

    class Expiring(WrapperStore[Store]):
        async def set(self, key: str, value: Any) -> None:
            if "image/c/" in key and (lasts or not refused[key]):
                refused[key] += 1
                raise Refused(403, "the token has expired")
            await self._store.set(key, value)

    monkeypatch.setattr(retrying, "RetryingStore", lambda beneath: original(Expiring(beneath)))
    monkeypatch.setattr(faults, "FIRST_WAIT", 0.0)
    out = tmp_path / "out.zarr"
    if lasts:
        with pytest.raises(RunError, match="the token has expired"):
            cdd_dask.decompose(field, out, **BASE, **OPTIONS["halos"])
    else:
        cdd_dask.decompose(field, out, **BASE, **OPTIONS["halos"])
    assert refused
    assert all(count == 1 for count in refused.values()) is not lasts


# sources and outputs at URLs, which fsspec reads


class Storm(MemoryFileSystem):
    """Objects at ``storm://…``, whose every first reading times out while it rages."""

    protocol = "storm"
    rages = False
    failed: ClassVar[set[tuple[str, str]]] = set()

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(MemoryFileSystem._strip_protocol(str(path).removeprefix("storm://")))

    def _pass(self, what: str, path: str) -> None:
        if self.rages and (what, path) not in self.failed:
            self.failed.add((what, path))
            raise OSError(110, "Connection timed out")

    def cat_file(self, path: str, *args: Any, **options: Any) -> Any:
        self._pass("get", path)
        return super().cat_file(path, *args, **options)

    def find(self, path: str, *args: Any, **options: Any) -> Any:
        self._pass("find", path)
        return super().find(path, *args, **options)


@pytest.fixture
def storm(monkeypatch: pytest.MonkeyPatch) -> type[Storm]:
    """The file system, empty and calm."""
    fsspec.register_implementation("storm", Storm, clobber=True)
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("rages", False), ("failed", set())):
        monkeypatch.setattr(Storm, name, value)
    monkeypatch.setattr(faults, "FIRST_WAIT", 0.0)
    return Storm


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_a_remote_source_is_read_to_the_same_bits(
    executor: str,
    field: Any,
    undisturbed: Any,
    storm: type[Storm],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Each of its objects is asked for again; and it is the same source in any weather."""
    url, out = "storm://bucket/in.zarr", tmp_path / "out.zarr"
    zarr.create_array(url, data=field, chunks=(16, 16))
    options = {**BASE, **OPTIONS["halos"], "executor": executor, "workers": 1}
    monkeypatch.setattr(storm, "rages", True)
    cdd_dask.decompose(url, out, **options)
    chunks = {path for what, path in storm.failed if "/c/" in path}
    assert len(chunks) == 9
    assert ("find", "/bucket/in.zarr") in storm.failed
    monkeypatch.setattr(storm, "rages", False)
    monkeypatch.setattr(run, "run_task", None)  # nothing is left to do
    result = cdd_dask.decompose(url, out, **options)
    assert_same(undisturbed["halos"], outputs_of(result))


def test_what_a_group_says_of_a_remote_source_is_read(
    storm: type[Storm], monkeypatch: pytest.MonkeyPatch
):
    """Without it the voxels would have another size."""
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    scale = [{"type": "scale", "scale": [2.0, 0.5]}]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    group = zarr.open_group("storm://bucket/image.zarr", attributes={"multiscales": [image]})
    group.create_array("0", data=np.ones((4, 4), "float32"))
    monkeypatch.setattr(storm, "rages", True)
    assert open_source("storm://bucket/image.zarr/0").spacing == (2.0, 0.5)


def test_a_remote_output_is_looked_for_again(
    field: Any, undisturbed: Any, storm: type[Storm], monkeypatch: pytest.MonkeyPatch
):
    """A time-out does not say that it cannot be reached."""
    monkeypatch.setattr(storm, "rages", True)
    result = cdd_dask.decompose(field, "storm://bucket/out.zarr", **BASE, **OPTIONS["halos"])
    assert ("get", "/bucket/out.zarr/zarr.json") in storm.failed
    assert_same(undisturbed["halos"], outputs_of(result))
