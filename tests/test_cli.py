"""The command line: every verb, every option, the config file, and the exit status."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

import cdd_dask
from cdd_dask import cli

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> Result:
    """The command with its arguments, in this process."""
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments])


def status(*arguments: object) -> tuple[int, str]:
    """Exit status and standard error of the command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "cdd_dask", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small positive field in a `.npy` file."""
    path = tmp_path / "field.npy"
    np.save(path, np.random.default_rng(0).lognormal(size=(20, 24)).astype("f4"))
    return path


def test_every_option_of_the_verbs_is_on_the_command_line_and_in_the_config():
    """API, command line and config file name the same options with the same defaults."""
    signature = inspect.signature(cdd_dask.decompose).parameters
    options = {p.name: p for p in cli.decompose.params if p.name not in ("source", "out")}
    verbs = {name for name in signature if name not in ("source", "out")}
    assert {*options} - {"config"} == (verbs - {"client"}) | {"scheduler"}
    defaults = cli.decompose.make_context("decompose", ["source", "out"]).params
    for name in verbs - {"client"}:
        assert defaults[name] == signature[name].default, name
    planned = inspect.signature(cdd_dask.plan).parameters.keys()
    assert planned - {"source_or_shape", "out", "calibrate"} == verbs
    shown = {p.name for p in cli.plan.params} - {"source", "as_json", "calibrate"}
    assert shown == {*options}
    assert set(yaml.safe_load((ROOT / "configs/local.yaml").read_text())) == verbs - {"client"}


def test_decompose_info_verify(source: Path, tmp_path: Path):
    """The three verbs after each other, and what they print."""
    out = tmp_path / "out.zarr"
    done = run("decompose", source, out, "--max-scale", 4, "--block", 12, "--quiet")
    assert done.exit_code == 0, done.output
    assert "channel_02" in done.output
    assert str(out) in done.output
    shown = run("info", out)
    assert "20 × 24 float32" in shown.output
    assert "bounded" in shown.output
    facts = json.loads(run("info", out, "--json").output)
    assert facts["edges"] == [1, 2, 4]
    assert sum(output["share"] for output in facts["outputs"]) == pytest.approx(1)
    checked = run("verify", out, "--quiet")
    assert checked.exit_code == 0
    assert "ulp of the maximum" in checked.output


def test_plan_prints_and_writes_nothing(source: Path, tmp_path: Path):
    """A plan of a file or of a shape; as JSON it is the API's."""
    before = sorted(tmp_path.iterdir())
    assert "channel 1" in run("plan", source, "--max-scale", 4).output
    assert "channel 4" in run("plan", "512,512,512", "--max-scale", 16, "--memory", "4GB").output
    facts = json.loads(run("plan", "64x64", "--max-scale", 4, "--memory", "1GB", "--json").output)
    made = cdd_dask.plan((64, 64), max_scale=4, memory="1GB")
    assert facts == json.loads(json.dumps(made.as_dict()))
    assert sorted(tmp_path.iterdir()) == before


def test_config_file_and_command_line(source: Path, tmp_path: Path):
    """A config file sets options; the command line wins."""
    config = tmp_path / "run.yaml"
    config.write_text("max_scale: 4\nblock: [10, 12]\nconstrained: false\nprogress: false\n")
    out = tmp_path / "out.zarr"
    done = run("decompose", source, out, "--config", config, "--max-scale", 8)
    assert done.exit_code == 0, done.output
    result = cdd_dask.open_decomposition(out)
    assert result.parameters.max_scale == 8
    assert result.parameters.constrained is False
    assert result.attrs["plan"]["block"] == [10, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: [0.9, 1.9]", "whole numbers"),
        ("block: [16, 1.5]", "whole numbers"),
        ("block: true", "whole numbers"),
        ("e_rel: true", "is not a valid float"),
        ("spacing: [true, 2]", "neither numbers like"),
        ("max_scale: 4\nmax_scale: 8", "max_scale stands there twice"),
        ("max_scal: 4", "max_scal"),
        ("- 1", "must map option names"),
        ("max_scale: [", "cannot be read"),
        ("max_scale: many", "many"),
        ("out: x.zarr", "unknown option"),
    ],
)
def test_bad_config_is_refused(source: Path, tmp_path: Path, text: str, message: str):
    """A config file with a fault is a wrong request, and the fault is named."""
    config = tmp_path / "run.yaml"
    config.write_text(text)
    done = run("plan", source, "--config", config)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize("name", ["local", "cluster"])
def test_shipped_configs_are_understood(source: Path, name: str):
    """The files in `configs/` name options that exist."""
    path = ROOT / "configs" / f"{name}.yaml"
    known = {p.name for p in cli.decompose.params}
    assert set(yaml.safe_load(path.read_text())) <= known
    if name == "local":
        done = run("plan", source, "--max-scale", 4, "--config", path)
        assert done.exit_code == 0, done.output


def test_exit_status(source: Path, tmp_path: Path):
    """0 done, 1 a run or verification failed, 2 the request was refused; never a traceback."""
    out = tmp_path / "out.zarr"
    assert status("decompose", source, out, "--max-scale", 4)[0] == 0
    code, said = status("decompose", source, out, "--max-scale", 4)
    assert (code, "nothing is left to do" in said) == (0, True)
    code, said = status("decompose", source, out, "--max-scale", 8)
    assert (code, "overwrite" in said, "Traceback" in said) == (2, True, False)
    code, said = status("decompose", source, out, "--no-such-option")
    assert (code, "--no-such-option" in said) == (2, True)
    code, said = status("plan", tmp_path / "missing.fits")
    assert (code, "does not exist" in said, "Traceback" in said) == (2, True, False)
    code, said = status("plan", source, "--max-scale", 0.5)
    assert (code, "max_scale=0.5" in said) == (2, True)
    np.save(source, np.load(source) * 1.001)
    code, said = status("verify", out)
    assert (code, "at voxel" in said, "Traceback" in said) == (1, True, False)


def test_memory_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Whatever asks for it, such as the size in a damaged store."""

    def main(**_: Any) -> None:
        raise MemoryError("Unable to allocate 16.0 GiB")

    monkeypatch.setattr(cli.cli, "main", main)
    monkeypatch.setattr(cli, "_stop_on_signals", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: Unable to allocate 16.0 GiB\n"


def test_progress_lines_in_a_log(source: Path, tmp_path: Path):
    """Without a terminal progress is plain lines on standard error, and --quiet is quiet."""
    said = status("decompose", source, tmp_path / "a.zarr", "--max-scale", 4, "--block", 12)[1]
    assert "decompose-ch02-pass1" in said
    assert "\x1b" not in said
    assert status("decompose", source, tmp_path / "b.zarr", "--quiet", "--max-scale", 4)[1] == ""
