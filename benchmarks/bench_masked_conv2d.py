"""masked_conv2d against torch's dense convolution, forward and backward (gradient of the input and of the weights).

Dense torch computes with a weight whose absent entries are 0, in NCHW and channels_last; its backward yields the dense
weight gradient, ours that of the live weights. Outside the sparse range our layer keeps a dense weight, as it does by
default, and may take the dense route.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ilnas_kernels import MaskedConv2d, to_batch_last

from .cases import DENSITIES, SPARSE_DENSITIES, THREADS, Case, Contenders, groups, label

LAYOUTS = {
    "nchw": torch.Tensor.contiguous,
    "channels_last": partial(torch.Tensor.contiguous, memory_format=torch.channels_last),
    "batch_last": to_batch_last,
}
NAMES = ("dense_nchw", "dense_channels_last", "ours_nchw", "ours_channels_last", "ours_batch_last")
# batch, in channels, out channels, height and width, kernel
SHAPES = (
    (128, 64, 64, 32, 3),
    (128, 128, 128, 16, 3),
    (128, 256, 256, 8, 3),
    (32, 512, 512, 8, 3),
    (128, 256, 256, 16, 1),
)


def cases() -> list[Case]:
    return cases_of("", NAMES, build, DENSITIES)


def cases_of(prefix: str, names: tuple[str, ...], build: Callable[..., Contenders], densities: Sequence[float]):
    """Every shape, direction, number of threads and density of convolutions done in the named ways."""
    return [
        Case(
            op=f"{prefix}conv{kernel}x{kernel} {direction}",
            shape=f"{batch}x{in_channels}->{out_channels} {size}x{size}",
            density=density,
            threads=count,
            names=names,
            build=partial(build, direction, batch, in_channels, out_channels, size, kernel, density),
        )
        for batch, in_channels, out_channels, size, kernel in SHAPES
        for direction in ("forward", "backward")
        for count in THREADS
        for density in densities
    ]


def build(
    direction: str, batch: int, in_channels: int, out_channels: int, size: int, kernel: int, density: float
) -> Contenders:
    generator = torch.Generator().manual_seed(0)
    layer = MaskedConv2d(
        in_channels, out_channels, kernel, padding=kernel // 2, bias=False, density=density, generator=generator
    )
    dense_weight = layer.weight.detach().clone()
    if density in SPARSE_DENSITIES:
        layer.pack_()
    x = torch.randn(batch, in_channels, size, size, generator=generator)
    grad_out = torch.randn(batch, out_channels, size, size, generator=generator)
    contenders: Contenders = {}
    for name in NAMES:
        who, layout = name.split("_", 1)
        place = LAYOUTS[layout]
        if who == "dense":
            weight = place(dense_weight).clone(memory_format=torch.preserve_format).requires_grad_()
            call = partial(F.conv2d, weight=weight, padding=kernel // 2)
        else:
            (weight,) = layer.parameters()
            call = layer
        contenders[name] = (
            forward(call, place(x)) if direction == "forward" else backward(call, place(x), place(grad_out), weight)
        )
    return contenders


def forward(layer, x: Tensor):
    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def backward(layer, x: Tensor, grad_out: Tensor, weight: Tensor):
    """The backward pass alone; its graph is kept."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    return partial(torch.autograd.grad, out, (x, weight), grad_out, retain_graph=True)


@pytest.mark.parametrize("case, contender", groups(cases()), ids=label)
def test_masked_conv2d(case: Case, contender: str, compare) -> None:
    compare(case, contender)
