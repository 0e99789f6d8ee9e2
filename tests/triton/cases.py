"""Layers to run, what they should give in float64, and how far rounding may take a kernel from it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ilnas_kernels import Pattern

LAYOUTS = {"nchw": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "batch_last": (1, 2, 3, 0)}
# Of the storage formats: half the distance of neighbouring numbers, relative. The interpreter cuts bfloat16 off instead
# of rounding it, which loses up to twice as much.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}
TF32_UNIT = 2.0**-11


class Conv(NamedTuple):
    """A convolution's sizes; padding is top, bottom, left, right."""

    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As torch computes it."""
        top, bottom, left, right = self.padding
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


CONVS = {
    "odd": Conv(2, 5, 7, (9, 8)),
    "one_pixel": Conv(1, 3, 2, (1, 1)),
    "pointwise": Conv(3, 17, 33, (5, 7), (1, 1), padding=(0, 0, 0, 0)),
    "pointwise_strided": Conv(2, 6, 5, (7, 5), (1, 1), (2, 2), (0, 0, 0, 0)),
    "no_padding": Conv(2, 4, 3, (7, 6), padding=(0, 0, 0, 0)),
    "groups_strided_dilated_asymmetric": Conv(2, 6, 40, (9, 11), (3, 2), (2, 3), (2, 0, 1, 1), (2, 1), 2),
    "stride_beyond_kernel": Conv(1, 3, 4, (11, 10), (2, 2), (3, 4), (0, 1, 2, 0)),
    "depthwise": Conv(2, 5, 10, (6, 5), groups=5),
    "padding_beyond_kernel": Conv(1, 2, 3, (4, 3), (2, 2), padding=(3, 2, 4, 1)),
    "many_channels": Conv(1, 35, 34, (5, 4), (3, 3), (2, 1), (1, 2, 0, 3), (1, 2)),
}


def in_layout(x: Tensor, layout: str) -> Tensor:
    order = LAYOUTS[layout]
    return x.permute(order).contiguous().permute([order.index(d) for d in range(4)])


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers of a storage format, as float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()


def random_pattern(shape, density: float, groups: int = 1, seed: int = 0) -> Pattern:
    return Pattern.random(shape, density, groups, generator=torch.Generator().manual_seed(seed))


def dense(pattern: Pattern, values: Tensor) -> Tensor:
    """The dense weight of packed values."""
    return values.new_zeros(pattern.numel).index_put((pattern.index,), values).view(pattern.shape)


def assert_sums_close(got: Tensor, exact: Tensor, of_magnitudes: Tensor, terms: int, dtype: torch.dtype, product=None):
    """Whether each entry is a sum of ``terms`` products, taken in fp32 in any order and stored in ``dtype``.

    Summing n products in fp32 is off by at most n * 2**-24 (1 + small) of the sum of their magnitudes, rounding the
    result by UNIT[dtype] of itself. product: the relative error of each factor as it is multiplied, 0 if left out.
    """
    bound = (terms + 2) * 2.0**-24 * of_magnitudes
    if product is not None:
        bound = bound + (2 * product + product**2) * of_magnitudes
    bound = bound + UNIT[dtype] * (exact.abs() + bound) + SMALLEST[dtype]
    error = (got.double() - exact).abs()
    worst = (error - bound).max() if error.numel() else 0
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    assert (error <= bound).all(), f"off by {error.max():.3e}, {worst:.3e} beyond the bound"


class Expected(NamedTuple):
    """Output and gradients in float64; `magnitudes`: the same of the absolute operands, for the bounds."""

    out: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def expected(layer, x: Tensor, weight: Tensor, bias: Tensor, grad_out: Tensor) -> Expected:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = layer(*leaves)
    return Expected(out.detach(), *torch.autograd.grad(out, leaves, grad_out))
