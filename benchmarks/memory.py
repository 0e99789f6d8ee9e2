"""Memory: what a training step keeps for its weights, and what an operator takes at its peak.

``python -m benchmarks.memory peak CASE CONTENDER`` runs one call in a fresh process and prints the bytes by which the
resident memory peaked over what it was before the call (Linux).
"""

import ctypes
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ilnas_kernels import MaskedConv2d, MaskedLinear, convert

from . import bench_absent_topk, bench_masked_conv2d
from .network import ResNet

LAYER = (128, 256, 256, 8, 3)  # batch, in channels, out channels, height and width, kernel
TINY = (16, 16, 16, 4, 3)  # the same work on little data: libraries and thread pools are loaded before the count begins
LARGE = (8, 1024, 1024, 4, 3)  # 9.4 million weights on little data: where a dense gradient would show
DENSITY = 0.05

PEAKS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "conv3x3 forward": (partial(bench_masked_conv2d.build, "forward"), LAYER),
    "conv3x3 backward": (partial(bench_masked_conv2d.build, "backward"), LAYER),
    "absent_topk conv3x3": (bench_absent_topk.build_conv, LARGE),
}
RIVALS = {
    "conv3x3 forward": ("dense_channels_last", "ours_nchw", "ours_batch_last"),
    "conv3x3 backward": ("dense_channels_last", "ours_nchw", "ours_batch_last"),
    "absent_topk conv3x3": ("dense_gradient_nchw", "four_steps_nchw", "ours_nchw", "ours_batch_last"),
}


def measure_peaks() -> dict[str, dict[str, int]]:
    """Peak bytes above the inputs, outputs included, of every operator and contender; a process for each."""
    return {op: {name: _peak_in_fresh_process(op, name) for name in names} for op, names in RIVALS.items()}


def weight_state_bytes(density: float | None) -> dict[str, int]:
    """Bytes of a ResNet-18's convolution and linear weights, their gradients and momentum after one step.

    density None: dense. ``plan`` counts the patterns' index tensors, which are no part of the other three.
    """
    torch.manual_seed(0)
    model: nn.Module = ResNet()
    if density is not None:
        model = convert(model, density=density)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    plan = 0
    for layer in layers:
        if isinstance(layer, (MaskedConv2d, MaskedLinear)):
            layer.pack_()
            plan += sum(_bytes(value) for value in vars(layer.pattern).values() if isinstance(value, Tensor))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    weights = [parameter for layer in layers for name, parameter in layer.named_parameters() if name != "bias"]
    return {
        "weights": sum(map(_bytes, weights)),
        "gradients": sum(_bytes(weight.grad) for weight in weights),
        "momentum": sum(_bytes(optimizer.state[weight]["momentum_buffer"]) for weight in weights),
        "plan": plan,
    }


def measure_weight_state() -> dict[str, dict[str, int]]:
    return {
        "dense": weight_state_bytes(None),
        "density 0.1": weight_state_bytes(0.1),
        "density 0.05": weight_state_bytes(0.05),
    }


def peak_of(call: Callable[[], object]) -> int:
    """By how many bytes resident memory peaks during ``call`` over what it was before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
    call()
    return _status_bytes("VmHWM") - before


def _peak_in_fresh_process(op: str, contender: str) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "peak", op, contender]
    root = Path(__file__).parents[1]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status, which counts in kB."""
    return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main(arguments: list[str]) -> None:
    _, op, contender = arguments
    build, shape = PEAKS[op]
    build(*TINY, DENSITY)[contender]()
    print(peak_of(build(*shape, DENSITY)[contender]))


if __name__ == "__main__":
    main(sys.argv[1:])
