"""Fake kernels and gradients that masked_conv2d and masked_linear have in common."""

import torch
from torch import Tensor

from .._registration import _asked, _second_backward
from ..layout import empty_in_layout, layout_of


def empty_gradients(x: Tensor, values: Tensor, rows: int, output_mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of x, in its layout, of the values and of a bias; empty where not asked for."""
    if not output_mask[0]:
        grad_x = x.new_empty(0)
    elif x.dim() == 4:
        grad_x = empty_in_layout(x, x.shape, layout_of(x))
    else:
        grad_x = x.new_empty(x.shape)
    return grad_x, x.new_empty(values.shape[0] if output_mask[1] else 0), x.new_empty(rows if output_mask[2] else 0)


def register_gradients(forward, backward) -> None:
    """Makes both operators of a layer differentiable as their C++ namesakes are, which take two arguments for the plan.

    forward(x, values, bias, *operands, plan); backward(grad_out, x, values, *operands, output_mask, plan).
    """

    def first_context(ctx, inputs, output):
        x, values, _, *ctx.operands, ctx.plan = inputs
        ctx.save_for_backward(x, values)

    def first(ctx, grad_out):
        x, values = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        found = backward(grad_out, x, values, *ctx.operands, mask, ctx.plan)
        return *_asked(found, mask), *[None] * len(ctx.operands), [None] * len(ctx.plan)

    def second_context(ctx, inputs, output):
        grad_out, x, values, *ctx.operands, ctx.output_mask, ctx.plan = inputs
        ctx.save_for_backward(grad_out, x, values)

    def second(ctx, *gradients):
        found = _second_backward(forward, backward, ctx, gradients, ctx.plan)
        return *found, *[None] * len(ctx.operands), None, [None] * len(ctx.plan)

    def fake_backward(grad_out, x, values, row_ptr, *rest):
        *_, output_mask, _ = rest
        return empty_gradients(x, values, row_ptr.shape[0] - 1, output_mask)

    backward.register_fake(fake_backward)
    torch.library.register_autograd(forward._qualname, first, setup_context=first_context)
    torch.library.register_autograd(backward._qualname, second, setup_context=second_context)
