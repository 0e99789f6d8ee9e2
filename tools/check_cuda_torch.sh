#!/usr/bin/env bash
# Builds, links and imports the real CUDA extension against a CUDA torch, on a machine that needs no GPU: about 5 GB of
# packages in a throw-away environment, and ten minutes on 2 cores. tools/check_cuda_torch.sh [torch version]
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${1:-2.14.1}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==$torch" "setuptools>=77" ninja "pybind11>=2.13" numpy
# A copy, so that neither this tree's build folder nor its compiled modules are touched.
git ls-files -z | xargs -0 cp --parents -t "$folder"
cd "$folder"
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-"7.5;9.0"} venv/bin/pip install --no-build-isolation --no-deps -e .
venv/bin/python - <<'PYTHON'
import torch

import ilnas_kernels
from ilnas_kernels import _C_cuda

print("torch", torch.__version__, "CUDA", torch.version.cuda, "extension", _C_cuda.__file__)
for name in ("masked_conv2d", "masked_conv2d_backward", "masked_linear", "masked_linear_backward", "absent_topk"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ilnas::{name}", "CUDA"), f"{name} has no CUDA kernel"
PYTHON
