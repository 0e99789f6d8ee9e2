"""The work between the masked layers of a batch-last network, with each value read and written once.

The functions take and fill plain matrices ``[channels, height, width, batch]``, the memory of a batch-last batch, and
record no gradient: each has its backward beside it. On devices other than the CPU they are put together from torch's.
"""

import torch
from torch import Tensor

from .dispatch import isa_argument

_ilnas = torch.ops.ilnas


def relu_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, out: Tensor,
    *, training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``out = (relu(x) - mean) / sqrt(variance + eps) * weight + bias`` by channel; returns mean and 1 / sqrt(...).

    training: by the batch's mean and variance, and the running ones move by ``momentum`` towards them (the variance
    unbiased), as in nn.BatchNorm2d; otherwise by the running ones.
    """
    check("relu_norm", x, out=out)
    check_vectors("relu_norm", x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if training and x[:1].numel() < 2:
        raise ValueError(f"relu_norm: training needs at least two values a channel, got x {tuple(x.shape)}")
    if x.is_cpu:
        return _ilnas.relu_norm(
            x.flatten(1), weight, bias, running_mean, running_var, out, training, momentum, eps, isa_argument()
        )
    rows = x.flatten(1).unsqueeze(0)
    normal, mean, inverse_std = torch.native_batch_norm(
        rows.relu(), weight, bias, running_mean, running_var, training, momentum, eps
    )
    out.copy_(normal.view_as(out))
    if not training:
        mean, inverse_std = running_mean.clone(), (running_var + eps).rsqrt()
    return mean, inverse_std


def relu_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, *, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, from what :func:`relu_norm` was given and returned."""
    check("relu_norm_backward", x, grad_out=grad_out)
    check_vectors("relu_norm_backward", x, weight=weight, mean=mean, inverse_std=inverse_std)
    if x.is_cpu:
        grad_x, grad_weight, grad_bias = _ilnas.relu_norm_backward(
            grad_out.flatten(1), x.flatten(1), weight, mean, inverse_std, training, isa_argument()
        )
        return grad_x.view_as(x), grad_weight, grad_bias
    rows, grads = x.flatten(1), grad_out.flatten(1)
    distance = (rows.relu() - mean[:, None]) * inverse_std[:, None]
    grad_weight, grad_bias = (grads * distance).sum(1), grads.sum(1)
    if training:
        grads = grads - (distance * grad_weight[:, None] + grad_bias[:, None]) / rows.shape[1]
    grads = torch.where(rows <= 0, 0, grads * (weight * inverse_std)[:, None])
    return grads.view_as(x), grad_weight, grad_bias


def max_pool(x: Tensor, out: Tensor) -> None:
    """2x2 max pooling with stride 2; an odd last row or column is left out. NaN wins."""
    check("max_pool", x, out=out, halved=True)
    if x.is_cpu:
        _ilnas.max_pool(x, out, isa_argument())
    else:
        a, b, c, d = quarters(x)
        torch.maximum(torch.maximum(a, b), torch.maximum(c, d), out=out)


def max_pool_backward(grad_out: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """The gradient of x: the window's goes to the first of its largest values."""
    check("max_pool_backward", x, grad_x=grad_x)
    check("max_pool_backward", x, grad_out=grad_out, halved=True)
    if x.is_cpu:
        _ilnas.max_pool_backward(grad_out, x, grad_x, isa_argument())
        return
    *parts, last = quarters(x)
    most = torch.maximum(torch.maximum(parts[0], parts[1]), torch.maximum(parts[2], last))
    grad_x.zero_()
    left = grad_out
    for part, to in zip(parts, quarters(grad_x), strict=False):
        to.copy_(torch.where(part == most, left, 0))
        left = torch.where(part == most, 0, left)
    quarters(grad_x)[3].copy_(left)


def average_pool(x: Tensor, out: Tensor) -> None:
    """2x2 average pooling with stride 2; an odd last row or column is left out."""
    check("average_pool", x, out=out, halved=True)
    a, b, c, d = quarters(x)
    torch.add(a, b, out=out)
    out.add_(c).add_(d).mul_(0.25)


def average_pool_backward(grad_out: Tensor, grad_x: Tensor) -> None:
    """The gradient of x: a quarter of the window's in each place, 0 beyond the last window."""
    check("average_pool_backward", grad_x, grad_out=grad_out, halved=True)
    quarter = grad_out * 0.25
    grad_x[:, grad_x.shape[1] // 2 * 2 :].zero_()
    grad_x[:, :, grad_x.shape[2] // 2 * 2 :].zero_()
    for to in quarters(grad_x):
        to.copy_(quarter)


def quarters(x: Tensor) -> tuple[Tensor, ...]:
    """The four places of every 2x2 window of [channels, height, width, batch], row by row, as views."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return tuple(x[:, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1))


def check(op: str, x: Tensor, halved: bool = False, **others: Tensor) -> None:
    """ValueError unless all are contiguous, of one float dtype, and of the shape of x, or half its height and width."""
    if x.dim() != 4 or x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        raise ValueError(
            f"{op}: x must be contiguous float32 or float64 [channels, height, width, batch], "
            f"got {x.dtype} {tuple(x.shape)} with strides {x.stride()}"
        )
    channels, height, width, batch = x.shape
    shape = (channels, height // 2, width // 2, batch) if halved else tuple(x.shape)
    for name, other in others.items():
        if tuple(other.shape) != shape or other.dtype != x.dtype or not other.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous {x.dtype} {shape}, "
                f"got {other.dtype} {tuple(other.shape)} with strides {other.stride()}"
            )


def check_vectors(op: str, x: Tensor, **vectors: Tensor) -> None:
    """ValueError unless each has one number a channel, of the dtype of x."""
    for name, vector in vectors.items():
        if tuple(vector.shape) != tuple(x.shape[:1]) or vector.dtype != x.dtype or not vector.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous {x.dtype} {tuple(x.shape[:1])}, "
                f"got {vector.dtype} {tuple(vector.shape)}"
            )
