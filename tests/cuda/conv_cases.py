"""Convolutions for the kernel tests: their inputs, the float64 reference with error bounds, and the kernels' answer."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ilnas_kernels.pattern import Pattern
from tests.simt.harness import Device, In, InOut, Out, Scratch

ROUTES = {"best": 0, "general": 1, "direct": 2, "condensed": 3}
DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}
LAYOUTS = {"nchw": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "batch_last": (1, 2, 3, 0)}


@dataclass(frozen=True)
class Case:
    """One convolution. ``size`` is (batch, in_channels, height, width)."""

    size: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    density: float = 0.3
    layout: str = "nchw"
    shared_limit: int = 64 * 1024
    multiprocessors: int = 4

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.size)), f"to{self.out_channels}", "k" + "x".join(map(str, self.kernel))]
        parts += [f"s{self.stride}", f"p{self.padding}", f"d{self.dilation}", f"g{self.groups}", f"{self.density}"]
        return "-".join([*parts, self.layout]).replace(" ", "")


@dataclass
class Problem:
    """The case with its tensors; ``weight`` is dense, float64 holds every value exactly."""

    case: Case
    dtype: torch.dtype
    seed: int = 0
    x: Tensor = field(init=False)
    values: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    grad_out: Tensor = field(init=False)
    pattern: Pattern = field(init=False)
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, generator = self.case, torch.Generator().manual_seed(self.seed)
        shape = (case.out_channels, case.size[1] // case.groups, *case.kernel)
        self.pattern = Pattern.random(shape, case.density, case.groups, generator=generator)

        def draw(*size):
            return torch.randn(*size, generator=generator).to(self.dtype)

        self.x = in_layout(draw(*case.size), case.layout)
        self.values, self.bias = draw(self.pattern.nnz), draw(case.out_channels)
        self.weight = torch.zeros(self.pattern.numel, dtype=torch.float64)
        self.weight[self.pattern.index] = self.values.double()
        self.weight = self.weight.view(shape)
        self.grad_out = in_layout(draw(*self.convolve(self.x.double(), self.weight).shape), case.layout)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        case = self.case
        return F.conv2d(x, weight, bias, case.stride, case.padding, case.dilation, case.groups)

    def gradients(self, x: Tensor, weight: Tensor, bias: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(self.convolve(*leaves), leaves, grad_out)

    def shape(self) -> Tensor:
        case, out = self.case, self.grad_out.shape
        return torch.tensor(
            [*case.size, case.out_channels, out[2], out[3], *case.kernel, *case.stride, *case.padding, *case.dilation,
             case.groups]
        )  # fmt: skip


def in_layout(image: Tensor, layout: str) -> Tensor:
    order = LAYOUTS[layout]
    return image.permute(order).contiguous().permute([order.index(i) for i in range(4)])


def strides(image: Tensor) -> Tensor:
    """As the bindings pass them: 0 for a dimension of one element."""
    return torch.tensor([0 if n == 1 else s for n, s in zip(image.shape, image.stride(), strict=True)])


def check(result: Tensor, expected: Tensor, sum_of_sizes: Tensor, terms: int) -> None:
    """A float32 sum of `terms` products, in any order, then one rounding to the stored type.

    Every product passes at most `terms` additions of relative error 2**-23 (tensor cores may truncate).
    """
    unit = UNIT_ROUNDOFF[result.dtype]
    bound = (terms + 2) * 2.0**-23 * sum_of_sizes + unit * expected.abs() * 1.001 + SMALLEST[result.dtype]
    excess = (result.double() - expected).abs() - bound
    assert not result.isnan().any(), "NaN in the result"
    assert excess.max().item() <= 0 if excess.numel() else True, f"off by {excess.max().item()} over the bound"


def make_device(library, case: Case, arch: int, seed: int) -> Device:
    return Device(library, arch=arch, seed=seed, shared_limit=case.shared_limit, multiprocessors=case.multiprocessors)


def workspace(device: Device, function: str, *arguments) -> Scratch:
    size = torch.zeros(1, dtype=torch.int64)
    device.run(function, *arguments, InOut(size))
    return Scratch(torch.empty(max(int(size), 1), dtype=torch.uint8))


def condensed_form(device: Device, problem: Problem, *, backward: bool) -> Tensor:
    """What the condensed kernels may keep from call to call."""
    shape, (row_ptr, col, t_row_ptr, t_col, _) = In(problem.shape()), problem.pattern.operands
    nnz, rows = problem.pattern.nnz, (t_row_ptr, t_col) if backward else (row_ptr, col)
    size = torch.zeros(1, dtype=torch.int64)
    device.run("form_bytes", shape, nnz, backward, InOut(size))
    form = torch.zeros(int(size), dtype=torch.uint8)
    device.run("form", shape, backward, In(rows[0]), In(rows[1]), nnz, Scratch(form))
    return form


def forward(
    device: Device, problem: Problem, route: str, *, form: Tensor | None = None
) -> tuple[Tensor, dict[str, int]]:
    out = torch.empty_like(problem.grad_out)
    pattern, shape = problem.pattern, In(problem.shape())
    head = (ROUTES[route], DTYPES[problem.dtype])
    space = workspace(device, "gather_workspace", *head, shape, pattern.nnz, False, form is not None)
    counts = device.run(
        "gather", *head, False, shape, In(problem.x), In(strides(problem.x)), In(problem.values),
        In(problem.bias), In(pattern.row_ptr), In(pattern.col), None, pattern.nnz, Out(out), In(strides(out)),
        None if form is None else In(form), space,
    )  # fmt: skip
    return out, counts


def grad_x(
    device: Device, problem: Problem, route: str, *, form: Tensor | None = None
) -> tuple[Tensor, dict[str, int]]:
    result = torch.empty_like(problem.x)
    pattern, shape = problem.pattern, In(problem.shape())
    head = (ROUTES[route], DTYPES[problem.dtype])
    space = workspace(device, "gather_workspace", *head, shape, pattern.nnz, True, form is not None)
    counts = device.run(
        "gather", *head, True, shape, In(problem.grad_out), In(strides(problem.grad_out)), In(problem.values), None,
        In(pattern.t_row_ptr), In(pattern.t_col), In(pattern.t_perm), pattern.nnz, Out(result), In(strides(result)),
        None if form is None else In(form), space,
    )  # fmt: skip
    return result, counts


def grad_values(device: Device, problem: Problem, route: str) -> tuple[Tensor, dict[str, int]]:
    result = torch.empty_like(problem.values)
    pattern, shape = problem.pattern, In(problem.shape())
    head = (ROUTES[route], DTYPES[problem.dtype], shape)
    space = workspace(device, "grad_values_workspace", *head, pattern.nnz)
    counts = device.run(
        "grad_values", *head, In(problem.grad_out), In(strides(problem.grad_out)), In(problem.x),
        In(strides(problem.x)), In(pattern.row_ptr), In(pattern.col), pattern.nnz, Out(result), space,
    )  # fmt: skip
    return result, counts


def grad_bias(device: Device, problem: Problem) -> Tensor:
    result = torch.empty_like(problem.bias)
    shape = In(problem.shape())
    space = workspace(device, "bias_workspace", shape)
    arguments = (shape, In(problem.grad_out), In(strides(problem.grad_out)), Out(result), space)
    device.run("grad_bias", DTYPES[problem.dtype], *arguments)
    return result
