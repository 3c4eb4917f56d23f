"""Progress of a run: a bar on a terminal or in a notebook, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from cdd_dask.plans import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts finished tasks of a run, weighted by the work in them.

    Parameters
    ----------
    show
        False keeps silent.
    total
        Work of the whole run, in voxel-steps and voxels.
    """

    def __init__(self, show: bool, total: int) -> None:
        self._total, self._done = max(1, total), 0
        self._name, self._tasks, self._of = "", 0, 0
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar = _rich_bar() if show and has_display() else None
        self._lines = show and self._bar is None
        if self._bar is not None:
            self._bar.start()
            self._id = self._bar.add_task("", total=self._total)

    def stage(self, name: str, tasks: int) -> None:
        """A stage of `tasks` tasks begins."""
        self._name, self._tasks, self._of = name, 0, tasks
        if self._bar is not None:
            self._bar.update(self._id, description=name)
        elif self._lines:
            log.info("%s: %d block%s", name, tasks, "" if tasks == 1 else "s")

    def advance(self, work: int) -> None:
        """A task that held `work` is finished."""
        self._done += work
        self._tasks += 1
        if self._bar is not None:
            self._bar.update(self._id, completed=self._done)
            return
        now = time.monotonic()
        if self._lines and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            log.info(
                "%s: block %d of %d, %.0f%% of the run after %s",
                self._name,
                self._tasks,
                self._of,
                100 * self._done / self._total,
                format_seconds(now - self._started),
            )

    def skip(self, work: int) -> None:
        """So much of the work was done before."""
        self._done += work
        if self._bar is not None:
            self._bar.update(self._id, completed=self._done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def has_display() -> bool:
    """Whether someone watches: a terminal, or a Jupyter notebook."""
    if "ipykernel" in sys.modules:
        return True
    return sys.stderr is not None and sys.stderr.isatty()


def _rich_bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
