"""The command, as `cdd-dask` or ``python -m cdd_dask``: while it is loaded, Ctrl-C just ends it."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cdd_dask.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
