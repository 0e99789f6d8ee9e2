"""The fused work between layers against float64, on every instruction set, and gradients that are added in place."""

import pytest
import torch
import torch.nn.functional as F
from comparison import STORED, assert_sum_close, in_layout

from ilnas_kernels import (
    GradientSum,
    MaskedConv2d,
    average_pool,
    average_pool_backward,
    max_pool,
    max_pool_backward,
    reference,
    relu_norm,
    relu_norm_backward,
    use_route,
)

SHAPES = [(1, 1, 1, 2), (3, 2, 3, 1), (2, 5, 7, 3), (4, 8, 8, 16), (2, 13, 11, 31), (1, 40, 40, 6)]
DTYPES = [torch.float32, torch.float64]
# The longest chain of one addition after another: 2048 values over 4 sums of 4 lanes, and what follows it.
ROUNDINGS = 2048 // (4 * 4) + 16


def norm_operands(shape, dtype):
    """x, weight, bias, running mean, running variance, gradient; a channel that is 0 throughout among them."""
    x = torch.randn(shape, dtype=dtype) * 3 + 1
    x[-1] = -x[-1].abs()
    vectors = [torch.randn(shape[0], dtype=dtype) for _ in range(3)]
    return x, *vectors, torch.rand(shape[0], dtype=dtype) + 0.5, torch.randn(shape, dtype=dtype)


def wide(vector):
    return vector.double().view(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_relu_norm(shape, dtype, training, isa):
    x, weight, bias, running_mean, running_var, _ = norm_operands(shape, dtype)
    out, eps, unit = torch.full_like(x, torch.nan), 1e-3, STORED[dtype]
    exact_mean, exact_var = running_mean.double().clone(), running_var.double().clone()
    exact = reference.relu_norm(x.double(), weight.double(), bias.double(), exact_mean, exact_var, training, 0.3, eps)
    mean, inverse_std = relu_norm(
        x, weight, bias, running_mean, running_var, out, training=training, momentum=0.3, eps=eps
    )
    rectified = x.double().relu()
    size = rectified.mean((1, 2, 3))  # an error of the mean is a few roundings of this
    distance = (rectified - wide(mean)).abs()
    allowed = ROUNDINGS * unit * (wide(weight * inverse_std).abs() * (wide(size) + distance) + wide(bias).abs())
    assert ((out.double() - exact).abs() <= allowed).all()
    assert ((running_mean.double() - exact_mean).abs() <= ROUNDINGS * unit * (size + exact_mean.abs())).all()
    spread = rectified.flatten(1).square().mean(1)
    assert ((running_var.double() - exact_var).abs() <= 2 * ROUNDINGS * unit * (2 * spread + exact_var)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_relu_norm_backward(shape, dtype, training, isa):
    x, weight, _, mean, inverse_std, grad_out = norm_operands(shape, dtype)
    grad_x, grad_weight, grad_bias = relu_norm_backward(grad_out, x, weight, mean, inverse_std, training=training)
    exact = reference.relu_norm_backward(
        grad_out.double(), x.double(), weight.double(), mean.double(), inverse_std.double(), training
    )
    unit, count = STORED[dtype], x[0].numel()
    g, distance = grad_out.double().abs(), (x.double().relu() - wide(mean)).abs() + wide(mean).abs()
    products = (g * distance).sum((1, 2, 3)) * inverse_std.double()
    assert ((grad_weight.double() - exact[1]).abs() <= ROUNDINGS * unit * products).all()
    assert ((grad_bias.double() - exact[2]).abs() <= ROUNDINGS * unit * g.sum((1, 2, 3))).all()
    terms = g + (wide(g.sum((1, 2, 3))) + distance * wide(inverse_std) * wide(products)) / count
    allowed = 2 * ROUNDINGS * unit * wide(weight * inverse_std).abs() * terms
    assert ((grad_x.double() - exact[0]).abs() <= allowed).all()


@pytest.mark.parametrize("training", [True, False])
def test_relu_norm_backward_is_the_gradient_of_its_formula(training):
    x, weight, bias, running_mean, running_var, grad_out = norm_operands((3, 4, 5, 6), torch.float64)
    operands = [t.clone().requires_grad_() for t in (x, weight, bias)]
    running = running_mean.clone(), running_var.clone()
    reference.relu_norm(*operands, *running, training, 0.1, 1e-5).backward(grad_out)
    out = torch.empty_like(x)
    saved = relu_norm(x, weight, bias, running_mean, running_var, out, training=training, momentum=0.1, eps=1e-5)
    for ours, operand in zip(relu_norm_backward(grad_out, x, weight, *saved, training=training), operands, strict=True):
        torch.testing.assert_close(ours, operand.grad, rtol=1e-10, atol=1e-10)


def test_relu_norm_lets_nan_through(isa):
    x = torch.randn(3, 4, 4, 17)
    x[1, 2, 3, 16] = torch.nan
    out, ones = torch.empty_like(x), torch.ones(3)
    relu_norm(x, ones, ones, torch.zeros(3), torch.ones(3), out, training=True, momentum=0.1, eps=1e-5)
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 1], ids=str)
@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling_is_that_of_torch(shape, dtype, kind, isa):
    x = torch.randint(-3, 4, shape).to(dtype)  # with ties
    channels, height, width, batch = shape
    images = x.permute(3, 0, 1, 2).contiguous().requires_grad_()
    expected = (F.max_pool2d if kind == "max" else F.avg_pool2d)(images, 2)
    out = x.new_full((channels, height // 2, width // 2, batch), torch.nan)
    grad_out, grad_x = torch.randn_like(out), torch.full_like(x, torch.nan)
    expected.backward(grad_out.permute(3, 0, 1, 2))
    if kind == "max":
        max_pool(x, out)
        max_pool_backward(grad_out, x, grad_x)
    else:
        average_pool(x, out)
        average_pool_backward(grad_out, grad_x)
    assert torch.equal(out.permute(3, 0, 1, 2), expected)
    assert torch.equal(grad_x.permute(3, 0, 1, 2), images.grad)


def test_max_pool_lets_nan_through_and_loses_no_gradient(isa):
    x = torch.randn(1, 2, 8, 33)
    for place in range(4):
        x[0, place // 2, 2 * place + place % 2, place] = torch.nan
    out, grad_x = x.new_empty(1, 1, 4, 33), torch.empty_like(x)
    max_pool(x, out)
    assert [out[0, 0, place, place].isnan().item() for place in range(4)] == [True] * 4
    assert out.isnan().sum() == 4
    max_pool_backward(torch.ones_like(out), x, grad_x)
    assert torch.equal(grad_x.view(1, 2, 4, 2, 33).sum((1, 3)), torch.ones(1, 4, 33))


def test_bad_operands_of_the_fused_functions():
    x, vector = torch.randn(2, 4, 4, 3), torch.ones(2)
    settings = {"training": True, "momentum": 0.1, "eps": 1e-5}
    with pytest.raises(ValueError, match="relu_norm: x must be contiguous float32 or float64"):
        relu_norm(x.half(), vector, vector, vector, vector, x.half(), **settings)
    with pytest.raises(ValueError, match=r"relu_norm: out must be contiguous torch.float32 \(2, 4, 4, 3\), got .*5"):
        relu_norm(x, vector, vector, vector, vector, x.new_empty(2, 4, 4, 5), **settings)
    with pytest.raises(ValueError, match=r"relu_norm: weight must be contiguous torch.float32 \(2,\), got .*\(3,\)"):
        relu_norm(x, torch.ones(3), vector, vector, vector, x.clone(), **settings)
    with pytest.raises(ValueError, match="relu_norm: training needs at least two values a channel"):
        relu_norm(
            x[:, :1, :1, :1].contiguous(), vector, vector, vector, vector, x[:, :1, :1, :1].contiguous(), **settings
        )
    with pytest.raises(ValueError, match=r"max_pool: out must be contiguous torch.float32 \(2, 2, 2, 3\)"):
        max_pool(x, x)
    with pytest.raises(ValueError, match="max_pool_backward: grad_x must be contiguous .* strides"):
        max_pool_backward(x.new_empty(2, 2, 2, 3), x, x.transpose(1, 2))


GEOMETRIES = [
    {"batch": 5, "channels": (4, 3), "size": (6, 7), "kernel": 3, "padding": 1},
    {"batch": 17, "channels": (6, 9), "size": (9, 5), "kernel": 3, "padding": 1},
    {"batch": 16, "channels": (3, 5), "size": (8, 8), "kernel": 1},
    {"batch": 3, "channels": (4, 6), "size": (9, 11), "kernel": 3, "stride": 2, "groups": 2},
    {"batch": 1, "channels": (20, 7), "size": (13, 17), "kernel": 5, "padding": 2},
]


def reader(kernel, channels, batch, size, **options):
    return MaskedConv2d(*channels, kernel, density=0.3, **options).pack_()


@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "batch_last", "sliced"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g['kernel']}x{g['kernel']} of {g['batch']}")
def test_the_gradient_of_the_input_is_added(geometry, layout, route, isa):
    layer, batch, channels = reader(**geometry), geometry["batch"], geometry["channels"][0]
    x = in_layout(torch.randn(batch, channels, *geometry["size"]), layout).requires_grad_()
    gradient_sum = GradientSum()
    before = in_layout(torch.randn(batch, channels + 2, *geometry["size"]), layout)
    gradient_sum.total = in_layout(before.clone(), layout)
    with use_route(route):
        layer(x).square().sum().backward()
        expected, live, bias = x.grad, layer.values.grad, layer.bias.grad
        x.grad = layer.values.grad = layer.bias.grad = None
        layer(x, gradient_sum).square().sum().backward()
    assert x.grad is None
    assert torch.equal(layer.values.grad, live)
    assert torch.equal(layer.bias.grad, bias)
    assert torch.equal(gradient_sum.total[:, channels:], before[:, channels:])
    before = before[:, :channels].double()
    exact, magnitude = before + expected.double(), before.abs() + expected.double().abs()
    assert_sum_close(gradient_sum.total[:, :channels], exact, magnitude, 2)


def test_readers_run_before_what_they_read_and_gradients_of_several_add_up():
    layers = [reader(3, (4, 4), 6, None, padding=1) for _ in range(3)]
    source = torch.randn(6, 4, 5, 5)
    gradient_sum = GradientSum()
    seen = []

    class Source(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(gradient_sum.total.clone())
            return gradient_sum.total

    def loss(*extra):
        x = Source.apply(leaf) if extra else leaf
        return sum(layer(x, *extra).square().sum() for layer in layers)

    leaf = source.requires_grad_()
    loss().backward()
    expected = leaf.grad
    leaf.grad = None
    gradient_sum.total = torch.zeros(6, 4, 5, 5)
    loss(gradient_sum).backward()
    assert len(seen) == 1
    torch.testing.assert_close(leaf.grad, expected)


def test_autocast_adds_to_a_wider_sum():
    layer = reader(3, (4, 5), 6, None, padding=1)
    x, gradient_sum = torch.randn(6, 4, 5, 5, requires_grad=True), GradientSum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    expected, x.grad = x.grad, None
    gradient_sum.total = torch.zeros(6, 4, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x, gradient_sum).sum().backward()
    assert torch.equal(gradient_sum.total, expected)


def test_where_a_gradient_cannot_be_added():
    gradient_sum = GradientSum()
    with pytest.raises(ValueError, match="gradient_sum needs padding_mode 'zeros' and a batch.*'circular'"):
        MaskedConv2d(3, 4, 3, padding=1, padding_mode="circular", density=0.5)(torch.randn(2, 3, 5, 5), gradient_sum)
    with pytest.raises(ValueError, match=r"gradient_sum needs .* got 'zeros' and \(3, 5, 5\)"):
        MaskedConv2d(3, 4, 3, density=0.5)(torch.randn(3, 5, 5), gradient_sum)
