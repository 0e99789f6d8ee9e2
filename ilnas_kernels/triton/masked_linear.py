"""masked_linear in Triton: out[b,o] = bias[o] + sum over live (o,i) of values * x[b,i], its gradients, and the
operators ilnas::masked_linear_triton and ilnas::masked_linear_backward_triton.

The kernels are masked_conv2d's: a linear layer is a 1x1 convolution over 1x1 images; window arithmetic folds away.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op

from ..pattern import Pattern
from . import masked_conv2d as conv2d
from .gradients import register_backward
from .launch import Table, precision_of

# A batch has far fewer rows than images have positions: smaller tiles, to occupy the device.
_BLOCK_BATCH = 64
LAUNCH_TABLE: Table = {
    key: {
        name: config._replace(block_pixels=min(config.block_pixels, _BLOCK_BATCH)) for name, config in configs.items()
    }
    for key, configs in conv2d.LAUNCH_TABLE.items()
}
# It spills a few registers otherwise, with Triton 3.9.
_SM75 = LAUNCH_TABLE["sm75", "float32"]
_SM75["wide"] = _SM75["wide"]._replace(warps=8)


def geometry(x: Tensor, out_features: int) -> conv2d.Geometry:
    precision = precision_of(x, torch.backends.cuda.matmul.allow_tf32)
    return conv2d.geometry(as_image(x), out_features, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, precision)


def linear_plan(x: Tensor, pattern: Pattern) -> list[Tensor]:
    """What the operators take as `plan` for an input like x: from the pattern's cache, or built and kept there."""
    return conv2d.plan_of(LAUNCH_TABLE, geometry(x, pattern.shape[0]), as_image(x), pattern)


def as_image(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


@triton_op("ilnas::masked_linear_triton", mutates_args=())
def masked_linear_triton(
    x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col: Tensor, t_row_ptr: Tensor, t_col: Tensor,
    t_perm: Tensor, plan: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The arguments of ilnas::masked_linear, and linear_plan's answer, or nothing, to have it made on each call."""
    g = geometry(x, row_ptr.numel() - 1)
    out = x.new_empty(g.batch, g.out_channels)
    conv2d.forward(LAUNCH_TABLE, g, as_image(x), values, bias, row_ptr, col, plan, as_image(out))
    return out


@triton_op("ilnas::masked_linear_backward_triton", mutates_args=())
def masked_linear_backward_triton(
    grad_out: Tensor, x: Tensor, values: Tensor, row_ptr: Tensor, col: Tensor, t_row_ptr: Tensor, t_col: Tensor,
    t_perm: Tensor, output_mask: Sequence[bool], plan: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, values and bias; one that output_mask leaves out is an empty tensor."""
    g = geometry(x, row_ptr.numel() - 1)
    grad_x = x.new_empty(x.shape) if output_mask[0] else x.new_empty(0)
    grads = conv2d.backward(
        LAUNCH_TABLE, g, as_image(grad_out), as_image(x), values, row_ptr, col, t_row_ptr, t_col, t_perm,
        output_mask, plan, as_image(grad_x) if output_mask[0] else grad_x,
    )  # fmt: skip
    return grad_x, *grads


@masked_linear_triton.register_fake
def _(x, values, bias, row_ptr, col, t_row_ptr, t_col, t_perm, plan):
    return x.new_empty(x.shape[0], row_ptr.shape[0] - 1)


register_backward("masked_linear", masked_linear_backward_triton)
