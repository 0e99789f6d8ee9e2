"""What the CUDA kernels serve, and the densities below which they should win. The densities are predictions.

They come from the resource model of the kernels for 3x3 layers of 256 channels; `calibrate(device="cuda")` replaces
them by measurements.
"""

import re
from functools import cache
from importlib.util import find_spec

import torch

from . import _C

MINIMUM_CAPABILITY = (7, 5)
SOURCE = "predicted by a resource model"

# (forward, grad_input, grad_weight) by compute capability and what dense torch computes in: where the geometric mean
# of the model's bounds (tools/resource_model.py) meets the dense time it assumes. An RTX 2060 Super stands for sm_75,
# an H200 for sm_80 and newer, whose tensor cores outrun the shared memory that sparse kernels read.
_PREDICTED = {
    ("sm_75", "float32"): (0.16, 0.16, 0.22),
    ("sm_75", "float16"): (0.17, 0.17, 0.12),
    ("sm_75", "bfloat16"): (0.16, 0.16, 0.22),  # no tensor core takes it there, in dense torch either
    ("sm_80", "float32"): (0.13, 0.13, 0.16),
    ("sm_80", "tf32"): (0.02, 0.02, 0.025),
    ("sm_80", "float16"): (0.02, 0.02, 0.01),
    ("sm_80", "bfloat16"): (0.02, 0.02, 0.01),
}
# A 1x1 convolution or a linear layer stages as many images a multiply-add as a 3x3 one does for nine taps.
_KIND_FACTOR = {"conv": 1.0, "conv1x1": 0.6, "linear": 0.5}


@cache
def why_not(device: torch.device) -> str | None:
    """Why the CUDA kernels do not run on a CUDA device; None if they do."""
    if torch.version.cuda is None or find_spec("ilnas_kernels._C_cuda") is None:
        return f"the CUDA kernels are {_C.cuda_outcome}"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return "the CUDA kernels need compute capability {}.{}, {} has {}.{}".format(
            *MINIMUM_CAPABILITY, torch.cuda.get_device_name(device), *capability
        )
    if not runs_on(capability, _C.cuda_outcome):
        return "the CUDA kernels are {}, {} has compute capability {}.{}".format(
            _C.cuda_outcome, torch.cuda.get_device_name(device), *capability
        )
    return None


def runs_on(capability: tuple[int, int], built_for: str) -> bool:
    """Whether a device runs what was built for such a list of architectures, e.g. "7.5;8.6 9.0+PTX".

    Machine code runs on later devices of its generation, PTX on all later ones.
    """
    for major, minor, ptx in re.findall(r"(\d+)\.(\d)a?(\+PTX)?", built_for):
        target = int(major), int(minor)
        if target <= capability and (ptx or target[0] == capability[0]):
            return True
    return False


def predicted(kind: str, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[float, float, float]:
    """The crossovers of forward, grad_input and grad_weight."""
    generation = "sm_80" if capability >= (8, 0) else "sm_75"
    tf32 = torch.backends.cuda.matmul.allow_tf32 if kind == "linear" else torch.backends.cudnn.allow_tf32
    dense = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and tf32 and generation == "sm_80":
        dense = "tf32"
    factor = _KIND_FACTOR[kind]
    forward, grad_input, grad_weight = _PREDICTED[generation, dense]
    return factor * forward, factor * grad_input, factor * grad_weight
