"""The two masked operators as objects: a pattern, a geometry, and how each route computes with them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BATCH_LAST, CHANNELS_LAST, layout_of, to_layout
from .pattern import Pattern

_ilnas = torch.ops.ilnas
Gradients = Sequence[Tensor | None]


def conv_output_size(size: int, pad_before: int, pad_after: int, kernel: int, stride: int, dilation: int) -> int:
    return (size + pad_before + pad_after - dilation * (kernel - 1) - 1) // stride + 1


def below_autograd() -> AbstractContextManager:
    """Skips the operators' own gradient rule, 8 us a call in eager mode, where no gradient is recorded anyway."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def operator(name: str, route: str) -> Callable:
    """The operator of a sparse route: one name on all devices, with a suffix for Triton.

    The last argument is the instruction set, or for Triton the pattern's plan.
    """
    return getattr(_ilnas, f"{name}_triton" if route == "triton" else name).default


class ConvCall:
    """A convolution's geometry; padding is (top, bottom, left, right)."""

    weight_dim = 4

    def __init__(
        self,
        pattern: Pattern,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
    ) -> None:
        self.pattern = pattern
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.geometry = (tuple(pattern.shape[2:]), stride, padding, dilation, pattern.groups)
        self.kind = "conv" if pattern.taps > 1 else "conv1x1"
        top, bottom, left, right = padding
        self._symmetric = top == bottom and left == right

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        (kernel_height, kernel_width), stride, (top, bottom, left, right), dilation, _ = self.geometry
        return (
            conv_output_size(height, top, bottom, kernel_height, stride[0], dilation[0]),
            conv_output_size(width, left, right, kernel_width, stride[1], dilation[1]),
        )

    def forward_sparse(self, x: Tensor, values: Tensor, bias: Tensor | None, route: str, isa: str) -> Tensor:
        last = self._triton_plan(x) if route == "triton" else isa
        with below_autograd():
            return operator("masked_conv2d", route)(x, values, bias, *self.pattern.operands, *self.geometry, last)

    def backward_sparse(
        self, grad_out: Tensor, x: Tensor, values: Tensor, wanted: list[bool], route: str, isa: str
    ) -> Gradients:
        last = self._triton_plan(x) if route == "triton" else isa
        with below_autograd():
            return operator("masked_conv2d_backward", route)(
                grad_out, x, values, *self.pattern.operands, *self.geometry, wanted, last
            )

    def _triton_plan(self, x: Tensor) -> list[Tensor]:
        from .triton import conv2d_plan  # not on every platform

        return conv2d_plan(x, self.pattern, *self.geometry[:-1])

    def forward_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch_last = layout_of(x) == BATCH_LAST
        x, padding = self._padded(to_layout(x, CHANNELS_LAST) if batch_last else x)
        out = F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.pattern.groups)
        return to_layout(out, BATCH_LAST) if batch_last else out

    def backward_dense(self, grad_out: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Gradients:
        batch_last = layout_of(x) == BATCH_LAST
        if batch_last:
            x, grad_out = to_layout(x, CHANNELS_LAST), to_layout(grad_out, CHANNELS_LAST)
        padded, padding = self._padded(x)
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_out, padded, weight, [weight.shape[0]], self.stride, padding, self.dilation, False, [0, 0],
            self.pattern.groups, wanted,
        )  # fmt: skip
        if grad_x is not None:
            if padded is not x:
                top, _, left, _ = self.padding
                grad_x = grad_x[:, :, top : top + x.shape[2], left : left + x.shape[3]]
                grad_x = to_layout(grad_x, layout_of(x))
            if batch_last:
                grad_x = to_layout(grad_x, BATCH_LAST)
        return grad_x, grad_weight, grad_bias

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x and the padding left to conv2d, which knows only the symmetric one."""
        top, bottom, left, right = self.padding
        if self._symmetric:
            return x, (top, left)
        return F.pad(x, (left, right, top, bottom)), (0, 0)


class LinearCall:
    """A linear map of rows [batch, in]."""

    kind = "linear"
    weight_dim = 2

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def forward_sparse(self, x: Tensor, values: Tensor, bias: Tensor | None, route: str, isa: str) -> Tensor:
        last = self._triton_plan(x) if route == "triton" else isa
        with below_autograd():
            return operator("masked_linear", route)(x, values, bias, *self.pattern.operands, last)

    def backward_sparse(
        self, grad_out: Tensor, x: Tensor, values: Tensor, wanted: list[bool], route: str, isa: str
    ) -> Gradients:
        last = self._triton_plan(x) if route == "triton" else isa
        with below_autograd():
            return operator("masked_linear_backward", route)(grad_out, x, values, *self.pattern.operands, wanted, last)

    def _triton_plan(self, x: Tensor) -> list[Tensor]:
        from .triton import linear_plan  # not on every platform

        return linear_plan(x, self.pattern)

    def forward_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def backward_dense(self, grad_out: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Gradients:
        return (
            grad_out @ weight if wanted[0] else None,
            grad_out.t() @ x if wanted[1] else None,
            grad_out.sum(0) if wanted[2] else None,
        )


Call = ConvCall | LinearCall
