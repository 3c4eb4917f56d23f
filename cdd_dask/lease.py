"""The lease: at most one run writes to an output at a time.

An object in the output names its owner and is written again every few seconds. Whoever finds one
may take it over if the process that wrote it is gone from the place where both run, or if it
stopped beating long ago; what a killed run still writes does no harm then, because it is the same
to the bit.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from cdd_dask import objects
from cdd_dask.addresses import UNPRINTABLE
from cdd_dask.errors import LeaseError, OutputAccessError, RunError, redacted

GROUP = "lease"
"""Name of the group whose attributes name the holder."""
KEY = f"{GROUP}/zarr.json"
PARTIAL = re.compile(r"zarr\.[0-9a-f]{32}\.partial")
"""What Zarr calls a file that it has not yet written whole."""
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_TO_EXPIRY = 120.0
"""Time without a beat after which a lease counts as given up, if none comes while it is watched."""
SECONDS_TO_WATCH = 2 * SECONDS_BETWEEN_BEATS + 1
"""Time for which a lease is watched whose beats are of another time, perhaps by another clock."""
SECONDS_TO_SETTLE = 0.2
"""Time that two who take over the same lease give each other to be seen."""
SECONDS_TO_SETTLE_AFAR = 1.0
"""The same at a URL, where even a lease that nobody held may be taken by two at once."""
CLOCK_STEP = 3600.0
"""Seconds by which a clock may be set while a run lasts, where it tells when processes began."""
LONGEST_TEXT = 4096
"""Characters of a holder's name."""
LATEST = 1e12
"""Seconds or ticks that no clock shows."""
PROC = Path("/proc")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; a `ValueError` if it is nobody that may be shown or looked for."""

    token: str
    """Name of the lease itself, made when it was taken."""
    owner: str
    host: str
    place: str
    """Where its number means this process and no other, see `_place`."""
    process: int
    born: float
    """When the process began, see `_birth`: numbers of processes are used again."""
    since: float
    """When the lease was taken, in seconds since the epoch."""
    beat: float
    """When it was last renewed, likewise; its host's clock may differ from ours."""

    def __post_init__(self) -> None:
        texts = (self.token, self.owner, self.host, self.place)
        times = (self.born, self.since, self.beat)
        if not (
            all(type(text) is str and len(text) <= LONGEST_TEXT for text in texts)
            and not any(map(UNPRINTABLE.search, texts))
            and all(type(moment) in (int, float) and 0 <= moment < LATEST for moment in times)
            and type(self.process) is int
            and 0 <= self.process < 2**31
        ):
            raise ValueError("no process holds such a lease: was it edited?")

    @classmethod
    def here(cls) -> Holder:
        """This process, holding a new lease from now on."""
        now, number = time.time(), os.getpid()
        try:
            owner = getpass.getuser()
        except (OSError, KeyError):  # no such user here, as in some containers
            owner = "unknown"
        owner = UNPRINTABLE.sub("?", owner)[:LONGEST_TEXT]  # of the environment
        birth, token = _birth(number), uuid.uuid4().hex
        return cls(token, owner, socket.gethostname(), _place(), number, birth, now, now)

    @property
    def is_gone(self) -> bool:
        """Whether the process surely ran in this very place and does no more."""
        import psutil

        if self.place != _place():
            return False
        try:
            if psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE:
                return True
            return abs(_birth(self.process) - self.born) > (0 if _has_ticks() else CLOCK_STEP)
        except psutil.ZombieProcess:
            return True
        except (psutil.Error, OSError):  # it is no more, or it is hidden from this user
            return not _exists(self.process)

    def __str__(self) -> str:
        if self == UNKNOWN:
            return "somebody unknown"
        return f"{self.owner} on {self.host}, process {self.process}"


UNKNOWN = Holder("", "", "", "", 0, 0.0, 0.0, 0.0)
"""Of a lease that cannot be understood."""


def _place() -> str:
    """Where a process's number is its own: the host and, on Linux, its boot and PID namespace.

    Containers may share a host's name, and those of one host its boot, but then not the namespace.
    """
    parts = [socket.gethostname()]
    if _has_ticks():
        try:
            parts.append((PROC / "sys/kernel/random/boot_id").read_text().strip())
            parts.append(os.readlink(PROC / "self/ns/pid"))
        except OSError:  # who cannot tell his place has none that is also another's
            parts.append(uuid.uuid4().hex)
    return " ".join(parts)


def _has_ticks() -> bool:
    return (PROC / "self/stat").exists()


def _birth(number: int) -> float:
    """When a process began: in ticks since boot on Linux, else in seconds since the epoch.

    Ticks are none of the clock's business. psutil adds them to the time of boot, which differs from
    before when the clock was set in between, and a process that lives seems to be another one.
    """
    import psutil

    if not _has_ticks():
        return psutil.Process(number).create_time()
    # the second field, a name in parentheses, may hold anything; field 22 is `starttime` (proc(5))
    fields = (PROC / str(number) / "stat").read_bytes().rpartition(b")")[2].split()
    return float(fields[22 - 3])


def _exists(number: int) -> bool:
    """Whether there is a process of that number, even one hidden from this user (`hidepid`)."""
    import psutil

    if os.name == "nt":  # there signal 0 is Ctrl-C
        return psutil.pid_exists(number)
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_vacant(address: str) -> bool:
    """Whether there is nothing at an address, or at most the lease of a run that may begin."""
    names = [*objects.names_in(address, ""), *objects.names_in(address, GROUP)]
    others = {name for name in names if not PARTIAL.fullmatch(name)} - {"", GROUP, "zarr.json"}
    there, root, held = (objects.read_object(address, key) for key in (GROUP, "zarr.json", KEY))
    if others or there is not None or root is not None:
        return False
    # a lost machine may leave a lease empty, or nothing but zeros
    return not (held or b"").strip(b"\0") or "token" in (
        objects.read_attributes(address, GROUP) or {}
    )


class Lease:
    """The right to write to a store, held from `__enter__` to `__exit__`.

    Parameters
    ----------
    address
        Address of the store, or of where it will be.
    break_it
        Take it from whoever holds it.

    Raises
    ------
    LeaseError
        When it is entered, if another run holds it.
    """

    def __init__(self, address: str, break_it: bool = False) -> None:
        self._address, self._break = address, break_it
        self._holder = Holder.here()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="cdd-dask-lease", daemon=True)
        self._lost: Holder | None = None

    def __enter__(self) -> Lease:
        if not self._address.startswith(objects.IN_MEMORY):
            try:
                self._take()
            except LeaseError:
                raise
            except KeyboardInterrupt:  # while it settles, written already
                self._give_back()
                raise
            except OSError as error:
                where = f"out={self._address}"
                raise OutputAccessError(f"{where} cannot be written: {error}") from error
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._thread.is_alive():
            return
        self._ended.set()
        self._thread.join()
        self._give_back()

    def _give_back(self) -> None:
        with suppress(Exception):  # it ends by itself
            if self._is_ours(self.read(self._address)):
                objects.remove_object(self._address, KEY)
                if not objects.names_in(self._address, GROUP):
                    objects.remove_objects(self._address, GROUP)
                os.rmdir(self._address)  # where nothing else is: no store was made

    def check(self) -> None:
        """Raise `RunError` if another run has taken the lease: this one cannot go on."""
        if self._lost is not None:
            raise RunError(
                f"{self._address} was taken over by {self._lost} while this run wrote to it: "
                "this run stops"
            )

    @staticmethod
    def read(address: str) -> Holder | None:
        """Who holds the lease of a store: None where nobody does, `UNKNOWN` where none can tell."""
        data = objects.read_object(address, KEY)
        if data is None:
            return None
        try:
            return Holder(**json.loads(data)["attributes"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return UNKNOWN

    def _take(self) -> None:
        held = self.read(self._address)
        if held is not None and not self._break:
            self._wait_until_free(held)
            before, held = held, self.read(self._address)
            if held not in (None, before):
                raise LeaseError(
                    f"{self._address} is being written by {held}, who has just taken or renewed "
                    "its lease: wait until that run is done, or stop it"
                )
        if held is not None:
            log.warning("taking over the lease of %s", held)
        # what is taken over is written over: were it removed first, a third one might find nothing
        self._write(new=held is None)
        afar = "://" in self._address  # where "only if none is there" is two calls
        if afar or held is not None:
            time.sleep(SECONDS_TO_SETTLE_AFAR if afar else SECONDS_TO_SETTLE)
        now = self.read(self._address)
        if not self._is_ours(now):  # whoever wrote last has it
            raise LeaseError(
                f"{self._address} was taken at the same time by {now or 'another run'}: wait until "
                "that run is done"
            )

    def _wait_until_free(self, held: Holder) -> None:
        """Return when a lease may be taken that did not change meanwhile."""
        if held.is_gone:
            return
        age = time.time() - held.beat
        if held == UNKNOWN or abs(age) <= SECONDS_TO_EXPIRY:
            raise LeaseError(self._refusal(held, round(age)))
        log.warning(
            "the lease of %s seems to be given up; watching it for %.0f s", held, SECONDS_TO_WATCH
        )
        time.sleep(SECONDS_TO_WATCH)

    def _refusal(self, held: Holder, age: int) -> str:
        start = f"{self._address} is being written by {held}, "
        force = "take over with break_lease=True (--break-lease)"
        if held == UNKNOWN:
            return f"{start}whose lease cannot be read: if surely no run writes to it, {force}"
        heard = f"who was last heard of {age} s ago"
        if age < 0:
            heard = f"whose last sign of life is {-age} s ahead of this host's clock"
        return (
            f"{start}{heard}: wait until that run is done, or stop it; if it surely is no more, "
            f"{force}, or after {SECONDS_TO_EXPIRY:.0f} s of silence"
        )

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                found = self.read(self._address)
                if found is not None and not self._is_ours(found):
                    self._lost = found
                    return
                self._write(new=False)
            except Exception as error:
                reason = redacted(str(error))
                log.warning("the lease of %s could not be renewed: %s", self._address, reason)

    def _is_ours(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token == self._holder.token

    def _write(self, new: bool) -> None:
        values = {**asdict(self._holder), "beat": time.time()}
        data = objects.group_document(values)
        objects.write_object(self._address, KEY, data, new=new)
        if new:
            objects.bring_to_disk(self._address, KEY)
