#!/usr/bin/env bash
# Every check a machine without a GPU can make. Uses the python on PATH, or the one given: tools/check.sh .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
bin=$(dirname "$(command -v "$python")")

step() {
  local start=$SECONDS
  echo "--- $*"
  "$@"
  echo "    $((SECONDS - start)) s"
}

step "$bin/ruff" check .
step "$bin/ruff" format --check .
sources=$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu')
step "$bin/clang-format" --dry-run -Werror $sources
step "$python" -m pytest -q
# Triton decides at import whether it interprets or compiles: a process each.
step env TRITON_INTERPRET=1 "$python" -m pytest -q tests/triton
step "$python" tools/triton_aot.py
if command -v nvcc > /dev/null; then
  step "$python" tools/check_cuda.py
else
  echo "--- no nvcc on this machine: the CUDA sources were run in the emulator but not compiled"
fi
