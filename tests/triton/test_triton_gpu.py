"""The Triton kernels on a real GPU: every operator, layout and dtype against float64 on the CPU."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from ilnas_kernels import triton as kernels
from tests.triton.cases import (
    CONVS,
    LAYOUTS,
    TF32_UNIT,
    UNIT,
    Conv,
    assert_sums_close,
    dense,
    draw,
    expected,
    in_layout,
    random_pattern,
)  # fmt: skip

if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
    pytest.skip("needs a GPU, and TRITON_INTERPRET unset", allow_module_level=True)

DTYPES = {
    "float32": (torch.float32, False), "tf32": (torch.float32, True),
    "float16": (torch.float16, False), "bfloat16": (torch.bfloat16, False),
}  # fmt: skip
LAYERS = {
    **CONVS,
    "wide": Conv(33, 70, 130, (13, 11)),
    "strided": Conv(16, 64, 96, (16, 15), stride=(2, 2)),
    "many_pixels": Conv(128, 16, 32, (32, 32)),
}


@pytest.fixture(params=DTYPES)
def arithmetic(request, monkeypatch):
    """A dtype, and how far a factor may be from what it was as the product takes it."""
    dtype, tf32 = DTYPES[request.param]
    if reason := kernels.why_not(dtype, torch.device("cuda"), 0):
        pytest.skip(reason)
    if tf32 and (torch.version.hip or torch.cuda.get_device_capability() < (8, 0)):
        pytest.skip("no TF32 before compute capability 8.0")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    return dtype, TF32_UNIT if tf32 else 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("name", LAYERS)
def test_masked_conv2d(name, density, layout, arithmetic):
    dtype, product = arithmetic
    conv = LAYERS[name]
    pattern = random_pattern(conv.weight_shape, density, conv.groups)
    x = draw(conv.batch, conv.in_channels, *conv.size, dtype=dtype, seed=1)
    values, bias = draw(pattern.nnz, dtype=dtype, seed=2), draw(conv.out_channels, dtype=dtype, seed=3)
    weight = dense(pattern, values)
    grad_out = draw(*conv(x, weight, bias).shape, dtype=dtype, seed=4)
    exact = expected(conv, x, weight, bias, grad_out)
    magnitude = expected(conv, *(t.abs() for t in (x, weight, bias, grad_out)))

    here = pattern.to("cuda")
    leaves = [t.to("cuda", dtype).requires_grad_() for t in (in_layout(x, layout), values, bias)]
    plan = kernels.conv2d_plan(leaves[0], here, *conv.geometry[:-1])
    out = kernels.masked_conv2d_triton(*leaves, *here.operands, *conv.geometry, plan)
    grads = torch.autograd.grad(out, leaves, in_layout(grad_out, layout).to("cuda", dtype))
    index = pattern.index
    in_terms, out_terms = pattern.shape[1] * pattern.taps + 1, pattern.shape[0] // conv.groups * pattern.taps
    pixels = grad_out.shape[0] * grad_out.shape[2] * grad_out.shape[3]
    assert_sums_close(out.cpu(), exact.out, magnitude.out, in_terms, dtype, product)
    assert_sums_close(grads[0].cpu(), exact.grad_x, magnitude.grad_x, out_terms, dtype, product)
    exact_values, magnitudes = exact.grad_weight.view(-1)[index], magnitude.grad_weight.view(-1)[index]
    assert_sums_close(grads[1].cpu(), exact_values, magnitudes, pixels, dtype, product)
    assert_sums_close(grads[2].cpu(), exact.grad_bias, magnitude.grad_bias, pixels, dtype)


@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("size", [(1, 1, 1), (33, 67, 41), (128, 1000, 520)], ids=str)
def test_masked_linear(size, density, arithmetic):
    dtype, product = arithmetic
    batch, cols, rows = size
    pattern = random_pattern((rows, cols), density)
    x, grad_out = draw(batch, cols, dtype=dtype, seed=1), draw(batch, rows, dtype=dtype, seed=4)
    values, bias = draw(pattern.nnz, dtype=dtype, seed=2), draw(rows, dtype=dtype, seed=3)
    weight = dense(pattern, values)
    exact = expected(F.linear, x, weight, bias, grad_out)
    magnitude = expected(F.linear, *(t.abs() for t in (x, weight, bias, grad_out)))
    here = pattern.to("cuda")
    leaves = [t.to("cuda", dtype).requires_grad_() for t in (x, values, bias)]
    out = kernels.masked_linear_triton(*leaves, *here.operands, [])
    grads = torch.autograd.grad(out, leaves, grad_out.to("cuda", dtype))
    index = pattern.index
    assert_sums_close(out.cpu(), exact.out, magnitude.out, cols + 1, dtype, product)
    assert_sums_close(grads[0].cpu(), exact.grad_x, magnitude.grad_x, rows, dtype, product)
    exact_values, magnitudes = exact.grad_weight.view(-1)[index], magnitude.grad_weight.view(-1)[index]
    assert_sums_close(grads[1].cpu(), exact_values, magnitudes, batch, dtype, product)


@pytest.mark.parametrize("by_kernel", [False, True], ids=["weight", "kernel"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 100, 20000])
def test_absent_topk(k, layout, by_kernel, arithmetic):
    """On whole numbers every arithmetic is exact, so the answer is the sorted gradient, ties by index."""
    dtype, _ = arithmetic
    conv = Conv(4, 150, 130, (9, 7))
    blocked = random_pattern(conv.weight_shape, 0.1)
    x = draw(conv.batch, conv.in_channels, *conv.size, dtype=dtype, seed=1).round()
    grad_out = draw(conv.batch, conv.out_channels, *conv.size, dtype=dtype, seed=2).round()
    weight = torch.zeros(conv.weight_shape, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(conv(x, weight, None), weight, grad_out)[0]
    absent = ~blocked.mask
    if by_kernel:
        count = absent.sum((2, 3))
        score = ((grad**2 * absent).sum((2, 3)) / count.clamp(min=1)).sqrt()
        score = torch.where(count > 0, score, -1.0).view(-1)
    else:
        score = torch.where(absent, grad.abs(), -1.0).view(-1)
    here = blocked.to("cuda")
    index, got, non_finite = kernels.absent_topk_triton(
        in_layout(x, layout).to("cuda", dtype), in_layout(grad_out, layout).to("cuda", dtype),
        here.row_ptr, here.col, k, *conv.geometry, by_kernel, 0.0,
    )  # fmt: skip
    found = min(k, int((score >= 0).sum()))
    order = torch.sort(score.float(), descending=True, stable=True).indices[:found]
    bound = score[order] * (1.5 * 2.0**-24 * 1.01 if by_kernel else 0.0)
    assert ((got[:found].cpu().abs() - score[order]).abs() <= bound).all()
    assert torch.equal(index[:found].cpu(), order)
    assert non_finite.item() == 0


def test_same_bits_again():
    conv = LAYERS["many_pixels"]
    pattern = random_pattern(conv.weight_shape, 0.1).to("cuda")
    x = draw(conv.batch, conv.in_channels, *conv.size, dtype=torch.float32, seed=1).cuda().float()
    grad_out = draw(conv.batch, conv.out_channels, *conv.size, dtype=torch.float32, seed=2).cuda().float()
    values = draw(pattern.nnz, dtype=torch.float32, seed=3).cuda().float()
    runs = [
        kernels.masked_conv2d_backward_triton(
            grad_out, x, values, *pattern.operands, *conv.geometry, [True, True, True], []
        )
        for _ in range(3)
    ]
    for first, second in itertools.pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled():
    """torch.compile sees the kernels, and gives the same numbers."""
    conv = Conv(4, 20, 30, (9, 8))
    pattern = random_pattern(conv.weight_shape, 0.1).to("cuda")
    x = draw(4, 20, 9, 8, dtype=torch.float32, seed=1).cuda().float().requires_grad_()
    values = draw(pattern.nnz, dtype=torch.float32, seed=3).cuda().float().requires_grad_()

    def run(x, values):
        return kernels.masked_conv2d_triton(x, values, None, *pattern.operands, *conv.geometry, []).relu()

    eager = torch.autograd.grad(run(x, values).square().sum(), (x, values))
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True)(x, values).square().sum(), (x, values))
    for got, exact in zip(compiled, eager, strict=True):
        assert (got - exact).abs().max() <= 4 * 300 * UNIT[torch.float32] * exact.abs().max()


def test_captured_in_a_cuda_graph():
    pattern = random_pattern((64, 96), 0.1).to("cuda")
    x = draw(32, 96, dtype=torch.float32, seed=1).cuda().float()
    values = draw(pattern.nnz, dtype=torch.float32, seed=3).cuda().float()
    plan = kernels.linear_plan(x, pattern)
    eager = kernels.masked_linear_triton(x, values, None, *pattern.operands, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.masked_linear_triton(x, values, None, *pattern.operands, plan)
    graph.replay()
    assert torch.equal(out, eager)


def test_more_than_2_31_elements():
    """Offsets beyond 32 bits, forward: two copies of the same image far apart give the same."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    pattern = random_pattern((16, 64, 1, 1), 0.3).to("cuda")
    x = torch.empty(34, 64, 1024, 1024, dtype=torch.float16, device="cuda")
    x[0] = torch.randn(64, 1024, 1024, device="cuda")
    x[-1] = x[0]
    values = torch.randn(pattern.nnz, device="cuda").half()
    geometry = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    out = kernels.masked_conv2d_triton(x, values, None, *pattern.operands, *geometry, [])
    assert torch.equal(out[0], out[-1])
