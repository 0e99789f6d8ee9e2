"""The public layers on the Triton route, in the interpreter: what a GPU without the CUDA extension takes."""

import pytest
import torch
from torch import nn

from ilnas_kernels import MaskedConv2d, MaskedLinear, absent_topk, dispatch, use_route
from tests.triton.cases import draw, random_pattern


@pytest.fixture
def triton_route(monkeypatch):
    """CPU tensors go to Triton."""
    monkeypatch.setattr(dispatch, "sparse_route", lambda device, dtype=torch.float32: "triton")


@pytest.mark.parametrize("packed", [False, True])
def test_training_step(triton_route, packed):
    """Two layers against the same with dense torch: one step of SGD from the same weights."""

    def step(route):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        conv = MaskedConv2d(3, 5, 3, stride=2, padding=1, density=0.4, generator=generator)
        linear = MaskedLinear(5 * 4 * 4, 6, density=0.2, generator=generator)
        if packed:
            conv.pack_()
            linear.pack_()
        model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear)
        x = draw(2, 3, 8, 8, dtype=torch.float32, seed=1).float().requires_grad_()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with use_route(route):
            out = model(x)
            (out**2).sum().backward()
        optimizer.step()
        return out, x.grad, conv.weight, linear.weight, conv.bias

    for got, exact in zip(step("sparse"), step("dense"), strict=True):
        # Both round every sum of at most 128 terms in fp32, through two layers and back.
        assert (got - exact).abs().max() <= 4 * 2 * 128 * 2.0**-24 * exact.abs().max().clamp(min=1)


def test_plan_is_built_once(triton_route):
    layer = MaskedLinear(20, 30, density=0.2)
    x = torch.ones(4, 20)
    with use_route("sparse"):
        layer(x)
        plans = dict(layer.pattern._plans)
        layer(x).sum().backward()
    triton_plans = [name for name in plans if name.startswith("triton")]
    assert len(triton_plans) == 1
    assert layer.pattern._plans[triton_plans[0]] is plans[triton_plans[0]]


def test_absent_topk(triton_route):
    pattern = random_pattern((7, 9), 0.3)
    x, grad_out = draw(5, 9, dtype=torch.float32, seed=1).round().float(), draw(5, 7, dtype=torch.float32, seed=2)
    grad_out = grad_out.round().float()
    index, grad = absent_topk(x, grad_out, pattern, 10)
    exact = (grad_out.t() @ x).view(-1)
    score = torch.where(pattern.mask.view(-1), -1.0, exact.abs())
    order = torch.sort(score, descending=True, stable=True).indices[:10]
    assert torch.equal(index, order)
    assert torch.equal(grad, exact[order])
