"""torch.library's own checks of every operator, torch.compile and torch.export of models with masked layers."""

import pytest
import torch
from torch import nn

from ilnas_kernels import (
    MaskedConv2d,
    MaskedLinear,
    Pattern,
    _masked,
    current_instruction_set,
    to_batch_last,
    use_route,
)
from ilnas_kernels.layout import BATCH_LAST, layout_of

# torch's own tracing instantiates Function and looks at the gradients of non-leaves, which its warnings are against.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

ILNAS = torch.ops.ilnas
CONV_PATTERN = Pattern.from_mask(torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4, 2)
GEOMETRY = ((3, 3), (2, 1), (0, 1, 2, 1), (1, 2), 2)
LINEAR_PATTERN = Pattern.from_mask(torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.4)
NOTHING = Pattern.from_mask(torch.zeros(5, 7, dtype=torch.bool))


def conv_inputs(batch_last):
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)
    x = to_batch_last(x) if batch_last else x
    return x.requires_grad_(), torch.randn(CONV_PATTERN.nnz, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("batch_last", (False, True))
def test_masked_conv2d(batch_last, with_bias):
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True) if with_bias else None
    arguments = (*conv_inputs(batch_last), bias, *CONV_PATTERN.operands, *GEOMETRY, "")
    torch.library.opcheck(ILNAS.masked_conv2d, arguments)


@pytest.mark.parametrize("output_mask", ([True] * 3, [True, False, False], [False, True, False], [False, False, True]))
def test_masked_conv2d_backward(output_mask):
    x, values = conv_inputs(False)
    grad_out = torch.randn(3, 6, 3, 7, dtype=torch.float64, requires_grad=True)
    arguments = (grad_out, x, values, *CONV_PATTERN.operands, *GEOMETRY, output_mask, "")
    torch.library.opcheck(ILNAS.masked_conv2d_backward, arguments)


@pytest.mark.parametrize("pattern", (LINEAR_PATTERN, NOTHING), ids=("live", "all-absent"))
def test_masked_linear(pattern):
    x, values = torch.randn(4, 7, requires_grad=True), torch.randn(pattern.nnz, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    torch.library.opcheck(ILNAS.masked_linear, (x, values, bias, *pattern.operands, ""))
    grad_out = torch.randn(4, 5, requires_grad=True)
    arguments = (grad_out, x, values, *pattern.operands, [True, True, True], "")
    torch.library.opcheck(ILNAS.masked_linear_backward, arguments)


def test_absent_topk():
    p = CONV_PATTERN
    x, grad_out = torch.randn(3, 4, 7, 8), torch.randn(3, 6, 3, 7)
    torch.library.opcheck(ILNAS.absent_topk, (x, grad_out, p.row_ptr, p.col, 5, *GEOMETRY, False, 0.0, ""))


def test_moving_live_values():
    p = CONV_PATTERN
    weight, values = torch.randn(p.shape, requires_grad=True), torch.randn(p.nnz, requires_grad=True)
    torch.library.opcheck(ILNAS.gather_live, (weight, p.row_ptr, p.col))
    torch.library.opcheck(ILNAS.scatter_live, (values, p.row_ptr, p.col, p.shape, p.stride))
    torch.library.opcheck(ILNAS.has_strays, (weight.detach(), p.row_ptr, p.col, p.live_bits))
    torch.library.opcheck(ILNAS.zero_absent_, (weight.detach(), p.row_ptr, p.col, p.live_bits))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("strided", (False, True))
def test_live_values_of_every_width(dtype, strided):
    p = CONV_PATTERN
    weight = torch.randn(p.shape).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last) if strided else weight
    values = ILNAS.gather_live(weight, p.row_ptr, p.col)
    assert torch.equal(values, weight[p.mask])
    dense = ILNAS.scatter_live(values, p.row_ptr, p.col, p.shape, weight.stride())
    assert torch.equal(dense, weight.masked_fill(~p.mask, 0))
    assert dense.stride() == weight.stride()
    held = (p.row_ptr, p.col, p.live_bits)
    assert ILNAS.has_strays(weight, *held) == 1
    assert ILNAS.has_strays(dense, *held) == 0
    for place in (~p.mask).nonzero():  # one stray at a time, at every place it can be
        stray = dense.clone()
        stray[tuple(place)] = torch.nan
        assert ILNAS.has_strays(stray, *held) == 1
    weight[~p.mask] = torch.nan
    ILNAS.zero_absent_(weight, *held)
    assert torch.equal(weight, dense)
    assert ILNAS.has_strays(weight, *held) == 0


@pytest.mark.parametrize("dtype", (torch.int8, torch.bfloat16, torch.float32, torch.float64), ids=str)
def test_strays_in_every_instruction_set(dtype, isa):
    """The mask in whole machine words, whole bytes and a rest of one bit."""
    p = Pattern.from_mask(torch.rand(13, 21) < 0.5)
    name, held = current_instruction_set(), (p.row_ptr, p.col, p.live_bits)
    clean = torch.where(p.mask, torch.full(p.shape, -3).to(dtype), torch.zeros(p.shape, dtype=dtype))
    assert ILNAS.has_strays(clean, *held, name) == 0
    assert ILNAS.has_strays(torch.where(p.mask, clean, -clean), *held, name) == 0  # -0 is a zero too
    for place in (~p.mask).nonzero():
        stray = clean.clone()
        stray[tuple(place)] = 5
        assert ILNAS.has_strays(stray, *held, name) == 1
        ILNAS.zero_absent_(stray, *held, name)
        assert torch.equal(stray, clean)


def test_strays_of_a_channels_last_weight():
    """Read in the order of memory, with the mask packed in that order."""
    p = CONV_PATTERN
    clean = torch.randn(p.shape).masked_fill_(~p.mask, 0).contiguous(memory_format=torch.channels_last)
    assert _masked.dense_weight(clean, p) is clean
    for place in (~p.mask).nonzero():
        stray = clean.clone()
        stray[tuple(place)] = torch.inf
        assert torch.equal(_masked.dense_weight(stray, p), clean)
        with torch.no_grad():
            assert torch.equal(_masked._masked_gradient(stray, clean, p), clean)


def network(packed):
    layers = [
        MaskedConv2d(3, 8, 3, padding=1, density=0.3), nn.BatchNorm2d(8), nn.ReLU(),
        MaskedConv2d(8, 6, 2, padding="same", groups=2, density=0.9, padding_mode="reflect"), nn.Flatten(),
        MaskedLinear(6 * 36, 5, density=0.2), MaskedLinear(5, 4),
    ]  # fmt: skip
    layers[0].set_bias_mask(torch.arange(8) % 2 == 0)
    if packed:
        layers = [m.pack_() if hasattr(m, "pack_") else m for m in layers]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("route", "packed"), ((None, False), ("sparse", True), ("dense", False), ("dense", True)))
def test_compiled_without_a_graph_break(packed, route):
    model, x = network(packed), torch.randn(4, 3, 6, 6)
    with use_route(route) if route else torch.enable_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(x)  # first, so that nothing is cached by an eager run
        out.square().sum().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected = model(x)
        expected.square().sum().backward()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], atol=1e-3, rtol=1e-3)


def test_compiled_for_changing_batches():
    model = network(False)[:3].eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 7):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(compiled(x).detach(), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_compiled_batch_last():
    layer = MaskedConv2d(3, 8, 3, padding=1, density=0.3)
    x = to_batch_last(torch.randn(4, 3, 6, 6))
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert layout_of(out) == BATCH_LAST
    torch.testing.assert_close(out, layer(x))


def test_exported():
    model, x = network(False).eval(), torch.randn(4, 3, 6, 6)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
