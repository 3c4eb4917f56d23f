"""The command, as `cdd-dask` or ``python -m cdd_dask``: while it is loaded, Ctrl-C just ends it."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command has a handler of its own
    from cdd_dask.cli import main as run

    run()


if __name__ == "__main__":
    main()
