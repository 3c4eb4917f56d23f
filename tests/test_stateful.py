"""Runs, stops, kills, damages and repairs in any order: what is whole is right, to the bit.

``HYPOTHESIS_PROFILE=nightly`` tries 200 orders.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from examples import NIGHTLY, few
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import cdd_dask
from cdd_dask import lease, mending, objects, run, store, task
from cdd_dask.errors import (
    CddError,
    DamagedError,
    DifferentRunError,
    RunError,
    StoreError,
    VerificationError,
)

OPTIONS: dict[str, Any] = {
    **{"max_scale": 2, "e_rel": 0.5, "rtol": 1e-2, "block": 8, "nan": "raise"},
    **{"engine": "cpu", "progress": False},
}
FIELD = np.random.default_rng(0).lognormal(size=(20, 24)).astype("float32")
NOBODY = {"token": "other", "process": 2**22 + 1, "born": 1.0}
"""Of a lease whose process is no more."""

Key = tuple[int, int]
"""Number of a pass and of a block."""


class Stopped(BaseException):
    """Stands for whatever ends a run at once."""


class Store(RuleBasedStateMachine):
    """One output, and what must be true of it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="stateful-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(lease, "SECONDS_TO_SETTLE", 0.0)
        self.source, self.out = self.folder / "field.npy", self.folder / "out.zarr"
        np.save(self.source, FIELD)
        self.wanted = outputs_of(cdd_dask.decompose(FIELD, **OPTIONS))
        self.passes = cdd_dask.plan(self.source, **OPTIONS).passes
        self.state = "absent"
        self.done: Counter[Key] = Counter()
        """How often every task was run to its end since the store was begun."""
        self.excused: Counter[Key] = Counter()
        """How often it may have been run besides: it was in flight at a kill, or lost since."""
        self.sound: dict[str, bytes] = {}
        """The files of the finished store."""
        self.lacks_groups = False
        """Whether it is unfinished for having been deleted in part."""

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)

    @contextmanager
    def tasks(self, limit: int = 10**9, kill: bool = False) -> Iterator[list[Key]]:
        """Count tasks, and stop before one, or in it when its data are written."""
        executed: list[Key] = []
        run_task, write_mark = run.run_task, task.write_mark

        def limited(one: Any) -> Any:
            executed.append((one.number, one.block))
            if len(executed) > limit and not kill:
                executed.pop()
                raise Stopped
            return run_task(one)

        def mark(*arguments: Any) -> None:
            if kill and len(executed) > limit:
                raise Stopped
            write_mark(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "run_task", limited)
            patch.setattr(task, "write_mark", mark)
            yield executed

    def decompose(self, limit: int = 10**9, kill: bool = False, **more: Any) -> list[Key]:
        """Run until it is done or stopped: damage is found where it is read, and removed."""
        everything: list[Key] = []
        self.lacks_groups = False
        for _ in range(40):
            with self.tasks(limit, kill) as executed:
                try:
                    cdd_dask.decompose(self.source, self.out, **OPTIONS, **more)
                    self.state = "finished"
                except Stopped:
                    self.state = "begun"
                    if kill and executed:
                        self.excused[executed[-1]] += 1
                except RunError:
                    self.done.update(executed)
                    everything += executed
                    more = {}
                    continue
            self.done.update(executed)
            return everything + executed
        raise AssertionError("it never ends")

    @property
    def is_sound(self) -> bool:
        """Whether a finished store is what its run left."""
        return all(
            (self.out / name).is_file() and (self.out / name).read_bytes() == data
            for name, data in self.sound.items()
        )

    def keep(self) -> None:
        """Remember a store that was found whole."""
        files = (path for path in self.out.rglob("*") if path.is_file())
        names = {path.relative_to(self.out).as_posix(): path for path in files}
        self.sound = {
            name: path.read_bytes() for name, path in names.items() if "partial" not in name
        }

    def finish(self) -> None:
        """A store that has just been finished is whole, unless it was damaged on its way."""
        found = outputs_of(cdd_dask.open_decomposition(self.out))
        if not all(map(np.array_equal, self.wanted, found)):
            assert (
                self.excused
            )  # damaged where no later pass has looked: verify tells, repair mends
            with pytest.raises(VerificationError):
                cdd_dask.verify(self.out, progress=False)
            assert not cdd_dask.repair(self.out, progress=False).impossible
        self.keep()
        self.check()

    def check(self) -> None:
        cdd_dask.verify(self.out, progress=False)
        found = outputs_of(cdd_dask.open_decomposition(self.out))
        assert all(map(np.array_equal, self.wanted, found))
        for key, times in self.done.items():
            assert times <= 1 + self.excused[key], (key, times)

    # runs

    @precondition(lambda self: self.state != "finished")
    @rule()
    def go_on(self) -> None:
        """Only what is left is run."""
        before = set(self.done) - set(self.excused)
        executed = self.decompose()
        assert not before & set(executed)
        self.finish()

    @precondition(lambda self: self.state == "finished" and self.is_sound)
    @rule()
    def run_again(self) -> None:
        """Nothing is left to do."""
        assert not self.decompose()

    @precondition(lambda self: self.state != "finished")
    @rule(after=st.integers(0, 20))
    def stop(self, after: int) -> None:
        """Before a task; where there are fewer, the run is finished."""
        self.decompose(after)
        if self.state == "finished":
            self.finish()

    @precondition(lambda self: self.state != "finished")
    @rule(after=st.integers(0, 20), torn=st.booleans())
    def kill(self, after: int, torn: bool) -> None:
        """In a task, with its data written but not marked, perhaps torn, and the lease left."""
        executed = self.decompose(after, kill=True)
        if self.state == "finished":
            self.finish()
            return
        if executed:
            place = "/".join(map(str, np.unravel_index(executed[-1][1], (3, 3))))
            for shard in self.out.rglob(f"c/{place}"):
                array = shard.parents[2].relative_to(self.out).as_posix()
                if self.writes(executed[-1][0], array):
                    (shard.parent / f"{shard.name}.1234.partial").write_bytes(b"half")
                    if torn:
                        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        holder = {**asdict(lease.Holder.here()), **NOBODY}
        objects.write_group(str(self.out), lease.GROUP, holder)

    def writes(self, number: int, array: str) -> bool:
        """Whether a pass writes an array."""
        stage = self.passes[number].stages[0]
        names = {f"work/field_{stage:02d}", f"channel_{stage - 1:02d}/scale0/image"}
        last = number == len(self.passes) - 1
        return array in names or (last and array == "residual/scale0/image")

    @precondition(lambda self: self.state != "absent")
    @rule(change=st.sampled_from([{"max_scale": 4}, {"boundary": "wrap"}, {"dtype": "float64"}]))
    def run_otherwise(self, change: dict[str, Any]) -> None:
        """Refused, without a task; where the root is damaged that is said instead."""
        refused = (
            DifferentRunError if self.state == "begun" or self.is_sound else (CddError, OSError)
        )
        with self.tasks() as executed, pytest.raises(refused):
            cdd_dask.decompose(self.source, self.out, **{**OPTIONS, **change})
        assert not executed

    @rule(after=st.sampled_from([5, 10**9]))
    def overwrite(self, after: int) -> None:
        """All is done again; what is no store of ours any more must be removed by hand."""
        if self.state != "absent" and not store.is_our_store(self.out):
            with pytest.raises(FileExistsError):
                cdd_dask.decompose(self.source, self.out, **OPTIONS, overwrite=True)
            shutil.rmtree(self.out)
        self.done.clear()
        self.excused.clear()
        executed = self.decompose(after, overwrite=True)
        total = sum(one.tasks for one in self.passes)
        assert len(executed) == len(set(executed)) == min(after, total)
        if self.state == "finished":
            self.finish()

    @precondition(lambda self: self.state != "absent" and store.is_our_store(self.out))
    @rule(after=st.integers(0, 8))
    def overwriting_is_killed(self, after: int) -> None:
        """While it deletes what is there: the rest goes on, or goes later."""
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, after, store, "write_group")
            patch.setattr(store, "shutil", SimpleNamespace(rmtree=shutil.rmtree))
            stop_at(patch, after, store.shutil, "rmtree")
            self.decompose(0, overwrite=True)
        self.lacks_groups = True
        if not store.is_our_store(self.out):
            self.state = "absent"
        elif (store.remembered(str(self.out)) or {})["complete"] is True:
            self.state = "finished"
        for number, one in enumerate(self.passes):
            self.excused.update((number, block) for block in range(one.tasks))

    @precondition(lambda self: self.state != "finished")
    @rule()
    def cleaning_up_is_killed(self) -> None:
        """What is complete stays so, and the next run cleans up."""
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 0, run, "clean_up")
            self.decompose()
        assert cdd_dask.open_decomposition(self.out)
        assert not self.decompose()
        self.finish()

    # verify, repair and read

    @precondition(lambda self: self.state == "finished")
    @rule()
    def read(self) -> None:
        """Nobody is given other values, whatever is damaged."""
        try:
            result = cdd_dask.open_decomposition(self.out)
        except StoreError:
            assert not self.is_sound
            return
        for part, wanted in zip((*result.channels, result.residual), self.wanted, strict=True):
            try:
                assert np.array_equal(part[...], wanted)
            except DamagedError:
                assert not self.is_sound

    @precondition(lambda self: self.state == "finished")
    @rule(after=st.integers(0, 8))
    def repairing_is_killed(self, after: int) -> None:
        """While it writes: what it has not mended is still found."""
        with pytest.MonkeyPatch.context() as patch:
            for place, name in (
                (objects, "write_object"), (mending, "gather_marks"), (store, "write_attributes"),
                (store, "write_block"),
            ):  # fmt: skip
                stop_at(patch, after, place, name)
            with suppress(Stopped, StoreError):
                cdd_dask.repair(self.out, progress=False)

    @rule()
    def verify(self) -> None:
        """Only a finished store that nobody touched passes."""
        if self.state == "finished" and self.is_sound:
            self.check()
        else:
            with pytest.raises((CddError, FileNotFoundError)):
                cdd_dask.verify(self.out, progress=False)

    @rule()
    def repair(self) -> None:
        """A finished store is whole again, unless what tells how it was is lost."""
        if self.state != "finished":
            with pytest.raises((StoreError, FileNotFoundError)):
                cdd_dask.repair(self.out, progress=False)
            return
        try:
            done = cdd_dask.repair(self.out, progress=False)
        except StoreError:
            assert not self.has("zarr.json")
            assert not self.has("done/zarr.json")
        else:
            if done.impossible:
                assert not self.has("done/zarr.json")  # before it was mended
            else:
                assert self.is_sound
                self.check()

    def has(self, name: str) -> bool:
        """Whether a file of the finished store is as it was."""
        path = self.out / name
        return path.is_file() and path.read_bytes() == self.sound[name]

    # damages

    @precondition(lambda self: self.state == "finished")
    @rule(data=st.data(), kind=st.sampled_from(["deleted", "truncated", "flipped"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        """Any file of a finished store."""
        path = self.out / data.draw(st.sampled_from(sorted(self.sound)))
        if path.is_file():
            injure(path, kind, data)

    @precondition(lambda self: self.state == "begun")
    @rule(data=st.data(), kind=st.sampled_from(["deleted", "truncated", "flipped"]))
    def damage_unfinished(self, data: st.DataObject, kind: str) -> None:
        """A chunk or a mark of an unfinished one: it, and what it is made of, may be run again."""
        shards = self.out.rglob("image/c/**/*"), self.out.rglob("field_*/c/**/*")
        marks = self.out.glob("done/pass_*/**/zarr.json")
        files = {path for paths in (*shards, marks) for path in paths if path.is_file()}
        names = sorted(path.relative_to(self.out).as_posix() for path in files)
        names = [name for name in names if "partial" not in name]
        if names:
            injure(self.out / data.draw(st.sampled_from(names)), kind, data)
            for number, one in enumerate(self.passes):
                self.excused.update((number, block) for block in range(one.tasks))

    # what always holds

    @invariant()
    def only_what_is_finished_is_opened(self) -> None:
        """Whatever happened before."""
        if self.state == "finished":
            if self.is_sound:
                cdd_dask.open_decomposition(self.out)
            return
        with pytest.raises((StoreError, FileNotFoundError)):
            cdd_dask.open_decomposition(self.out)
        if self.state == "begun" and not self.lacks_groups:
            cdd_dask.open_decomposition(self.out, allow_incomplete=True)


def outputs_of(result: cdd_dask.Decomposition) -> list[Any]:
    """The channels and the residual; nothing where they cannot be read."""
    try:
        return [part[...] for part in (*result.channels, result.residual)]
    except ValueError:  # a chunk is damaged
        return [np.empty(0)]


def stop_at(patch: pytest.MonkeyPatch, after: int, place: Any, name: str) -> None:
    """Have a function stop everything when it is called for the next time after so many."""
    original, count = getattr(place, name), iter(range(after))

    def stopping(*arguments: Any, **options: Any) -> Any:
        if next(count, None) is None:
            raise Stopped
        return original(*arguments, **options)

    patch.setattr(place, name, stopping)


def injure(path: Path, kind: str, data: st.DataObject) -> None:
    """Damage a file."""
    content = path.read_bytes()
    if kind == "deleted" or not content:
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])


TestStore = Store.TestCase
TestStore.pytestmark = [pytest.mark.timeout(7200 if NIGHTLY else 600)]
TestStore.settings = settings(few(4), stateful_step_count=12)
