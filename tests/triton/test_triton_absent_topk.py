"""absent_topk in Triton's interpreter against a sort of the float64 gradient."""

import math

import pytest
import torch
from torch import Tensor

from ilnas_kernels import Pattern
from ilnas_kernels import triton as kernels
from ilnas_kernels.triton import absent_topk as module
from tests.triton.cases import CONVS, LAYOUTS, UNIT, Conv, draw, in_layout, random_pattern


def run(conv: Conv, blocked: Pattern, x: Tensor, grad_out: Tensor, k: int, by_kernel=False, floor=0.0):
    return kernels.absent_topk_triton(x, grad_out, blocked.row_ptr, blocked.col, k, *conv.geometry, by_kernel, floor)


def gradient(conv: Conv, x: Tensor, grad_out: Tensor) -> Tensor:
    weight = torch.zeros(conv.weight_shape, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(conv(x.double(), weight, None), weight, grad_out.double())[0]


def scores(grad: Tensor, blocked: Pattern, by_kernel: bool) -> Tensor:
    """Of every candidate by flat index; -1 for what is none."""
    absent = ~blocked.mask
    if not by_kernel:
        return torch.where(absent, grad.abs(), -1.0).view(-1)
    absent = absent.flatten(2)
    count = absent.sum(2)
    score = ((grad.flatten(2) ** 2 * absent).sum(2) / count.clamp(min=1)).sqrt()
    return torch.where(count > 0, score, -1.0).view(-1)


def inputs(conv: Conv, dtype=torch.float32, whole=False) -> tuple[Tensor, Tensor]:
    """x and grad_out. whole: small integers, whose products sum without rounding and often to the same."""
    x = draw(conv.batch, conv.in_channels, *conv.size, dtype=dtype, seed=1)
    grad_out = draw(*conv(x, torch.zeros(conv.weight_shape, dtype=torch.float64), None).shape, dtype=dtype, seed=2)
    if whole:
        x, grad_out = x.round(), grad_out.round()
    return x.to(dtype), grad_out.to(dtype)


def check_exact(conv: Conv, density: float, k: int, by_kernel=False, layout="nchw", dtype=torch.float32) -> None:
    """On integers nothing rounds, so the answer is the sorted float64 gradient, ties by index."""
    blocked = random_pattern(conv.weight_shape, density, conv.groups)
    x, grad_out = inputs(conv, dtype, whole=True)
    grad = gradient(conv, x, grad_out)
    score = scores(grad, blocked, by_kernel)
    order = torch.sort(score.float(), descending=True, stable=True).indices
    count = min(k, int((score >= 0).sum()))
    index, got, non_finite = run(conv, blocked, in_layout(x, layout), in_layout(grad_out, layout), k, by_kernel)
    assert index[:count].tolist() == order[:count].tolist()
    signed = score if by_kernel else grad.view(-1)
    # A gradient is exact; the root of a mean rounds the mean, which the root halves, and itself.
    bound = signed[order[:count]].abs() * (1.5 * 2.0**-24 * 1.01 if by_kernel else 0.0)
    assert ((got[:count] - signed[order[:count]]).abs() <= bound).all()
    assert (index[count:] == -1).all()
    assert not got[count:].any()
    assert non_finite.item() == 0


TOPK_CONVS = ("odd", "pointwise_strided", "groups_strided_dilated_asymmetric", "depthwise", "padding_beyond_kernel")


@pytest.mark.parametrize("by_kernel", [False, True], ids=["weight", "kernel"])
@pytest.mark.parametrize("name", TOPK_CONVS)
def test_exact_with_ties(name, by_kernel):
    check_exact(CONVS[name], 0.3, 11, by_kernel)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check_exact(CONVS["groups_strided_dilated_asymmetric"], 0.3, 20, layout=layout)


@pytest.mark.parametrize("by_kernel", [False, True], ids=["weight", "kernel"])
@pytest.mark.parametrize("density", [0.0, 0.95, 1.0])
def test_more_than_there_are(density, by_kernel):
    conv = CONVS["odd"]
    check_exact(conv, density, math.prod(conv.weight_shape) + 5, by_kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    check_exact(CONVS["odd"], 0.3, 30, dtype=dtype)


def test_linear():
    check_exact(Conv(9, 50, 37, (1, 1), (1, 1), padding=(0, 0, 0, 0)), 0.2, 100)


@pytest.mark.parametrize("by_kernel", [False, True], ids=["weight", "kernel"])
@pytest.mark.parametrize("k", [1, 7, 90])
def test_several_passes(monkeypatch, k, by_kernel):
    """A buffer that the candidates overflow: the threshold is sampled, and corrected by the histogram."""
    monkeypatch.setattr(module, "_SMALLEST_BUFFER", 300)
    check_exact(Conv(1, 33, 30, (3, 3), (2, 2)), 0.2, k, by_kernel)


def test_massive_ties(monkeypatch):
    """All gradients but a few are equal: the threshold has to be found among the bits of the index."""
    monkeypatch.setattr(module, "_SMALLEST_BUFFER", 300)
    conv = Conv(1, 60, 40, (1, 1), (1, 1), padding=(0, 0, 0, 0))
    x, grad_out = torch.ones(1, 60, 1, 1), torch.ones(1, 40, 1, 1)
    x[0, 3] = -2
    blocked = random_pattern(conv.weight_shape, 0.0)
    index, grad, _ = run(conv, blocked, x, grad_out, 70)
    order = torch.sort(scores(gradient(conv, x, grad_out), blocked, False), descending=True, stable=True).indices
    assert index.tolist() == order[:70].tolist()
    assert grad.tolist() == [-2.0] * 40 + [1.0] * 30


def test_all_zero():
    conv = Conv(1, 4, 5, (3, 3))
    index, grad, _ = run(
        conv, random_pattern(conv.weight_shape, 0.0), torch.zeros(1, 4, 3, 3), torch.ones(1, 5, 3, 3), 6
    )
    assert index.tolist() == [0, 1, 2, 3, 4, 5]
    assert not grad.any()


@pytest.mark.parametrize("by_kernel", [False, True], ids=["weight", "kernel"])
def test_floor(by_kernel):
    conv = CONVS["odd"]
    blocked = random_pattern(conv.weight_shape, 0.3)
    x, grad_out = inputs(conv, whole=True)
    score = scores(gradient(conv, x, grad_out), blocked, by_kernel)
    floor = score.max().item() / 2
    index, _, _ = run(conv, blocked, x, grad_out, score.numel(), by_kernel, floor)
    assert (index >= 0).sum() == (score >= floor).sum()
    assert (score[index[index >= 0]] >= floor).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # 0 * inf in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("by_kernel", [False, True], ids=["weight", "kernel"])
def test_non_finite_are_counted_and_left_out(value, by_kernel):
    conv = Conv(2, 4, 3, (5, 4), padding=(0, 0, 0, 0))
    blocked = random_pattern(conv.weight_shape, 0.3)
    x, grad_out = inputs(conv, whole=True)
    grad_out = grad_out.abs() + 1
    x[1, 2, 2, 2] = value
    score = scores(gradient(conv, x, grad_out), blocked, by_kernel)
    candidates = ~(score == -1)
    bad = candidates & ~score.isfinite()
    assert bad.any()
    index, grad, non_finite = run(conv, blocked, x, grad_out, score.numel(), by_kernel)
    assert non_finite.item() == bad.sum()
    assert sorted(index[index >= 0].tolist()) == (candidates & score.isfinite()).nonzero().view(-1).tolist()
    assert grad.isfinite().all()


def test_rounded_gradients_rank_as_float64_does_up_to_rounding():
    conv = CONVS["many_channels"]
    blocked = random_pattern(conv.weight_shape, 0.3)
    x, grad_out = inputs(conv)
    exact = gradient(conv, x, grad_out)
    magnitude = gradient(conv, x.abs(), grad_out.abs()).max()
    terms = grad_out.shape[0] * grad_out.shape[2] * grad_out.shape[3]
    bound = (terms + 2) * UNIT[torch.float32] * magnitude
    index, grad, _ = run(conv, blocked, x, grad_out, 200)
    score = scores(exact, blocked, False)
    assert ((grad - exact.view(-1)[index]).abs() <= bound).all()
    best = torch.sort(score, descending=True).values[:200]
    assert ((score[index] - best).abs() <= 2 * bound).all()
    assert index.unique().numel() == 200


def test_same_answer_again():
    conv = CONVS["odd"]
    blocked = random_pattern(conv.weight_shape, 0.3)
    x, grad_out = inputs(conv)
    first, second = (run(conv, blocked, x, grad_out, 17) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_too_large_a_weight():
    x = torch.empty(1, 1, 1, 1).expand(1, 2**16, 1, 1)
    row_ptr = torch.zeros(1, dtype=torch.int32).expand(2**15 + 1)
    with pytest.raises(ValueError, match="2147483648"):
        kernels.absent_topk_triton(x, x, row_ptr, row_ptr[:0], 1, [1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1, False, 0.0)


def test_registration():
    conv = Conv(2, 3, 4, (5, 4))
    x, grad_out = inputs(conv)
    blocked = random_pattern(conv.weight_shape, 0.3)
    geometry = (*map(list, conv.geometry[:-1]), 1)
    torch.library.opcheck(
        torch.ops.ilnas.absent_topk_triton,
        (x, grad_out, blocked.row_ptr, blocked.col, 5, *geometry, False, 0.0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
