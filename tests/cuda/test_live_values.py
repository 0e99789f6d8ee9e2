"""The CUDA forms of the packing operators, which are made of torch operations, against the CPU's kernels."""

import math

import pytest
import torch

from ilnas_kernels import _live_values
from ilnas_kernels.pattern import Pattern

SHAPES = [(7, 5), (6, 3, 3, 3), (1, 1), (4, 0), (5, 2, 1, 3)]


def example(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    pattern = Pattern.random(shape, 0.4, generator=generator)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return pattern, weight.to(memory_format=torch.channels_last) if len(shape) == 4 else weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_agree_with_the_cpu_kernels(shape, dtype):
    pattern, weight = example(shape, dtype)
    operands = (pattern.row_ptr, pattern.col)
    values = torch.ops.ilnas.gather_live(weight, *operands)
    assert torch.equal(_live_values.gather_live(weight, *operands), values)
    dense = _live_values.scatter_live(values, *operands, weight.shape, weight.stride())
    assert torch.equal(dense, torch.ops.ilnas.scatter_live(values, *operands, weight.shape, weight.stride()))
    assert dense.stride() == weight.stride()
    held = (*operands, pattern.live_bits)
    for either in (weight, dense):
        assert torch.equal(_live_values.has_strays(either, *held), torch.ops.ilnas.has_strays(either, *held))
    ours, theirs = weight.clone(), weight.clone()
    _live_values.zero_absent_(ours, *held)
    torch.ops.ilnas.zero_absent_(theirs, *held)
    assert torch.equal(ours, theirs)


def test_every_absent_entry_but_zero_is_a_stray():
    weight = torch.tensor([[0.0, -0.0, math.nan, 1.0, math.inf]])
    pattern = Pattern.from_mask(torch.tensor([[False, False, False, True, False]]))
    held = (pattern.row_ptr, pattern.col, pattern.live_bits)
    assert _live_values.has_strays(weight, *held).tolist() == [1]
    _live_values.zero_absent_(weight, *held)
    assert weight.tolist() == [[0, 0, 0, 1, 0]]
    assert _live_values.has_strays(torch.tensor([[0.0, -0.0, 0.0, 1.0, 0.0]]), *held).tolist() == [0]
