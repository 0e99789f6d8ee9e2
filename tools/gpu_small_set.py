"""Every CUDA kernel once against torch in float64, on layers small enough for compute-sanitizer, which slows a program
a hundredfold. Needs neither pytest nor the rest of the tests' packages."""

import torch

import ilnas_kernels  # noqa: F401 - registers the operators
from tests.cuda.conv_cases import Case, Problem, check

CASES = [
    Case((9, 10, 7, 6), 19),
    Case((5, 8, 9, 8), 12, stride=(2, 2), groups=2, layout="channels_last"),
    Case((35, 40, 1, 1), 21, (1, 1), padding=(0, 0)),
]


def check_case(case: Case, dtype: torch.dtype, routes: list[str]) -> None:
    problem, ops = Problem(case, dtype), torch.ops.ilnas
    pattern = problem.pattern.to("cuda")
    top, left = case.padding
    geometry = (case.kernel, case.stride, (top, top, left, left), case.dilation, case.groups)
    x, values, bias, grad_out = (t.cuda() for t in (problem.x, problem.values, problem.bias, problem.grad_out))
    wide = [t.double() for t in (problem.x, problem.weight, problem.bias, problem.grad_out)]
    sizes = [t.abs() for t in wide]
    index, positions = problem.pattern.index, problem.grad_out[:, 0].numel()
    for route in routes:
        out = ops.masked_conv2d(x, values, bias, *pattern.operands, *geometry, route)
        grads = ops.masked_conv2d_backward(grad_out, x, values, *pattern.operands, *geometry, [True] * 3, route)
        check(out.cpu(), problem.convolve(*wide[:3]), problem.convolve(*sizes[:3]), problem.weight[0].numel() + 1)
        expected, bounds = problem.gradients(*wide), problem.gradients(*sizes)
        check(grads[0].cpu(), expected[0], bounds[0], problem.weight[:, 0].numel())
        check(grads[1].cpu(), expected[1].reshape(-1)[index], bounds[1].reshape(-1)[index], positions)
        check(grads[2].cpu(), expected[2], bounds[2], positions)
    for by_kernel in (False, True):
        place, grad, _ = ops.absent_topk(x, grad_out, *pattern.operands[:2], 30, *geometry, by_kernel, 0.0, "")
        if not by_kernel:
            gradient, bound = (t[1].reshape(-1)[place.cpu()] for t in (expected, bounds))
            check(grad.cpu(), gradient, bound, positions)


def main() -> None:
    tensor_cores = torch.cuda.get_device_capability() >= (8, 0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        routes = ["general", "direct"]
        if dtype == torch.float16 or (dtype == torch.bfloat16 and tensor_cores):
            routes.append("condensed")
        for case in CASES:
            check_case(case, dtype, routes)
    torch.cuda.synchronize()
    print("every kernel agrees with float64")


if __name__ == "__main__":
    main()
