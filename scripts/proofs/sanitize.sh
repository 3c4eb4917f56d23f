#!/usr/bin/env bash
# Runs the engines' tests with compiled code that stops at bad accesses and undefined behaviour.
# Needs GCC and the environment that scripts/test.sh makes; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/.venv/bin/python
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"
"$python" scripts/build_kernels.py --compiler g++ --sanitize
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=$copy
"$python" -m pytest -n logical tests/test_engines.py tests/test_pyramid.py tests/test_cpu_engine.py \
    -k "(cpu or cell or bits or thread or library or checked) and not instruction_set" "$@"
