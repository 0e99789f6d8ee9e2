"""The CPU kernels of masked_conv2d against float64 arithmetic: every instruction set, dtype, layout and geometry."""

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ilnas_kernels import _C
from ilnas_kernels.pattern import Pattern

ISAS = [name for name, runs in _C.instruction_sets().items() if runs]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def unwritten_outputs_are_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Geometry:
    batch: int = 2
    channels: int = 3  # into the layer
    filters: int = 5  # out of the layer
    size: tuple = (7, 6)
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1, 1, 1)  # top, bottom, left, right
    dilation: tuple = (1, 1)
    groups: int = 1
    density: float = 0.4

    @property
    def arguments(self):
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    @property
    def out_size(self):
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        pads = [sum(self.padding[:2]), sum(self.padding[2:])]
        return tuple((n + p - span) // s + 1 for n, p, span, s in zip(self.size, pads, spans, self.stride, strict=True))

    def pattern(self):
        shape = (self.filters, self.channels // self.groups, *self.kernel)
        return Pattern.random(shape, self.density, self.groups, generator=torch.Generator().manual_seed(7))

    def tensors(self, dtype):
        """x, values, bias, grad_out."""
        shapes = (
            (self.batch, self.channels, *self.size),
            (self.pattern().nnz,),
            (self.filters,),
            (self.batch, self.filters, *self.out_size),
        )
        generator = torch.Generator().manual_seed(3)
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


GEOMETRIES = {
    "plain": Geometry(),
    "one_of_everything": Geometry(1, 1, 1, (1, 1), (1, 1), padding=(0, 0, 0, 0), density=1.0),
    "full_lanes": Geometry(16, 6, 7, (8, 8)),
    "full_lanes_and_more": Geometry(19, 5, 4, (9, 5)),
    "odd_batch": Geometry(5, 4, 3, (11, 13)),
    "regions_of_few_images": Geometry(6, 5, 4, (16, 9)),
    "sums_beyond_cache": Geometry(16, 210, 140, (4, 32), density=0.01),
    "one_image": Geometry(1, 17, 19, (13, 17), density=0.2),
    "wide": Geometry(16, 2, 3, (5, 67)),
    "tall": Geometry(17, 2, 2, (70, 3)),
    "many_channels": Geometry(17, 150, 35, (6, 6), density=0.03),
    "dense_channels": Geometry(16, 70, 18, (5, 7), density=0.9),
    "absent": Geometry(density=0.0),
    "all_live": Geometry(density=1.0),
    "empty_rows": Geometry(3, 40, 30, (5, 5), density=0.004),
    "asymmetric": Geometry(padding=(0, 2, 3, 1)),
    "padding_beyond_kernel": Geometry(16, 3, 4, (3, 4), padding=(4, 5, 6, 4)),
    "even_kernel": Geometry(16, 3, 4, (7, 9), (2, 4), padding=(0, 1, 1, 2)),
    "row_kernel": Geometry(3, 3, 4, (6, 12), (1, 7), padding=(0, 0, 3, 3)),
    "large_kernel": Geometry(16, 2, 3, (9, 9), (7, 5), padding=(3, 3, 2, 2)),
    "stride": Geometry(17, 4, 5, (9, 10), stride=(2, 2)),
    "stride_uneven": Geometry(3, 4, 5, (12, 17), stride=(3, 2)),
    "stride_beyond_kernel": Geometry(16, 4, 5, (13, 16), (2, 1), stride=(5, 7)),
    "stride_drops_edge": Geometry(2, 4, 5, (8, 8), (3, 3), (3, 3), (0, 0, 0, 0)),
    "dilation": Geometry(16, 3, 4, (9, 11), dilation=(2, 3), padding=(2, 2, 3, 3)),
    "dilation_and_stride": Geometry(5, 3, 4, (12, 13), stride=(2, 3), dilation=(3, 2), padding=(3, 2, 1, 2)),
    "dilation_multiple_of_stride": Geometry(16, 3, 4, (12, 13), stride=(2, 2), dilation=(2, 4), padding=(2, 2, 4, 4)),
    "groups": Geometry(16, 6, 9, (6, 7), groups=3),
    "groups_and_stride": Geometry(3, 8, 6, (7, 7), stride=(2, 1), groups=2),
    "depthwise": Geometry(4, 7, 7, (8, 6), groups=7, density=0.6),
    "depthwise_multiplied": Geometry(17, 40, 80, (5, 5), groups=40, density=0.6),
    "pointwise": Geometry(16, 33, 18, (4, 8), (1, 1), padding=(0, 0, 0, 0)),
    "pointwise_stride": Geometry(16, 9, 11, (8, 7), (1, 1), stride=(2, 2), padding=(0, 0, 0, 0)),
    "large_output": Geometry(17, 2, 32, (66, 32)),
    "on_single_pixels": Geometry(37, 19, 21, (1, 1), (1, 1), padding=(0, 0, 0, 0)),
}


def scattered(t):
    """The same values with strides no dimension of which is 1."""
    wide = torch.zeros([2 * n + 1 for n in t.shape], dtype=t.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "batch_last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "scattered": scattered,
}


def plan(p):
    return p.row_ptr, p.col, p.t_row_ptr, p.t_col, p.t_perm


def forward(x, values, bias, pattern, geometry, isa=""):
    return torch.ops.ilnas.masked_conv2d(x, values, bias, *plan(pattern), *geometry.arguments, isa)


def backward(grad_out, x, values, pattern, geometry, isa="", mask=(True, True, True)):
    return torch.ops.ilnas.masked_conv2d_backward(
        grad_out, x, values, *plan(pattern), *geometry.arguments, list(mask), isa
    )


def dense_conv(x, weight, bias, grad_out, geometry):
    """out, grad_x, grad_weight, grad_bias of the dense convolution."""
    x, weight, bias = (t.clone().requires_grad_() for t in (x, weight, bias))
    top, bottom, left, right = geometry.padding
    padded = F.pad(x, (left, right, top, bottom))
    out = F.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)
    return [out.detach(), *torch.autograd.grad(out, (x, weight, bias), grad_out)]


@lru_cache(maxsize=8)
def expected(geometry, dtype):
    """Each result in float64, the sum of its terms' magnitudes, and the greatest number of terms."""
    pattern = geometry.pattern()
    x, values, bias, grad_out = (t.double() for t in geometry.tensors(dtype))
    weight = torch.zeros(pattern.numel, dtype=torch.float64)
    weight[pattern.index] = values
    weight = weight.view(pattern.shape)
    results = dense_conv(x, weight, bias, grad_out, geometry)
    magnitudes = dense_conv(x.abs(), weight.abs(), bias.abs(), grad_out.abs(), geometry)
    for part in (results, magnitudes):
        part[2] = part[2].flatten()[pattern.index]
    most = lambda ptr: int((ptr[1:] - ptr[:-1]).max()) + 1  # noqa: E731
    positions = geometry.batch * geometry.out_size[0] * geometry.out_size[1]
    return results, magnitudes, (most(pattern.row_ptr), most(pattern.t_row_ptr), positions, positions)


def assert_close(actual, expected, magnitude, terms, dtype, name):
    """A sum of `terms` products in any order is off by at most terms * u * sum of magnitudes, and rounded once.

    The reference's own rounding doubles that where it is no wider than the kernels' sums.
    """
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    u, stored = torch.finfo(sums).eps / 2, torch.finfo(dtype).eps / 2
    sides = 2 if dtype == torch.float64 else 1
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = sides * (terms + 2) * u * magnitude * (1 + stored) + stored * expected.abs() + smallest
    error = (actual.double() - expected).abs()
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert (error <= bound).all(), f"{name}: error {error.max()}, allowed there {bound.flatten()[error.argmax()]}"


def check(geometry, dtype, layout, isa, grad_layout=None):
    pattern = geometry.pattern()
    x, values, bias, grad_out = geometry.tensors(dtype)
    x, grad_out = LAYOUTS[layout](x), LAYOUTS[grad_layout or layout](grad_out)
    results, magnitudes, terms = expected(geometry, dtype)
    actual = [forward(x, values, bias, pattern, geometry, isa), *backward(grad_out, x, values, pattern, geometry, isa)]
    for name, *case in zip(
        ("out", "grad_x", "grad_values", "grad_bias"), actual, results, magnitudes, terms, strict=True
    ):
        assert_close(*case, dtype, name)
    if layout != "scattered":
        assert actual[0].stride() == LAYOUTS[layout](actual[0]).stride() or 1 in x.shape
        assert actual[1].stride() == LAYOUTS[layout](actual[1]).stride() or 1 in x.shape


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_matches_float64(isa, dtype, name):
    for layout in LAYOUTS:
        check(GEOMETRIES[name], dtype, layout, isa)


@pytest.mark.parametrize("name", ["plain", "full_lanes", "stride"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_may_differ(layout, grad_layout, name):
    check(GEOMETRIES[name], torch.float32, layout, "", grad_layout)


@st.composite
def geometries(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*[st.integers(0, 5)] * 4))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(
        draw(st.integers(max(1, span - sum(pads)), span + 12))
        for span, pads in zip(spans, (padding[:2], padding[2:]), strict=True)
    )
    return Geometry(
        batch=draw(st.integers(1, 20)),
        channels=groups * draw(st.integers(1, 12)),
        filters=groups * draw(st.integers(1, 12)),
        size=size,
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        density=draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])),
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(geometries(), st.sampled_from(ISAS), st.sampled_from(DTYPES), st.sampled_from(list(LAYOUTS)))
def test_random_geometries(geometry, isa, dtype, layout):
    check(geometry, dtype, layout, isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["full_lanes_and_more", "one_image", "many_channels", "stride_uneven"])
def test_repeats_bit_for_bit(name, threads):
    geometry = GEOMETRIES[name]
    pattern = geometry.pattern()
    x, values, bias, grad_out = geometry.tensors(torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [
            [forward(x, values, bias, pattern, geometry), *backward(grad_out, x, values, pattern, geometry)]
            for _ in range(3)
        ]
        check(geometry, torch.float32, "nchw", "")
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_asked_for(mask):
    geometry = GEOMETRIES["full_lanes"]
    pattern = geometry.pattern()
    x, values, _, grad_out = geometry.tensors(torch.float32)
    every = backward(grad_out, x, values, pattern, geometry)
    some = backward(grad_out, x, values, pattern, geometry, mask=mask)
    for asked, whole, part in zip(mask, every, some, strict=True):
        assert torch.equal(part, whole) if asked else part.numel() == 0


def test_without_bias():
    geometry = GEOMETRIES["plain"]
    x, values, bias, _ = geometry.tensors(torch.float64)
    with_bias = forward(x, values, bias, geometry.pattern(), geometry)
    without = forward(x, values, None, geometry.pattern(), geometry)
    torch.testing.assert_close(without + bias.view(-1, 1, 1), with_bias)


def test_expanded_gradient():
    geometry = GEOMETRIES["full_lanes"]
    pattern = geometry.pattern()
    x, values, _, grad_out = geometry.tensors(torch.float64)
    for expanded in (grad_out[:1].expand_as(grad_out), grad_out[:, :, :1, :1].expand_as(grad_out)):
        whole = backward(expanded.contiguous(), x, values, pattern, geometry)
        for a, b in zip(backward(expanded, x, values, pattern, geometry), whole, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["full_lanes_and_more", "one_image", "odd_batch", "stride", "dilation_and_stride"])
def test_nan_in_x_reaches_what_it_reaches_in_dense(name, layout, isa):
    geometry = GEOMETRIES[name]
    pattern = geometry.pattern()
    x, values, bias, grad_out = geometry.tensors(torch.float32)
    x[0, 1, 2, 3] = x[0, 0, -1, -1] = torch.nan
    touched = torch.zeros(pattern.numel)
    touched[pattern.index] = 1
    top, bottom, left, right = geometry.padding
    padded = F.pad(x.isnan().float(), (left, right, top, bottom))
    arguments = geometry.stride, 0, geometry.dilation
    reached = F.conv2d(padded, touched.view(pattern.shape), None, *arguments) > 0
    out = forward(LAYOUTS[layout](x), values, bias, pattern, geometry, isa)
    assert torch.equal(out.isnan(), reached)
    reached = torch.nn.grad.conv2d_weight(padded, pattern.shape, torch.ones_like(grad_out), *arguments) > 0
    _, grad_values, grad_bias = backward(
        LAYOUTS[layout](grad_out), LAYOUTS[layout](x), values, pattern, geometry, isa=isa
    )
    assert torch.equal(grad_values.isnan(), reached.view(-1)[pattern.index])
    assert grad_bias.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 7, 6), (2, 3, 7, 6)])
def test_nothing_to_do(shape):
    """An empty batch, and a layer without a live weight: the gradients have their shapes and are zero."""
    geometry = Geometry(batch=shape[0], density=0.0 if shape[0] else 0.5)
    pattern = geometry.pattern()
    x, values, bias, grad_out = geometry.tensors(torch.float32)
    out = forward(x, values, bias, pattern, geometry)
    assert torch.equal(out, bias.view(-1, 1, 1).expand_as(out))
    grad_x, grad_values, grad_bias = backward(grad_out, x, values, pattern, geometry)
    assert grad_x.shape == x.shape and not grad_x.any()
    assert grad_values.shape == values.shape and not grad_values.any()
    torch.testing.assert_close(grad_bias, grad_out.sum((0, 2, 3)))
