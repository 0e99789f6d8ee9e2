"""The masked operators as functions: arguments checked, routes chosen, gradients wired."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from ._calls import Call, ConvCall, LinearCall, run_operator
from ._checks import (
    FLOATS,
    as_pattern,
    autocasts,
    check_mask_type,
    check_operands,
    check_output_size,
    check_same_shape,
    conv_call,
)
from ._geometry import AS_CONVOLUTION
from ._masked import GradientSum, run_masked
from .pattern import Pattern, rows_of


def masked_conv2d(
    x: Tensor,
    weight_or_values: Tensor,
    mask_or_pattern: Tensor | Pattern,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``out[n,o,h,w] = bias[o] + sum over live (o,c,i,j) of weight[o,c,i,j] * x[n, c, h*stride + i*dilation, ..]``.

    x: [N, C, H, W] or [C, H, W]. weight_or_values: the weight [out, C / groups, kh, kw], whose absent entries do not
    matter and get the gradient 0, or the packed live values [nnz]. mask_or_pattern: bool, true where live, of the
    weight's shape, or a Pattern (a mask is compressed anew at every call). padding: as in torch's conv2d, or
    (top, bottom, left, right). The answer comes in the layout of ``x``; under autocast in the dtype conv2d would take.
    """
    op = "masked_conv2d"
    pattern = _pattern(op, mask_or_pattern, groups, ConvCall.weight_dim)
    check_operands(op, x, weight_or_values, pattern, bias)
    call = conv_call(op, pattern, stride, padding, dilation, groups)
    return run_conv2d(op, x, weight_or_values, bias, call)


def masked_linear(
    x: Tensor, weight_or_values: Tensor, mask_or_pattern: Tensor | Pattern, bias: Tensor | None = None
) -> Tensor:
    """``out[..., o] = bias[o] + sum over the live (o,i) of weight[o,i] * x[..., i]``.

    x: [..., in]. weight_or_values: the weight [out, in], whose absent entries do not matter and get the gradient 0, or
    the packed live values [nnz]. mask_or_pattern: as in :func:`masked_conv2d`.
    """
    op = "masked_linear"
    pattern = _pattern(op, mask_or_pattern, 1, LinearCall.weight_dim)
    check_operands(op, x, weight_or_values, pattern, bias)
    return run_linear(x, weight_or_values, bias, LinearCall(pattern))


def absent_topk(
    x: Tensor,
    grad_out: Tensor,
    mask_or_pattern: Tensor | Pattern,
    k: int,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    exclude: Tensor | Pattern | None = None,
    granularity: str = "weight",
) -> tuple[Tensor, Tensor]:
    """The k absent weights of largest ``|dL/dweight|``: index int64 [k] and signed gradient float32 [k], descending.

    x, grad_out: input of the layer and gradient of its output, [N, C, H, W] and [N, out, H', W'], or for linear
    [..., in] and [..., out]; the pattern's shape tells which. index is flat into the weight. exclude: positions never
    proposed, bool of the weight's shape or a Pattern. granularity "kernel": candidates are (output, input) channel
    pairs with an absent tap, index ``o * (C / groups) + c``, scored by the root mean square of their absent taps'
    gradients. Ties go to the lowest index; fewer than k candidates give fewer entries. The dense gradient never exists
    in memory. ArithmeticError when a gradient is not finite.
    """
    op = "absent_topk"
    pattern = _pattern(op, mask_or_pattern, groups, None)
    index, grad, non_finite = topk_with_count(
        op, x, grad_out, pattern, k, stride, padding, dilation, groups, exclude, granularity
    )
    if non_finite:
        raise ArithmeticError(f"{op}: the gradients of {non_finite} absent candidates are NaN or infinite")
    return index, grad


def topk_with_count(
    op: str,
    x: Tensor,
    grad_out: Tensor,
    pattern: Pattern,
    k: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    exclude: Tensor | Pattern | None = None,
    granularity: str = "weight",
    floor: float = 0.0,
) -> tuple[Tensor, Tensor, int]:
    """(index, grad, number of non-finite candidates); candidates scored below ``floor`` are left out."""
    check_topk_options(op, k, granularity)
    _check_pair(op, x, grad_out, pattern)
    by_kernel = granularity == "kernel"
    row_ptr, col = (pattern.row_ptr, pattern.col) if exclude is None else _blocked(op, pattern, exclude)
    if len(pattern.shape) == 2:
        x, grad_out = _as_images(op, x, grad_out, pattern)
        geometry = AS_CONVOLUTION
    else:
        call = conv_call(op, pattern, stride, padding, dilation, groups)
        x, grad_out = _as_batch(op, x, grad_out, call)
        geometry = call.geometry
    candidates = pattern.numel // max(pattern.taps, 1) if by_kernel else pattern.numel - col.numel()
    k = min(k, candidates)
    if k == 0 or col.numel() == pattern.numel:
        return x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32), 0
    function, x, grad_out = dispatch.topk_route(x, grad_out, pattern)
    index, grad, non_finite = run_operator(
        function, x, grad_out, row_ptr, col, k, *geometry, by_kernel, floor, dispatch.isa_argument()
    )
    found = int((index >= 0).sum())
    return index[:found], grad[:found], int(non_finite)


def check_topk_options(op: str, k: int, granularity: str) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{op}: k must be an int of at least 1, got {k!r}")
    if granularity not in ("weight", "kernel"):
        raise ValueError(f"{op}: granularity must be 'weight' or 'kernel', got {granularity!r}")


def run_conv2d(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, call: ConvCall, gradient_sum: GradientSum | None = None
) -> Tensor:
    """The convolution of checked operands."""
    check_output_size(op, x, call)
    x, weight, bias = _autocast(x, weight, bias)
    if x.dim() == 3:
        return _run(x.unsqueeze(0), weight, bias, call).squeeze(0)
    return _run(x, weight, bias, call, gradient_sum)


def run_linear(x: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall) -> Tensor:
    """The linear map of checked operands."""
    x, weight, bias = _autocast(x, weight, bias)
    if x.dim() == 2:
        return _run(x, weight, bias, call)
    out_features, in_features = call.pattern.shape
    rows = x.numel() // in_features if in_features else x.shape[:-1].numel()
    return _run(x.reshape(rows, in_features), weight, bias, call).view(*x.shape[:-1], out_features)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, gradient_sum: GradientSum | None = None) -> Tensor:
    routes = dispatch.routes_for(call, x)
    plain = call.pattern.nnz == call.pattern.numel and weight.dim() != 1 and gradient_sum is None
    if routes.forward == "dense" and plain and not (dispatch.converts_layout(call, x) or call.outruns_torch(x)):
        return call.forward_dense(x, weight, bias)
    return run_masked(x, weight, bias, call, routes, dispatch.isa_argument(), gradient_sum)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as torch.autocast does for conv2d and linear: all floating operands but float64."""
    if not autocasts(x):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    return x, weight, bias


def _pattern(op: str, mask_or_pattern: Tensor | Pattern, groups: int, weight_dim: int | None) -> Pattern:
    pattern = as_pattern(op, "mask_or_pattern", mask_or_pattern, groups)
    if len(pattern.shape) not in ((weight_dim,) if weight_dim else (2, 4)):
        wanted = weight_dim or "2 or 4"
        raise ValueError(f"{op}: the mask must have {wanted} dimensions, got shape {tuple(pattern.shape)}")
    return pattern


def _blocked(op: str, pattern: Pattern, exclude: Tensor | Pattern) -> tuple[Tensor, Tensor]:
    """The rows of what is live or excluded."""
    check_mask_type(op, "exclude", exclude)
    check_same_shape(op, "exclude", exclude, pattern.shape)
    excluded = exclude.index if isinstance(exclude, Pattern) else exclude.reshape(-1).nonzero().reshape(-1)
    index = torch.cat([pattern.index, excluded.to(pattern.device)]).sort().values.unique_consecutive()
    return rows_of(index, pattern.shape[0], pattern.numel // max(pattern.shape[0], 1))


def _check_pair(op: str, x: Tensor, grad_out: Tensor, pattern: Pattern) -> None:
    if x.dtype not in FLOATS or grad_out.dtype != x.dtype:
        raise TypeError(
            f"{op}: x and grad_out must share one of the dtypes {FLOATS}, got x {x.dtype}, grad_out {grad_out.dtype}"
        )
    for name, tensor in (("grad_out", grad_out), ("mask_or_pattern", pattern)):
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}")


def _as_images(op: str, x: Tensor, grad_out: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    rows, cols = pattern.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"{op}: x must be [..., {cols}], got {tuple(x.shape)}")
    if grad_out.shape != (*x.shape[:-1], rows):
        raise ValueError(f"{op}: grad_out must be {(*x.shape[:-1], rows)}, got {tuple(grad_out.shape)}")
    batch = x.shape[:-1].numel()
    return x.reshape(batch, cols, 1, 1), grad_out.reshape(batch, rows, 1, 1)


def _as_batch(op: str, x: Tensor, grad_out: Tensor, call: ConvCall) -> tuple[Tensor, Tensor]:
    channels = call.pattern.in_channels
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"{op}: x must be [N, {channels}, H, W] or [{channels}, H, W], got {tuple(x.shape)}")
    expected = (*x.shape[:-3], call.pattern.shape[0], *check_output_size(op, x, call))
    if grad_out.shape != expected:
        raise ValueError(f"{op}: grad_out must be {expected}, got {tuple(grad_out.shape)}")
    return (x, grad_out) if x.dim() == 4 else (x.unsqueeze(0), grad_out.unsqueeze(0))
