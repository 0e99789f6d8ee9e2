"""Moving weights between the dense and the packed form on CUDA devices, with torch's own operations.

The CPU has kernels of its own for these. None of them waits for the device or depends on _C_cuda being built.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _flat_index(numel: int, row_ptr: Tensor, col: Tensor) -> Tensor:
    """The flat positions of the live weights, int64 [nnz]."""
    rows = row_ptr.shape[0] - 1
    starts = torch.arange(rows, device=col.device) * (numel // max(rows, 1))
    return torch.repeat_interleave(starts, row_ptr.diff(), output_size=col.shape[0]) + col


def absent_positions(shape: Sequence[int], row_ptr: Tensor, col: Tensor) -> Tensor:
    """True where a weight of this shape has no live position."""
    numel = math.prod(shape)
    absent = torch.ones(numel, dtype=torch.bool, device=col.device)
    return absent.index_fill_(0, _flat_index(numel, row_ptr, col), False).view(shape)


def gather_live(weight: Tensor, row_ptr: Tensor, col: Tensor) -> Tensor:
    return weight.reshape(-1).index_select(0, _flat_index(weight.numel(), row_ptr, col))


def scatter_live(values: Tensor, row_ptr: Tensor, col: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    weight = values.new_zeros(size)
    weight.view(-1).index_copy_(0, _flat_index(weight.numel(), row_ptr, col), values)
    if weight.stride() == tuple(stride):
        return weight
    return values.new_empty_strided(size, stride).copy_(weight)


def has_strays(weight: Tensor, row_ptr: Tensor, col: Tensor, live_bits: Tensor, isa: str = "") -> Tensor:
    """Whether an absent entry holds anything but a zero: 1 or 0, int64 [1]; NaN counts."""
    return weight.ne(0).logical_and_(absent_positions(weight.shape, row_ptr, col)).any().long().view(1)


def zero_absent_(weight: Tensor, row_ptr: Tensor, col: Tensor, live_bits: Tensor, isa: str = "") -> None:
    weight.masked_fill_(absent_positions(weight.shape, row_ptr, col), 0)


for _function in (gather_live, scatter_live, has_strays, zero_absent_):
    torch.library.impl(f"ilnas::{_function.__name__}", "CUDA", _function)
