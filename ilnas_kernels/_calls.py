"""The two masked operators as objects: a pattern, a geometry, and how each route computes with them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from ._condensed_forms import kept_form
from ._geometry import AS_CONVOLUTION, conv_output_size
from .layout import BATCH_LAST, CHANNELS_LAST, layout_of, to_layout
from .pattern import Pattern

_ilnas = torch.ops.ilnas
_OUT_OF_MEMORY = "CUDA out of memory."  # so begins what csrc/torch/kernels_cuda.cpp throws
Gradients = Sequence[Tensor | None]


def below_autograd() -> AbstractContextManager:
    """Skips the operators' own gradient rule, 8 us a call in eager mode, where no gradient is recorded anyway."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def run_operator(function: Callable, *arguments) -> Any:
    """Calls an operator. Out of memory on the device is torch's own error, whose type the stable ABI cannot carry."""
    if torch.compiler.is_compiling():
        return function(*arguments)
    try:
        with below_autograd():
            return function(*arguments)
    except RuntimeError as error:
        if str(error).startswith(_OUT_OF_MEMORY) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def operator(name: str, route: str) -> Callable:
    """The operator of a sparse route: one name on all devices, with a suffix for Triton.

    Its last arguments are the instruction set and the form kept for the CUDA kernels, or for Triton the pattern's plan.
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
        return run_operator(
            operator("masked_conv2d", route), x, values, bias, *self.pattern.operands, *self.geometry,
            *self._last(x, route, isa, backward=False),
        )  # fmt: skip

    def backward_sparse(
        self, grad_out: Tensor, x: Tensor, values: Tensor, wanted: list[bool], route: str, isa: str
    ) -> Gradients:
        return run_operator(
            operator("masked_conv2d_backward", route), grad_out, x, values, *self.pattern.operands, *self.geometry,
            wanted, *self._last(x, route, isa, backward=True, wanted=wanted[0]),
        )  # fmt: skip

    def adds_gradient(self, total: Tensor, x: Tensor, route: str) -> bool:
        """Whether the route can add the gradient of x to a tensor by itself."""
        return route == "sparse" and total.dtype == x.dtype and not torch.is_grad_enabled()

    def backward_sparse_add_(
        self, grad_out: Tensor, x: Tensor, values: Tensor, total: Tensor, wanted: list[bool], isa: str
    ) -> Gradients:
        """Adds the gradient of x to ``total``; returns those of the values and the bias."""
        return run_operator(
            operator("masked_conv2d_backward_add_", "sparse"), grad_out, x, values, total, *self.pattern.operands,
            *self.geometry, wanted, isa,
        )  # fmt: skip

    def _last(self, x: Tensor, route: str, isa: str, *, backward: bool, wanted: bool = True) -> tuple:
        """The arguments in which the routes differ."""
        if route == "cuda" and wanted:
            return isa, kept_form(self.pattern, x, x.shape, self.geometry, backward=backward)
        if route == "triton":
            from .triton import conv2d_plan  # not on every platform

            return (conv2d_plan(x, self.pattern, *self.geometry[:-1]),)
        return (isa,)

    def outruns_torch(self, x: Tensor) -> bool:
        """Whether the dense route beats torch's own layer even where all weights are live."""
        return False

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
        return run_operator(
            operator("masked_linear", route), x, values, bias, *self.pattern.operands,
            *self._last(x, route, isa, backward=False),
        )  # fmt: skip

    def backward_sparse(
        self, grad_out: Tensor, x: Tensor, values: Tensor, wanted: list[bool], route: str, isa: str
    ) -> Gradients:
        return run_operator(
            operator("masked_linear_backward", route), grad_out, x, values, *self.pattern.operands, wanted,
            *self._last(x, route, isa, backward=True, wanted=wanted[0]),
        )  # fmt: skip

    def _last(self, x: Tensor, route: str, isa: str, *, backward: bool, wanted: bool = True) -> tuple:
        """The arguments in which the routes differ."""
        if route == "cuda" and wanted:
            return isa, kept_form(self.pattern, x, (*x.shape, 1, 1), AS_CONVOLUTION, backward=backward)
        if route == "triton":
            from .triton import linear_plan  # not on every platform

            return (linear_plan(x, self.pattern),)
        return (isa,)

    def outruns_torch(self, x: Tensor) -> bool:
        """Whether the dense route beats torch's own layer even where all weights are live."""
        return _onednn_is_faster(x, self.pattern.numel)

    def forward_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, weight, bias)

    def backward_dense(self, grad_out: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Gradients:
        return (
            _linear(grad_out, weight.t()) if wanted[0] else None,
            _linear(grad_out.t(), x.t()) if wanted[1] else None,
            grad_out.sum(0) if wanted[2] else None,
        )


# Products from here on oneDNN takes a tenth to half less time for than MKL on processors other than Intel's, and no
# less below.
_ONEDNN_PRODUCTS = 2**24


def _onednn_is_faster(x: Tensor, weight_numel: int) -> bool:
    """Whether oneDNN's linear, which has no gradient of its own, beats F.linear on rows x of inputs."""
    return (
        _C.mkl_is_slower
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[:-1].numel() * weight_numel >= _ONEDNN_PRODUCTS
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.backends.mkldnn.is_available()
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by the faster of torch's two libraries."""
    if not torch.is_grad_enabled() and _onednn_is_faster(x, weight.numel()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


Call = ConvCall | LinearCall
