"""One run at a time writes to an output; the others are told who, or take over who is gone."""

from __future__ import annotations

import errno
import getpass
import json
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import cdd_dask
from cdd_dask import lease, objects, run
from cdd_dask.errors import LeaseError, RunError, StoreError
from cdd_dask.lease import Holder, Lease

LINUX = sys.platform == "linux"


def put(out: Path, **changes: Any) -> Path:
    """A store with a lease that somebody else of this place holds, with some of its fields."""
    values = {**vars(Holder.here()), "token": "other", **changes}
    objects.write_group(str(out), lease.GROUP, values)
    return out


def take(address: Any, **options: Any) -> None:
    with Lease(str(address), **options):
        pass


def at_once(address: str, count: int = 2) -> list[Exception | None]:
    """What comes of it when several take one lease at the same time, and keep it for a while."""
    start, kept = (threading.Barrier(count, timeout=60) for _ in range(2))
    found: list[Exception | None] = []

    def run() -> None:
        mine = Lease(address)
        start.wait()
        try:
            with mine:
                found.append(None)
                kept.wait()
        except LeaseError as error:
            found.append(error)
            kept.wait()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.zarr"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are not watched for long."""
    monkeypatch.setattr(lease, "SECONDS_TO_WATCH", 0.1)


# refusing


def test_a_second_run_is_refused(out: Path, lognormal: Any):
    """While the first one holds the lease; its message says who."""
    field = lognormal((20, 20))
    with Lease(str(out)):
        for more in ({}, {"overwrite": True}):
            with pytest.raises(LeaseError, match=rf"being written by .*, process {os.getpid()}"):
                cdd_dask.decompose(field, out, max_scale=4, progress=False, **more)
        cdd_dask.decompose(field, out, max_scale=4, progress=False, break_lease=True)
        assert cdd_dask.verify(out, field, progress=False).worst_ulp < 2
    assert cdd_dask.open_decomposition(out)


def test_a_lease_that_is_lost_stops_the_run(
    out: Path, lognormal: Any, monkeypatch: pytest.MonkeyPatch
):
    """At the next heartbeat, with what is done left for the other run."""
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.05)
    original = run.run_task

    def slow(task: Any) -> Any:
        if task.block == 3:
            Lease(str(out), break_it=True)._take()
            time.sleep(0.3)
        return original(task)

    monkeypatch.setattr(run, "run_task", slow)
    with pytest.raises(RunError, match="was taken over by"):
        cdd_dask.decompose(lognormal((64, 64)), out, max_scale=4, block=16, progress=False)
    with pytest.raises(StoreError, match="not complete"):
        cdd_dask.open_decomposition(out)
    assert (out / "lease").exists()  # the other's


def test_a_clock_that_is_ahead_is_told(out: Path):
    """The last beat is not "0 s ago" when it lies in our future."""
    put(out, place="elsewhere", beat=time.time() + 60)
    with pytest.raises(LeaseError, match=r"is (59|60) s ahead of this host's clock: wait"):
        take(out)
    put(out, place="elsewhere", beat=time.time() - 60)
    with pytest.raises(LeaseError, match=r"last heard of (60|61) s ago: wait"):
        take(out)


# who is gone


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"process": 2**22 + 1}, True),
        ({"born": 1.0}, True),
        ({"place": "elsewhere"}, False),
        ({"place": "elsewhere", "process": 2**22 + 1}, False),
        ({"place": "elsewhere", "beat": 1.0}, True),
        ({"beat": 1.0}, True),
        ({}, False),
    ],
)
def test_who_is_gone_holds_nothing(change: Any, free: bool, out: Path, watched: None):
    """A process that died in this place, at once; one elsewhere after a while."""
    put(out, **change)
    if free:
        take(out)
        assert not out.exists()
        return
    with pytest.raises(LeaseError, match=r"--break-lease"):
        take(out)
    take(out, break_it=True)
    assert not out.exists()


@pytest.mark.skipif(not LINUX, reason="boots and PID namespaces are Linux's")
@pytest.mark.parametrize("what", ["boot", "namespace", "host", "hidden"])
def test_a_place_is_more_than_a_host_s_name(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two containers of one name: what does not exist in the one may live in the other."""
    proc = tmp_path / "proc"
    for folder in ("self/ns", "sys/kernel/random"):
        (proc / folder).mkdir(parents=True)
    (proc / "self/stat").touch()
    boot, namespace = proc / "sys/kernel/random/boot_id", proc / "self/ns/pid"
    boot.write_text("0d48\n")
    namespace.symlink_to("pid:[1]")
    holder = replace(Holder.here(), process=2**22 + 1)
    monkeypatch.setattr(lease, "PROC", proc)
    assert not holder.is_gone
    holder = replace(holder, place=lease._place())
    assert holder.is_gone
    if what == "boot":
        boot.write_text("0d49\n")
    elif what == "namespace":
        namespace.unlink()
        namespace.symlink_to("pid:[2]")
    elif what == "host":
        monkeypatch.setattr(lease.socket, "gethostname", lambda: "another")
    else:  # where nobody can tell, not even one's own
        boot.unlink()
        assert not replace(holder, place=lease._place()).is_gone
    assert not holder.is_gone


@pytest.mark.parametrize("waited", [True, False])
def test_a_process_that_ended_is_gone(waited: bool):
    """Even if nobody has taken note of it, as in containers without an init."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        holder = replace(Holder.here(), process=process.pid, born=lease._birth(process.pid))
        assert not holder.is_gone
        process.stdin.close()
        if waited:
            process.wait()
        for _ in range(1000):
            if holder.is_gone:
                break
            time.sleep(0.01)
        assert holder.is_gone


@pytest.mark.parametrize("error", [psutil.AccessDenied(1), psutil.NoSuchProcess(1)])
def test_who_is_hidden_is_not_gone(error: Exception, monkeypatch: pytest.MonkeyPatch):
    """As other users' processes are with ``hidepid=1`` and 2."""
    here = Holder.here()

    def hidden(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(psutil, "Process", hidden)
    if os.name != "nt":  # it looks into /proc
        monkeypatch.setattr(psutil, "pid_exists", lambda _: False)
    assert not here.is_gone
    assert replace(here, process=2**22 + 1).is_gone


@pytest.mark.parametrize("ticks", [True, False])
def test_a_clock_that_is_set_kills_nobody(
    ticks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Times at which processes began are then other ones by the clock, where it is asked."""
    if not ticks:
        monkeypatch.setattr(lease, "PROC", tmp_path)
    elif not LINUX:
        pytest.skip("ticks are Linux's")
    here, now = Holder.here(), psutil.Process.create_time
    for step in (-3.0, 600.0):
        monkeypatch.setattr(psutil.Process, "create_time", lambda self, by=step: now(self) + by)
        assert not here.is_gone
    assert replace(here, born=here.born + 2 * lease.CLOCK_STEP).is_gone


# expiry


@pytest.fixture(params=[-130, 86400])
def skewed(request: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Lease]:
    """A factory of leases of another host whose clock differs by so many seconds."""

    class Skewed(Lease):
        def _write(self, new: bool) -> None:
            values = {**vars(self._holder), "beat": time.time() + request.param}
            objects.write_group(self._address, lease.GROUP, values)

    def make(address: str) -> Lease:
        made = Skewed(address)
        made._holder = replace(made._holder, place="elsewhere")
        return made

    return make


def test_clocks_alone_take_nothing(skewed: Any, out: Path, monkeypatch: pytest.MonkeyPatch):
    """A lease that is renewed while it is watched is held, whatever its time."""
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(lease, "SECONDS_TO_WATCH", 1.0)
    with skewed(str(out)):
        with pytest.raises(LeaseError, match="who has just taken or renewed its lease"):
            take(out)
        kept = Lease.read(str(out))
    assert kept is not None
    put(out, place="elsewhere", beat=kept.beat)
    take(out)
    assert not out.exists()


def test_watching_is_told(out: Path, watched: None, caplog: pytest.LogCaptureFixture):
    """So that nobody wonders why nothing happens; whoever breaks a lease does not wait."""
    put(out, place="elsewhere", beat=1.0)
    with caplog.at_level(logging.WARNING):
        take(out)
    assert "seems to be given up; watching it for" in caplog.text
    assert "taking over the lease of" in caplog.text
    caplog.clear()
    put(out, place="elsewhere", beat=1.0)
    with caplog.at_level(logging.WARNING):
        take(out, break_it=True)
    assert "watching" not in caplog.text


def test_a_lease_that_ends_while_it_is_watched_is_free(
    out: Path, watched: None, monkeypatch: pytest.MonkeyPatch
):
    put(out, place="elsewhere", beat=1.0)
    sleep = time.sleep

    def ends(seconds: float) -> None:
        objects.remove_objects(str(out), lease.GROUP)
        sleep(seconds)

    monkeypatch.setattr(lease.time, "sleep", ends)
    taken = Lease(str(out))
    taken._take()
    assert taken._is_ours(Lease.read(str(out)))


# two at once


def test_one_of_some_takes_over(out: Path, monkeypatch: pytest.MonkeyPatch):
    """Of those who find the same lease of a process that is gone, whoever writes last."""
    monkeypatch.setattr(lease, "SECONDS_TO_SETTLE", 1.0)
    write, delays = Lease._write, [0.7, 0.3, 0.5]

    def slow(self: Lease, new: bool) -> None:
        time.sleep(delays.pop())
        write(self, new)

    monkeypatch.setattr(Lease, "_write", slow)
    put(out, process=2**22 + 1)
    assert [error is None for error in at_once(str(out), 3)].count(True) == 1


def test_there_is_no_moment_without_a_lease(out: Path, monkeypatch: pytest.MonkeyPatch):
    """While it is taken over: a third one would find nothing, and not wait for others."""
    put(out, process=2**22 + 1)
    monkeypatch.setattr(objects, "remove_objects", None)
    Lease(str(out))._take()


@pytest.fixture
def store() -> Iterator[Any]:
    """A file system like an object store's: no folders to make, no exclusive creation."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class ObjectStore(MemoryFileSystem):
        protocol = f"store-{uuid.uuid4().hex}"
        store: dict[str, Any] = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012
        delays: list[float] = []  # noqa: RUF012
        down = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix(f"{cls.protocol}://"))

        def info(self, path: str, **options: Any) -> Any:
            if self.down:
                raise OSError(errno.ENOTCONN, "no HEAD today")
            return super().info(path, **options)

        def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
            time.sleep(self.delays.pop(0) if self.delays else 0)
            super().pipe_file(path, value, **options)

    fsspec.register_implementation(ObjectStore.protocol, ObjectStore)
    yield ObjectStore
    ObjectStore.down = False


@pytest.mark.filterwarnings("ignore:.*asynchronous")
def test_one_of_two_has_a_lease_at_a_url(store: Any):
    """Both found none and wrote theirs: the later one has it."""
    store.delays[:] = [0.4, 0.8]
    found = at_once(f"{store.protocol}://bucket/out.zarr")
    assert not store.delays
    assert sum(error is None for error in found) == 1
    (refused,) = filter(None, found)
    assert "was taken at the same time by" in str(refused)


@pytest.mark.filterwarnings("ignore:.*asynchronous")
def test_what_cannot_be_asked_for_is_not_missing(store: Any):
    """fsspec says of an object that it does not exist when the request fails."""
    address = f"{store.protocol}://bucket/out.zarr"
    with Lease(address):
        store.down = True
        with pytest.raises(LeaseError, match="being written by"):
            take(address)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_no_hard_links_are_needed(code: int, out: Path, monkeypatch: pytest.MonkeyPatch):
    """Which exFAT, SMB and some file systems in user space do not have."""

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    assert [error is None for error in at_once(str(out), 3)].count(True) == 1
    assert not out.exists()
    field = np.ones((16, 16), "float32")
    cdd_dask.decompose(field, out, max_scale=4, block=8, progress=False)
    assert cdd_dask.verify(out, field, progress=False)


# what others may have written


@pytest.mark.parametrize(
    "change",
    [
        *({"process": value} for value in ("x", -1, 10**30, True, 1.5, None)),
        *({"beat": value} for value in (None, "now", [], 1e300, float("nan"), float("inf"))),
        *({"born": value} for value in (None, -1.0, 10**400, True)),
        *({"owner": value} for value in ("\x1b[2Jroot", "x\ny", "\ud800", 7, None, "x" * 5000)),
        {"host": "\x9b2J"},
        {"token": None},
        {"place": 1},
        {"odd": 1},
    ],
    ids=lambda change: f"{change!a:.30}",
)
def test_an_edited_lease_is_somebody_s(change: Any, out: Path):
    """Who is nobody to look for: only whoever says so takes it."""
    check_unknown(put(out, **change))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"attributes": [1]}', "\xff", "[" * 10**5, "1" * 5000]
)
def test_a_torn_lease_is_somebody_s(text: str, out: Path):
    put(out)
    (out / "lease/zarr.json").write_text(text, encoding="latin-1")
    check_unknown(out)


def check_unknown(out: Path) -> None:
    assert Lease.read(str(out)) == lease.UNKNOWN
    with pytest.raises(LeaseError, match=r"cannot be read: .*--break-lease\)$") as refused:
        take(out)
    assert str(refused.value).isprintable()
    take(out, break_it=True)
    assert not out.exists()


def test_our_own_lease_can_be_read(out: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the environment calls the user; and it is JSON that others may read."""
    monkeypatch.setattr(getpass, "getuser", lambda: "\x1b[2J\udcff" + "é" * 5000)
    with Lease(str(out)) as taken:
        assert taken._is_ours(Lease.read(str(out)))
        attributes = json.loads((out / "lease/zarr.json").read_bytes())["attributes"]
        assert attributes["process"] == os.getpid()
        assert attributes["owner"].startswith("?[2J?é")


def test_no_secret_is_logged(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Errors of storage may quote signed URLs."""
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.01)
    write = objects.write_object

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("PUT https://acc.blob.core.windows.net/c/lease?sig=SECRET&se=1 failed")

    with Lease(str(out)), caplog.at_level(logging.WARNING):
        monkeypatch.setattr(objects, "write_object", refused)
        while "could not be renewed" not in caplog.text:
            time.sleep(0.01)
        monkeypatch.setattr(objects, "write_object", write)
    assert "sig=***" in caplog.text
    assert "SECRET" not in caplog.text


def test_ctrl_c_while_a_lease_settles_gives_it_back(out: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a notebook would lock itself out."""
    put(out, process=2**22 + 1, born=1.0)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lease.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            take(out)
    assert Lease.read(str(out)) is None
    take(out)
