#!/usr/bin/env bash
# The interpreter tests and the ahead-of-time compilation with the oldest and the newest Triton that is supported, each
# installed into a folder of its own; takes minutes and the network.
#   tools/triton_versions.sh [VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
versions=("$@")
if ((${#versions[@]} == 0)); then versions=(3.6.0 3.9.0); fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

for version in "${versions[@]}"; do
  echo "--- triton $version"
  "$python" -m pip install -q --no-deps --target "$folder/$version" "triton==$version"
  # Its interpreter calls what numpy 2.4 no longer has.
  if [[ $version == 3.6.* ]]; then "$python" -m pip install -q --no-deps --target "$folder/$version" "numpy<2.4"; fi
  export PYTHONPATH="$folder/$version:$PWD"
  "$python" -c "import triton; assert triton.__version__ == '$version', triton.__version__"
  TRITON_INTERPRET=1 "$python" -m pytest -q -p no:cacheprovider tests/triton
  "$python" tools/triton_aot.py
done
