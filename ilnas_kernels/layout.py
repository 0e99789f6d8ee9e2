"""Memory layouts of image batches: NCHW, channels_last, and batch-last, in which the CPU kernels need no conversion.

Batch-last (CHWN) is a plain strided tensor: the shape is ``[N, C, H, W]``, the strides are ``(1, H*W*N, W*N, N)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Order = tuple[int, int, int, int]  # the dimensions N, C, H, W by number, outermost in memory first

NCHW: Order = (0, 1, 2, 3)
CHANNELS_LAST: Order = (0, 2, 3, 1)
BATCH_LAST: Order = (1, 2, 3, 0)


def layout_of(x: Tensor) -> Order:
    """The layout in which ``x`` [N, C, H, W] is dense; NCHW where several fit or none does."""
    sizes, strides = x.shape, x.stride()
    for order in (NCHW, CHANNELS_LAST, BATCH_LAST):
        expected = 1
        for d in reversed(order):
            if sizes[d] != 1 and strides[d] != expected:
                break
            expected *= sizes[d]
        else:
            return order
    return NCHW


def empty_in_layout(like: Tensor, sizes: Sequence[int], order: Order) -> Tensor:
    """An uninitialised tensor [N, C, H, W] of the given layout, otherwise like ``like``."""
    strides, stride = [0] * 4, 1
    for d in reversed(order):
        strides[d] = stride
        stride *= sizes[d]
    return like.new_empty_strided(sizes, strides)


def to_layout(x: Tensor, order: Order) -> Tensor:
    """``x`` with its elements in memory in the given order; itself when they are."""
    inverse = [order.index(d) for d in range(4)]
    return x.permute(order).contiguous().permute(inverse)


def to_batch_last(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] in the batch-last layout; itself when it is."""
    return to_layout(x, BATCH_LAST)


def is_batch_last(x: Tensor) -> bool:
    """Whether ``x`` [N, C, H, W] is dense in the batch-last layout."""
    return x.dim() == 4 and x.permute(BATCH_LAST).is_contiguous()


def is_strided_batch_last(x: Tensor) -> bool:
    """Whether ``x`` is batch-last and is not NCHW at the same time, as tensors with dimensions of size 1 can be."""
    return not x.is_contiguous() and is_batch_last(x)


def cat_channels(images: Sequence[Tensor]) -> Tensor:
    """``torch.cat(images, 1)``, batch-last when the first image is; torch.cat itself answers in NCHW then."""
    if not is_strided_batch_last(images[0]):
        return torch.cat(list(images), 1)
    return torch.cat([x.permute(BATCH_LAST) for x in images]).permute(3, 0, 1, 2)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that keeps a batch-last input batch-last: it is seen as [1, C, H*W*N], which is contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_strided_batch_last(x):
            return super().forward(x)
        batch, channels, height, width = x.shape
        rows = x.permute(BATCH_LAST).reshape(1, channels, height * width * batch)
        return _like_batch_last(super().forward(rows), x.shape)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in (3, 4):
            raise ValueError(f"BatchNorm2d: x must be [N, C, H, W], got {tuple(x.shape)}")


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d that keeps a batch-last input batch-last: with N and C exchanged it is channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        return _exchanged(super().forward, x)


class AvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d that keeps a batch-last input batch-last."""

    def forward(self, x: Tensor) -> Tensor:
        return _exchanged(super().forward, x)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d that keeps a batch-last input batch-last."""

    def forward(self, x: Tensor) -> Tensor:
        return _exchanged(super().forward, x)


def keep_batch_last(model: nn.Module) -> nn.Module:
    """Makes the BatchNorm2d and pooling layers of a model keep the batch-last layout, in place; returns the model.

    Only the classes of the layers change: parameters, buffers and hooks stay. Masked layers and element-wise
    functions keep the layout by themselves; for concatenation there is :func:`cat_channels`. Give the model
    :func:`to_batch_last` input.
    """
    for module in model.modules():
        module.__class__ = _LAYOUT_AWARE.get(type(module), type(module))
    return model


_LAYOUT_AWARE = {
    nn.BatchNorm2d: BatchNorm2d,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
}


def _exchanged(pool, x: Tensor):
    """Pools treat N and C alike, so a batch-last batch can pass as a channels_last one."""
    if not is_strided_batch_last(x):
        return pool(x)
    outputs = pool(x.permute(1, 0, 2, 3))
    if isinstance(outputs, tuple):  # max pooling with indices, which count within one plane and so stay right
        return tuple(_exchanged_back(out) for out in outputs)
    return _exchanged_back(outputs)


def _exchanged_back(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last).permute(1, 0, 2, 3)


def _like_batch_last(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """[1, C, H*W*N] seen as batch-last [N, C, H, W]."""
    batch, channels, height, width = shape
    return rows.view(channels, height, width, batch).permute(3, 0, 1, 2)
