"""The CPU kernel of absent_topk against the sorted dense gradient, for every instruction set, dtype and layout.

Most inputs are small integers: every sum is then exact in any order, so index and gradient must agree exactly, ties
included.
"""

import pytest
import torch

from ilnas_kernels import _C
from ilnas_kernels.pattern import Pattern

ISAS = [name for name, runs in _C.instruction_sets().items() if runs]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class Case:
    """One convolution; a linear layer is a 1x1 convolution over 1x1 images."""

    def __init__(self, batch, n_in, size, n_out, kernel, stride=1, pad=0, dilation=1, groups=1, blocked=0.3):
        self.batch, self.n_in, self.size, self.n_out, self.kernel = batch, n_in, size, n_out, kernel
        self.stride, self.padding, self.dilation = self.pair(stride), self.quadruple(pad), self.pair(dilation)
        self.groups, self.blocked = groups, blocked
        self.shape = (n_out, n_in // groups, *kernel)
        self.pattern = Pattern.random(self.shape, blocked, groups, generator=torch.Generator().manual_seed(3))

    @staticmethod
    def pair(a):
        return (a, a) if isinstance(a, int) else a

    @staticmethod
    def quadruple(a):
        return (a,) * 4 if isinstance(a, int) else a

    def __str__(self):
        size, kernel = "x".join(map(str, self.size)), "x".join(map(str, self.kernel))
        geometry = f"s{self.stride}-p{self.padding}-d{self.dilation}-g{self.groups}".replace(" ", "")
        return f"{self.batch}x{self.n_in}x{size}-{self.n_out}-{kernel}-{geometry}-b{self.blocked}"

    def out_size(self):
        top, bottom, left, right = self.padding
        extents = (self.size[0] + top + bottom, self.size[1] + left + right)
        return tuple((extents[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1 for i in range(2))

    def inputs(self, dtype, integer=True):
        generator = torch.Generator().manual_seed(7)
        shapes = (self.batch, self.n_in, *self.size), (self.batch, self.n_out, *self.out_size())
        if integer:
            return tuple(torch.randint(-3, 4, s, generator=generator).to(dtype) for s in shapes)
        return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)

    def gradient(self, x, grad_out):
        """The dense weight gradient in float64."""
        top, bottom, left, right = self.padding
        padded = torch.nn.functional.pad(x.double(), (left, right, top, bottom))
        weight = torch.zeros(self.shape, dtype=torch.float64, requires_grad=True)
        out = torch.nn.functional.conv2d(padded, weight, None, self.stride, 0, self.dilation, self.groups)
        return torch.autograd.grad(out, weight, grad_out.double())[0]

    def run(self, x, grad_out, k, isa, by_kernel=False, floor=0.0):
        p = self.pattern
        index, grad, non_finite = torch.ops.ilnas.absent_topk(
            x, grad_out, p.row_ptr, p.col, k, self.kernel, self.stride, self.padding, self.dilation, self.groups,
            by_kernel, floor, isa,
        )  # fmt: skip
        return index, grad, int(non_finite)


def linear(batch, n_in, n_out, blocked=0.3):
    return Case(batch, n_in, (1, 1), n_out, (1, 1), blocked=blocked)


CASES = [
    linear(1, 1, 1, 0.0),
    linear(67, 45, 129),
    linear(300, 331, 70),
    linear(130, 20, 1001, 0.9),
    Case(3, 5, (7, 9), 6, (3, 3), pad=1),
    Case(2, 33, (8, 8), 50, (3, 3), pad=1, blocked=0.05),
    Case(5, 4, (5, 6), 3, (2, 3), stride=(2, 1), pad=(1, 0, 2, 1), dilation=(1, 2)),
    Case(3, 6, (11, 10), 8, (3, 3), stride=3, pad=2, groups=2),
    Case(4, 8, (6, 6), 8, (3, 3), pad=1, groups=8, blocked=0.5),
    Case(2, 3, (9, 9), 17, (5, 5), pad=(4, 4, 4, 4), dilation=2),
    Case(2, 40, (7, 7), 21, (1, 1)),
    Case(2, 40, (7, 7), 21, (1, 1), stride=2),
    Case(1, 2, (3, 300), 5, (3, 3), pad=1),
    Case(1, 2, (300, 1), 5, (3, 1), pad=(1, 1, 0, 0)),
    Case(2, 3, (4, 4), 5, (17, 17), pad=8),
    Case(2, 3, (4, 4), 5, (3, 3), pad=5),
    Case(2, 7, (6, 6), 9, (3, 3), pad=1, blocked=1.0),
]


def expected(score, candidate, k, floor=0.0):
    """(index, grad) of the k greatest |score| among the candidates, ties to the lowest index, -1 and 0 behind them."""
    score, order = score.reshape(-1), torch.argsort(score.abs().reshape(-1), descending=True, stable=True)
    order = order[(candidate.reshape(-1) & (score.abs() >= floor))[order]][:k]
    index, grad = torch.full((k,), -1), torch.zeros(k)
    index[: len(order)], grad[: len(order)] = order, score[order].float()
    return index, grad


def check(case, x, grad_out, k, isa, by_kernel=False, floor=0.0):
    gradient, absent = case.gradient(x, grad_out), ~case.pattern.mask
    if by_kernel:
        count = absent.sum((2, 3))
        squares = torch.where(absent, gradient.square(), 0).sum((2, 3))
        gradient, absent = (squares / count.clamp(min=1)).sqrt().float(), count > 0
    index, grad, non_finite = case.run(x, grad_out, k, isa, by_kernel, floor)
    expected_index, expected_grad = expected(gradient, absent, k, floor)
    assert torch.equal(grad, expected_grad)
    assert torch.equal(index, expected_index)
    assert non_finite == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_on_integers(case, dtype, isa):
    x, grad_out = case.inputs(dtype)
    absent = case.pattern.numel - case.pattern.nnz
    for k in {1, max(absent // 7, 1), absent + 5}:
        check(case, x, grad_out, k, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_exact_on_integers(case, dtype, isa):
    x, grad_out = case.inputs(dtype)
    kernels = case.shape[0] * case.shape[1]
    for k in {max(kernels // 3, 1), kernels + 2}:
        check(case, x, grad_out, k, isa, by_kernel=True)


def strided(image, layout):
    """The same numbers in another layout."""
    if layout == "channels_last":
        return image.contiguous(memory_format=torch.channels_last)
    if layout == "batch_last":
        return image.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "transposed":
        return image.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        wide = torch.full([2 * n + 1 for n in image.shape], float("nan"), dtype=image.dtype)
        part = wide[tuple(slice(1, None, 2) for _ in image.shape)]
        return part.copy_(image)
    if layout == "expanded batch":
        return image[:1].expand_as(image)
    if layout == "expanded channels":
        return image[:, :1].expand_as(image)
    assert layout == "expanded scalar"
    return image[:1, :1, :1, :1].expand_as(image)


LAYOUTS = ["channels_last", "batch_last", "transposed", "sliced", "expanded batch", "expanded channels"]
LAYOUTS += ["expanded scalar"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7], CASES[10]], ids=str)
def test_layouts(case, layout, dtype, isa):
    x, grad_out = case.inputs(dtype)
    check(case, strided(x, layout), grad_out, 50, isa)
    check(case, x, strided(grad_out, layout), 50, isa)
    check(case, strided(x, layout), strided(grad_out, layout), 50, isa, by_kernel=True)


# Chunks that end within an image, many images to a chunk, few and many of a cache line's, too large to turn over.
BATCH_LAST = [
    Case(37, 5, (7, 7), 20, (3, 3), pad=1), Case(150, 3, (2, 2), 4, (3, 3), pad=1), Case(19, 4, (9, 1), 5, (3, 1)),
    Case(33, 6, (5, 6), 40, (1, 1), groups=2), Case(17, 3, (11, 11), 6, (3, 3), stride=2, dilation=2),
    Case(18, 30, (70, 70), 48, (3, 3), pad=1, blocked=0.9), Case(3, 2, (150, 130), 97, (3, 3)),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BATCH_LAST, ids=str)
def test_batch_last_gives_the_same_bits(case, dtype, isa):
    """How a batch is laid out does not change the order of the sums."""
    x, grad_out = case.inputs(dtype, integer=False)
    index, grad, _ = case.run(x, grad_out, 200, isa)
    for layouts in (("batch_last", "batch_last"), ("batch_last", None), (None, "batch_last")):
        pair = [strided(side, layout) if layout else side for side, layout in zip((x, grad_out), layouts, strict=True)]
        same_index, same_grad, _ = case.run(*pair, 200, isa)
        assert torch.equal(index, same_index)
        assert torch.equal(grad, same_grad)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [100, 30000])
def test_threshold_rises_many_times(k, isa):
    """More candidates than the buffer holds, the greatest of them last."""
    case = linear(20, 300, 700, 0.2)
    x, grad_out = case.inputs(torch.float32)
    x *= torch.arange(300).view(1, 300, 1, 1) + 1
    check(case, x, grad_out, k, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_guessed_threshold(isa):
    """A weight large enough for a guess from a sample; then one where the sampled channels mislead it."""
    case = linear(2, 1400, 1300, 0.1)
    x, grad_out = case.inputs(torch.float32)
    x *= torch.arange(1400).view(1, 1400, 1, 1) % 89 + 1
    check(case, x, grad_out, 2000, isa)
    x[:, ::4] *= 100
    check(case, x, grad_out, case.pattern.numel // 5, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_all_gradients_equal(isa):
    """Nothing but ties, and none but zeros: the lowest indices win."""
    case = linear(8, 300, 400, 0.1)
    x, grad_out = case.inputs(torch.float32)
    check(case, torch.ones_like(x), torch.ones_like(grad_out), 5000, isa)
    check(case, x, torch.zeros_like(grad_out), 5000, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("by_kernel", [False, True])
def test_floor(by_kernel, isa):
    case = CASES[5]
    x, grad_out = case.inputs(torch.float32)
    for floor in (1.0, 17.0, 1e30):
        check(case, x, grad_out, 4000, isa, by_kernel, floor)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[7]], ids=str)
def test_close_on_real_numbers(case, dtype, isa):
    """Each gradient is off by at most terms * u * sum of magnitudes, and nothing beats the last one by more."""
    x, grad_out = case.inputs(dtype, integer=False)
    gradient = case.gradient(x, grad_out).reshape(-1)
    terms = case.batch * case.out_size()[0] * case.out_size()[1]
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    bound = (terms + 2) * u * case.gradient(x.abs(), grad_out.abs()).reshape(-1)
    bound += torch.finfo(torch.float32).eps / 2 * gradient.abs()  # ranked and returned in float32
    k = case.pattern.numel // 20
    index, grad, _ = case.run(x, grad_out, k, isa)
    absent = ~case.pattern.mask.reshape(-1)
    assert absent[index].all() and len(index.unique()) == k
    assert (grad.abs().diff() <= 0).all()
    assert ((grad.double() - gradient[index]).abs() <= bound[index]).all()
    absent[index] = False
    assert (gradient.abs()[absent] <= float(grad[-1].abs()) + bound[absent]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_non_finite_gradients_are_counted_and_not_ranked(case, isa):
    x, grad_out = case.inputs(torch.float32)
    x[0, 1], grad_out[1, 2] = float("inf"), float("nan")
    gradient, absent = case.gradient(x, grad_out), ~case.pattern.mask
    bad = absent & ~gradient.isfinite()
    index, grad, non_finite = case.run(x, grad_out, case.pattern.numel, isa)
    assert non_finite == bad.sum() > 0
    expected_index, expected_grad = expected(gradient.nan_to_num(), absent & ~bad, case.pattern.numel)
    assert torch.equal(index, expected_index) and torch.equal(grad, expected_grad)
    squares = torch.where(absent, gradient.square(), 0).sum((2, 3))
    _, _, non_finite = case.run(x, grad_out, 5, isa, by_kernel=True)
    assert non_finite == (~squares.isfinite()).sum()


@pytest.mark.parametrize("isa", ISAS)
def test_zero_sizes(isa):
    for case in (linear(0, 6, 5), Case(0, 3, (4, 4), 5, (3, 3), pad=1)):
        check(case, *case.inputs(torch.float32), 10, isa)
    for case in (linear(3, 0, 5), linear(3, 4, 0)):
        index, grad, non_finite = case.run(*case.inputs(torch.float32), 4, isa)
        assert index.tolist() == [-1] * 4 and grad.tolist() == [0] * 4 and non_finite == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[7]], ids=str)
def test_same_bits_whatever_the_thread_count(case, isa):
    x, grad_out = case.inputs(torch.float32, integer=False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(x, grad_out, 200, isa))
    finally:
        torch.set_num_threads(before)
    for index, grad, _ in results[1:]:
        assert torch.equal(index, results[0][0]) and torch.equal(grad, results[0][1])


def test_weight_too_large_to_rank():
    empty = torch.zeros(70001, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    x, grad_out = torch.zeros(1, 70000, 1, 1), torch.zeros(1, 70000, 1, 1)
    one, none = (1, 1), (0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"2\*\*32"):
        torch.ops.ilnas.absent_topk(x, grad_out, *empty, 5, one, one, none, one, 1, False, 0.0, "")
