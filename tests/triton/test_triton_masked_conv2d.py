"""masked_conv2d in Triton's interpreter against float64."""

import pytest
import torch

from ilnas_kernels import Pattern
from ilnas_kernels import triton as kernels
from ilnas_kernels.layout import layout_of
from ilnas_kernels.triton import masked_conv2d as module
from tests.triton.cases import CONVS, LAYOUTS, Conv, assert_sums_close, dense, draw, expected, in_layout, random_pattern


def check(conv: Conv, pattern: Pattern, layout: str, dtype: torch.dtype, plan: str = "built") -> None:
    x = draw(conv.batch, conv.in_channels, *conv.size, dtype=dtype, seed=1)
    values = draw(pattern.nnz, dtype=dtype, seed=2)
    bias = draw(conv.out_channels, dtype=dtype, seed=3)
    weight = dense(pattern, values)
    grad_out = draw(*conv(x, weight, bias).shape, dtype=dtype, seed=4)
    exact = expected(conv, x, weight, bias, grad_out)
    magnitude = expected(conv, *(t.abs() for t in (x, weight, bias, grad_out)))

    leaves = [in_layout(x.to(dtype), layout).requires_grad_(), values.to(dtype).requires_grad_()]
    leaves.append(bias.to(dtype).requires_grad_())
    tensors = kernels.conv2d_plan(leaves[0], pattern, *conv.geometry[:-1]) if plan == "given" else []
    out = kernels.masked_conv2d_triton(*leaves, *pattern.operands, *conv.geometry, tensors)
    grad_x, grad_values, grad_bias = torch.autograd.grad(out, leaves, in_layout(grad_out.to(dtype), layout))

    in_terms, out_terms = pattern.shape[1] * pattern.taps + 1, pattern.shape[0] // conv.groups * pattern.taps
    pixels = grad_out.shape[0] * grad_out.shape[2] * grad_out.shape[3]
    assert_sums_close(out, exact.out, magnitude.out, in_terms, dtype)
    assert_sums_close(grad_x, exact.grad_x, magnitude.grad_x, out_terms, dtype)
    index = pattern.index
    assert_sums_close(
        grad_values, exact.grad_weight.view(-1)[index], magnitude.grad_weight.view(-1)[index], pixels, dtype
    )
    assert_sums_close(grad_bias, exact.grad_bias, magnitude.grad_bias, pixels, dtype)
    assert layout_of(out) == layout_of(leaves[0])
    assert layout_of(grad_x) == layout_of(leaves[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVS)
def test_against_float64(name, layout):
    conv = CONVS[name]
    check(conv, random_pattern(conv.weight_shape, 0.3, conv.groups), layout, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["odd", "groups_strided_dilated_asymmetric"])
def test_half_precision(name, dtype):
    conv = CONVS[name]
    check(conv, random_pattern(conv.weight_shape, 0.3, conv.groups), "channels_last", dtype)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("name", ["odd", "groups_strided_dilated_asymmetric"])
def test_densities(name, density):
    """All absent, most rows empty, all live."""
    conv = CONVS[name]
    check(conv, random_pattern(conv.weight_shape, density, conv.groups), "nchw", torch.float32)


def test_empty_rows_and_columns():
    conv = CONVS["many_channels"]
    mask = random_pattern(conv.weight_shape, 0.5).mask
    mask[3:20] = False
    mask[:, 5:30] = False
    check(conv, Pattern.from_mask(mask), "nchw", torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.0, 0.04, 0.3])
def test_given_plan(layout, density):
    """Both widths, and the phases of a strided gradient, with a plan made beforehand."""
    conv = CONVS["groups_strided_dilated_asymmetric"]
    check(conv, random_pattern(conv.weight_shape, density, conv.groups), layout, torch.float32, plan="given")


def test_pixels_are_split_in_the_gradient_of_values(monkeypatch):
    conv = Conv(2, 1, 2, (18, 17))
    splits = []
    kernel = module.grad_values_kernel

    class Watched:
        def __getitem__(self, grid):
            splits.append(grid[1])
            return kernel[grid]

    monkeypatch.setattr(module, "grad_values_kernel", Watched())
    monkeypatch.setattr(module, "wrap_triton", lambda k: k)
    check(conv, random_pattern(conv.weight_shape, 0.3), "nchw", torch.float32)
    assert splits[0] > 1


@pytest.mark.parametrize("make", ["expanded", "sliced", "zero_stride_grad"])
def test_non_contiguous(make):
    conv = Conv(4, 3, 5, (6, 7))
    pattern = random_pattern(conv.weight_shape, 0.4)
    values, bias = draw(pattern.nnz, dtype=torch.float32, seed=2), draw(5, dtype=torch.float32, seed=3)
    if make == "expanded":
        x = draw(1, 3, 6, 7, dtype=torch.float32, seed=1).float().expand(4, -1, -1, -1)
    elif make == "sliced":
        x = draw(4, 6, 12, 9, dtype=torch.float32, seed=1).float()[:, ::2, ::2, 1:8]
    else:
        x = draw(4, 3, 6, 7, dtype=torch.float32, seed=1).float()
    weight = dense(pattern, values)
    grad_out = draw(4, 5, 6, 7, dtype=torch.float32, seed=4)
    if make == "zero_stride_grad":
        grad_out = torch.ones(1, dtype=torch.float64).expand(4, 5, 6, 7)
    exact = expected(conv, x.double(), weight, bias, grad_out)
    magnitude = expected(conv, x.double().abs(), weight.abs(), bias.abs(), grad_out.abs())
    strided = torch.zeros(pattern.nnz, 2)
    strided[:, 0] = values
    arguments = (*pattern.operands, *conv.geometry)
    out = kernels.masked_conv2d_triton(x, strided[:, 0], bias.float(), *arguments, [])
    assert_sums_close(out, exact.out, magnitude.out, 28, torch.float32)
    grad_x, grad_values, grad_bias = kernels.masked_conv2d_backward_triton(
        grad_out.float() if make != "zero_stride_grad" else torch.ones(1).expand(4, 5, 6, 7),
        x, strided[:, 0], *arguments, [True, True, True], [],
    )  # fmt: skip
    assert_sums_close(grad_x, exact.grad_x, magnitude.grad_x, 45, torch.float32)
    index = pattern.index
    exact_values, magnitudes = exact.grad_weight.view(-1)[index], magnitude.grad_weight.view(-1)[index]
    assert_sums_close(grad_values, exact_values, magnitudes, 168, torch.float32)
    assert_sums_close(grad_bias, exact.grad_bias, magnitude.grad_bias, 168, torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5)])
def test_empty_images(shape):
    """No image, and images that are all padding."""
    conv = Conv(shape[0], 3, 4, shape[2:], padding=(1, 2, 1, 1))
    pattern = random_pattern(conv.weight_shape, 0.5)
    x = torch.zeros(shape)
    values, bias = torch.ones(pattern.nnz), torch.full((4,), 2.0)
    out = kernels.masked_conv2d_triton(x, values, bias, *pattern.operands, *conv.geometry, [])
    assert out.shape == conv(x, dense(pattern, values), bias).shape
    assert (out == 2).all()
    grads = kernels.masked_conv2d_backward_triton(
        torch.ones_like(out), x, values, *pattern.operands, *conv.geometry, [True, True, True], []
    )
    assert [g.shape for g in grads] == [x.shape, values.shape, bias.shape]
    assert not grads[1].any()
    assert (grads[2] == out.numel() / 4).all()


def test_gradients_left_out_are_empty():
    conv = CONVS["odd"]
    pattern = random_pattern(conv.weight_shape, 0.5)
    x, values = torch.ones(2, 5, 9, 8), torch.ones(pattern.nnz)
    grad_out = torch.ones(2, 7, 9, 8)
    grads = kernels.masked_conv2d_backward_triton(
        grad_out, x, values, *pattern.operands, *conv.geometry, [False, False, False], []
    )
    assert [g.numel() for g in grads] == [0, 0, 0]


def test_same_bits_again():
    conv = Conv(3, 4, 6, (8, 9))
    pattern = random_pattern(conv.weight_shape, 0.3)
    x = draw(3, 4, 8, 9, dtype=torch.float32, seed=1).float()
    values = draw(pattern.nnz, dtype=torch.float32, seed=2).float()
    grad_out = draw(3, 6, 8, 9, dtype=torch.float32, seed=4).float()

    def run():
        arguments = (*pattern.operands, *conv.geometry)
        out = kernels.masked_conv2d_triton(x, values, None, *arguments, [])
        return out, *kernels.masked_conv2d_backward_triton(grad_out, x, values, *arguments, [True, True, False], [])

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_registration():
    conv = Conv(2, 3, 4, (5, 4))
    pattern = random_pattern(conv.weight_shape, 0.4)
    x = draw(2, 3, 5, 4, dtype=torch.float32, seed=1).float().requires_grad_()
    values = draw(pattern.nnz, dtype=torch.float32, seed=2).float().requires_grad_()
    bias = torch.ones(4, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*pattern.operands, *map(list, conv.geometry[:-1]), 1)
    plan = kernels.conv2d_plan(x, pattern, *conv.geometry[:-1])
    for given in ([], plan):
        torch.library.opcheck(
            torch.ops.ilnas.masked_conv2d_triton, (x, values, bias, *arguments, given), test_utils=checks
        )
        torch.library.opcheck(
            torch.ops.ilnas.masked_conv2d_backward_triton,
            (torch.ones(2, 4, 5, 4), x.detach(), values.detach(), *arguments, [True, True, True], given),
            test_utils=checks,
        )


def test_second_derivative():
    """Of the squared gradients, against torch."""
    conv = Conv(2, 3, 4, (5, 4), stride=(2, 1))
    pattern = random_pattern(conv.weight_shape, 0.4)
    x = draw(2, 3, 5, 4, dtype=torch.float32, seed=1)
    values = draw(pattern.nnz, dtype=torch.float32, seed=2)

    def penalty(x, values, run):
        out = run(x, values)
        grads = torch.autograd.grad((out**2).sum(), (x, values), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), (x, values))

    leaves = [t.clone().requires_grad_() for t in (x, values)]
    exact = penalty(*leaves, lambda x, v: conv(x, dense(pattern, v), None))
    leaves = [t.float().requires_grad_() for t in (x, values)]
    got = penalty(*leaves, lambda x, v: kernels.masked_conv2d_triton(x, v, None, *pattern.operands, *conv.geometry, []))
    for a, b in zip(got, exact, strict=True):
        # Six nested sums of at most 160 terms each, all bounded by the largest entry's magnitude.
        assert (a.double() - b).abs().max() <= 6 * 160 * 2.0**-24 * b.abs().max()
