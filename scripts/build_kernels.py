"""Compile the CPU engine: from ``kernels.cpp``, a library per instruction set, beside it.

    python scripts/build_kernels.py

Wheels and editable installs are made the same way: hatchling calls the hook below. The compiler is
the one that the environment variable CXX names, or c++, g++ or clang++, or else Zig's, which pip
fetches (as the package `ziglang`) where no other is found.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "cdd_dask" / "engines" / "cpu"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512"
VARIANTS = {
    "x86_64": {"avx512": AVX512, "avx2": "-mavx2 -mfma", "portable": ""},
    "aarch64": {"neon": ""},
}
"""Flags for the instruction sets of each processor, the widest first."""
FLAGS = (
    "-std=c++17 -ffp-contract=off -fno-exceptions -fno-rtti -fvisibility=hidden "
    "-fno-trapping-math -fno-math-errno -fno-tree-slp-vectorize "
    "-Wall -Wextra -Wconversion"
)
GCC_ONLY = "-mtune-ctrl=^inter_unit_moves_from_vec"
"""Pointers that find no register wait in memory: to move them back from vectors' registers would
take a unit that arithmetic needs."""
FAST = "-O3"
SANITIZED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def target() -> list[str]:
    """The platform to compile for: ``[linux, x86_64]``, ``[macosx, 11.0, arm64]``."""
    parts = sysconfig.get_platform().split("-")
    if parts[0] == "macosx":  # Python may be for two processors, and for a version too precise
        _, version, machine = parts
        asked = re.search(r"-arch\s+(\w+)", os.environ.get("ARCHFLAGS", ""))
        machine = asked[1] if asked else machine.replace("universal2", platform.machine())
        version = os.environ.get("MACOSX_DEPLOYMENT_TARGET") or version
        if machine == "arm64" or not version.startswith("10."):
            version = f"{max(11, int(version.split('.')[0]))}.0"
        return ["macosx", version, machine]
    return parts


def processor() -> str:
    """The processor to compile for, as compilers name it."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(target()[-1], target()[-1])


def variants() -> dict[str, str]:
    """The instruction sets to compile for and their flags, the widest first."""
    return VARIANTS.get(processor(), {"portable": ""})


def installed_compiler() -> list[str]:
    """The command of the compiler that CXX names, or that is on the PATH; empty if there's none."""
    if named := os.environ.get("CXX"):
        return shlex.split(named, posix=os.name == "posix")
    if os.name == "nt":
        return []  # GCC puts vectors of AVX where Windows' stack is not aligned: its bug 54412
    for path in filter(None, map(shutil.which, ("c++", "g++", "clang++"))):
        # on macOS this may be a stub, which only says how to install one
        if not subprocess.run([path, "--version"], capture_output=True).returncode:
            return [path]
    return []


def compiler() -> list[str]:
    """The command of the compiler to use."""
    if not (found := installed_compiler()) and importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    return found or sys.exit("no C++ compiler: install g++, clang++ or PyPI's ziglang, or set CXX")


def run(command: list[str]) -> None:
    """Run a compiler; if it fails, this program ends with what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        failed, said = done.returncode, done.stderr
    except OSError as error:
        failed, said = 1, str(error)
    if failed:
        sys.exit(
            f"compiling the CPU engine failed:\n{shlex.join(command)}\n{said}\n"
            "Install a C++17 compiler (g++, clang++ or PyPI's ziglang), or name it in CXX."
        )
    sys.stderr.write(said)


def build(to: Path, command: list[str], mode: str, names: list[str]) -> list[Path]:
    """Compile libraries into a folder, at the same time; old ones stay until the new are whole."""
    system, *version, machine = target()
    command = list(command)
    flags, link = FLAGS.split() + mode.split(), ["-shared", *mode.split()]
    asked = [*command, GCC_ONLY, "-E", "-x", "c++", os.devnull]
    if processor() == "x86_64" and not subprocess.run(asked, capture_output=True).returncode:
        flags += [GCC_ONLY]
    if any(Path(word).stem in ("zig", "ziglang", "python-zig") for word in command):
        os_and_abi = {"linux": "linux-gnu.2.17", "win": "windows-gnu"}
        zig_target = f"{processor()}-{os_and_abi.get(system) or 'macos.' + version[0]}"
        command += ["-target", zig_target]  # else it compiles for this very machine
        if system != "win":  # elsewhere nothing of C++'s library is used: a minute less to compile
            link += ["-nostdlib++"]
    elif system == "macosx":
        command += ["-arch", machine, f"-mmacosx-version-min={version[0]}"]
    else:
        # nothing of C++'s library is used, whose static form not every system has
        link += ["-static"] if system == "win" else ["-static-libgcc", "-Wl,--as-needed"]
    if system != "win":
        flags += ["-fPIC"]
    if system != "macosx" and mode == FAST:
        link += ["-s"]
    if system == "linux":
        link += ["-lm", *(["-Wl,-z,defs"] if mode == FAST else [])]
    suffix = ".dll" if system == "win" else ".so"

    def build_one(name: str) -> Path:
        # git and wheels leave out what has such a name, should it stay behind
        with tempfile.TemporaryDirectory(suffix, "kernels_", to) as folder:
            compiled, library = f"{folder}/kernels.o", f"{folder}/kernels_{name}{suffix}"
            own = variants()[name].split()
            run([*command, *flags, *own, "-c", str(FOLDER / "kernels.cpp"), "-o", compiled])
            run([*command, compiled, *link, "-o", library])
            return Path(library).replace(to / Path(library).name)

    to.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build_one, reversed(names)))  # `portable` takes longest


def widest(command: list[str]) -> str:
    """The widest instruction set that this machine runs, as a library that is made to ask tells."""
    *others, least = variants()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        runs = ctypes.CDLL(str(build(Path(folder), command, "-O0", [least])[0])).cdd_runs
        return next((name for name in others if runs(name.encode())), least)


def main() -> None:
    """Compile as the command line says."""
    parser = argparse.ArgumentParser(description="Compile the CPU engine.")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder; else beside the source")
    parser.add_argument("--compiler", help="its command; else CXX, or the first that is found")
    parser.add_argument("--variants", nargs="+", choices=list(variants()), help="else all of them")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="stop at bad accesses and undefined behaviour (needs GCC or Clang); without "
        "--variants, only the widest one that this machine runs is compiled",
    )
    options = parser.parse_args()
    command = shlex.split(options.compiler) if options.compiler else compiler()
    mode = SANITIZED if options.sanitize else FAST
    names = options.variants or ([widest(command)] if options.sanitize else list(variants()))
    print(*build(options.to, command, mode, names), sep="\n")


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:
    pass  # this is run as a command
else:

    class KernelsHook(BuildHookInterface[Any]):
        """Puts the libraries into a wheel, which is then for one platform and every Python 3."""

        def dependencies(self) -> list[str]:
            """What pip installs before it builds."""
            wanted = self.target_name == "wheel" and not installed_compiler()
            return ["ziglang==0.17.*"] if wanted else []

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile, before the wheel is put together."""
            if self.target_name == "wheel":
                paths = build(FOLDER, compiler(), FAST, list(variants()))
                build_data["artifacts"] += [f"/cdd_dask/engines/cpu/{path.name}" for path in paths]
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{'_'.join(target()).replace('.', '_')}"


if __name__ == "__main__":
    main()
