"""The command `cdd-dask`: the verbs on the command line.

Exit status: 0 done; 1 a run or a verification failed; 2 the request was refused; 130 Ctrl-C and 143
SIGTERM stopped it.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cdd_dask import __version__
from cdd_dask.addresses import check_address
from cdd_dask.config import load_config
from cdd_dask.engines import ENGINES
from cdd_dask.errors import AGAIN, CddError, RunError, VerificationError, redacted
from cdd_dask.executors import EXECUTORS
from cdd_dask.executors.processes import kill_children
from cdd_dask.parameters import BLANKS, BOUNDARIES, DTYPES, KERNELS, MODES

FAILURES = (RunError, VerificationError)
"""Errors of a run that had begun; all others refuse it."""


class Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Whole numbers with commas between, like ``64,64,64``."""

    name = "n,n,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(map(int, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers like 64,64,64", param, ctx)


class Spacing(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Numbers with commas between, like ``2,0.5,0.5``, or ``header``."""

    name = "x,x,…|header"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...] | float | str:
        if value == "header" or not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            numbers = tuple(map(float, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is neither numbers like 2,0.5,0.5 nor header", param, ctx)
        return numbers[0] if len(numbers) == 1 else numbers


def _read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Make the values of a config file the defaults, so that the command line wins."""
    if path is not None:
        arguments = {"source", "out", "config", "as_json", "calibrate"}
        known = {p.name for p in ctx.command.params if p.name} - arguments
        try:
            ctx.default_map = load_config(path, known)
        except CddError as error:
            raise click.BadParameter(str(error), ctx, param) from error


OPTIONS = (
    click.option("--config", callback=_read_config, is_eager=True, expose_value=False,
                 metavar="FILE", help="YAML file of these options; the command line wins."),
    click.option("--min-scale", type=float,
                 help="First scale edge.  [default: the smallest spacing, 1 voxel]"),
    click.option("--max-scale", type=float,
                 help="Largest scale.  [default: half of the largest decomposed axis]"),
    click.option("--num-channels", type=int,
                 help="Number of channels (log mode); decides the edges instead of --max-scale."),
    click.option("--mode", type=click.Choice(MODES), default="log", show_default=True,
                 help="Spacing of the scale edges."),
    click.option("--log-scale-base", type=float, default=2.0, show_default=True,
                 help="Ratio of an edge to the one before (log mode)."),
    click.option("--linear-scale-step", type=float,
                 help="Distance of an edge to the one before (lin mode)."),
    click.option("--e-rel", type=float, default=3e-2, show_default=True,
                 help="Largest relative step in time; part of the method's definition."),
    click.option("--constrained/--unconstrained", default=True, show_default=True,
                 help="Whether the sign constraint is applied."),
    click.option("--inverted/--not-inverted", default=False, show_default=True,
                 help="Whether the constraint is inverted."),
    click.option("--crossing/--not-crossing", default=False, show_default=True,
                 help="Whether voxels may cross zero, as in the package constrained-diffusion."),
    click.option("--kernel", type=click.Choice(KERNELS), default="discrete", show_default=True,
                 help="Smoothing kernel."),
    click.option("--boundary", type=click.Choice(BOUNDARIES), default="reflect",
                 show_default=True, help="Extension beyond the volume, as in scipy.ndimage."),
    click.option("--cval", type=float, default=0.0, show_default=True,
                 help="Value beyond the volume for --boundary constant."),
    click.option("--rtol", type=float, default=1e-3, show_default=True,
                 help="Error allowed by cutting into blocks, relative to the field's range; below "
                 "1e-4 wide kernels are not computed on a coarser grid."),
    click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True,
                 help="Working type."),
    click.option("--axes", type=Numbers(), help="Axes to decompose along, like 1,2; slices across "
                 "the others are decomposed by themselves.  [default: all]"),
    click.option("--spacing", type=Spacing(), help="Distance of voxels along every axis, or "
                 "header: what the source states. Scales are then in --unit.  [default: voxels]"),
    click.option("--unit", help="Unit of --spacing, like µm."),
    click.option("--nan", type=click.Choice(BLANKS), default="mask", show_default=True,
                 help="What becomes of blank (NaN) voxels."),
    click.option("--fill-value", type=float, default=0.0, show_default=True,
                 help="Value of blank voxels for --nan fill."),
    click.option("--upsample", type=int, default=1, show_default=True,
                 help="Cells per voxel and axis, 1, 2 or 4, for edges up to --switch-scale."),
    click.option("--switch-scale", type=float, help="Largest edge on the refined grid.  "
                 "[default: 5 times the smallest spacing]"),
    click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True,
                 help="What computes a block; auto: torch on a GPU, else cpu."),
    click.option("--device", help="Device of the torch engine: cpu, cuda, cuda:1, mps."),
    click.option("--memory", metavar="SIZE", help="What all tasks on this machine may hold "
                 "together, like 500MB.  [default: half of what is free]"),
    click.option("--block", type=Numbers(), help="Core of a block in voxels, one number or one "
                 "per axis.  [default: the largest that --memory holds]"),
    click.option("--scratch", metavar="FOLDER", help="Where working fields lie, like a fast local "
                 "disk; removed when done.  [default: in OUT]"),
    click.option("--executor", type=click.Choice(EXECUTORS), default="auto", show_default=True,
                 help="What runs the blocks."),
    click.option("--workers", type=int, help="Blocks computed at once.  [default: 1]"),
    click.option("--scheduler", metavar="ADDRESS",
                 help="A running Dask scheduler to use, like tcp://host:8786."),
    click.option("--overwrite/--keep", default=False, show_default=True,
                 help="Whether a decomposition that is at OUT is replaced."),
    click.option("--break-lease/--respect-lease", default=False, show_default=True,
                 help="Whether to write to OUT though another run seems to, which is no more."),
    click.option("--progress/--quiet", default=True, show_default=True,
                 help="Whether progress is shown."),
)  # fmt: skip
"""The options of `decompose` and `plan`, named as in the API."""


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cdd-dask")
def cli() -> None:
    """Constrained diffusion decomposition of volumes larger than memory."""


@cli.command()
@click.argument("source")
@click.argument("out")
@_with_options
def decompose(source: str, out: str, scheduler: str | None, **options: Any) -> None:
    """Split SOURCE into its scales, in the Zarr store OUT.

    Where OUT was begun with the same options by a run that was stopped, this one goes on.

    SOURCE is a Zarr array or a FITS, HDF5, TIFF, NIfTI or .npy file; file::part names an HDU, a
    dataset or a series of it.
    """
    from cdd_dask.api import decompose as run

    if out.startswith("memory://"):
        problem = "what lies in this process's memory is gone when it ends: name a path or a URL"
        raise click.BadParameter(problem, param_hint="OUT")
    _log_lines(options["progress"])
    result = run(source, out, client=_connect(scheduler), **_plain(options))
    click.echo(result.table())
    if note := _empty_blocks(result):
        click.echo(f"\n{note}")
    click.echo(f"\nfield = sum(channels) + residual, in {result.path}")


@cli.command()
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--calibrate", is_flag=True,
              help="First measure how fast this machine and the current folder's disk are, for the "
              "times of this plan and of later ones.")  # fmt: skip
@_with_options
def plan(source: str, scheduler: str | None, as_json: bool, **options: Any) -> None:
    """What decompose would do with SOURCE, or with a volume of a shape like 512,512,512."""
    from cdd_dask.api import plan as make

    if options["calibrate"] and options["progress"]:
        click.echo("measuring: 5 s, and what compiling takes the first time", err=True)
    shape = source.replace("x", ",").split(",")
    is_shape = all(re.fullmatch(r"\s*\d{1,18}\s*", part) for part in shape)
    what = tuple(map(int, shape)) if is_shape else source
    made = make(what, client=_connect(scheduler), **_plain(options))
    click.echo(json.dumps(made.as_dict(), indent=2) if as_json else str(made))


@cli.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--allow-incomplete", is_flag=True, help="Also look at an unfinished store.")
def info(store: str, as_json: bool, allow_incomplete: bool) -> None:
    """What the decomposition in STORE is and holds."""
    from cdd_dask.decomposition import open_decomposition
    from cdd_dask.statistics import Statistics

    result = open_decomposition(store, allow_incomplete=allow_incomplete)
    finished = result.attrs["complete"]
    if as_json:
        names = ("name", "scale_from", "scale_to", "statistics")
        outputs = [dict(zip(names, output, strict=True)) for output in result.outputs()]
        if finished:
            for output, share in zip(outputs, result.scale_spectrum()["share"], strict=True):
                output["share"] = float(share)
        about = {"path": result.path, **result.attrs, "outputs": outputs}
        click.echo(json.dumps(about, indent=2))
        return
    click.echo(repr(result))
    if finished:
        click.echo(f"\n{result.table()}")
        click.echo(f"\nerror by blocks: {result.attrs['error']}, rtol {result.parameters.rtol:g}")
        source = Statistics.of_dict(result.attrs["source_statistics"])
        if source.negative:
            click.echo(f"voxels below zero: {100 * source.negative / source.count:.3g}%")
        if note := _empty_blocks(result):
            click.echo(note)


@cli.command()
@click.argument("store")
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, allow_dash=True), metavar="FILE",
              help="Write all columns as CSV, - for standard output.")  # fmt: skip
def spectrum(store: str, csv_file: str | None) -> None:
    """How the field of STORE is shared among its scales; reads nothing but attributes."""
    from cdd_dask.decomposition import open_decomposition
    from cdd_dask.exporting.writing import appearing

    result = open_decomposition(store)
    if csv_file is None:
        click.echo(result.table())
        return
    rows = result.scale_spectrum()
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(rows.dtype.names)
    writer.writerows(row.tolist() for row in rows)
    file = Path(csv_file)
    if csv_file == "-" or file.parts[1:2] in (("dev",), ("proc",)) or file.is_fifo():
        with click.open_file(csv_file, "w") as stream:  # which nothing may replace
            stream.write(text.getvalue())
        return
    with appearing(Path(os.path.realpath(file))) as partial:  # of a link, what it leads to
        partial.write_text(text.getvalue(), newline="")


@cli.command()
@click.argument("store")
@click.option("--source", help="What was decomposed.  [default: what the store remembers]")
@click.option(
    "--sample",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Recompute N random blocks of every channel, more exactly, and compare.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random choice.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="What a recomputation may take, like 500MB.  [default: half of what is free]",
)
@click.option("--progress/--quiet", default=True, show_default=True,
              help="Whether progress is shown.")  # fmt: skip
def verify(store: str, **options: Any) -> None:
    """Check that STORE is whole and that its channels and residual sum up to the source."""
    from cdd_dask.sampling import describe_samples
    from cdd_dask.verification import verify as check

    _log_lines(options["progress"])
    found = check(store, **options)
    click.echo(f"{found}\n{store} is whole")
    if found.samples:
        click.echo(f"\n{describe_samples(found.samples)}")


@cli.command()
@click.argument("store")
@click.option("--source", help="What was decomposed.  [default: what the store remembers]")
@click.option(
    "--memory",
    metavar="SIZE",
    help="What computing may take, like 500MB.  [default: half of what is free]",
)
@click.option(
    "--scratch",
    metavar="FOLDER",
    help="Where to put what is computed on the way.  [default: beside STORE]",
)
@click.option(
    "--break-lease/--respect-lease",
    default=False,
    show_default=True,
    help="Whether to write to STORE though a run seems to, which is no more.",
)
@click.option("--progress/--quiet", default=True, show_default=True,
              help="Whether progress is shown.")  # fmt: skip
def repair(store: str, **options: Any) -> None:
    """Mend what verify finds damaged in STORE, to the same bits where that can be."""
    from cdd_dask.mending import repair as mend

    _log_lines(options["progress"])
    done = mend(store, **options)
    click.echo(str(done))
    if done.impossible:
        sys.exit(1)


@cli.command()
@click.argument("store")
@click.option("--to", required=True, metavar="FORMAT", help="fits, npy or tiff (OME-TIFF).")
@click.option("--out", metavar="PATH", help="Folder, or the file of the only output.  [STORE's]")
@click.option("--channel", metavar="LIST", help="Channels, like 0,2,residual.  [default: all]")
@click.option("--region", metavar="RANGES", help="Voxels per axis, like 10:20,:,-5:.  [all]")
@click.option("--overwrite/--keep", default=False, help="Whether files there are replaced.")
@click.option("--progress/--quiet", default=True, show_default=True,
              help="Whether progress is shown.")  # fmt: skip
def export(store: str, channel: str | None, region: str | None, **options: Any) -> None:
    """Write the channels and the residual in STORE to files, one each."""
    from cdd_dask.exporting import export as write
    from cdd_dask.exporting import parse_channels, parse_region

    _log_lines(options["progress"])
    channels = None if channel is None else parse_channels(channel)
    ranges = None if region is None else parse_region(region)
    for path in write(store, channel=channels, region=ranges, **options):
        click.echo(path)


@cli.command()
@click.argument("source", required=False)
@click.argument("out", required=False)
@_with_options
def doctor(source: str | None, out: str | None, scheduler: str | None, **options: Any) -> None:
    """Check whether all is fit to decompose SOURCE into OUT, here and on every worker.

    Without them: whether this machine, or the cluster at --scheduler, is fit for any run, with its
    output in the current folder. The exit status is 1 if something must be mended.
    """
    from cdd_dask.checkup import doctor as check

    found = check(source, out, client=_connect(scheduler), **_plain(options))
    click.echo(str(found))
    if not found.ok:
        sys.exit(1)


def _empty_blocks(result: Any) -> str:
    """How much needed no computing, where something did not."""
    blocks = result.attrs["blocks"]
    if not blocks["empty"]:
        return ""
    total = blocks["empty"] + blocks["computed"]
    share = f"{blocks['empty']} of {total} blocks, counted for every channel,"
    return f"{share} were blank or zero and cost nothing"


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the API takes them: one number for all axes is no tuple."""
    block = options.pop("block")
    return {**options, "block": block[0] if block is not None and len(block) == 1 else block}


def _connect(scheduler: str | None) -> Any:
    if scheduler is None:
        return None
    from distributed import Client

    check_address("scheduler", scheduler)
    # our own message tells better that the scheduler is gone than their tracebacks
    for name in ("batched", "client", "core"):
        logging.getLogger(f"distributed.{name}").setLevel(logging.CRITICAL)
    try:
        return Client(scheduler, timeout="10s")
    except (OSError, ValueError, TypeError) as error:  # TypeError: TLS without certificates
        problem = f"{scheduler} does not answer: {error}"
        raise click.BadParameter(problem, param_hint="--scheduler") from error


def _log_lines(progress: bool) -> None:
    """Plain lines on standard error, where no progress bar is shown."""
    from cdd_dask.progress import has_display

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("cdd_dask")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if progress and not has_display() else logging.WARNING)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: like Ctrl-C, with an exit status of its own."""


def _stop_on_signals() -> None:
    """Have SIGTERM wind up as Ctrl-C does, and a second signal of either kind end at once."""
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        if stopping:
            kill_children()
            os._exit(128 + number)
        stopping = True
        # a call of Dask's that is cut short says so with a traceback
        for name in ("distributed", "tornado.application"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def main() -> None:
    """Run the command, with our errors as one line and the exit status that fits."""
    _stop_on_signals()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        goes_on = sys.argv[1:2] in (["decompose"], ["repair"])
        text = f"stopped: {AGAIN} to go on" if goes_on else "interrupted"
        click.echo(text, err=True)
        terminated = isinstance(error.__cause__ or error, Terminated)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    except (CddError, OSError, MemoryError) as error:
        reason = redacted(str(error)) or type(error).__name__
        click.echo(f"error: {reason}", err=True)
        refused = isinstance(error, CddError | FileNotFoundError)
        sys.exit(2 if refused and not isinstance(error, FAILURES) else 1)


if __name__ == "__main__":
    main()
