"""The CUDA kernels on a real GPU, through the operators, against torch in float64 on the CPU."""

from importlib.util import find_spec

import pytest
import torch

import ilnas_kernels
from ilnas_kernels import _cuda_routes, absent_topk
from ilnas_kernels.pattern import Pattern
from tests.cuda.conv_cases import LAYOUTS, Case, Problem, check, in_layout
from tests.cuda.test_absent_topk import check_ranking, reference

if find_spec("ilnas_kernels._C_cuda") is None:
    pytest.skip("the CUDA kernels are not built", allow_module_level=True)
if (reason := _cuda_routes.why_not(torch.device("cuda", 0))) is not None:
    pytest.skip(reason, allow_module_level=True)

ARCH = torch.cuda.get_device_capability()
CASES = [
    *(Case((37, 20, 13, 11), 41, density=0.15, layout=layout) for layout in LAYOUTS),
    Case((128, 64, 16, 16), 96, density=0.1),
    Case((16, 24, 15, 17), 40, stride=(2, 3), padding=(0, 2), dilation=(2, 1), groups=2, layout="channels_last"),
    Case((9, 33, 7, 7), 65, (1, 1), padding=(0, 0), density=0.05),
    Case((5, 12, 9, 9), 12, groups=12, density=0.7),  # depthwise
    Case((1, 1, 1, 1), 1, (1, 1), padding=(0, 0), density=1.0),
    Case((3, 8, 6, 6), 24, density=0.0),
    Case((257, 300, 1, 1), 130, (1, 1), padding=(0, 0), density=0.08),  # a linear layer
]
ids = pytest.mark.parametrize("case", CASES, ids=str)


def tensor_cores(dtype) -> bool:
    return ARCH >= (8, 0) or dtype == torch.float16


def kernels():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for route in ("", "general", "direct", "condensed"):
            if route != "condensed" or (dtype != torch.float32 and tensor_cores(dtype)):
                yield pytest.param(dtype, route, id=f"{str(dtype).removeprefix('torch.')}-{route or 'best'}")


def operands(problem: Problem):
    case, pattern = problem.case, problem.pattern.to("cuda")
    top, left = case.padding
    geometry = (case.kernel, case.stride, (top, top, left, left), case.dilation, case.groups)
    return pattern.operands, geometry


@ids
@pytest.mark.parametrize("dtype, route", list(kernels()))
def test_masked_conv2d(case, dtype, route):
    problem = Problem(case, dtype)
    pattern, geometry = operands(problem)
    x, values, bias, grad_out = (t.cuda() for t in (problem.x, problem.values, problem.bias, problem.grad_out))
    out = torch.ops.ilnas.masked_conv2d(x, values, bias, *pattern, *geometry, route)
    gradients = torch.ops.ilnas.masked_conv2d_backward(grad_out, x, values, *pattern, *geometry, [True] * 3, route)
    wide = [t.double() for t in (problem.x, problem.weight, problem.bias, problem.grad_out)]
    expected, expected_gradients = problem.convolve(*wide[:3]), problem.gradients(*wide)
    sizes = [t.abs() for t in wide]
    size_gradients = problem.gradients(*sizes)
    check(out.cpu(), expected, problem.convolve(*sizes[:3]), problem.weight[0].numel() + 1)
    index, positions = problem.pattern.index, grad_out[:, 0].numel()
    check(gradients[0].cpu(), expected_gradients[0], size_gradients[0], problem.weight[:, 0].numel())
    check(gradients[1].cpu(), *(g[1].reshape(-1)[index] for g in (expected_gradients, size_gradients)), positions)
    check(gradients[2].cpu(), expected_gradients[2], size_gradients[2], positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_linear(dtype):
    problem = Problem(CASES[-1], dtype)
    weight = problem.weight.view(130, 300)
    pattern = Pattern.from_mask(problem.pattern.mask.view(130, 300)).to("cuda")
    x = problem.x.view(257, 300)
    out = torch.ops.ilnas.masked_linear(x.cuda(), problem.values.cuda(), problem.bias.cuda(), *pattern.operands, "")
    expected = torch.nn.functional.linear(x.double(), weight, problem.bias.double())
    sizes = torch.nn.functional.linear(x.double().abs(), weight.abs(), problem.bias.double().abs())
    check(out.cpu(), expected, sizes, 301)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
@pytest.mark.parametrize("k", [1, 200])
def test_absent_topk(case, k):
    problem = Problem(case, torch.float32)
    gradient, bound = reference(problem)
    absent = ~problem.pattern.mask
    geometry = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups}
    index, grad = absent_topk(problem.x.cuda(), problem.grad_out.cuda(), problem.pattern.to("cuda"), k, **geometry)
    check_ranking(index.cpu(), grad.cpu(), gradient, bound, absent, k)


def test_the_same_bits_every_time():
    problem = Problem(CASES[3], torch.float16)
    pattern, geometry = operands(problem)
    x, values, grad_out = (t.cuda() for t in (problem.x, problem.values, problem.grad_out))
    runs = [
        torch.ops.ilnas.masked_conv2d_backward(grad_out, x, values, *pattern, *geometry, [True] * 3, "")
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_expanded_and_strided_operands():
    problem = Problem(CASES[3], torch.float32)
    pattern, geometry = operands(problem)
    values = problem.values.cuda()
    x = problem.x.cuda()[:, :, ::2].repeat_interleave(2, 3)[..., ::2]
    plain = torch.ops.ilnas.masked_conv2d(x.contiguous(), values, None, *pattern, *geometry, "")
    assert torch.equal(torch.ops.ilnas.masked_conv2d(x, values, None, *pattern, *geometry, ""), plain)
    ones = torch.ones((), device="cuda").expand_as(plain)
    one = torch.ops.ilnas.masked_conv2d_backward(ones, x, values, *pattern, *geometry, [True] * 3, "")
    two = torch.ops.ilnas.masked_conv2d_backward(
        ones.contiguous(), x.contiguous(), values, *pattern, *geometry, [True] * 3, ""
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_graph_replays_a_training_step(dtype):
    """Captured on another stream: nothing waits for the host and nothing is allocated outside torch."""
    problem = Problem(CASES[3], dtype)
    pattern, geometry = operands(problem)
    x, values, grad_out = (t.cuda() for t in (problem.x, problem.values, problem.grad_out))

    def step():
        out = torch.ops.ilnas.masked_conv2d(x, values, None, *pattern, *geometry, "")
        gradients = torch.ops.ilnas.masked_conv2d_backward(grad_out, x, values, *pattern, *geometry, [True] * 3, "")
        best = torch.ops.ilnas.absent_topk(x, grad_out, *pattern[:2], 100, *geometry, False, 0.0, "")
        return out, *gradients, *best

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.mul_(2), grad_out.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], expected[0] * 2)
    assert torch.equal(captured[4], expected[4]) and torch.equal(captured[5], expected[5] * 4)


@pytest.mark.parametrize("kind", ("conv", "linear"))
def test_kept_forms_serve_calls_streams_and_graphs(kind):
    """The condensed kernels' form is built by the first call and read by those after it, wherever they run."""
    generator = torch.Generator().manual_seed(0)
    if kind == "conv":
        layer = ilnas_kernels.MaskedConv2d(40, 48, 3, padding=1, density=0.1, generator=generator).half().cuda()
        x = torch.randn(16, 40, 9, 9, generator=generator).half().cuda()
    else:
        layer = ilnas_kernels.MaskedLinear(300, 130, density=0.1, generator=generator).half().cuda()
        x = torch.randn(33, 300, generator=generator).half().cuda()
    x.requires_grad_()

    def step():
        with ilnas_kernels.use_route("sparse"):
            out = layer(x)
        return out, *torch.autograd.grad(out, (x, layer.weight), torch.ones_like(out))

    expected = step()
    forms = layer.pattern._plans["condensed forms"]
    assert len(forms) == 2
    runs = [step()]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        runs.append(step())
    torch.cuda.synchronize()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    runs.append(captured)
    assert len(forms) == 2
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, expected, strict=True))


def test_layers_train_like_a_dense_twin():
    torch.manual_seed(0)
    layer = ilnas_kernels.MaskedConv2d(16, 24, 3, padding=1, density=0.1).cuda()
    twin = torch.nn.Conv2d(16, 24, 3, padding=1).cuda()
    twin.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    x = torch.randn(8, 16, 9, 9, device="cuda")
    with ilnas_kernels.use_route("sparse"):
        layer(x).square().sum().backward()
    with torch.backends.cudnn.flags(enabled=False):
        twin(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad * layer.mask, rtol=1e-4, atol=1e-3)


def test_other_streams_and_float64():
    problem = Problem(CASES[0], torch.float32)
    pattern, geometry = operands(problem)
    x, values = problem.x.cuda(), problem.values.cuda()
    expected = torch.ops.ilnas.masked_conv2d(x, values, None, *pattern, *geometry, "")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = torch.ops.ilnas.masked_conv2d(x, values, None, *pattern, *geometry, "")
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="float64"):
        torch.ops.ilnas.masked_conv2d(x.double(), values.double(), None, *pattern, *geometry, "")


def test_no_images_and_no_memory():
    pattern, geometry = operands(Problem(CASES[3], torch.float32))
    values = torch.zeros(pattern[1].shape[0], device="cuda")
    empty = torch.empty(0, 64, 16, 16, device="cuda")
    assert torch.ops.ilnas.masked_conv2d(empty, values, None, *pattern, *geometry, "").shape == (0, 96, 16, 16)
    free, _ = torch.cuda.mem_get_info()
    huge = torch.empty(1, device="cuda").expand(free // (96 * 256 * 4) + 1, 64, 16, 16)
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory. masked_conv2d tried to allocate"):
        torch.ops.ilnas.masked_conv2d(huge, values, None, *pattern, *geometry, "")
    layer = ilnas_kernels.MaskedConv2d(64, 96, 3, padding=1, density=0.1).cuda()
    with ilnas_kernels.use_route("sparse"), pytest.raises(torch.OutOfMemoryError):
        layer(huge)
    one = torch.ones(2, 64, 16, 16, device="cuda")
    assert (torch.ops.ilnas.masked_conv2d(one, values, None, *pattern, *geometry, "") == 0).all()


def test_in_layout_is_what_comes_back():
    problem = Problem(CASES[1], torch.float32)
    pattern, geometry = operands(problem)
    for layout in LAYOUTS:
        x = in_layout(problem.x.contiguous(), layout).cuda()
        out = torch.ops.ilnas.masked_conv2d(x, problem.values.cuda(), None, *pattern, *geometry, "")
        assert out.stride() == in_layout(out.contiguous(), layout).stride()
