"""A stage's channels as one block of memory, and the steps between conv layers that read and fill it.

Each layer writes its output behind those of the earlier layers and reads all that stands before it, so nothing is
concatenated; in the backward pass the layers add their gradients up in a second such block.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ilnas_kernels import (
    GradientSum,
    average_pool,
    average_pool_backward,
    max_pool,
    max_pool_backward,
    relu_norm,
    relu_norm_backward,
)


class Memory:
    """One stage's channels [channels, height, width, batch], and the sum of their gradients in the backward pass.

    Channels are written once, in order, and every layer reads a beginning of them. Each tensor that autograd sees is a
    view of all channels written so far, made by way of ``.data``: so each has a version counter of its own, which the
    writes behind it leave alone.

    In the backward pass what reads the whole stage (a reduction or the head) comes first and makes ``gradient.total``.
    Every conv layer then adds its part to it, and every block finds the finished gradient of its own channels there.
    The gradient that travels from block to block is a view of that sum.
    """

    def __init__(self, like: Tensor, channels: int, height: int, width: int) -> None:
        """like: a batch [batch, ...] of the same size, dtype and device."""
        self.values = like.new_empty(channels, height, width, like.shape[0])
        self.gradient = GradientSum()

    def until(self, channel: int) -> Tensor:
        """The channels up to here as a batch-last tensor."""
        return _images(self.values.data[:channel])

    def start_gradient(self, skipped: int) -> Tensor:
        """Make the sum of gradients, 0 in the first ``skipped`` channels; returns the memory of the others."""
        total = torch.empty_like(self.values)
        total[:skipped].zero_()
        self.gradient.total = _images(total)
        return total[skipped:]


def begin(images: Tensor, memory: Memory) -> Tensor:
    """Copy images [batch, channels, height, width] to the beginning of the first stage's memory."""
    return _Begin.apply(images, memory)


def append_norm(seen: Tensor, x: Tensor, norm: nn.BatchNorm2d, memory: Memory) -> Tensor:
    """Write ``BN(ReLU(x))`` behind ``seen`` in the stage's memory; both as one tensor, nothing of it copied."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return _AppendNorm.apply(seen, x, norm.weight, norm.bias, norm, memory)


def reduced(seen: Tensor, first: int, kind: str, memory: Memory, after: Memory) -> Tensor:
    """2x2 pooling, stride 2, of a stage's channels from ``first`` on, written to the next stage's memory."""
    return _Reduced.apply(seen, first, kind, memory, after)


def pooled_to_grid(seen: Tensor, first: int, grid: int, memory: Memory) -> Tensor:
    """Each channel from ``first`` on, averaged over ``grid`` x ``grid`` cells: [batch, channels * grid * grid]."""
    return _PooledToGrid.apply(seen, first, grid, memory)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, memory):
        return memory.until(images.shape[1]).copy_(images)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.clone(), None


class _AppendNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seen, x, weight, bias, norm, memory):
        ctx.start, ctx.stop = seen.shape[1], seen.shape[1] + x.shape[1]
        ctx.training, ctx.memory = norm.training, memory
        x = _matrix(x)
        mean, inverse_std = relu_norm(
            x, weight, bias, norm.running_mean, norm.running_var, memory.values.data[ctx.start : ctx.stop],
            training=norm.training, momentum=norm.momentum, eps=norm.eps,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, inverse_std)
        return memory.until(ctx.stop)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, inverse_std = ctx.saved_tensors
        own = _matrix(ctx.memory.gradient.total[:, ctx.start : ctx.stop])
        grad_x, grad_weight, grad_bias = relu_norm_backward(own, x, weight, mean, inverse_std, training=ctx.training)
        if not ctx.needs_input_grad[0]:  # the first block of the first stage: nothing reads the sum any more
            ctx.memory.gradient.total = None
        return grad[:, : ctx.start], _images(grad_x), grad_weight, grad_bias, None, None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seen, first, kind, memory, after):
        ctx.first, ctx.kind, ctx.memory, ctx.after = first, kind, memory, after
        x = memory.values.data[first:]
        (max_pool if kind == "max" else average_pool)(x, after.values.data[: len(x)])
        return after.until(len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad, grad_x = _matrix(grad), ctx.memory.start_gradient(ctx.first)
        if ctx.kind == "max":
            max_pool_backward(grad, ctx.memory.values[ctx.first :], grad_x)
        else:
            average_pool_backward(grad, grad_x)
        ctx.after.gradient.total = None
        return ctx.memory.gradient.total, None, None, None, None


class _PooledToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seen, first, grid, memory):
        ctx.first, ctx.grid, ctx.memory = first, grid, memory
        # With channels for images, and images for channels, the memory is a channels_last batch.
        return F.adaptive_avg_pool2d(memory.values.data[first:].permute(0, 3, 1, 2), grid).transpose(0, 1).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x = ctx.memory.start_gradient(ctx.first).zero_()
        grad = _matrix(grad.view(len(grad), -1, ctx.grid, ctx.grid))
        rows, columns = (_cells(size, ctx.grid) for size in grad_x.shape[1:3])
        for i, j in itertools.product(range(ctx.grid), repeat=2):
            cell = grad_x[:, rows[i], columns[j]]
            cell += (grad[:, i, j] / (cell.shape[1] * cell.shape[2]))[:, None, None]
        return ctx.memory.gradient.total, None, None, None


def _cells(size: int, grid: int) -> list[slice]:
    """How adaptive pooling cuts an axis; the cells overlap where their number does not divide its size."""
    return [slice(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)]


def _matrix(x: Tensor) -> Tensor:
    """The batch-last memory [channels, height, width, batch] of a tensor [batch, channels, height, width]."""
    return x.detach().permute(1, 2, 3, 0).contiguous()


def _images(x: Tensor) -> Tensor:
    """Memory [channels, height, width, batch] as a tensor [batch, channels, height, width]."""
    return x.permute(3, 0, 1, 2)
