"""One autograd function for both masked operators, whose three operations each take their own route."""

import torch
from torch import Tensor

from ._calls import Call, below_autograd
from .dispatch import Routes
from .pattern import Pattern

_ilnas = torch.ops.ilnas


class GradientSum:
    """Where the layers that read one tensor add up its gradient, in place of autograd's own sum of their answers.

    ``total`` [batch, channels, height, width] is there before the first of these layers' backward. A layer that reads
    the first channels only adds to these. Autograd still runs the layers' backward before that of what they read.
    """

    total: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The part of the sum that is the gradient of ``x``, the first channels."""
        return self.total[:, : x.shape[1]]


def run_masked(
    x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, routes: Routes, isa: str,
    gradient_sum: GradientSum | None = None,
) -> Tensor:  # fmt: skip
    """The masked operation on checked operands of one dtype; weight in either form."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return Masked.apply(x, weight, bias, call, routes, isa, gradient_sum)
    return _forward(x, weight, bias, call, routes, isa)[0]  # apply would cost a small layer half as much again


def _forward(x, weight, bias, call, routes, isa):
    """The output, and the weight in the form that the route works with."""
    if routes.forward == "dense":
        operand = dense_weight(weight, call.pattern)
        return call.forward_dense(x, operand, bias), operand
    operand = live_values(weight, call.pattern)
    return call.forward_sparse(x, operand, bias, routes.forward, isa), operand


class Masked(torch.autograd.Function):
    """x, weight or packed values, bias -> the masked operation that ``call`` describes."""

    @staticmethod
    def forward(ctx, x, weight, bias, call, routes, isa, gradient_sum):
        out, operand = _forward(x, weight, bias, call, routes, isa)
        ctx.save_for_backward(x, weight, operand)
        ctx.call, ctx.routes, ctx.isa, ctx.gradient_sum = call, routes, isa, gradient_sum
        return out

    @staticmethod
    def backward(ctx, grad_out):
        x, weight, operand = ctx.saved_tensors
        call, routes, isa = ctx.call, ctx.routes, ctx.isa
        # The forward left its operand clean; a second derivative must see how it hangs on the weight instead.
        clean = not torch.is_grad_enabled()
        operand = operand if clean else weight
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        total = ctx.gradient_sum.of(x) if ctx.gradient_sum is not None and wants_x else None
        if routes.grad_input == routes.grad_weight:
            wanted = [wants_x, wants_weight, wants_bias]
            found = _gradients(grad_out, x, weight, operand, call, wanted, routes.grad_input, isa, clean, total)
        else:
            only_x, rest = [wants_x, False, False], [False, wants_weight, wants_bias]
            grad_x, *_ = _gradients(grad_out, x, weight, operand, call, only_x, routes.grad_input, isa, clean, total)
            _, *others = _gradients(grad_out, x, weight, operand, call, rest, routes.grad_weight, isa, clean, None)
            found = (grad_x, *others)
        return *found, None, None, None, None


def _gradients(grad_out, x, weight, operand, call, wanted, route, isa, clean, total):
    """Those of the three gradients that are wanted, by one route; None for the others.

    clean: an operand in dense form is known to be exactly 0 where absent. total: what the gradient of x is added to
    instead of being returned.
    """
    if not any(wanted):
        return None, None, None
    pattern = call.pattern
    if route == "dense":
        full = operand if clean and operand.dim() != 1 else dense_weight(operand, pattern)
        grad_x, grad_weight, grad_bias = call.backward_dense(grad_out, x, full, wanted)
        if wanted[1]:
            grad_weight = _masked_gradient(grad_weight, weight, pattern)
    else:
        values = live_values(operand, pattern)
        if wanted[0] and total is not None and call.adds_gradient(total, x, route):
            grad_weight, grad_bias = call.backward_sparse_add_(grad_out, x, values, total, wanted[1:], isa)
            wanted = [False, *wanted[1:]]
        else:
            grad_x, grad_weight, grad_bias = call.backward_sparse(grad_out, x, values, wanted, route, isa)
        if wanted[1] and weight.dim() != 1:
            grad_weight = scatter(grad_weight, pattern, weight.shape, weight.stride())
    if wanted[0] and total is not None:
        total.add_(grad_x)
        wanted = [False, *wanted[1:]]
    return (
        grad_x if wanted[0] else None,
        grad_weight if wanted[1] else None,
        grad_bias if wanted[2] else None,
    )


def gather(weight: Tensor, pattern: Pattern) -> Tensor:
    """The packed live values of a dense weight."""
    with below_autograd():
        return _ilnas.gather_live.default(weight, pattern.row_ptr, pattern.col)


def scatter(values: Tensor, pattern: Pattern, size=None, stride=None) -> Tensor:
    """The dense weight of packed values, 0 where absent; contiguous unless told otherwise."""
    with below_autograd():
        return _ilnas.scatter_live.default(
            values, pattern.row_ptr, pattern.col, size or pattern.shape, stride or pattern.stride
        )


def live_values(weight: Tensor, pattern: Pattern) -> Tensor:
    """The packed values of a weight in either form."""
    return weight if weight.dim() == 1 else gather(weight, pattern)


def dense_weight(weight: Tensor, pattern: Pattern) -> Tensor:
    """The dense weight, absent entries exactly 0, of a weight in either form; itself when it is that."""
    if weight.dim() != 1:
        if pattern.nnz == pattern.numel:
            return weight
        # Reading it through costs a fraction of writing a clean copy; a compiled graph cannot depend on the answer, and
        # to wait for another device would cost more.
        if weight.device.type == "cpu" and not torch.compiler.is_compiling():
            with below_autograd():
                seen, live_bits = _in_memory_order(weight, pattern)
                if not _ilnas.has_strays.default(seen, pattern.row_ptr, pattern.col, live_bits).item():
                    return weight
        weight = gather(weight, pattern)
    return scatter(weight, pattern)


def _masked_gradient(grad: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    """A dense gradient brought into the weight's form."""
    if weight.dim() == 1:
        return gather(grad, pattern)
    if pattern.nnz == pattern.numel:
        return grad
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return scatter(gather(grad, pattern), pattern, grad.shape, grad.stride())
    with below_autograd():
        seen, live_bits = _in_memory_order(grad, pattern)
        _ilnas.zero_absent_.default(seen, pattern.row_ptr, pattern.col, live_bits)
    return grad


def _in_memory_order(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The same weight seen as contiguous, where it is channels_last on the CPU, and its mask packed in that order."""
    if (
        not weight.is_contiguous()
        and weight.device.type == "cpu"
        and weight.dim() == 4
        and weight.is_contiguous(memory_format=torch.channels_last)
    ):
        return weight.permute(0, 2, 3, 1), pattern.live_bits_channels_last
    return weight, pattern.live_bits
