"""Nobody gets in and nothing leaks: hostile stores and files, secrets, open ports."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import cdd_dask
from cdd_dask import store
from cdd_dask.addresses import check_address
from cdd_dask.cli import cli
from cdd_dask.config import load_config
from cdd_dask.errors import CddError, InputError, SourceReadError, StoreError, redacted
from cdd_dask.output import output_address, scratch_address
from cdd_dask.readers import open_source

ROOT = Path(__file__).parent.parent
SHAPE = (20, 30)
RUN = "0123456789ab"
SECRET = "hunter2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two channels in blocks."""
    folder = tmp_path_factory.mktemp("made")
    np.save(folder / "in.npy", np.random.default_rng(0).lognormal(size=SHAPE).astype("f4"))
    out = folder / "out.zarr"
    options = {"max_scale": 2, "e_rel": 0.3, "block": (10, 30)}
    cdd_dask.decompose(folder / "in.npy", out, progress=False, **options)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be spoiled."""
    return Path(shutil.copytree(made, tmp_path / "out.zarr"))


def edit(path: Path, keys: str, value: Any) -> None:
    """Set what the dotted `keys` name in a JSON file; a `value` of ``...`` removes it."""
    stated = json.loads(path.read_text())
    *above, last = (int(key) if key.isdecimal() else key for key in keys.split("."))
    place: Any = stated
    for key in above:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(stated))


# stores

HUGE = 10**15
ROOT_EDITS: list[tuple[str, Any, str]] = [
    ("run", "../../x", "run"),
    ("run", 5, "run"),
    ("scratch", "/home", "scratch"),
    ("scratch", "/tmp/cdd-dask-x.zarr", "scratch"),
    ("scratch", f"/tmp/../home/cdd-dask-{RUN}.zarr", "scratch"),
    ("scratch", f"cdd-dask-{RUN}.zarr", "scratch"),
    ("scratch", ["/tmp"], "scratch"),
    ("parameters", [], "parameters"),
    ("parameters.boundary", "round", "boundary"),
    ("parameters.dtype", "|O", "dtype"),
    ("parameters.spacing", [1.0] * 9, "spacing"),
    ("parameters.nothing", 1, r"parameters\.nothing"),
    ("parameters.rtol", ..., r"parameters\.rtol"),
    ("edges", [1.0, math.nan], r"edges\[1\]"),
    ("edges", [1.0] * 5000, "edges"),
    ("edges", "1, 2", "edges"),
    ("edges", [1.0, 3.0], "edges"),
    ("axes", [["../../x", 1.0, None], ["x", 1.0, None]], "axes"),
    ("axes", [["x", 1.0, None], ["x", 1.0, None]], "axes"),
    ("axes.0", ["y", "1", None], r"axes\[0\]\[1\]"),
    ("plan.block", [0, 30], r"plan\.block\[0\]"),
    ("plan.block", [HUGE, 30], r"plan\.block"),
    ("plan.block", [10.0, 30], r"plan\.block\[0\]"),
    ("plan.block", [True, 30], r"plan\.block\[0\]"),
    ("plan.volume.shape", [HUGE, 30], r"plan\.volume\.shape"),
    ("plan.volume.shape", [-20, 30], r"plan\.volume\.shape\[0\]"),
    ("plan.volume.shape", [1] * 5, r"plan\.volume\.shape"),
    ("plan.volume", None, r"plan\.volume"),
    ("plan.resources.engine", "os.system", r"plan\.resources\.engine"),
    ("plan.resources.threads", "all", r"plan\.resources\.threads"),
    ("plan.resources.speeds", {}, r"plan\.resources\.speeds\.narrow is missing"),
    ("plan.volume.later", 1, r"plan\.volume\.'later' is unknown"),
    ("plan.edges", [1.0], r"plan\.edges"),
    ("plan.stages", [], r"plan\.stages"),
    ("plan.stages.1.levels", [0] * 3, r"plan\.stages\[1\]\.levels"),
    ("plan.stages.1.steps", 1e300, r"plan\.stages\[1\]\.steps"),
    ("plan.stages.0", {}, r"plan\.stages\[0\]"),
    ("source.address", None, r"source\.address"),
    ("source.address", f"https://me:{SECRET}@example.org/x", r"source\.address"),
    ("source.address", "reference::https://example.org/x", r"source\.address"),
    ("source.address", "x" * 5000, r"source\.address"),
    ("source.description", "\x1b]0;hello\a", r"source\.description"),
    ("source.description", "\ud800", r"source\.description"),
    ("source.units", "mm", r"source\.units"),
    ("source.header", 5, r"source\.header"),
    ("source_statistics.count", -1, r"source_statistics\.count"),
    ("source_statistics.sum", 10**400, r"source_statistics\.sum"),
    ("blocks", 3, "blocks"),
    ("complete", "yes", "complete"),
    ("format_version", None, "format_version"),
]


@pytest.mark.parametrize(("keys", "value", "named"), ROOT_EDITS)
def test_edited_attributes_are_refused(out: Path, keys: str, value: Any, named: str):
    """Whatever is wrong with the root's attributes is named, and nothing secret repeated."""
    edit(out / "zarr.json", f"attributes.cdd_dask.{keys}", value)
    with pytest.raises(StoreError, match=named) as found:
        cdd_dask.open_decomposition(out)
    assert SECRET not in str(found.value)
    assert len(str(found.value)) < 1000


def test_unknown_attributes_are_left_alone(out: Path):
    """Later versions may write more, and so may users."""
    edit(out / "zarr.json", "attributes.cdd_dask.later", [HUGE])
    edit(out / "zarr.json", "attributes.mine", {"a": 1})
    edit(out / "channel_00/zarr.json", "attributes.cdd_dask.later", None)
    assert cdd_dask.open_decomposition(out).attrs["later"] == [HUGE]


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        ("scale_from", math.nan, r"channel_01\.scale_from"),
        ("scale_to", 3.0, r"channel_01\.scale_from, scale_to"),
        ("statistics", [], r"channel_01\.statistics"),
        ("statistics.min", "0", r"channel_01\.statistics\.min"),
        ("error", "none", r"channel_01\.error"),
        ("halo", [-1, 0], r"channel_01\.halo\[0\]"),
    ],
)
def test_edited_groups_are_refused(out: Path, keys: str, value: Any, named: str):
    """Likewise those of an output."""
    edit(out / "channel_01/zarr.json", f"attributes.cdd_dask.{keys}", value)
    with pytest.raises(StoreError, match=named):
        cdd_dask.open_decomposition(out)


GZIP = {"name": "gzip", "configuration": {"level": 5}}
SHARDED = "codecs.0.configuration"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("shape", [HUGE, 30], "the shape"),
        ("shape", [20, 31], "the shape"),
        ("shape", [20, -30], "damaged"),
        ("data_type", "float64", "the type"),
        ("data_type", "string", "the type|damaged"),
        ("data_type", {"name": "struct"}, "damaged"),
        ("chunk_grid.configuration.chunk_shape", [10**9, 10**9], "shards and chunks|damaged"),
        ("chunk_grid.configuration.chunk_shape", [20, 30], "shards and chunks"),
        (f"{SHARDED}.chunk_shape", [5, 30], "shards and chunks"),
        (f"{SHARDED}.codecs.1", GZIP, "the codec GzipCodec"),
        (f"{SHARDED}.codecs.1", {"name": "numcodecs.pickle"}, "damaged"),
        (f"{SHARDED}.codecs.1", {"name": "numcodecs.bz2", "configuration": {}}, "the codec BZ2"),
        ("dimension_names", ["\x1b[31m", "x"], "dimension_names"),
        ("node_type", "group", "damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs")
def test_edited_arrays_are_refused(out: Path, keys: str, value: Any, message: str):
    """No array is opened that would decode more than a block, or by other codecs than ours."""
    edit(out / "channel_01/scale0/image/zarr.json", keys, value)
    with pytest.raises(StoreError, match=message) as found:
        cdd_dask.open_decomposition(out)
    assert "channel_01" in str(found.value) or "damaged" in str(found.value)


def test_a_huge_store_that_agrees_with_itself_is_refused(out: Path):
    """Not only contradictions: nobody has a volume of 10^15 voxels, or a block of 10^12."""
    file = out / "zarr.json"
    edit(file, "attributes.cdd_dask.plan.volume.shape", [10**8, 10**7])
    edit(file, "attributes.cdd_dask.plan.block", [10, 30])
    with pytest.raises(StoreError, match=r"plan\.volume\.shape=\[100000000, 10000000\]"):
        cdd_dask.open_decomposition(out)
    edit(file, "attributes.cdd_dask.plan.volume.shape", [10**7, 10**7])
    edit(file, "attributes.cdd_dask.plan.block", [10**6, 10**6])
    with pytest.raises(StoreError, match=r"plan\.block"):
        cdd_dask.open_decomposition(out)


@pytest.mark.parametrize("name", ["zarr.json", "channel_00/zarr.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "", "{", "[]", "null", '{"attributes": 3}'])
def test_metadata_that_are_no_metadata(out: Path, name: str, content: str):
    """JSON too deep to read, or of another kind, is refused like any damage."""
    (out / name).write_text(content)
    with pytest.raises(StoreError):
        cdd_dask.open_decomposition(out)


# pickles


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("dtype", ["<f4", "|O", "<M8[s]"])
@pytest.mark.parametrize("filters", [[], ["vlen-utf8"], ["json2"]])
@pytest.mark.parametrize("as_filter", [True, False])
def test_no_zarr_source_is_unpickled(
    tmp_path: Path, dtype: str, filters: list[str], as_filter: bool
):
    """Not by a filter, nor by a compressor, whatever the type that the array says it has."""
    chain = [{"id": name} for name in filters]
    array = {
        "zarr_format": 2, "shape": [4], "chunks": [4], "dtype": dtype, "fill_value": None,
        "order": "C", "compressor": None if as_filter else {"id": "pickle"},
        "filters": ([*chain, {"id": "pickle"}] if as_filter else chain) or None,
    }  # fmt: skip
    (tmp_path / "in.zarr").mkdir()
    (tmp_path / "in.zarr/.zarray").write_text(json.dumps(array))
    (tmp_path / "in.zarr/0").write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    with pytest.raises((SourceReadError, InputError)):
        cdd_dask.decompose(tmp_path / "in.zarr", progress=False)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("name", ["in.npy", "in.npz", "in"])
def test_no_npy_file_is_unpickled(tmp_path: Path, name: str):
    """Neither an array of objects, nor a bare pickle, nor one in an archive."""
    planted = np.array([Planted(tmp_path / "planted")], dtype=object)
    with (tmp_path / name).open("wb") as file:
        if name == "in.npz":
            np.savez(file, planted)
        else:
            np.save(file, planted)
    bare = tmp_path / "bare.npy"
    bare.write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    shutil.copy(tmp_path / name, archive := tmp_path / "archive.npy")
    for source in (tmp_path / name, bare, archive):
        with pytest.raises(SourceReadError):
            open_source(source)
    assert not (tmp_path / "planted").exists()


# what is decoded


def test_a_page_larger_than_memory_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A compressed page says how large it is; next to nothing in the file does."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "in.tif", np.zeros((512, 512), "u1"), compression="zlib")
    assert open_source(tmp_path / "in.tif").shape == (512, 512)
    monkeypatch.setattr("cdd_dask.readers.base.available_memory", lambda: 100_000)
    with pytest.raises(SourceReadError, match="decoded in parts of 262 kB, but 100 kB"):
        open_source(tmp_path / "in.tif")


def test_a_fits_file_without_end(tmp_path: Path):
    """A negative size makes an HDU follow itself, as often as one looks."""
    fits = pytest.importorskip("astropy.io.fits")
    fits.writeto(tmp_path / "in.fits", np.zeros((12, 64), "f4"))
    data = (tmp_path / "in.fits").read_bytes()
    (tmp_path / "in.fits").write_bytes(
        data.replace(b"                  64", b"                 -64")
    )
    with pytest.raises(SourceReadError, match="HDU 0 ends before it begins"):
        open_source(tmp_path / "in.fits")


def test_a_source_that_fails_while_it_is_read(tmp_path: Path):
    """Any error of a library is one of ours, at whatever moment it comes."""
    array = zarr.create_array(tmp_path / "in.zarr", shape=(4,), chunks=(4,), dtype="f4")
    array[:] = 1
    (tmp_path / "in.zarr/c/0").write_bytes(b"nonsense")
    source = open_source(tmp_path / "in.zarr")
    with pytest.raises(SourceReadError, match=r"in\.zarr cannot be read"):
        source.read((slice(0, 4),))


def test_units_that_command_a_terminal_are_no_units(tmp_path: Path):
    """What headers say is shown to people: it must not move their cursor."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["a"] = np.ones(4)
        file["a"].attrs["spacing"], file["a"].attrs["units"] = 2.0, "\x1b[2J"
        file["b\x1b[2J"] = np.ones(4)
    assert open_source(f"{tmp_path}/in.h5::a").units == (None,)
    with pytest.raises(InputError, match=r"\\x1b.* cannot be printed"):
        open_source(f"{tmp_path}/in.h5::b\x1b[2J")


# config files


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch planted']",
        "block: !!python/name:os.system",
        "a: &a [1, 1]\nblock: *a",
        "block: " + "[" * 100_000,
        "max_scale: " + "9" * 5000,
        "x: !!bool y",
        "x: !!timestamp y",
        "? [1]\n: 2",
        "\0",
    ],
)
def test_hostile_configs_are_refused(tmp_path: Path, text: str):
    """No object is made, nothing grows, and whatever YAML makes of it is one error."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config .*config\.yaml"):
        load_config(tmp_path / "config.yaml", {"block", "max_scale", "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# secrets

LEAKY = (
    f"https://me:{SECRET}@example.org/a.zarr",
    f"https://{SECRET}@example.org/a.zarr",
    f"https://me:{SECRET}/{SECRET}@example.org/a.zarr",
    f"https:/me:{SECRET}@example.org/a.zarr",
    f"s3://key:{SECRET}@bucket/a.zarr",
    f"simplecache::https://me:{SECRET}@example.org/a.zarr",
    f"https://example.org/a.zarr?sv=2024&sig={SECRET}",
    f"https://example.org/a.zarr?X-Amz-Credential=me&X-Amz-Signature={SECRET}",
    f"https://example.org/a.zarr?%73ig={SECRET}",
    f"gs://bucket/a.zarr?access_token={SECRET}",
    f"s3://bucket/a.zarr?AWS_SECRET_ACCESS_KEY={SECRET}",
    f"https://example.org/a.zarr#token={SECRET}",
)
HARMLESS = (
    "s3://bucket/a.zarr", "abfs://container@account.dfs.core.windows.net/a.zarr",
    "sftp://me@host:22/a", "http://localhost:8000/a@b.zarr", "http://[::1]:8000/a", "tcp://host:1",
    "tls://10.0.0.1:8786", "gs://bucket/a.zarr?versionId=3", "/data/me@home/a.h5::/x", "a b/ä.npy",
    "s3://bucket/a.zarr?design=1&sigma=2",
)  # fmt: skip


@pytest.mark.parametrize("address", LEAKY)
@pytest.mark.parametrize(
    "use",
    [
        lambda address: check_address("scheduler", address),
        open_source,
        output_address,
        scratch_address,
        cdd_dask.open_decomposition,
        cdd_dask.plan,
    ],
    ids=["address", "source", "out", "scratch", "open", "plan"],
)
def test_addresses_with_credentials_are_refused(use: Callable[[str], Any], address: str):
    """Before anything is opened, with what to do, and without a word of the secret."""
    with pytest.raises(InputError, match=r"holds credentials.*environment") as found:
        use(address)
    assert SECRET not in str(found.value)


@pytest.mark.parametrize("address", HARMLESS)
def test_other_addresses_are_not(address: str):
    """Ports, users, containers and versions are no secrets."""
    check_address("source", address)
    assert redacted(f"{address}: 403") == f"{address}: 403"


@pytest.mark.parametrize("address", ["a\nb", "\x1b[2Ja", "a\ud800", "reference::s3://b/x", "a\0"])
def test_addresses_that_cannot_be_shown_or_kept(address: str):
    """Nor are those taken that would command a terminal, or hand over to any other file."""
    with pytest.raises(InputError) as found:
        output_address(address)
    str(found.value).encode()
    assert "\x1b" not in str(found.value)


@pytest.mark.parametrize("kind", CddError.__subclasses__())
def test_no_error_of_ours_repeats_a_secret(kind: type[CddError]):
    """What a storage library says may quote the URL that it signed; also through pickles."""
    said = f"GET https://b.s3.amazonaws.com/k?X-Amz-Expires=9&X-Amz-Signature={SECRET}: 403"
    for error in (kind(said), pickle.loads(pickle.dumps(kind(said)))):
        assert SECRET not in f"{error} {error!r} {error.args}"
        assert "X-Amz-Signature=***" in str(error)


def test_a_signed_url_in_a_storage_error_is_redacted(monkeypatch: pytest.MonkeyPatch):
    """As it would come from a bucket: opening and probing name the address, not the signature."""

    def fail(*_: Any, **__: Any) -> Any:
        raise PermissionError(f"403 https://b/k?sig={SECRET}")

    monkeypatch.setattr(zarr, "open", fail)
    monkeypatch.setattr(zarr, "open_group", fail)
    monkeypatch.setattr(store, "open_root", fail)
    for use in (open_source, cdd_dask.open_decomposition):
        with pytest.raises(CddError, match=r"sig=\*\*\*") as found:
            use("memory://bucket/a.zarr")
        assert SECRET not in str(found.value)


# clusters


def test_a_cluster_of_ours_listens_on_the_loopback_only():
    """Scheduler, dashboard, nannies and workers: whoever reaches one could run code there."""
    psutil = pytest.importorskip("psutil")
    from cdd_dask.executors.dask import start_local_cluster

    def listening() -> set[tuple[int, str, int]]:
        me = psutil.Process()
        return {
            (process.pid, *connection.laddr)
            for process in (me, *me.children(recursive=True))
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }

    before = listening()  # this process may hold clusters of other tests
    cluster, client = start_local_cluster(1)
    with cluster, client:
        assert {ip for _, ip, _ in listening() - before} == {"127.0.0.1"}
        assert cluster.scheduler_address.startswith("tcp://127.0.0.1:")


def test_a_scheduler_is_reached_by_tls(tmp_path: Path):
    """Certificates come from Dask's own configuration, and nothing else is needed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    from distributed import LocalCluster
    from distributed.security import Security

    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    names = {
        f"tls_{role}_{part}": str(path)
        for role in ("scheduler", "worker", "client")
        for part, path in (("cert", certificate), ("key", key))
    }
    security = Security(require_encryption=True, tls_ca_file=str(certificate), **names)
    np.save(tmp_path / "in.npy", np.random.default_rng(0).lognormal(size=SHAPE))
    prefix = "DASK_DISTRIBUTED__COMM__TLS__"
    told = {
        f"{prefix}CA_FILE": str(certificate),
        f"{prefix}CLIENT__CERT": str(certificate),
        f"{prefix}CLIENT__KEY": str(key),
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True",
    }
    with LocalCluster(
        n_workers=1, threads_per_worker=1, protocol="tls", host="127.0.0.1", security=security,
        dashboard_address="127.0.0.1:0",
    ) as cluster:  # fmt: skip
        address = cluster.scheduler_address
        assert address.startswith("tls://127.0.0.1:")
        command = [sys.executable, "-m", "cdd_dask", "decompose", tmp_path / "in.npy"]
        options = ["--max-scale", "2", "--quiet", "--scheduler", address]
        done = subprocess.run(
            [*command, tmp_path / "out.zarr", *options],
            env={**os.environ, **told}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cdd_dask.open_decomposition(tmp_path / "out.zarr").attrs["complete"]


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (f"tcp://me:{SECRET}@127.0.0.1:1", "holds credentials"),
        ("tls://127.0.0.1:1", "does not answer: TLS expects"),
    ],
)
def test_a_scheduler_that_cannot_be_connected(scheduler: str, message: str):
    """A secret in its address, or TLS that nobody set up: one line each."""
    result = CliRunner().invoke(cli, ["plan", "8,8", "--scheduler", scheduler])
    assert message in f"{result.output} {result.exception}"
    assert isinstance(result.exception, CddError | SystemExit)
    assert SECRET not in f"{result.output} {result.exception}"


# fuzzing


def test_fuzzing_finds_nothing(tmp_path: Path):
    """A hundred hostile inputs of every kind: no traceback, no write outside the output."""
    pytest.importorskip("resource")
    for library in ("astropy", "h5py", "tifffile", "nibabel"):
        pytest.importorskip(library)
    seed = ["--count", "100", "--seed", "1000"]
    command = [sys.executable, ROOT / "scripts/fuzz.py", *seed, "--findings", tmp_path / "found"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 inputs, 0 findings" in done.stdout
    assert not (tmp_path / "found").exists()


def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A traceback is a finding, and so is a file beside the output; a refusal is none."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import fuzz

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    assert fuzz.run(["info", str(tmp_path / "nothing.zarr")]) == ("refused", "")
    monkeypatch.setattr(cli.commands["info"], "callback", fail)
    outcome, text = fuzz.run(["info", str(tmp_path / "nothing.zarr")])
    assert outcome == "finding"
    assert "ZeroDivisionError" in text
    (tmp_path / "out").mkdir()
    sandbox = fuzz.Sandbox(tmp_path)
    before = sandbox.snapshot()
    (tmp_path / "out/allowed").touch()
    assert sandbox.snapshot() == before
    (tmp_path / "outside/written").touch()
    assert sandbox.snapshot() != before
