"""masked_conv2d, masked_linear and absent_topk against the float64 reference."""

import pytest
import torch
from comparison import LAYOUTS, assert_sum_close, in_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from ilnas_kernels import (
    Pattern,
    _blocked_topk,
    absent_topk,
    dispatch,
    instruction_set,
    instruction_sets,
    masked_conv2d,
    masked_linear,
    reference,
    use_route,
)
from ilnas_kernels.layout import layout_of

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# name: (batch, in, out, (height, width), kernel, geometry, density)
CONVOLUTIONS = {
    "3x3": (17, 5, 7, (9, 6), (3, 3), {"padding": 1}, 0.4),
    "3x3-full-block": (16, 16, 16, (8, 8), (3, 3), {"padding": 1}, 0.1),
    "1x1": (3, 13, 11, (4, 4), (1, 1), {}, 0.3),
    "1x1-stride": (2, 6, 5, (7, 7), (1, 1), {"stride": 2}, 0.5),
    "5x5-stride": (2, 3, 4, (11, 13), (5, 5), {"stride": (2, 3), "padding": (2, 1)}, 0.3),
    "dilated": (3, 4, 5, (9, 9), (3, 3), {"dilation": 2, "padding": 2}, 0.5),
    "groups": (3, 6, 9, (6, 5), (3, 3), {"groups": 3, "padding": 1}, 0.5),
    "depthwise": (5, 8, 8, (7, 6), (3, 3), {"groups": 8, "padding": 1, "stride": 2}, 0.6),
    "same-even": (2, 4, 3, (6, 7), (4, 2), {"padding": "same"}, 0.5),
    "same-even-dilated": (2, 3, 2, (9, 8), (2, 4), {"padding": "same", "dilation": (3, 1)}, 0.5),
    "valid": (1, 2, 3, (5, 5), (3, 2), {"padding": "valid"}, 0.5),
    "four-sided": (2, 3, 2, (5, 4), (3, 3), {"padding": (0, 3, 2, 1)}, 0.5),
    "one-pixel": (19, 7, 5, (1, 1), (3, 3), {"padding": 1}, 0.5),
    "wide-padding": (1, 2, 2, (2, 3), (2, 2), {"padding": 3}, 0.5),
    "all-absent": (2, 3, 4, (5, 5), (3, 3), {"padding": 1}, 0.0),
    "all-live": (4, 3, 5, (5, 6), (3, 3), {"padding": 1}, 1.0),
}


def conv_problem(batch, in_channels, out_channels, size, kernel, geometry, density, dtype=torch.float64):
    """(x, weight, mask, bias) of the dtype; one row of the mask is empty where the density allows it."""
    groups = geometry.get("groups", 1)
    x = torch.randn(batch, in_channels, *size).to(dtype)
    weight = torch.randn(out_channels, in_channels // groups, *kernel).to(dtype)
    mask = torch.rand(weight.shape) < density
    if density < 1 and out_channels > 1:
        mask[out_channels // 2] = False
    return x, weight, mask, torch.randn(out_channels).to(dtype)


def gradients(function, tensors, grad_out):
    """The output and its gradients, of copies of the tensors."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def check_conv(x, weight, mask, bias, geometry, layouts):
    """Forward and every gradient, dense form, against float64, with ``x`` in each of the layouts."""
    pattern = Pattern.from_mask(mask, geometry.get("groups", 1))
    exact = [t.double() for t in (x, weight, bias)]

    def ours(x, weight, bias):
        return masked_conv2d(x, weight, pattern, bias, **geometry)

    def spec(x, weight, bias):
        return reference.masked_conv2d(x, weight, mask, bias, **geometry)

    out = ours(x, weight, bias)
    grad_out = torch.randn(out.shape).to(x.dtype)
    weight = weight.masked_fill(~mask, torch.nan)  # absent entries must not matter
    exact_out, wanted = gradients(spec, exact, grad_out.double())
    sizes, size_gradients = gradients(spec, [t.abs() for t in exact], grad_out.double().abs())
    per_channel = out.numel() // max(out.shape[1], 1)
    taps_in = weight[0].numel()
    taps_out = weight.shape[0] // geometry.get("groups", 1) * weight[0, 0].numel()
    terms = (taps_out, per_channel, per_channel)
    for layout in layouts:
        x = in_layout(x, layout)
        out, found = gradients(ours, (x, weight, bias), grad_out)
        assert_sum_close(out, exact_out, sizes, taps_in + 1)
        for got, want, size, length in zip(found, wanted, size_gradients, terms, strict=True):
            assert_sum_close(got, want, size, length)
        assert found[1][~mask].count_nonzero() == 0
        if layout in ("nchw", "channels_last", "batch_last") and min(*out.shape, *x.shape) > 1:
            assert layout_of(out) == layout_of(x) == layout_of(found[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sparse_convolution(name, dtype, isa):
    with use_route("sparse"):
        check_conv(*conv_problem(*CONVOLUTIONS[name], dtype), CONVOLUTIONS[name][5], LAYOUTS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_dense_route_of_convolution(name, dtype):
    with use_route("dense"):
        check_conv(*conv_problem(*CONVOLUTIONS[name], dtype), CONVOLUTIONS[name][5], LAYOUTS)


@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_packed_convolution_equals_the_dense_form(route):
    x, weight, mask, bias = conv_problem(*CONVOLUTIONS["3x3"])
    pattern = Pattern.from_mask(mask)
    with use_route(route):
        grad_out = torch.randn_like(masked_conv2d(x, weight, pattern, bias, padding=1))
        dense, of_dense = gradients(
            lambda *t: masked_conv2d(t[0], t[1], pattern, t[2], padding=1), (x, weight, bias), grad_out
        )
        packed, of_packed = gradients(
            lambda *t: masked_conv2d(t[0], t[1], pattern, t[2], padding=1), (x, weight[mask], bias), grad_out
        )
    assert torch.equal(dense, packed)
    assert torch.equal(of_dense[0], of_packed[0])
    assert torch.equal(of_dense[1][mask], of_packed[1])
    assert torch.equal(of_dense[2], of_packed[2])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_geometries(data):
    def draw(least, most):
        return data.draw(st.integers(least, most))

    groups = draw(1, 3)
    kernel, stride, dilation = ((draw(1, 4), draw(1, 4)), (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 3)))
    padding = tuple(draw(0, 4) for _ in range(4))
    size = tuple(
        max(d * (k - 1) + 1 - padding[2 * i] - padding[2 * i + 1], 1) + draw(0, 6)
        for i, (k, d) in enumerate(zip(kernel, dilation, strict=True))
    )
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    torch.manual_seed(draw(0, 1000))
    problem = conv_problem(draw(1, 18), groups * draw(1, 5), groups * draw(1, 5), size, kernel, geometry,
                           data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))), torch.float32)  # fmt: skip
    with use_route(data.draw(st.sampled_from(("sparse", "dense")))):
        check_conv(*problem, geometry, [data.draw(st.sampled_from(LAYOUTS))])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 13, 11), (32, 48, 64), (3, 100, 7), (5, 9, 600)], ids=str)
@pytest.mark.parametrize("density", (0.0, 0.1, 1.0))
def test_sparse_linear(shape, density, dtype, isa):
    batch, in_features, out_features = shape
    x = torch.randn(batch, 2, in_features)[:, 0].to(dtype)  # rows that are not next to one another
    weight = torch.randn(out_features, in_features).to(dtype)
    mask, bias = torch.rand(weight.shape) < density, torch.randn(out_features).to(dtype)
    pattern = Pattern.from_mask(mask)
    grad_out = torch.randn(out_features, batch).to(dtype).t()
    with use_route("sparse"):
        out, found = gradients(
            lambda x, w, b: masked_linear(x, w, pattern, b), (x, weight.masked_fill(~mask, torch.inf), bias), grad_out
        )
    exact = [t.double() for t in (x, weight, bias)]

    def spec(x, w, b):
        return reference.masked_linear(x, w, mask, b)

    exact_out, wanted = gradients(spec, exact, grad_out.double())
    sizes, size_gradients = gradients(spec, [t.abs() for t in exact], grad_out.double().abs())
    assert_sum_close(out, exact_out, sizes, in_features + 1)
    for got, want, size, terms in zip(found, wanted, size_gradients, (out_features, batch, batch), strict=True):
        assert_sum_close(got, want, size, terms)


@pytest.mark.parametrize("route", ("sparse", "dense"))
@pytest.mark.parametrize("lead", ((), (4,), (2, 3), (2, 0), (0,)), ids=str)
def test_linear_takes_any_leading_dimensions(lead, route):
    x, weight = torch.randn(*lead, 6), torch.randn(5, 6)
    mask = torch.rand(5, 6) < 0.5
    with use_route(route):
        out = masked_linear(x, weight, mask)
    torch.testing.assert_close(out, reference.masked_linear(x, weight, mask))


@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_unbatched_image(route):
    x, weight, mask, bias = conv_problem(1, 3, 4, (5, 6), (3, 3), {}, 0.5)
    with use_route(route):
        out = masked_conv2d(x[0], weight, mask, bias, padding=1)
    torch.testing.assert_close(out, reference.masked_conv2d(x, weight, mask, bias, padding=1)[0])


@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_zero_batch(route):
    x = torch.randn(0, 3, 5, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    with use_route(route):
        out = masked_conv2d(x, weight, torch.rand(weight.shape) < 0.5, bias, padding=1)
        out.sum().backward()
    assert out.shape == (0, 4, 5, 5)
    assert x.grad.shape == x.shape
    assert weight.grad.count_nonzero() == 0
    assert bias.grad.count_nonzero() == 0


@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_expanded_gradient(route):
    """sum().backward() hands on a gradient whose strides are 0."""
    x, weight, mask, bias = conv_problem(*CONVOLUTIONS["3x3"])
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    with use_route(route):
        masked_conv2d(leaves[0], leaves[1], mask, leaves[2], padding=1).sum().backward()
    twins = [t.clone().requires_grad_() for t in (x, weight, bias)]
    reference.masked_conv2d(twins[0], twins[1], mask, twins[2], padding=1).sum().backward()
    for ours, theirs in zip(leaves, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("route", ("sparse", "dense"))
@pytest.mark.parametrize("form", ("dense", "packed"))
def test_first_and_second_derivatives(route, form):
    x, weight, mask, bias = conv_problem(2, 4, 4, (4, 5), (3, 2), {"groups": 2}, 0.5)
    pattern = Pattern.from_mask(mask, 2)
    weight = weight[mask] if form == "packed" else weight
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x, weight, bias):
        return masked_conv2d(x, weight, pattern, bias, stride=(2, 1), padding=(1, 0, 2, 1), groups=2)

    with use_route(route):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_derivatives_of_linear(route):
    mask = torch.rand(4, 5) < 0.5
    inputs = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 5), (4, 5), (4,))]
    with use_route(route):
        assert torch.autograd.gradcheck(lambda x, w, b: masked_linear(x, w, mask, b), inputs)
        assert torch.autograd.gradgradcheck(lambda x, w, b: masked_linear(x, w, mask, b), inputs)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_a_single_gradient(route, wanted):
    tensors = conv_problem(*CONVOLUTIONS["groups"])
    x, weight, mask, bias = tensors
    for tensor, wants in zip((x, weight, bias), wanted, strict=True):
        tensor.requires_grad_(wants)
    with use_route(route):
        masked_conv2d(x, weight, Pattern.from_mask(mask, 3), bias, padding=1, groups=3).square().sum().backward()
    for tensor, wants in zip((x, weight, bias), wanted, strict=True):
        assert (tensor.grad is not None) == wants


@pytest.mark.parametrize("x_dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_autocast_takes_the_dtype_that_torch_takes(route, x_dtype):
    x, weight, mask = torch.randn(2, 3, 6, 6, dtype=x_dtype), torch.randn(4, 3, 3, 3, dtype=x_dtype), None
    mask = torch.rand(weight.shape) < 0.5
    weight.requires_grad_()
    with use_route(route), torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_conv2d(x, weight, mask, padding=1)
        linear = masked_linear(x, torch.randn(5, 6, dtype=x_dtype), torch.rand(5, 6) < 0.5)
        assert out.dtype == torch.nn.functional.conv2d(x, weight, padding=1).dtype
        assert linear.dtype == torch.nn.functional.linear(x, torch.randn(5, 6, dtype=x_dtype)).dtype
    out.float().sum().backward()
    assert weight.grad.dtype == x_dtype
    assert weight.grad[~mask].count_nonzero() == 0


@pytest.fixture(params=[*sorted(name for name, runs in instruction_sets().items() if runs), "blocked"])
def topk_kernel(request, monkeypatch):
    """Each instruction set, and plain torch in blocks of a row or two, as where a device has no kernel."""
    if request.param != "blocked":
        with instruction_set(request.param):
            yield request.param
        return
    monkeypatch.setattr(dispatch, "sparse_route", lambda device, dtype=torch.float32: None)
    monkeypatch.setattr(_blocked_topk, "_BLOCK", 100)
    yield request.param


def check_topk(x, grad_out, mask, k, *, terms, **options):
    """The k best by a float64 count, where candidates closer than the error bound may change places."""
    geometry = {key: options[key] for key in ("stride", "padding", "dilation", "groups") if key in options}
    pattern = Pattern.from_mask(mask, geometry.get("groups", 1))
    index, grad = absent_topk(x, grad_out, pattern, k, **options)
    exact = reference.weight_gradient(x.double(), grad_out.double(), mask.shape, **geometry)
    size = reference.weight_gradient(x.double().abs(), grad_out.double().abs(), mask.shape, **geometry)
    exclude, granularity = options.get("exclude"), options.get("granularity", "weight")
    blocked = mask if exclude is None else mask | exclude
    candidates, score = reference.absent_scores(exact, blocked, granularity)
    _, bound = reference.absent_scores(size, blocked, granularity)
    # sums in float32 and one rounding; for kernels the squares, their mean and its root add a handful more
    bound = bound * ((terms + 16) * 2.0**-24)
    assert index.numel() == min(k, candidates.numel()) == index.unique().numel()
    place = torch.searchsorted(candidates, index)
    assert torch.equal(candidates[place], index)
    assert ((grad.double() - score[place]).abs() <= bound[place]).all()
    assert (grad.abs()[1:] <= grad.abs()[:-1]).all()
    left_out = torch.ones_like(candidates, dtype=torch.bool)
    left_out[place] = False
    if left_out.any() and index.numel():
        assert ((score.abs() - bound)[left_out] <= grad[-1].abs().double()).all()


@pytest.mark.parametrize("granularity", ("weight", "kernel"))
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_topk_of_convolution(name, granularity, topk_kernel):
    x, weight, mask, _ = conv_problem(*CONVOLUTIONS[name], torch.float32)
    geometry = CONVOLUTIONS[name][5]
    out = reference.masked_conv2d(x, weight, mask, **geometry)
    for layout, k in zip(LAYOUTS, (1, 7, 10**4, 20, 3), strict=True):
        check_topk(
            in_layout(x, layout), in_layout(torch.randn_like(out), layout), mask, k,
            terms=out.numel() // out.shape[1], granularity=granularity, exclude=torch.rand(mask.shape) < 0.2,
            **geometry,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("granularity", ("weight", "kernel"))
def test_topk_of_linear(granularity, dtype, topk_kernel):
    x, grad_out = torch.randn(3, 7, 33).to(dtype), torch.randn(3, 7, 29).to(dtype)
    mask = torch.rand(29, 33) < 0.3
    for k in (1, 50, 29 * 33):
        check_topk(x, grad_out, mask, k, terms=21, granularity=granularity)


def test_topk_ties_go_to_the_lowest_index(topk_kernel):
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[0, :2] = True
    index, grad = absent_topk(torch.ones(3, 5), torch.ones(3, 6), mask, 4)
    assert index.tolist() == [2, 3, 4, 5]
    assert grad.tolist() == [3.0] * 4


def test_topk_of_an_all_live_layer_and_of_a_zero_batch(topk_kernel):
    index, grad = absent_topk(torch.ones(3, 5), torch.ones(3, 6), torch.ones(6, 5, dtype=torch.bool), 4)
    assert index.shape == grad.shape == (0,)
    index, grad = absent_topk(torch.ones(0, 5), torch.ones(0, 6), torch.zeros(6, 5, dtype=torch.bool), 4)
    assert index.tolist() == [0, 1, 2, 3]
    assert grad.tolist() == [0.0] * 4


def test_topk_refuses_non_finite_gradients(topk_kernel):
    x = torch.ones(3, 5)
    x[1, 2] = torch.nan
    with pytest.raises(ArithmeticError, match="6 absent candidates are NaN or infinite"):
        absent_topk(x, torch.ones(3, 6), torch.zeros(6, 5, dtype=torch.bool), 4)


def test_nan_in_x_shows_where_live_weights_see_it_and_nowhere_else():
    x = torch.ones(1, 2, 4, 4)
    x[0, 1] = torch.nan
    mask = torch.zeros(2, 2, 1, 1, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = True
    with use_route("sparse"):
        out = masked_conv2d(x, torch.ones(2, 2, 1, 1), mask)
    assert out[0, 0].eq(1).all()
    assert out[0, 1].isnan().all()
