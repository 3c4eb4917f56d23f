"""Recomputed blocks agree with an honest store, and find what the sum does not show."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from examples import slowly

import cdd_dask
from cdd_dask import cli, store
from cdd_dask.drafts import Draft
from cdd_dask.errors import InputError, VerificationError
from cdd_dask.marks import gather_marks
from cdd_dask.memory import TASK_OVERHEAD, format_bytes
from cdd_dask.parameters import Parameters
from cdd_dask.sampling import finer_levels
from cdd_dask.soundness import Ledger
from cdd_dask.time_stepping import channel_steps
from cdd_dask.verification import Verification

ALL = 1000
"""More blocks than any of these volumes has."""


def smooth(shape: tuple[int, ...], seed: int = 0) -> Any:
    """A positive field of moderate contrast, so that every channel counts beside the range."""
    return np.random.default_rng(seed).gamma(4.0, size=shape).astype("f4")


def verified(field: Any, out: Path, sample: int = ALL, **options: Any) -> Verification:
    """A decomposition into several blocks, verified with a sample."""
    options = {"max_scale": 4, "block": 24, **options}
    cdd_dask.decompose(field, out, progress=False, **options)
    return cdd_dask.verify(out, field, sample=sample, progress=False)


def shift(out: Path, k: int, place: Any, amount: float) -> None:
    """Move something from the output after channel `k` to it: the sum remains as it was."""
    result = cdd_dask.open_decomposition(out)
    names = [name for name, *_ in result.outputs()]
    for name, sign in ((names[k], 1), (names[k + 1], -1)):
        array = zarr.open_array(out / name / "scale0/image", mode="r+")
        array[place] = array[place] + sign * np.float32(amount)
    remark(out)


def remark(out: Path) -> None:
    """Have the done marks tell of what is there, as if it had been computed so."""
    ledger = Ledger.of(str(out))
    for number, marks in ledger.marks.items():
        for block, mark in marks.items():
            core = ledger.plan.grid.core(block)
            now = {
                path: store.checksum(store.read_block(str(out), path, core))
                for path in mark.checksums
                if not path.startswith(store.WORK)
            }
            marks[block] = replace(mark, checksums={**mark.checksums, **now})
        gather_marks(str(out), ledger.attributes["fingerprint"], number, marks.values())


# honest stores


@pytest.mark.parametrize(
    "options",
    [
        {"boundary": "wrap"},
        *slowly(*({"boundary": rule} for rule in ("reflect", "mirror", "nearest", "constant"))),
        {"boundary": "constant", "cval": 3.0},
        {"constrained": False},
        {"inverted": True},
        {"rtol": 0},
        {"rtol": 0, "dtype": "float64"},
        {"rtol": 0, "engine": "reference"},
        {"rtol": 0.03},
        {"axes": (1,)},
        {"spacing": (1.0, 0.5), "max_scale": 2},
        {"mode": "lin", "linear_scale_step": 1.5},
    ],
    ids=str,
)
def test_an_honest_store_passes(tmp_path: Path, options: dict[str, Any]):
    """All blocks of all channels: the error is within a tenth of what is promised."""
    found = verified(smooth((70, 52)), tmp_path / "out.zarr", **options)
    result = cdd_dask.open_decomposition(tmp_path / "out.zarr")
    assert [s.channel for s in found.samples] == list(range(len(result.channels)))
    assert [s.scale_to for s in found.samples] == list(result.scales)
    for sample in found.samples:
        assert sample.blocks == 6
        assert sample.promise == ("exact" if options.get("rtol") == 0 else "bounded")
        assert sample.share <= 0.1
        assert sample.error <= max(0.1 * result.parameters.rtol, 1e-6)
        assert sample.l2 <= 1e-2


@pytest.mark.parametrize("shape", [(300,), (40, 34, 50), (9, 8, 12, 10)], ids=str)
def test_any_number_of_axes(tmp_path: Path, shape: tuple[int, ...]):
    """Blocks are clipped to the volume."""
    found = verified(smooth(shape), tmp_path / "out.zarr", sample=3, max_scale=2, block=20)
    assert all(s.error <= 1e-4 for s in found.samples)
    assert {s.blocks for s in found.samples} == {min(3, math.prod(-(-n // 32) for n in shape))}


def test_a_halo_that_wraps_around_is_the_whole_axis(tmp_path: Path):
    """A small periodic volume is computed as what it is, whatever the halo."""
    out = tmp_path / "out.zarr"
    found = verified(smooth((40, 36)), out, boundary="wrap", max_scale=16, block=20)
    assert all(s.share <= 0.1 for s in found.samples)
    assert found.samples[-1].needed_memory < TASK_OVERHEAD + 0.7e6  # not 2 MB


@pytest.mark.parametrize("inverted", [False, True])
def test_small_values_keep_their_sign(tmp_path: Path, inverted: bool):
    """Thirty orders of magnitude: what sums up to it must not be counted from the wrong end."""
    y, x = np.mgrid[:64, :64] - 32.0
    field = (np.exp(-(y**2 + x**2) / 18) + 1e-30).astype("f4")
    found = verified(field, tmp_path / "out.zarr", rtol=0, inverted=inverted, max_scale=8)
    assert all(s.error <= 1e-6 for s in found.samples)


def test_blank_voxels(tmp_path: Path):
    """Blocks that are blank altogether, and edges of blanks everywhere."""
    field = smooth((70, 100))
    field[32:64, 32:64] = field[:8] = field[::9, ::5] = np.nan
    found = verified(field, tmp_path / "out.zarr")
    assert {(s.promise, s.blocks) for s in found.samples} == {("estimated", 12)}
    assert all(s.error <= 1e-5 for s in found.samples)


@pytest.mark.parametrize("boundary", ["reflect", "mirror", "wrap"])
@pytest.mark.parametrize("upsample", [2, 4])
def test_upsampled_channels(tmp_path: Path, upsample: int, boundary: str):
    """They are one pass, recomputed on the refined grid."""
    found = verified(
        smooth((44, 40)), tmp_path / "out.zarr", max_scale=8, upsample=upsample, boundary=boundary
    )
    assert [s.regime for s in found.samples] == ["refined"] * 3 + ["direct"]
    assert all(s.share <= 0.1 for s in found.samples)
    assert all(s.l2 <= 1e-4 for s in found.samples)


@pytest.mark.usefixtures("free_passes")
@pytest.mark.parametrize(
    "options",
    [{}, *slowly({"boundary": "wrap"}, {"inverted": True})],
    ids=str,
)
def test_coarse_kernels_are_judged_by_l2(tmp_path: Path, options: dict[str, Any]):
    """Full kernels, or ones a level finer, tell what the run's coarse ones did."""
    coarse: dict[str, Any] = {"max_scale": 64, "block": 70, "rtol": 1e-4, **options}
    found = verified(smooth((130, 140)), tmp_path / "out.zarr", sample=4, **coarse)
    *_, once, twice = found.samples
    assert once.regime == twice.regime == "pyramid"
    for sample in (once, twice):
        assert 1e-6 < sample.l2 < 1e-3
        assert sample.share < 0.5


def test_mixed_signs(tmp_path: Path):
    """The bound holds for them, too; crossing zero they have none, and an exact store still passes.

    Rounding alone may carry single voxels across.
    """
    field = smooth((70, 70)) - np.float32(4)
    found = verified(field, tmp_path / "kept.zarr")
    assert {s.promise for s in found.samples} == {"bounded"}
    found = verified(field, tmp_path / "cut.zarr", crossing=True)
    assert {s.promise for s in found.samples} == {"estimated"}
    found = verified(field, tmp_path / "whole.zarr", block=None, rtol=0, crossing=True)
    assert {s.promise for s in found.samples} == {"exact"}
    assert all(s.share < 0.5 for s in found.samples)


def test_a_constant_field(tmp_path: Path):
    """It has no range that differences could be relative to."""
    found = verified(np.full((40, 40), 7, "f4"), tmp_path / "out.zarr")
    assert {(s.error, s.l2, s.share) for s in found.samples} == {(0.0, 0.0, 0.0)}


# stores that are not


@pytest.mark.parametrize("k", [0, 2, *slowly(1)])
@pytest.mark.parametrize("options", [{}, {"inverted": True}, {"upsample": 2}], ids=str)
def test_a_shift_between_outputs_is_found(tmp_path: Path, k: int, options: dict[str, Any]):
    """The sum is still the source; the channel, its place and the amount are named."""
    field, out = smooth((70, 52)), tmp_path / "out.zarr"
    verified(field, out, **options)
    amount = 0.05 * float(np.ptp(field))
    shift(out, k, (41, 17), amount)
    assert cdd_dask.verify(out, field, progress=False).worst_ulp <= 4
    with pytest.raises(VerificationError, match=rf"channel {k} differs by 0\.0[45].*\(41, 17\)"):
        cdd_dask.verify(out, field, sample=ALL, progress=False)


def test_a_halo_that_is_too_small_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a run did wrong itself: blocks without a halo."""
    monkeypatch.setattr("cdd_dask.drafts.channel_halos", lambda steps, rtol: ((0, 0),) * len(steps))
    with pytest.raises(VerificationError, match=r"rtol=0\.001 is not kept: channel 0 differs"):
        verified(smooth((70, 52)), tmp_path / "out.zarr")


def test_a_shift_of_a_coarse_channel_is_found(tmp_path: Path):
    """By its norm."""
    field, out = smooth((70, 52)), tmp_path / "out.zarr"
    assert verified(field, out, max_scale=32, rtol=5e-4).samples[5].regime == "pyramid"
    shift(out, 5, slice(0, 40), 0.01 * float(np.ptp(field)))
    with pytest.raises(VerificationError, match="channel 5 differs"):
        cdd_dask.verify(out, field, sample=ALL, progress=False)


def test_a_shift_of_a_channel_on_cells_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By its norm, too: an honest one is within what its regime may cause, a shifted one is not."""
    field, out = smooth((70, 52)), tmp_path / "out.zarr"
    options = Draft.options

    def on_cells(draft: Draft, grid: Any, k: int) -> Any:
        ways = list(options(draft, grid, k))
        return iter([way for way in ways if k == 6 and way.name == "closure"] or ways)

    monkeypatch.setattr(Draft, "options", on_cells)
    honest = verified(field, out, max_scale=64).samples[6]
    assert (honest.regime, honest.promise) == ("closure", "estimated")
    assert honest.share < 1
    assert honest.l2 <= 1e-2
    shift(out, 6, slice(0, 40), 0.01 * float(np.ptp(field)))
    assert cdd_dask.verify(out, field, sample=ALL, progress=False).samples[6].share > 1


def test_of_an_estimated_error_it_is_only_told(tmp_path: Path):
    """An estimate promises nothing that could be broken."""
    field, out = smooth((70, 52)), tmp_path / "out.zarr"
    field[3, 4] = np.nan
    verified(field, out)
    shift(out, 1, (41, 17), 0.1 * float(np.nanmax(field) - np.nanmin(field)))
    found = cdd_dask.verify(out, field, sample=ALL, progress=False)
    sample = found.samples[1]
    assert sample.promise == "estimated"
    assert sample.where == (41, 17)
    assert sample.error == pytest.approx(0.1, rel=0.01)
    assert sample.share > 1


# what is chosen, and what is refused


def test_seeds_choose_the_same_blocks_again(tmp_path: Path):
    """And other seeds others."""
    field, out = smooth((200, 200)), tmp_path / "out.zarr"
    first = verified(field, out, sample=2, block=100).samples
    assert first == cdd_dask.verify(out, field, sample=2, progress=False).samples
    others = [
        cdd_dask.verify(out, field, sample=2, seed=seed, progress=False).samples for seed in (1, 2)
    ]
    assert len({first, *others}) == 3


def test_without_a_sample_nothing_is_recomputed(tmp_path: Path):
    """The samples are none."""
    assert verified(smooth((30, 30)), tmp_path / "out.zarr", sample=0).samples == ()


def test_what_does_not_fit_the_memory_is_told(tmp_path: Path):
    """With both numbers and the remedy; channels that fit are sampled."""
    field, out = smooth((150, 150)), tmp_path / "out.zarr"
    cdd_dask.decompose(field, out, max_scale=8, block=75, progress=False)
    whole = cdd_dask.verify(out, field, sample=2, progress=False).samples
    limit = whole[2].needed_memory
    assert whole[1].needed_memory < limit < whole[3].needed_memory
    assert all(s.needed_memory > TASK_OVERHEAD for s in whole)
    *fine, last = cdd_dask.verify(out, field, sample=2, memory=limit, progress=False).samples
    assert [s.blocks for s in fine] == [2, 2, 2]
    assert (last.blocks, last.is_broken, math.isnan(last.error)) == (0, False, True)
    assert str(last).startswith("channel 3 is not sampled: a block with its halo needs 1")
    assert f'but memory allows {format_bytes(limit)}: raise memory to at least "1' in str(last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": -1}, "sample=-1 must be a whole number >= 0"),
        ({"sample": 1.5}, r"sample=1\.5 must be"),
        ({"sample": 1, "seed": -1}, "seed=-1 must be"),
        ({"sample": 1, "memory": "much"}, "memory='much' is no amount"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str):
    """Before anything is read."""
    with pytest.raises(InputError, match=message):
        cdd_dask.verify(tmp_path / "none.zarr", **arguments)


def test_closures_are_compared_with_pyramids():
    """What goes further than a pyramid is recomputed by one, or by full kernels."""
    channels = channel_steps(Parameters(), (16.0, 32.0, 64.0), ndim=2)
    run = {"regime": "closure", "levels": [1, 1]}
    assert finer_levels(Parameters(), run, channels[1]) == (0, 0)
    assert finer_levels(Parameters(), run, channels[2]) == (2, 2)
    assert finer_levels(Parameters(), {**run, "levels": [0, 0]}, channels[2]) == (0, 0)


def test_the_command_line_prints_a_table(tmp_path: Path):
    """After what it prints anyway."""
    source, out = tmp_path / "field.npy", tmp_path / "out.zarr"
    np.save(source, smooth((70, 52)))
    cdd_dask.decompose(source, out, max_scale=4, block=24, progress=False)
    said = CliRunner().invoke(cli.cli, ["verify", str(out), "--sample", "2", "--quiet"])
    assert said.exit_code == 0, said.output
    whole, blank, header, _, *rows = said.output.splitlines()[1:]
    assert (whole, blank) == (f"{out} is whole", "")
    assert header.split()[:4] == ["channel", "scales", "regime", "blocks"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert all(row.endswith("bounded") for row in rows)
    arguments = ["verify", str(out), "--sample", "2", "--seed", "1", "--memory", "1kB"]
    said = CliRunner().invoke(cli.cli, arguments)
    assert "channel 2 is not sampled" in said.output
    shift(out, 0, (slice(None), slice(None)), 0.5)
    said = CliRunner().invoke(cli.cli, arguments[:-2])
    assert isinstance(said.exception, VerificationError)
