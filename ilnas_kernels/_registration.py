"""Fake kernels and gradients of the C++ operators, so that torch.compile, torch.export and autograd know them.

Every gradient is written in terms of the operators themselves, so it can be differentiated again.
"""

import torch
from torch import Tensor

from ._geometry import conv_output_size
from .layout import empty_in_layout, layout_of

_ilnas = torch.ops.ilnas


@torch.library.register_fake("ilnas::masked_conv2d")
def _(
    x, values, bias, row_ptr, col, t_row_ptr, t_col, t_perm,
    kernel_size, stride, padding, dilation, groups, isa, form=None,
):  # fmt: skip
    height = conv_output_size(x.shape[2], padding[0], padding[1], kernel_size[0], stride[0], dilation[0])
    width = conv_output_size(x.shape[3], padding[2], padding[3], kernel_size[1], stride[1], dilation[1])
    return empty_in_layout(x, (x.shape[0], row_ptr.shape[0] - 1, height, width), layout_of(x))


@torch.library.register_fake("ilnas::masked_conv2d_backward")
def _(
    grad_out, x, values, row_ptr, col, t_row_ptr, t_col, t_perm,
    kernel_size, stride, padding, dilation, groups, output_mask, isa, form=None,
):  # fmt: skip
    grad_x = empty_in_layout(x, x.shape, layout_of(x)) if output_mask[0] else x.new_empty(0)
    grad_values = x.new_empty(col.shape[0] if output_mask[1] else 0)
    return grad_x, grad_values, x.new_empty(row_ptr.shape[0] - 1 if output_mask[2] else 0)


@torch.library.register_fake("ilnas::masked_conv2d_backward_add_")
def _(
    grad_out, x, values, grad_x, row_ptr, col, t_row_ptr, t_col, t_perm,
    kernel_size, stride, padding, dilation, groups, output_mask, isa,
):  # fmt: skip
    grad_values = x.new_empty(col.shape[0] if output_mask[0] else 0)
    return grad_values, x.new_empty(row_ptr.shape[0] - 1 if output_mask[1] else 0)


@torch.library.register_fake("ilnas::masked_linear")
def _(x, values, bias, row_ptr, col, t_row_ptr, t_col, t_perm, isa, form=None):
    return x.new_empty(x.shape[0], row_ptr.shape[0] - 1)


@torch.library.register_fake("ilnas::masked_linear_backward")
def _(grad_out, x, values, row_ptr, col, t_row_ptr, t_col, t_perm, output_mask, isa, form=None):
    grad_x = x.new_empty(x.shape) if output_mask[0] else x.new_empty(0)
    grad_values = x.new_empty(col.shape[0] if output_mask[1] else 0)
    return grad_x, grad_values, x.new_empty(row_ptr.shape[0] - 1 if output_mask[2] else 0)


@torch.library.register_fake("ilnas::absent_topk")
def _(x, grad_out, row_ptr, col, k, kernel_size, stride, padding, dilation, groups, by_kernel, floor, isa):
    return (
        row_ptr.new_empty(k, dtype=torch.int64),
        row_ptr.new_empty(k, dtype=torch.float32),
        row_ptr.new_empty(1, dtype=torch.int64),
    )


@torch.library.register_fake("ilnas::relu_norm")
def _(x, weight, bias, running_mean, running_var, out, training, momentum, eps, isa):
    return weight.new_empty(x.shape[0]), weight.new_empty(x.shape[0])


@torch.library.register_fake("ilnas::relu_norm_backward")
def _(grad_out, x, weight, mean, inverse_std, training, isa):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("ilnas::max_pool")
def _(x, out, isa):
    return None


@torch.library.register_fake("ilnas::max_pool_backward")
def _(grad_out, x, grad_x, isa):
    return None


@torch.library.register_fake("ilnas::gather_live")
def _(weight, row_ptr, col):
    return weight.new_empty(col.shape[0])


@torch.library.register_fake("ilnas::scatter_live")
def _(values, row_ptr, col, size, stride):
    return values.new_empty_strided(size, stride)


@torch.library.register_fake("ilnas::has_strays")
def _(weight, row_ptr, col, live_bits, isa=""):
    return row_ptr.new_empty(1, dtype=torch.int64)


@torch.library.register_fake("ilnas::zero_absent_")
def _(weight, row_ptr, col, live_bits, isa=""):
    return None


def register_gradients(name: str, suffix: str = "", behind: int = 0) -> None:
    """Makes both operators of a layer differentiable; their gradients are the same operators again.

    forward(x, values, bias, *operands, last, ...), backward(grad_out, x, values, *operands, output_mask, last, ...):
    ``last``, the instruction set or Triton's plan, is handed on; ``behind`` further arguments keep their defaults.
    """
    forward, backward = getattr(_ilnas, name + suffix), getattr(_ilnas, f"{name}_backward{suffix}")
    end = -1 - behind  # where last stands

    def no_gradients(ctx):
        """For what follows the three differentiable arguments; a list of tensors wants a list."""
        last = [None] * len(ctx.last) if isinstance(ctx.last, list) else None
        return *[None] * len(ctx.operands), last, *[None] * behind

    def first_context(ctx, inputs, output):
        x, values, _, *ctx.operands = inputs[:end]
        ctx.last = inputs[end]
        ctx.save_for_backward(x, values)

    def first(ctx, grad_out):
        x, values = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        return *_asked(backward(grad_out, x, values, *ctx.operands, mask, ctx.last), mask), *no_gradients(ctx)

    def second_context(ctx, inputs, output):
        grad_out, x, values, *ctx.operands, ctx.output_mask = inputs[:end]
        ctx.last = inputs[end]
        ctx.save_for_backward(grad_out, x, values)

    def second(ctx, *gradients):
        """The three gradients are bilinear in (grad_out, x, values)."""
        grad_out, x, values = ctx.saved_tensors
        from_x, from_values, from_bias = _asked(gradients, ctx.output_mask)
        need_grad_out, need_x, need_values = ctx.needs_input_grad[:3]
        grad_grad_out = grad_x = grad_values = None
        if need_grad_out:
            terms = []
            if from_x is not None:
                terms.append(forward(from_x, values, None, *ctx.operands, ctx.last))
            if from_values is not None:
                terms.append(forward(x, from_values, None, *ctx.operands, ctx.last))
            if from_bias is not None:
                terms.append(from_bias.view(1, -1, *[1] * (grad_out.dim() - 2)).expand_as(grad_out))
            grad_grad_out = sum(terms[1:], terms[0])
        if need_x and from_values is not None:
            grad_x = backward(grad_out, x, from_values, *ctx.operands, [True, False, False], ctx.last)[0]
        if need_values and from_x is not None:
            grad_values = backward(grad_out, from_x, values, *ctx.operands, [False, True, False], ctx.last)[1]
        return grad_grad_out, grad_x, grad_values, None, *no_gradients(ctx)

    torch.library.register_autograd(f"ilnas::{name}{suffix}", first, setup_context=first_context)
    torch.library.register_autograd(f"ilnas::{name}_backward{suffix}", second, setup_context=second_context)


def _asked(gradients, output_mask):
    """A backward operator returns an empty tensor for a gradient that was not asked for; autograd wants None there."""
    return tuple(g if wanted else None for g, wanted in zip(gradients, output_mask, strict=True))


def _gather_context(ctx, inputs, output):
    weight, *ctx.pattern = inputs
    ctx.size, ctx.stride = weight.shape, weight.stride()


def _gather_backward(ctx, grad):
    return _ilnas.scatter_live(grad, *ctx.pattern, ctx.size, ctx.stride), None, None


def _scatter_context(ctx, inputs, output):
    ctx.pattern = inputs[1:3]


def _scatter_backward(ctx, grad: Tensor):
    return _ilnas.gather_live(grad, *ctx.pattern), None, None, None, None


register_gradients("masked_conv2d", behind=1)  # the form kept for the CUDA kernels
register_gradients("masked_linear", behind=1)
torch.library.register_autograd("ilnas::gather_live", _gather_backward, setup_context=_gather_context)
torch.library.register_autograd("ilnas::scatter_live", _scatter_backward, setup_context=_scatter_context)
