"""absent_topk's CUDA kernels, run by the SIMT emulator, against a full gradient in float64."""

import math

import pytest
import torch
from torch import Tensor

from ilnas_kernels.pattern import Pattern
from tests.cuda.conv_cases import DTYPES, Case, Problem, make_device, strides, workspace
from tests.simt.harness import In, Out

SEED = 3
CASES = [
    Case((3, 5, 6, 7), 11, density=0.2),
    Case((4, 7, 5, 6), 66, (1, 3), (2, 1), (0, 1), density=0.5, layout="channels_last"),
    Case((5, 6, 7, 4), 8, stride=(1, 2), dilation=(2, 1), groups=2, density=0.1, layout="batch_last"),
    Case((1, 1, 12, 12), 2, (12, 12), padding=(0, 0), density=0.0),  # kernels of several tiles
    Case((19, 140, 1, 1), 70, (1, 1), padding=(0, 0), density=0.03),  # a linear layer
]
ids = pytest.mark.parametrize("case", CASES, ids=str)


def run(library, problem: Problem, k: int, *, arch=80, by_kernel=False, floor=0.0, blocked: Pattern | None = None):
    blocked = blocked or problem.pattern
    device = make_device(library, problem.case, arch, SEED)
    shape = In(problem.shape())
    space = workspace(device, "topk_workspace", shape, k, by_kernel)
    index, grad = torch.empty(k, dtype=torch.int64), torch.empty(k)
    non_finite = torch.empty(1, dtype=torch.int64)
    device.run(
        "topk", DTYPES[problem.dtype], shape, In(blocked.row_ptr), In(blocked.col), blocked.nnz, In(problem.grad_out),
        In(strides(problem.grad_out)), In(problem.x), In(strides(problem.x)), k, by_kernel, floor, Out(index),
        Out(grad), Out(non_finite), space,
    )  # fmt: skip
    return index, grad, int(non_finite)


def reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """The gradient of every weight and a bound on a float32 kernel's error in it."""
    bias, grad_out = problem.bias.double(), problem.grad_out.double()
    gradient = problem.gradients(problem.x.double(), problem.weight, bias, grad_out)[1]
    sizes = problem.gradients(problem.x.double().abs(), problem.weight, bias, grad_out.abs())[1]
    return gradient, (grad_out[:, 0].numel() + 2) * 2.0**-23 * sizes + 2.0**-126


def by_kernel_reference(gradient: Tensor, bound: Tensor, absent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Root mean squares over absent taps, their bound, and which kernels have one."""
    taps = absent.flatten(2).sum(2)
    clipped = taps.clamp(min=1)
    score = ((gradient * absent).flatten(2).square().sum(2) / clipped).sqrt()
    error = ((bound * absent).flatten(2).square().sum(2) / clipped).sqrt() + (taps + 4) * 2.0**-23 * score
    return score, error, taps > 0


def check_ranking(index: Tensor, grad: Tensor, expected: Tensor, bound: Tensor, exists: Tensor, k: int) -> None:
    """`index` are the k best of `exists`, up to what the error bound leaves open; `grad` is what stands there."""
    flat, error = expected.reshape(-1), bound.reshape(-1)
    found = min(k, int(exists.sum()))
    assert (index[found:] == -1).all() and (grad[found:] == 0).all()
    index, grad = index[:found], grad[:found]
    assert exists.reshape(-1)[index].all()
    assert index.unique().numel() == found
    assert ((grad.double() - flat[index]).abs() <= error[index]).all()
    assert (grad.abs()[1:] <= grad.abs()[:-1]).all()
    if found:
        left_out = exists.reshape(-1).clone()
        left_out[index] = False
        worst = grad.abs().double().min()
        assert ((flat.abs() - error)[left_out] <= worst).all(), "a larger gradient was left out"


@ids
@pytest.mark.parametrize(
    ("dtype", "arch"),
    [
        (torch.float32, 80),
        (torch.float16, 75),
        (torch.bfloat16, 80),
        (torch.bfloat16, 75),  # without tensor cores
    ],
)
@pytest.mark.parametrize("k", [1, 37, 3000])
def test_weights(library, case, dtype, arch, k):
    problem = Problem(case, dtype)
    index, grad, non_finite = run(library, problem, k, arch=arch)
    gradient, bound = reference(problem)
    check_ranking(index, grad, gradient, bound, ~problem.pattern.mask, k)
    assert non_finite == 0


@ids
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 1), (torch.float32, 20), (torch.float16, 5000)])
def test_kernels(library, case, dtype, k):
    problem = Problem(case, dtype)
    index, grad, _ = run(library, problem, k, by_kernel=True)
    score, bound, exists = by_kernel_reference(*reference(problem), ~problem.pattern.mask)
    check_ranking(index, grad, score, bound, exists, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_panels(library, dtype):
    """More tiles than a panel holds: a sample first, every pass computed anew."""
    problem = Problem(Case((3, 8400, 1, 1), 260, (1, 1), padding=(0, 0), density=0.01), dtype)
    index, grad, _ = run(library, problem, 2500)
    gradient, bound = reference(problem)
    check_ranking(index, grad, gradient, bound, ~problem.pattern.mask, 2500)


def test_ties_go_to_the_lowest_index(library):
    """All gradients equal: the answer is known exactly, and only the last digits of the keys tell them apart."""
    problem = Problem(Case((2, 40, 1, 1), 130, (1, 1), padding=(0, 0), density=0.1), torch.float32)
    problem.x.fill_(1.5)
    problem.grad_out.fill_(-2.0)
    index, grad, _ = run(library, problem, 300)
    absent = (~problem.pattern.mask).reshape(-1).nonzero().reshape(-1)
    assert torch.equal(index, absent[:300])
    assert (grad == -6.0).all()


def test_dead_channels(library):
    """Zero gradients still rank, last, in order of their index."""
    problem = Problem(Case((2, 30, 1, 1), 100, (1, 1), padding=(0, 0), density=0.0), torch.float32)
    problem.x[:, 3:] = 0
    index, grad, _ = run(library, problem, 1000)
    flat = torch.arange(3000)
    assert set(index[:300].tolist()) == set(flat[flat % 30 < 3].tolist())
    assert torch.equal(index[300:], flat[flat % 30 >= 3][:700])
    assert (grad[300:] == 0).all()


def test_floor_and_exclude(library):
    problem = Problem(CASES[0], torch.float32)
    gradient, _ = reference(problem)
    absent = ~problem.pattern.mask
    order = gradient.abs().reshape(-1)[absent.reshape(-1)].sort(descending=True).values
    floor = float((order[20] + order[21]) / 2)
    index, _, _ = run(library, problem, 64, floor=floor)
    assert (index >= 0).sum() == 21
    excluded = torch.zeros(problem.pattern.numel, dtype=torch.bool)
    excluded[index[:10]] = True
    blocked = Pattern.from_mask(excluded.view(absent.shape) | ~absent)
    fewer, _, _ = run(library, problem, 64, floor=floor, blocked=blocked)
    assert torch.equal(fewer[:11], index[10:21]) and (fewer[11:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_non_finite_is_counted_and_not_ranked(library, dtype):
    problem = Problem(CASES[0], dtype)
    problem.grad_out[0, 4, 0, 0] = math.nan
    problem.grad_out[1, 7, 2, 3] = math.inf
    index, grad, non_finite = run(library, problem, 200)
    gradient, _ = reference(problem)
    absent = ~problem.pattern.mask
    assert non_finite == int((~gradient.isfinite() & absent).sum()) > 0
    assert gradient.reshape(-1)[index[index >= 0]].isfinite().all() and grad.isfinite().all()
