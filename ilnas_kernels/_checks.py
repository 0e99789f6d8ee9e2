"""Arguments of the operators: checked, and spelt out. Errors name operator, argument, its value and the rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._calls import ConvCall
from .pattern import Pattern

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def as_pattern(op: str, name: str, mask: Tensor | Pattern, groups: int) -> Pattern:
    """The Pattern of a mask, or the Pattern given."""
    if isinstance(mask, Pattern):
        return mask
    check_mask_type(op, name, mask)
    return Pattern.from_mask(mask, groups)


def check_mask_type(op: str, name: str, mask: Tensor | Pattern) -> None:
    if isinstance(mask, Pattern):
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"{op}: {name} must be a bool tensor or a Pattern, got {kind}")


def check_same_shape(op: str, name: str, mask: Tensor | Pattern, shape: Sequence[int]) -> None:
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have the weight's shape {tuple(shape)}, got {tuple(mask.shape)}")


def check_operands(op: str, x: Tensor, weight: Tensor, pattern: Pattern, bias: Tensor | None) -> None:
    """Everything about the tensors of a forward that the kernels rely on."""
    shape = pattern.shape
    if weight.shape != shape and (weight.dim() != 1 or weight.shape[0] != pattern.nnz):
        raise ValueError(
            f"{op}: weight_or_values must have the mask's shape {tuple(shape)} or [nnz] = [{pattern.nnz}], "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"{op}: bias must be [{shape[0]}], got {tuple(bias.shape)}")
    check_input(op, x, pattern)
    casts = autocasts(x)
    for name, tensor in (("weight_or_values", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}")
        if tensor.dtype != x.dtype and not casts:
            raise TypeError(f"{op}: {name} must be of the dtype of x, {x.dtype}, got {tensor.dtype}")
    if pattern.device != x.device and not x.is_meta:
        raise ValueError(f"{op}: mask_or_pattern must be on the device of x, {x.device}, got {pattern.device}")


def autocasts(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of ``x``."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def check_input(op: str, x: Tensor, pattern: Pattern) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be of one of the dtypes {FLOATS}, got {x.dtype}")
    channels = pattern.in_channels
    if len(pattern.shape) == 4:
        if x.dim() not in (3, 4) or x.shape[-3] != channels:
            raise ValueError(f"{op}: x must be [N, {channels}, H, W] or [{channels}, H, W], got {tuple(x.shape)}")
    elif x.dim() == 0 or x.shape[-1] != channels:
        raise ValueError(f"{op}: x must be [..., {channels}], got {tuple(x.shape)}")


def conv_call(op: str, pattern: Pattern, stride, padding, dilation, groups: int) -> ConvCall:
    """The geometry of a convolution, checked and spelt out."""
    stride, dilation = _pair(op, "stride", stride), _pair(op, "dilation", dilation)
    if groups != pattern.groups:
        raise ValueError(f"{op}: groups is {groups}, but the pattern was made for groups={pattern.groups}")
    return ConvCall(pattern, stride, _padding(op, padding, pattern.shape[2:], stride, dilation), dilation)


def check_output_size(op: str, x: Tensor, call: ConvCall) -> tuple[int, int]:
    """(height, width) of the output; ValueError when the kernel does not fit."""
    height, width = call.output_size(x.shape[-2], x.shape[-1])
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: x has height and width {tuple(x.shape[-2:])}, too small for kernel {call.geometry[0]} with "
            f"padding (top, bottom, left, right) {call.padding} and dilation {call.dilation}"
        )
    return height, width


def _pair(op: str, name: str, value: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{op}: {name} must be an int or a pair of ints of at least {least}, got {value!r}")
    return pair


def _padding(op: str, padding, kernel_size, stride, dilation) -> tuple[int, int, int, int]:
    """(top, bottom, left, right)."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"{op}: padding 'same' needs stride 1, got stride {stride}")
        (top, bottom), (left, right) = (_same(k, d) for k, d in zip(kernel_size, dilation, strict=True))
        return top, bottom, left, right
    if isinstance(padding, str):
        raise ValueError(f"{op}: padding must be 'same', 'valid' or ints, got {padding!r}")
    if not isinstance(padding, int) and len(padding) == 4:
        if min(padding) < 0:
            raise ValueError(f"{op}: padding must not be negative, got {padding!r}")
        return tuple(padding)
    vertical, horizontal = _pair(op, "padding", padding, least=0)
    return vertical, vertical, horizontal, horizontal


def _same(kernel: int, dilation: int) -> tuple[int, int]:
    """torch puts the odd element of an even kernel's padding at the far side."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2
