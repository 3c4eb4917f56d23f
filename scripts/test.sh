#!/usr/bin/env bash
# Makes what the tests need in .venv (once) and runs them on all cores. --slow adds the long proofs;
# other arguments go to pytest; --install-only stops before the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# what decides what is installed and compiled
stamp=.venv/.test-$(cat pyproject.toml scripts/build_kernels.py cdd_dask/engines/cpu/*.?pp | cksum | cut -d' ' -f1)
if [ ! -f "$stamp" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/pip install --quiet --upgrade pip
    # the CPU build of torch, before a dependency can ask for one with several GB of CUDA
    .venv/bin/pip install --quiet torch==2.13.0
    .venv/bin/pip install --quiet --editable '.[test]'
    touch "$stamp"
fi

select=(-m 'not slow')
rest=()
for argument in "$@"; do
    case $argument in
        --install-only) exit 0 ;;
        --slow) select=() ;;
        *) rest+=("$argument") ;;
    esac
done
exec .venv/bin/python -m pytest -n logical --dist worksteal ${select[@]+"${select[@]}"} ${rest[@]+"${rest[@]}"}
