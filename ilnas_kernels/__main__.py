"""`python -m ilnas_kernels`: what was built, what this machine runs, and why."""

from importlib.metadata import version
from importlib.util import find_spec

import torch

from . import _C, dispatch


def main() -> None:
    sets = _C.instruction_sets()
    runs = ", ".join(name if works else f"{name} (not on this processor)" for name, works in sorted(sets.items()))
    print(f"ilnas {version('ilnas')} with torch {torch.__version__}")
    print(f"CPU kernels: {_C.best_instruction_set()} chosen of {runs}; {torch.get_num_threads()} threads")
    print(f"CUDA kernels: {_C.cuda_outcome}")
    print(f"Triton: {version('triton') if find_spec('triton') else 'not installed'}")
    print(f"GPU: {_gpu()}")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    device = torch.device("cuda", torch.cuda.current_device())
    route = dispatch.sparse_route(device) or dispatch.why_no_sparse_route(device, torch.float32)
    return f"{torch.cuda.get_device_name(device)}, kernels: {route}"


if __name__ == "__main__":
    main()
