"""masked_conv2d's CUDA kernels, run by the SIMT emulator, against torch in float64."""

import pytest
import torch

from tests.cuda.conv_cases import (
    Case,
    Problem,
    check,
    condensed_form,
    forward,
    grad_bias,
    grad_values,
    grad_x,
    make_device,
)

SEED = 7
PLAIN = Case((5, 6, 7, 9), 10)
CASES = [
    PLAIN,
    Case((5, 6, 7, 9), 10, layout="channels_last"),
    Case((8, 6, 7, 8), 10, layout="batch_last"),
    Case((1, 1, 1, 1), 1, (1, 1), padding=(0, 0), density=1.0),
    Case((33, 5, 3, 2), 9, (2, 3), padding=(0, 1), density=0.5),
    Case((3, 7, 11, 6), 13, (5, 1), (2, 1), (3, 0), density=0.2),
    Case((2, 8, 9, 10), 6, stride=(2, 3), padding=(0, 2), dilation=(2, 1), groups=2, layout="channels_last"),
    Case((4, 6, 8, 8), 12, dilation=(1, 3), padding=(2, 2), groups=3, density=0.6),
    Case((9, 17, 4, 4), 20, (1, 1), padding=(0, 0), density=0.1),
    Case((20, 70, 1, 1), 37, (1, 1), padding=(0, 0), density=0.1),  # a linear layer
    Case((2, 4, 5, 5), 70, density=0.0),
    Case((6, 40, 6, 6), 9, density=0.04, shared_limit=20 * 1024),  # many chunks of channels, empty rows
    Case((4, 21, 6, 5), 9, (5, 5), padding=(2, 2), density=0.8, shared_limit=160 * 1024),  # many columns a chunk
    Case((17, 9, 8, 16), 33, density=0.1, multiprocessors=1),  # the largest tiles
    Case((9, 20, 4, 4), 70, density=0.2, multiprocessors=1),  # smaller ones
    Case((40, 12, 1, 1), 150, (1, 1), padding=(0, 0), density=0.02),
]
ids = pytest.mark.parametrize("case", CASES, ids=str)


def routes(dtype):
    return ["general", "direct"] if dtype == torch.float32 else ["direct", "condensed"]


KERNELS = [
    pytest.param(dtype, route, arch, id=f"{str(dtype).removeprefix('torch.')}-{route}-sm_{arch}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for route in routes(dtype)
    for arch in ((75, 80) if route == "condensed" and dtype == torch.float16 else (80,))
]
kernels = pytest.mark.parametrize("dtype, route, arch", KERNELS)


@ids
@kernels
def test_forward(library, case, dtype, route, arch):
    problem = Problem(case, dtype)
    out, _ = forward(make_device(library, case, arch, SEED), problem, route)
    expected = problem.convolve(problem.x.double(), problem.weight, problem.bias.double())
    sizes = problem.convolve(problem.x.double().abs(), problem.weight.abs(), problem.bias.double().abs())
    assert out.stride() == problem.grad_out.stride()
    check(out, expected, sizes, problem.weight[0].numel() + 1)


@ids
@kernels
def test_grad_x(library, case, dtype, route, arch):
    problem = Problem(case, dtype)
    result, _ = grad_x(make_device(library, case, arch, SEED), problem, route)
    bias, grad_out = problem.bias.double(), problem.grad_out.double()
    expected = problem.gradients(problem.x.double(), problem.weight, bias, grad_out)[0]
    sizes = problem.gradients(problem.x.double(), problem.weight.abs(), bias, grad_out.abs())[0]
    check(result, expected, sizes, problem.weight[:, 0].numel())


@ids
@pytest.mark.parametrize("function", (forward, grad_x))
def test_a_kept_form_serves_every_call(library, case, function):
    """With other weights and another type too: the form depends on the pattern and the sizes alone."""
    first = Problem(case, torch.float16)
    form = condensed_form(make_device(library, case, 80, SEED), first, backward=function is grad_x)
    for dtype in (torch.float16, torch.bfloat16):
        problem = Problem(case, dtype)
        problem.values = problem.values.flip(0)
        own, launches = function(make_device(library, case, 80, SEED), problem, "condensed")
        kept, fewer = function(make_device(library, case, 80, SEED), problem, "condensed", form=form)
        assert torch.equal(own, kept)
        names = [[launch.kernel.split("<")[0] for launch in run] for run in (launches, fewer)]
        assert [n for n in names[0] if n != "condense_kernel"] == names[1]


@ids
@pytest.mark.parametrize(
    "dtype, route, arch",
    [
        (torch.float32, "general", 80),
        (torch.float32, "direct", 80),
        (torch.float16, "direct", 80),
        (torch.bfloat16, "general", 80),
        (torch.float16, "condensed", 75),
        (torch.bfloat16, "condensed", 80),
    ],
)
def test_grad_values(library, case, dtype, route, arch):
    problem = Problem(case, dtype)
    result, _ = grad_values(make_device(library, case, arch, SEED), problem, route)
    bias, grad_out = problem.bias.double(), problem.grad_out.double()
    index = problem.pattern.index
    expected = problem.gradients(problem.x.double(), problem.weight, bias, grad_out)[1].reshape(-1)[index]
    sizes = problem.gradients(problem.x.double().abs(), problem.weight, bias, grad_out.abs())[1].reshape(-1)[index]
    check(result, expected, sizes, problem.grad_out[:, 0].numel())


@ids
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_bias(library, case, dtype):
    problem = Problem(case, dtype)
    result = grad_bias(make_device(library, case, 80, SEED), problem)
    grad_out = problem.grad_out.double()
    check(result, grad_out.sum((0, 2, 3)), grad_out.abs().sum((0, 2, 3)), grad_out[:, 0].numel())
