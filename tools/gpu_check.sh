#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes: builds for the GPU that is there, runs the CUDA and
# Triton tests against float64, compute-sanitizer on a small set, and the benchmarks against cuDNN.
#   tools/gpu_check.sh [results folder]
# Needs torch with CUDA, nvcc, ninja and pybind11, and no network; pytest for the tests, without which a small set is
# checked. A step that fails does not stop the next ones; the exit status tells whether any did. The folder gets a log
# of each step, summary.json, gpu.json and gpu_triton.json. Uses the python on PATH, or $PYTHON.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu_results}")
python=${PYTHON:-python3}
mkdir -p "$out"
limit=535
failed=0
steps=()

# Records how a step went, also in summary.json, so that nothing is lost should the machine be taken away.
record() {
  echo "$1: $2"
  steps+=("{\"step\": \"$1\", \"outcome\": \"$2\"}")
  (IFS=,; echo "{\"seconds\": $SECONDS, \"steps\": [${steps[*]}]}") > "$out/summary.json"
}

# step NAME SECONDS COMMAND...: the log goes to NAME.log, its end to the screen.
step() {
  local name=$1 seconds=$2 status start=$SECONDS left
  shift 2
  left=$((limit - SECONDS))
  ((seconds < left)) || seconds=$left
  if ((seconds < 5)); then
    record "$name" "left out, no time"
    return 1
  fi
  timeout --kill-after=5 "$seconds" "$@" > "$out/$name.log" 2>&1
  status=$?
  if ((status == 0)); then
    record "$name" "passed in $((SECONDS - start)) s"
  else
    failed=1
    record "$name" "FAILED ($status) in $((SECONDS - start)) s"
  fi
  tail -n "${SHOW:-4}" "$out/$name.log"
  return $status
}

# Some installed packages bring a top-level `tests` of their own, which would hide this project's.
own_tests=$(mktemp -d)
trap 'rm -rf "$own_tests"' EXIT
mkdir "$own_tests/tests"
echo "__path__.append('$PWD/tests')" > "$own_tests/tests/__init__.py"
export PYTHONUNBUFFERED=1 PYTHONPATH=$own_tests:$PWD
# Only this GPU's code: the other architectures would take the time and could not be run.
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST
# Without the project's pytest configuration: plugins that it names may be missing.
pytest=("$python" -m pytest -q -c /dev/null --rootdir="$PWD" --noconftest -p no:cacheprovider)

SHOW=3 step machine 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
# Where the environment may not be written to, the extension beside its sources is enough.
if ! step build 240 "$python" -m pip install --no-build-isolation --no-deps -e .; then
  failed=0
  step build_in_place 240 "$python" setup.py build_ext --inplace
fi
step small_set 60 "$python" tools/gpu_small_set.py
if "$python" -c 'import pytest' 2> /dev/null; then
  SHOW=8 step cuda_tests 120 "${pytest[@]}" tests/cuda/test_gpu.py
  SHOW=8 step triton_tests 80 "${pytest[@]}" tests/triton/test_triton_gpu.py
else
  record tests "left out, no pytest"
fi

# The benchmarks keep the last two and a half minutes.
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    left=$((limit - 150 - SECONDS))
    step "sanitizer_$tool" $((left < 45 ? left : 45)) compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --target-processes all "$python" tools/gpu_small_set.py
  done
else
  record sanitizer "left out, no compute-sanitizer"
fi

# Two thirds of the time that is left to the CUDA kernels, the rest to Triton's.
benchmark() {
  local name=$1 module=$2 seconds=$3
  SHOW=400 step "$name" $((seconds + 15)) "$python" -m "$module" --out "$out" --seconds $((seconds > 10 ? seconds : 10))
}
benchmark benchmarks benchmarks.bench_gpu $(((limit - SECONDS - 35) * 2 / 3))
benchmark benchmarks_triton benchmarks.bench_gpu_triton $((limit - SECONDS - 20))
echo "--- $SECONDS s, $out/summary.json"
"$python" -m json.tool "$out/summary.json"
exit $failed
