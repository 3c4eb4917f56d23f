"""Tasks that outlive their run, or meet another one between two reads, do no harm."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cdd_dask
from cdd_dask import run, store
from cdd_dask.errors import BlockError, RunError

OPTIONS: dict[str, Any] = {
    **{"max_scale": 2, "e_rel": 0.5, "rtol": 0.0, "block": 8},
    **{"engine": "reference", "progress": False},
}
FIELD = np.random.default_rng(0).lognormal(size=(24, 24)).astype("float32")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "field.npy", FIELD)
    return tmp_path / "field.npy"


@pytest.fixture(scope="module")
def wanted() -> list[Any]:
    """What an undisturbed run gives."""
    result = cdd_dask.decompose(FIELD, **OPTIONS)
    return [part[...] for part in (*result.channels, result.residual)]


def assert_whole(out: Path, wanted: list[Any]) -> None:
    cdd_dask.verify(out, progress=False)
    result = cdd_dask.open_decomposition(out)
    for one, other in zip((*result.channels, result.residual), wanted, strict=True):
        assert np.array_equal(one[...], other)


class Late:
    """A first try of a block: it hangs where it reads, and wakes when it was given up."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, array: str) -> None:
        self.hung, self._go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self._number, self._array = number, array
        self._thread: threading.Thread | None = None
        self._read, self._run = store.read_region, run.run_task
        patch.setattr(store, "read_region", self._slow_read)

    def _slow_read(self, array: Any, region: Any) -> Any:
        if threading.current_thread() is self._thread and array.path == self._array:
            self.hung.set()
            self._go.wait()
        return self._read(array, region)

    def start(self, task: Any) -> None:
        """Try the block in a thread of its own, up to where it hangs."""

        def attempt() -> None:
            try:
                self._run(task)
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=attempt)
        self._thread.start()
        self.hung.wait()

    def wake(self) -> None:
        assert self._thread is not None
        self._go.set()
        self._thread.join()


@pytest.mark.parametrize("wakes", ["in the next pass", "after the end"])
def test_a_first_try_that_was_given_up(
    wakes: str, source: Path, wanted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What it reads is gone by then: no zeros, no write over what its second try has written."""
    out, late = tmp_path / "out.zarr", Late(monkeypatch, 1, "work/field_00")
    run_task = run.run_task

    def task(one: Any) -> Any:
        if (one.number, one.block) == (1, 4) and not late.hung.is_set():
            late.start(one)
        if (one.number, one.block) == (2, 0) and wakes == "in the next pass":
            late.wake()
        return run_task(one)

    monkeypatch.setattr(run, "run_task", task)
    cdd_dask.decompose(source, out, **OPTIONS)
    if wakes == "after the end":
        late.wake()
    assert isinstance(late.error, BlockError)
    assert_whole(out, wanted)
    assert str(cdd_dask.repair(out, progress=False)) == "nothing is damaged"


def test_a_try_that_wakes_after_the_end_with_all_that_it_read(
    source: Path, wanted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It writes nothing into what is complete."""
    out, write = tmp_path / "out.zarr", store.write_block
    kept: list[Any] = []

    def keep(*arguments: Any) -> None:
        if not kept and "channel_01" in arguments[1]:
            kept.append((store._record.get(), arguments))
        write(*arguments)

    monkeypatch.setattr(store, "write_block", keep)
    cdd_dask.decompose(source, out, **OPTIONS)
    (record, (address, path, core, values)) = kept[0]
    token = store._record.set(record)
    try:
        with pytest.raises(ValueError, match="is over: this task was given up"):
            write(address, path, core, values + 1)
    finally:
        store._record.reset(token)
    assert_whole(out, wanted)


def test_a_shard_that_vanishes_while_it_is_read(
    source: Path, wanted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A neighbour finds it damaged, and deletes it, between two reads of another task."""
    out, read = tmp_path / "out.zarr", store.read_region
    shard, first, lock = out / "work/field_01/c/1/1", [], threading.Lock()

    def slow(array: Any, region: Any) -> Any:
        if array.path == "work/field_01":
            with lock:
                mine = not first
                if mine:
                    first.append(True)
                    data = bytearray(shard.read_bytes())
                    data[3] ^= 255
                    shard.write_bytes(data)
            while mine and os.path.exists(shard):
                threading.Event().wait(0.01)
        return read(array, region)

    monkeypatch.setattr(store, "read_region", slow)
    threads = {"executor": "threads", "workers": 2}
    with pytest.raises(RunError, match="is damaged"):
        cdd_dask.decompose(source, out, **OPTIONS, **threads)
    cdd_dask.decompose(source, out, **OPTIONS, **threads)
    assert_whole(out, wanted)


def test_a_late_task_deletes_nothing_of_another_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whose shards it takes for damaged ones of its own."""
    out, late = tmp_path / "out.zarr", Late(monkeypatch, 1, "work/field_00")
    run_task = run.run_task

    def stopped(one: Any) -> Any:
        if (one.number, one.block) == (1, 4):
            late.start(one)
            raise KeyboardInterrupt
        return run_task(one)

    def task(one: Any) -> Any:
        if (one.number, one.block) == (1, 0):
            before = sorted(out.glob("work/field_00/c/*/*"))
            late.wake()
            assert sorted(out.glob("work/field_00/c/*/*")) == before
        return run_task(one)

    monkeypatch.setattr(run, "run_task", stopped)
    with pytest.raises(KeyboardInterrupt):
        cdd_dask.decompose(source, out, **OPTIONS)
    monkeypatch.setattr(run, "run_task", task)
    cdd_dask.decompose(source, out, **{**OPTIONS, "block": 12}, overwrite=True)
    assert "was replaced by another run" in str(late.error)
    cdd_dask.verify(out, progress=False)


def test_a_stray_mark_changes_no_verdict(source: Path, wanted: list[Any], tmp_path: Path):
    """What was gathered, twice, is what counts."""
    from dataclasses import replace

    from cdd_dask.marks import read_marks, start_marks, write_mark

    out = tmp_path / "out.zarr"
    fingerprint = cdd_dask.decompose(source, out, **OPTIONS).attrs["fingerprint"]
    mark = read_marks(str(out), fingerprint, 1)[4]
    stray = replace(mark, checksums=dict.fromkeys(mark.checksums, "0" * 32))
    start_marks(str(out), 1)
    write_mark(str(out), fingerprint, 1, stray)
    assert_whole(out, wanted)
    assert str(cdd_dask.repair(out, progress=False)) == "nothing is damaged"
    assert read_marks(str(out), fingerprint, 1)[4] == mark
