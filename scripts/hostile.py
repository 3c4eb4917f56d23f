"""What `fuzz.py` feeds: whole files and stores, and ways to spoil them."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from cdd_dask.seals import sealed

RUN = "0123456789ab"
SCRATCH = f"cdd-dask-{RUN}.zarr"
FAST = ("--max-scale", "2", "--e-rel", "0.3", "--engine", "reference", "--executor", "serial",
        "--quiet")  # fmt: skip
"""Options of a run that takes no time."""

DEEP = "@deep@"
"""Stands for lists within lists until JSON is made of it."""
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 0.5, -0.0, 1e308, 5e-324, 2**31, 10**15, 2**63, 2**64,
    10**400, math.nan, math.inf, -math.inf, [], {}, [0], [-1, -1], [1, 1], [10**15, 10], [1e6, 2],
    [1] * 5, [[[]]], [None], ["a"], {"a": {"b": []}}, DEEP, "", " ", "0", "nan", "auto", "header",
    "|O", "<U4", "float64", "complex64", "M8[s]", "pickle", "numcodecs.pickle", "vlen-utf8", "gzip",
    "blosc", "sharding_indexed", "transpose", "../outside", "/etc/passwd", "../../../../tmp",
    f"../outside/{SCRATCH}", "in-memory:0", "object:0", "file:///etc/passwd", "reference://x",
    "memory://x", "https://me:pw@127.0.0.1:1/x?sig=1", "\0", "\x1b[31m", "\n", "é", "\ud800",
    "%s%n{0}", "x" * 5000,
)  # fmt: skip
"""Values that nobody expects."""

TEXTS = (
    "", "-", "--", "0", "-1", "1", "2", "3", "0.5", "1e-300", "1e308", "nan", "inf", "1,2", "1,,2",
    "9" * 5000, "1,1,1,1,1", "64", "32,8", "0,0", "-3,2", "1e6", "100MB", "1KiB", "-5GB", "MB",
    "float64", "lin", "log", "sampled", "wrap", "constant", "mask", "fill", "raise", "reference",
    "cpu", "cuda:99", "cuda:x", "serial", "threads", "header", "µm", "residual", "0,residual",
    "channel_00", ":", "3:", "::2", "5:2", "-3:,:", "1:2,3:4,5:6", "a:b", "npy", "fits", "tiff",
    "\x1b[31m", "\ud800", "é", "%s", "https://me:pw@127.0.0.1:1/x?sig=1", "s3://key:secret@b/x",
)  # fmt: skip
"""Arguments, some of which mean something."""
TAGS = ("!!int ", "!!float ", "!!bool ", "!!set ", "!!timestamp ", "!!binary ", "&a ", "*a ",
        "!!python/object/apply:os.system ", "? ")  # fmt: skip
"""What YAML may have before a value."""
NO_OPTIONS = {"config", "calibrate", "scheduler", "workers", "executor", "engine", "device"}
"""Options that are not drawn for a run: they start processes or wait for the network."""


def make_templates(folder: Path) -> None:
    """Whole files of every format, a whole store, and a whole config."""
    import h5py
    import nibabel
    import tifffile
    import yaml
    import zarr
    from astropy.io import fits

    import cdd_dask

    folder.mkdir()
    field = np.random.default_rng(0).lognormal(size=(12, 10)).astype("float32")
    np.save(folder / "field.npy", field)
    options = {"max_scale": 2, "e_rel": 0.3, "block": (6, 10), "engine": "reference"}
    cdd_dask.decompose(folder / "field.npy", folder / "store.zarr", progress=False, **options)
    known = {**options, "block": [6, 10], "nan": "fill", "dtype": "float64", "spacing": [2, 0.5],
             "unit": "µm", "memory": "1GB", "axes": [0, 1], "num_channels": None}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(known))

    header = fits.Header({"CTYPE1": "RA---TAN", "CDELT1": -0.1, "CDELT2": 0.1, "CUNIT1": "deg"})
    fits.writeto(folder / "field.fits", field, header)
    scaled = fits.PrimaryHDU((field * 9).astype("int16"))
    scaled.header["BSCALE"], scaled.header["BZERO"], scaled.header["BLANK"] = 0.5, 3.0, 7
    scaled.writeto(folder / "field_scaled.fits")
    tiles = fits.CompImageHDU((field * 9).astype("int16"), tile_shape=(6, 10))
    fits.HDUList([fits.PrimaryHDU(), tiles]).writeto(folder / "field_tiles.fits")
    with h5py.File(folder / "field.h5", "w") as file:
        data = file.create_dataset("group/data", data=field, chunks=(6, 5), compression="gzip")
        data.attrs["spacing"], data.attrs["units"] = [2.0, 0.5], "um"
        data.attrs["scale_factor"], data.attrs["_FillValue"] = 2.0, -1.0
    tifffile.imwrite(folder / "field.ome.tif", field[None], ome=True, metadata={"axes": "ZYX"})
    stack = (field * 9).astype("uint8")[None].repeat(3, 0)
    tifffile.imwrite(folder / "field_zip.tif", stack, compression="zlib", tile=(16, 16))
    tifffile.imwrite(folder / "field_imagej.tif", stack, imagej=True, metadata={"spacing": 2.0})
    image = nibabel.Nifti1Image(field[..., None], np.eye(4))
    image.header.set_slope_inter(2.0, 1.0)
    nibabel.save(image, folder / "field.nii")
    nibabel.save(image, folder / "field_packed.nii.gz")
    zarr.create_array(folder / "field.zarr", data=field, chunks=(6, 5))
    zarr.create_array(folder / "field_2.zarr", data=field, chunks=(6, 5), zarr_format=2)
    group = zarr.open_group(folder / "field_ome.zarr", mode="w")
    group.create_array("0", data=field, shards=(12, 10), chunks=(6, 5))
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    scale = [{"type": "scale", "scale": [2.0, 0.5]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}


def spoiled(random: Random, data: bytes, header: int | None = None) -> bytes:
    """Bytes with flipped bits, other bytes, pieces cut out, doubled or cut off.

    Most of it within the first `header` bytes, if given.
    """
    spoilt = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        end = len(spoilt) if header is None or random.random() < 0.2 else min(header, len(spoilt))
        if not end:
            break
        place, length = random.randrange(end), random.choice((1, 2, 4, 8, 64))
        kind = random.randrange(7)
        if kind < 2:
            spoilt[place] ^= 1 << random.randrange(8)
        elif kind == 2:
            spoilt[place : place + length] = random.randbytes(length)
        elif kind == 3:
            spoilt[place : place + length] = random.choice((b"\xff", b"\0", b"\x7f")) * length
        elif kind == 4:
            del spoilt[place : place + length]
        elif kind == 5:
            spoilt[place:place] = spoilt[place : place + length]
        else:
            del spoilt[place:]
    return bytes(spoilt)


def spoiled_file(random: Random, path: Path) -> bytes:
    """A file's bytes with other values in its header, or other bytes."""
    data = path.read_bytes()
    if ".fits" in path.name and random.random() < 0.6:
        return _spoiled_cards(random, data)
    if path.suffix == ".npy" and random.random() < 0.6:
        return _spoiled_npy(random, data)
    header = {".npy": 128, ".nii": 352, ".fits": 2880}.get(path.suffix)
    return spoiled(random, data, header if random.random() < 0.8 else None)


def _spoiled_cards(random: Random, data: bytes) -> bytes:
    """A FITS file with other values on some of its cards."""
    cards = [m.start() for m in re.finditer(rb"[A-Z0-9_-]{1,8} *= .{70}", data)]
    spoilt = bytearray(data)
    for place in random.sample(cards, min(len(cards), random.choice((1, 1, 2, 4)))):
        value = str(random.choice((*VALUES, "T", "-32", "-64", "8", "16", "3", "'IMAGE   '")))
        text = value.encode("utf-8", "replace")[:70].rjust(20)
        spoilt[place + 10 : place + 80] = text.ljust(70)[:70]
    return bytes(spoilt)


def _spoiled_npy(random: Random, data: bytes) -> bytes:
    """A `.npy` file with another header of the same form."""
    known = {"descr": "<f4", "fortran_order": False, "shape": (12, 10)}
    for _ in range(random.choice((1, 1, 2))):
        known[random.choice(list(known))] = random.choice((*VALUES, ("a",), (-1, 5), (10**9,) * 3))
    if random.random() < 0.2:
        known.pop(random.choice(list(known)))
    text = repr(known).encode("utf-8", "replace")
    return data[:8] + (len(text) + 1 & 0xFFFF).to_bytes(2, "little") + text + b"\n" + data[128:]


def spoiled_config(random: Random, path: Path) -> bytes:
    """A config file with other options, or other bytes."""
    data = path.read_bytes()
    if random.random() < 0.4:
        return spoiled(random, data)
    lines = []
    for _ in range(random.choice((1, 1, 2, 3))):
        key = random.choice((*re.findall(r"^\w+", data.decode(), re.M), "out", "source", "é", "a"))
        tag = random.choice(TAGS) if random.random() < 0.3 else ""
        value = random.choice((*VALUES, *TEXTS))
        shown = value if random.random() < 0.5 else to_json(value).decode("utf-8", "replace")
        lines.append(f"{key}: {tag}{shown}")
    kept = random.choice((data.decode() + "\n", ""))
    return (kept + "\n".join(lines)).encode("utf-8", "replace")


def to_json(value: Any) -> bytes:
    """JSON as nobody should write it: infinities, lone surrogates, endless nesting."""
    depth = 100_000
    return json.dumps(value).replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode()


def spoil_metadata(random: Random, store: Path, sandbox: Path) -> None:
    """Change the metadata of a Zarr hierarchy: one file, or the same value in all of them."""
    names = ("zarr.json", ".zarray", ".zattrs", ".zgroup")
    files = sorted(path for path in store.rglob("*") if path.name in names)
    chosen = files[0] if random.random() < 0.5 else random.choice(files)
    if random.random() < 0.1:
        chosen.write_bytes(spoiled(random, chosen.read_bytes()))
        return
    if random.random() < 0.05:
        chosen.unlink()
        return
    stated = json.loads(chosen.read_bytes())
    value = random.choice((*VALUES, str(sandbox / "outside" / SCRATCH)))
    if random.random() < 0.2 and stated:
        old = random.choice([item for *_, item in _places(stated)])
        for path in files:
            replaced = _replaced(json.loads(path.read_bytes()), old, value)
            _seal(replaced)
            path.write_bytes(to_json(replaced))
        return
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(stated))
        if places:
            _spoil(random, *random.choice(places)[:2])
    if random.random() < 0.7:
        _seal(stated)
    data = to_json(stated)
    if random.random() < 0.05:  # a key twice
        key = random.choice(re.findall(rb'"[a-z_]+": ', data) or [b""])
        data = data.replace(key, key + to_json(value) + b", " + key, 1)
    chosen.write_bytes(data)


def _seal(stated: Any) -> None:
    """Make the checksum of attributes right again: who edits them can do that, too."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        stated["attributes"]["cdd_dask"] = sealed(stated["attributes"]["cdd_dask"])


def _places(value: Any) -> Any:
    """All (container, key, item) within JSON, which may be nested deeper than functions may."""
    left = [value]
    while left:
        container = left.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, item in list(items):
            yield container, key, item
            if isinstance(item, dict | list):
                left.append(item)


def _spoil(random: Random, container: Any, key: Any) -> None:
    """Change one item: another value, another key, gone, or twice."""
    kind = random.randrange(10)
    value = container[key]
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[str(random.choice(VALUES))] = container.pop(key)
    elif kind == 1:
        container.insert(key, value)
    elif kind == 2 and type(value) in (int, float):
        container[key] = random.choice((-value, value + 1, value * 10**6, str(value), [value]))
    else:
        container[key] = random.choice(VALUES)


def _replaced(value: Any, old: Any, new: Any) -> Any:
    """JSON with `new` wherever there was `old`."""
    if type(value) is type(old) and value == old:
        return new
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    return [_replaced(item, old, new) for item in value] if isinstance(value, list) else value


def arguments(random: Random, source: Path, store: Path, out: Path) -> list[str]:
    """A command line of a known command, with known options and any values."""
    from cdd_dask.cli import cli

    name = random.choice(sorted(cli.commands))
    command = cli.commands[name]
    given = [name]
    for parameter in command.params:
        if parameter.param_type_name == "argument" and random.random() < 0.95:
            whole = source if parameter.name == "source" else store
            given.append(str(whole) if random.random() < 0.7 else random.choice(TEXTS))
    if name == "decompose":
        # what is written may be anywhere that the user names, so only places in `out` are named
        given = [name, str(source) if random.random() < 0.9 else random.choice(TEXTS)]
        given += [str(random.choice((out / "new.zarr", store, out))), *FAST]
    skipped = (
        NO_OPTIONS if name in ("decompose", "doctor") else {"config", "calibrate", "scheduler"}
    )
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in skipped]
    for option in random.sample(options, min(len(options), random.choice((0, 1, 1, 2, 4)))):
        given.append(random.choice((*option.opts, *option.secondary_opts)))
        if option.name in ("out", "csv_file", "scratch"):
            given.append(str(out / random.choice(("a", "b.npy", "c.fits", "a/b", "store.zarr"))))
        elif not option.is_flag:
            given.append(random.choice(TEXTS))
    if random.random() < 0.05:
        # not between an option and its value, which may be where something is written
        place = random.choice((1, len(given)))
        given.insert(place, random.choice((*TEXTS, "--nothing", "-x")))
    return [text.replace("\0", "") for text in given]
