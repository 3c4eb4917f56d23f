"""The command, as `cdd-dask` or ``python -m cdd_dask``: while it is loaded, Ctrl-C just ends it."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # which would say so with a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cdd_dask.cli import main as run

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
