"""absent_topk against torch's weight gradient alone, and against gradient + abs + mask + torch.topk.

k is 1 % of the weight.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ilnas_kernels import Pattern, absent_topk

from .bench_masked_conv2d import LAYOUTS
from .bench_masked_conv2d import SHAPES as CONV_SHAPES
from .bench_masked_linear import SHAPES as LINEAR_SHAPES
from .cases import THREADS, Case, Contenders, groups, label

DENSITIES = (0.5, 0.1, 0.01)
SHARE = 0.01
CONV_NAMES = (
    "dense_gradient_nchw", "dense_gradient_channels_last", "four_steps_nchw", "four_steps_channels_last",
    "ours_nchw", "ours_channels_last", "ours_batch_last",
)  # fmt: skip
LINEAR_NAMES = ("dense_gradient", "four_steps", "ours")


def cases() -> list[Case]:
    conv = [
        Case(
            op=f"absent_topk conv{kernel}x{kernel}",
            shape=f"{batch}x{in_channels}->{out_channels} {size}x{size}",
            density=density,
            threads=count,
            names=CONV_NAMES,
            build=partial(build_conv, batch, in_channels, out_channels, size, kernel, density),
        )
        for batch, in_channels, out_channels, size, kernel in CONV_SHAPES
        for count in THREADS
        for density in DENSITIES
    ]
    linear = [
        Case(
            op="absent_topk linear",
            shape=f"{batch}x{in_features}->{out_features}",
            density=density,
            threads=count,
            names=LINEAR_NAMES,
            build=partial(build_linear, batch, in_features, out_features, density),
        )
        for batch, in_features, out_features in LINEAR_SHAPES
        for count in THREADS
        for density in DENSITIES
    ]
    return conv + linear


def build_conv(batch: int, in_channels: int, out_channels: int, size: int, kernel: int, density: float) -> Contenders:
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern.random((out_channels, in_channels, kernel, kernel), density, generator=generator)
    x = torch.randn(batch, in_channels, size, size, generator=generator)
    grad_out = torch.randn(batch, out_channels, size, size, generator=generator)
    k = round(SHARE * pattern.numel)
    mask = pattern.mask
    contenders: Contenders = {}
    for layout, place in LAYOUTS.items():
        gradient = partial(_conv_gradient, place(x), place(grad_out), place(mask.float()), kernel // 2)
        ways = {
            "dense_gradient": gradient,
            "four_steps": _four_steps(gradient, mask, k),
            "ours": partial(absent_topk, place(x), place(grad_out), pattern, k, padding=kernel // 2),
        }
        contenders |= {f"{way}_{layout}": call for way, call in ways.items()}
    return {name: contenders[name] for name in CONV_NAMES}  # torch has no batch-last gradient


def build_linear(batch: int, in_features: int, out_features: int, density: float) -> Contenders:
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern.random((out_features, in_features), density, generator=generator)
    x = torch.randn(batch, in_features, generator=generator)
    grad_out = torch.randn(batch, out_features, generator=generator)
    k = round(SHARE * pattern.numel)
    gradient = partial(torch.mm, grad_out.t(), x)
    return {
        "dense_gradient": gradient,
        "four_steps": _four_steps(gradient, pattern.mask, k),
        "ours": partial(absent_topk, x, grad_out, pattern, k),
    }


def _conv_gradient(x: Tensor, grad_out: Tensor, weight: Tensor, padding: int) -> Tensor:
    return torch.ops.aten.convolution_backward(
        grad_out, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def _four_steps(gradient: Callable[[], Tensor], mask: Tensor, k: int) -> Callable[[], Tensor]:
    """The indices of the k absent weights of largest gradient, as torch computes them."""

    def call() -> Tensor:
        return torch.topk(gradient().abs_().masked_fill_(mask, -1.0).reshape(-1), k).indices

    return call


@pytest.mark.parametrize("case, contender", groups(cases()), ids=label)
def test_absent_topk(case: Case, contender: str, compare) -> None:
    compare(case, contender)
