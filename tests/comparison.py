"""Comparing with the float64 reference: layouts, dtypes, and error bounds that follow from the length of a sum."""

import torch
from torch import Tensor

from ilnas_kernels import to_batch_last

# Unit roundoff of storage, and of the sums that the kernels form.
STORED = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMMED = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-24}


def assert_sum_close(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int, *, roundings: int = 1) -> None:
    """|actual - exact| <= gamma(terms) * magnitude + the rounding on storing.

    magnitude: the same sum of absolute values in float64. A sum of n products in any order, with or without fused
    multiply-add, is off by at most n * u / (1 - n * u) times it (Higham, Accuracy and Stability, section 3.1).
    roundings: how often the result is rounded to its dtype.
    """
    assert actual.shape == exact.shape
    summed, stored = SUMMED[actual.dtype], STORED[actual.dtype]
    gamma = (terms + 1) * summed / (1 - (terms + 1) * summed)
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    bound = gamma * magnitude + roundings * stored * (exact.abs() + gamma * magnitude) + smallest
    error = (actual.double() - exact).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"error exceeds the bound by {worst:.3g} (bound up to {bound.max():.3g})"
    assert not actual.isnan().any()


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same numbers [N, C, H, W] in another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "batch_last":
        return to_batch_last(x)
    if layout == "sliced":
        wide = torch.full((*x.shape[:3], x.shape[3] * 2 + 1), torch.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    assert layout == "nchw"
    return x.contiguous()


LAYOUTS = ("nchw", "channels_last", "batch_last", "sliced", "transposed")
