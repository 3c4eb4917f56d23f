"""Storage that fails one call in twenty changes nothing but the time that a run takes."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.abc.store import Store
from zarr.storage import WrapperStore

import cdd_dask
from cdd_dask import faults, retrying, run
from cdd_dask.errors import CddError, RunError

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

    KINDS = ("timeout", "503", "429", "torn write", "lost acknowledgement")

    def __init__(self, seed: int, share: float) -> None:
        self._random, self._share, self._lock = random.Random(seed), share, threading.Lock()
        self.failures: Counter[str] = Counter()
        self.calls = 0

    def now(self, writes: bool) -> str:
        """How the present call fails; nothing if it does not."""
        with self._lock:
            self.calls += 1
            if self._random.random() >= self._share:
                return ""
            kind = self._random.choice(self.KINDS if writes else self.KINDS[:3])
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


@pytest.mark.parametrize("executor", ["serial", "threads"])
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
