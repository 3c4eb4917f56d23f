#!/usr/bin/env bash
# From nothing to a result: makes .venv (once), decomposes a turbulence cube of 128³ voxels, or
# the file given, out of core, and checks the sum.
#   bash scripts/demo.sh [cube.fits] [options of `cdd-dask decompose`]
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
venv=$here/.venv

# what decides what is installed and compiled
stamp=$venv/.demo-$(cat "$here"/{pyproject.toml,scripts/build_kernels.py,cdd_dask/engines/cpu/*.?pp} | cksum | cut -d' ' -f1)
if [ ! -f "$stamp" ]; then
    echo "Installing into $venv (once) ..."
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --upgrade pip
    "$venv/bin/pip" install --quiet --editable "$here[files]"
    touch "$stamp"
fi

work=${CDD_DEMO_DIR:-$here/demo}
mkdir -p "$work"
budget=(--max-scale 8)
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    source=$1
    shift
else
    source=$work/turbulence.npy
    # too little memory for the whole cube: it is computed in blocks; to say that no voxel is
    # blank saves some
    budget+=(--memory 40MB --workers 2 --nan raise)
    [ -f "$source" ] || "$venv/bin/python" "$here/scripts/turbulence.py" "$source" --size 128
fi
name=$(basename "$source")
out=$work/${name%%.*}.zarr

echo "Decomposing $source into $out"
"$venv/bin/cdd-dask" decompose "$source" "$out" "${budget[@]}" --overwrite "$@"
"$venv/bin/cdd-dask" verify "$out"
