"""The CPU kernels of masked_linear against float64 arithmetic, for every instruction set, dtype and layout."""

import pytest
import torch

from ilnas_kernels import _C, masked_linear, use_route
from ilnas_kernels.pattern import Pattern

ISAS = [name for name, runs in _C.instruction_sets().items() if runs]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# batch, in, out, density: single, odd, around the vector and panel widths, several feature blocks, empty and full
SHAPES = [
    (1, 1, 1, 1.0),
    (1, 300, 37, 0.2),
    (2, 65, 40, 0.5),
    (3, 17, 19, 0.4),
    (17, 31, 33, 0.0),
    (19, 8, 70, 1.0),
    (67, 129, 45, 0.1),
    (150, 61, 18, 0.3),
    (300, 40, 23, 0.5),
]


def rounding(dtype):
    """Unit round-off of the type that sums are taken in, and of the stored type."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(sums).eps / 2, torch.finfo(dtype).eps / 2


def assert_close(actual, expected, magnitude, terms, dtype):
    """A sum of `terms` products in any order is off by at most terms * u * sum of magnitudes, and rounded once."""
    u, stored = rounding(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # half a subnormal step, and some
    bound = (terms + 2) * u * magnitude * (1 + stored) + stored * expected.abs() + smallest
    error = (actual.double() - expected).abs()
    assert actual.dtype == dtype
    assert (error <= bound).all(), f"error {error.max()} where {bound.flatten()[error.argmax()]} is allowed"


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(batch, n_in, n_out, density, dtype):
    pattern = Pattern.random((n_out, n_in), density, generator=torch.Generator().manual_seed(5))
    return (
        pattern,
        random((batch, n_in), dtype, 0),
        random((pattern.nnz,), dtype, 1),
        random((n_out,), dtype, 2),
        random((batch, n_out), dtype, 3),
    )


def plan(p):
    return p.row_ptr, p.col, p.t_row_ptr, p.t_col, p.t_perm


def forward(x, values, bias, pattern, isa):
    return torch.ops.ilnas.masked_linear(x, values, bias, *plan(pattern), isa)


def backward(grad_out, x, values, pattern, isa, mask=(True, True, True)):
    return torch.ops.ilnas.masked_linear_backward(grad_out, x, values, *plan(pattern), list(mask), isa)


def dense(pattern, values):
    weight = torch.zeros(pattern.numel, dtype=torch.float64)
    weight[pattern.index] = values.double()
    return weight.view(pattern.shape)


def check(pattern, x, values, bias, grad_out, isa):
    dtype, weight, x64, g64 = x.dtype, dense(pattern, values), x.double(), grad_out.double()
    n_out, n_in = pattern.shape
    out = forward(x, values, bias, pattern, isa)
    offset = torch.zeros(n_out) if bias is None else bias
    magnitude = x64.abs() @ weight.abs().T + offset.double().abs()
    assert_close(out, x64 @ weight.T + offset.double(), magnitude, n_in + 1, dtype)
    grad_x, grad_values, grad_bias = backward(grad_out, x, values, pattern, isa)
    assert_close(grad_x, g64 @ weight, g64.abs() @ weight.abs(), n_out, dtype)
    live = pattern.index
    assert_close(
        grad_values,
        (g64.T @ x64).reshape(-1)[live],
        (g64.abs().T @ x64.abs()).reshape(-1)[live],
        x.shape[0],
        dtype,
    )
    assert_close(grad_bias, g64.sum(0), g64.abs().sum(0), x.shape[0], dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, isa):
    pattern, x, values, bias, grad_out = make(*shape, dtype)
    check(pattern, x, values, bias, grad_out, isa)
    check(pattern, x, values, None, grad_out, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.004, 0.05, 0.6])
def test_several_feature_blocks(density, isa):
    """More features than one panel holds in cache, so that partial sums are taken up again."""
    check(*make(70, 9001, 21, density, torch.float32), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_many_rows(isa):
    """More rows than sums are held for at once."""
    check(*make(130, 700, 2100, 0.3, torch.float32), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", [(50, 4112), (4112, 50), (51, 4111)], ids=str)
def test_outputs_beyond_the_caches(sizes, isa):
    """Large outputs are stored past the caches where whole registers fit."""
    check(*make(275, *sizes, 0.05, torch.float32), isa)


def strided(t, layout):
    """The same numbers in another layout."""
    if layout == "column-major":
        return t.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((t.shape[0] * 2, t.shape[1] * 3), float("nan"), dtype=t.dtype)
        wide[::2, ::3] = t
        return wide[::2, ::3]
    if layout == "unaligned":
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)
    if layout == "expanded batch":
        return t[:1].expand_as(t)
    if layout == "expanded features":
        return t[:, :1].expand_as(t)
    assert layout == "expanded scalar"
    return t[:1, :1].expand_as(t)


LAYOUTS = ["column-major", "sliced", "unaligned", "expanded batch", "expanded features", "expanded scalar"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2, 53])
def test_layouts(batch, layout, dtype, isa):
    pattern, x, values, bias, grad_out = make(batch, 35, 41, 0.3, dtype)
    check(pattern, strided(x, layout), values, bias, grad_out, isa)
    check(pattern, x, values, bias, strided(grad_out, layout), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_noncontiguous_values_and_bias(isa):
    pattern, x, values, bias, grad_out = make(20, 35, 41, 0.3, torch.float32)
    check(pattern, x, values.repeat_interleave(2)[::2], bias[:1].expand_as(bias), grad_out, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_empty_rows_and_columns(isa):
    mask = torch.zeros(50, 60, dtype=torch.bool)
    mask[7, 3] = mask[49, 59] = mask[20] = True
    pattern = Pattern.from_mask(mask)
    _, x, _, bias, grad_out = make(33, 60, 50, 0.1, torch.float32)
    check(pattern, x, random((pattern.nnz,), torch.float32, 9), bias, grad_out, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 20])
def test_zero_sizes(batch, isa):
    check(*make(0, 5, 4, 0.5, torch.float32), isa)
    check(*make(batch, 0, 4, 0.5, torch.float32), isa)
    pattern, x, values, bias, grad_out = make(batch, 5, 0, 0.5, torch.float32)
    assert forward(x, values, bias, pattern, isa).shape == (batch, 0)
    assert not backward(grad_out, x, values, pattern, isa)[0].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 40])
def test_non_finite_inputs_stay_where_they_belong(batch, isa):
    """A NaN or Inf of x reaches exactly the outputs whose rows are live there."""
    pattern, x, values, bias, _ = make(batch, 64, 48, 0.2, torch.float32)
    x[0, 3], x[batch - 1, 40] = float("nan"), float("inf")
    expected = torch.zeros(batch, 48, dtype=torch.bool)
    expected[0] |= pattern.mask[:, 3]
    expected[batch - 1] |= pattern.mask[:, 40]
    assert torch.equal(~forward(x, values, bias, pattern, isa).isfinite(), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_output_mask_leaves_gradients_out(isa):
    pattern, x, values, _, grad_out = make(20, 35, 41, 0.3, torch.float32)
    complete = backward(grad_out, x, values, pattern, isa)
    for wanted in range(3):
        parts = backward(grad_out, x, values, pattern, isa, [i == wanted for i in range(3)])
        for i in range(3):
            assert torch.equal(parts[i], complete[i]) if i == wanted else parts[i].numel() == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 70, 300])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_at_the_same_thread_count(threads, batch, isa):
    pattern, x, values, bias, grad_out = make(batch, 200, 70, 0.3, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(pattern, x, values, bias, grad_out, isa)
        first = (forward(x, values, bias, pattern, isa), *backward(grad_out, x, values, pattern, isa))
        for _ in range(3):
            again = (forward(x, values, bias, pattern, isa), *backward(grad_out, x, values, pattern, isa))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [17, 40, 64, 129, 144, 300])
@pytest.mark.parametrize("in_features", [70, 2100])
@pytest.mark.parametrize("density", [0.02, 0.4])
def test_live_weights_of_0_change_no_bit(isa, batch, in_features, density):
    """With more images than one vector holds each output is one chain of sums, wherever the zeros stand in it."""
    generator = torch.Generator().manual_seed(batch)
    few = Pattern.random((13, in_features), density, generator=generator)
    absent = (~few.mask.flatten()).nonzero().flatten()
    more = torch.cat([few.index, absent[torch.rand(len(absent), generator=generator) < 0.1]])
    many = Pattern.from_index(few.shape, more)
    values, bias = torch.randn(few.nnz, generator=generator), torch.randn(13, generator=generator)
    with_zeros = torch.zeros(many.nnz)
    with_zeros[torch.searchsorted(many.index, few.index)] = values
    x = torch.randn(batch, in_features, generator=generator)
    with use_route("sparse"):
        assert torch.equal(masked_linear(x, with_zeros, many, bias), masked_linear(x, values, few, bias))
