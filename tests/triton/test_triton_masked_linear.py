"""masked_linear in Triton's interpreter against float64."""

import pytest
import torch
import torch.nn.functional as F

from ilnas_kernels import triton as kernels
from tests.triton.cases import assert_sums_close, dense, draw, expected, random_pattern


def check(batch: int, cols: int, rows: int, density: float, dtype: torch.dtype, transposed=False, plan=False) -> None:
    pattern = random_pattern((rows, cols), density)
    x = draw(batch, cols, dtype=dtype, seed=1)
    values, bias = draw(pattern.nnz, dtype=dtype, seed=2), draw(rows, dtype=dtype, seed=3)
    grad_out = draw(batch, rows, dtype=dtype, seed=4)
    weight = dense(pattern, values)
    exact = expected(F.linear, x, weight, bias, grad_out)
    magnitude = expected(F.linear, *(t.abs() for t in (x, weight, bias, grad_out)))

    def stored(t):
        return t.to(dtype).t().contiguous().t() if transposed else t.to(dtype)

    leaves = [stored(x).requires_grad_(), values.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]
    given = kernels.linear_plan(leaves[0], pattern) if plan else []
    out = kernels.masked_linear_triton(*leaves, *pattern.operands, given)
    grad_x, grad_values, grad_bias = torch.autograd.grad(out, leaves, stored(grad_out))

    assert_sums_close(out, exact.out, magnitude.out, cols + 1, dtype)
    assert_sums_close(grad_x, exact.grad_x, magnitude.grad_x, rows, dtype)
    index = pattern.index
    exact_values, magnitudes = exact.grad_weight.view(-1)[index], magnitude.grad_weight.view(-1)[index]
    assert_sums_close(grad_values, exact_values, magnitudes, batch, dtype)
    assert_sums_close(grad_bias, exact.grad_bias, magnitude.grad_bias, batch, dtype)


@pytest.mark.parametrize("size", [(1, 1, 1), (7, 13, 5), (33, 67, 41), (2, 150, 17)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.4, 1.0])
def test_against_float64(size, density):
    check(*size, density, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    check(19, 45, 37, 0.3, dtype)


def test_transposed_operands():
    check(19, 45, 37, 0.3, torch.float32, transposed=True)


@pytest.mark.parametrize("density", [0.03, 0.3])
def test_given_plan(density):
    check(19, 45, 37, density, torch.float32, plan=True)


def test_empty_batch():
    pattern = random_pattern((4, 3), 0.5)
    x, values = torch.zeros(0, 3), torch.ones(pattern.nnz)
    out = kernels.masked_linear_triton(x, values, torch.ones(4), *pattern.operands, [])
    assert out.shape == (0, 4)
    grads = kernels.masked_linear_backward_triton(out, x, values, *pattern.operands, [True, True, True], [])
    assert [g.shape for g in grads] == [(0, 3), values.shape, (4,)]
    assert not grads[1].any()
    assert not grads[2].any()


def test_registration():
    pattern = random_pattern((5, 6), 0.4)
    x = draw(3, 6, dtype=torch.float32, seed=1).float().requires_grad_()
    values = draw(pattern.nnz, dtype=torch.float32, seed=2).float().requires_grad_()
    bias = torch.ones(5, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for given in ([], kernels.linear_plan(x, pattern)):
        torch.library.opcheck(
            torch.ops.ilnas.masked_linear_triton, (x, values, bias, *pattern.operands, given), test_utils=checks
        )
        torch.library.opcheck(
            torch.ops.ilnas.masked_linear_backward_triton,
            (torch.ones(3, 5), x.detach(), values.detach(), *pattern.operands, [True, False, True], given),
            test_utils=checks,
        )
