"""The lease: at most one run writes to an output at a time.

An object in the output names its owner and is written again every few seconds. Whoever finds one
may take it over if the process that wrote it is gone from this host, or if it stopped beating long
ago; what a killed run still writes does no harm then, because it is the same to the bit.
"""

from __future__ import annotations

import getpass
import logging
import math
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType

from cdd_dask import objects
from cdd_dask.errors import LeaseError, OutputAccessError

GROUP = "lease"
"""Name of the group whose attributes name the holder."""
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_TO_EXPIRY = 120.0
"""Time without a beat after which a lease of another host counts as given up."""
SECONDS_TO_SETTLE = 0.2
"""Time that two who take over the same lease give each other to be seen."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    token: str
    """Name of the lease itself, made when it was taken."""
    owner: str
    host: str
    process: int
    born: float
    """When the process started, in seconds since the epoch: numbers of processes are used again."""
    since: float
    """When the lease was taken."""
    beat: float
    """When it was last renewed."""

    @classmethod
    def here(cls) -> Holder:
        """This process, holding a new lease from now on."""
        import psutil

        now, number = time.time(), os.getpid()
        try:
            owner = getpass.getuser()
        except (OSError, KeyError):  # no such user here, as in some containers
            owner = "unknown"
        born = psutil.Process(number).create_time()
        return cls(uuid.uuid4().hex, owner, socket.gethostname(), number, born, now, now)

    @property
    def is_gone(self) -> bool:
        """Whether the process ran on this host and does no more."""
        import psutil

        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.born) > 2
        except psutil.Error:
            return True

    def __str__(self) -> str:
        return f"{self.owner} on {self.host}, process {self.process}"


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
            except OSError as error:
                if isinstance(error, LeaseError):
                    raise
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
        with suppress(Exception):  # it ends by itself
            if self._is_ours(self.read(self._address)):
                objects.remove_objects(self._address, GROUP)
                os.rmdir(self._address)  # where nothing else is: no store was made

    def check(self) -> None:
        """Raise `LeaseError` if another run has taken the lease."""
        if self._lost is not None:
            raise LeaseError(
                f"{self._address} was taken over by {self._lost} while this run wrote to it: "
                "this run stops"
            )

    @staticmethod
    def read(address: str) -> Holder | None:
        """Who holds the lease of a store, as far as can be told."""
        if not objects.has_object(address, f"{GROUP}/zarr.json"):
            return None
        try:
            return Holder(**(objects.read_attributes(address, GROUP) or {}))
        except TypeError:
            return Holder("", "somebody", "an unknown host", 0, 0.0, 0.0, math.inf)

    def _take(self) -> None:
        held = self.read(self._address)
        if held is not None:
            self._check_free(held)
            log.warning("taking over the lease of %s", held)
            if self.read(self._address) == held:  # or else somebody else was quicker
                objects.remove_objects(self._address, GROUP)
        self._write(new=True)
        if held is not None:
            time.sleep(SECONDS_TO_SETTLE)
        now = self.read(self._address)
        if now is None or not self._is_ours(now):
            raise LeaseError(f"{self._address} is being written by {now}: wait until it is done")

    def _check_free(self, held: Holder) -> None:
        silent = max(0.0, time.time() - held.beat)
        if held.is_gone or silent > SECONDS_TO_EXPIRY or self._break:
            return
        raise LeaseError(
            f"{self._address} is being written by {held}, who was last heard of {silent:.0f} s "
            "ago: wait until that run is done, or stop it; if it surely is no more, take over with "
            f"break_lease=True (--break-lease), or after {SECONDS_TO_EXPIRY:.0f} s of silence"
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
                log.warning("the lease of %s could not be renewed: %s", self._address, error)

    def _is_ours(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token == self._holder.token

    def _write(self, new: bool) -> None:
        values = {**asdict(self._holder), "beat": time.time()}
        data = objects.group_document(values)
        objects.write_object(self._address, f"{GROUP}/zarr.json", data, new=new)
