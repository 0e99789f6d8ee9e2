"""The specification: the operators in plain PyTorch, in the dtype of their arguments. For tests and benchmarks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """conv2d with the absent weights taken as 0; padding may be (top, bottom, left, right)."""
    if padding == "same":
        steps = (dilation, dilation) if isinstance(dilation, int) else dilation
        (rows, cols) = (step * (kernel - 1) for step, kernel in zip(steps, weight.shape[2:], strict=True))
        padding = (rows // 2, rows - rows // 2, cols // 2, cols - cols // 2)
    if not isinstance(padding, (int, str)) and len(padding) == 4:
        top, bottom, left, right = padding
        x, padding = F.pad(x, (left, right, top, bottom)), 0
    return F.conv2d(x, torch.where(mask, weight, 0), bias, stride, padding, dilation, groups)


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear with the absent weights taken as 0."""
    return F.linear(x, torch.where(mask, weight, 0), bias)


def relu_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    """BN(ReLU(x)) of [channels, ...]; the running mean and variance are changed in training."""
    rows = x.relu().flatten(1).unsqueeze(0)
    return F.batch_norm(rows, running_mean, running_var, weight, bias, training, momentum, eps).view_as(x)


def relu_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias with ``mean`` and ``inverse_std`` as those of ReLU(x)."""
    rows, grads = x.flatten(1), grad_out.flatten(1)
    normal = (rows.relu() - mean[:, None]) * inverse_std[:, None]
    grad_weight, grad_bias = (grads * normal).sum(1), grads.sum(1)
    if training:
        grads = grads - (normal * grad_weight[:, None] + grad_bias[:, None]) / rows.shape[1]
    grad_x = torch.where(rows > 0, grads * (weight * inverse_std)[:, None], 0)
    return grad_x.view_as(x), grad_weight, grad_bias


def weight_gradient(x: Tensor, grad_out: Tensor, shape: Sequence[int], **geometry) -> Tensor:
    """The dense gradient of a weight of this shape; geometry as in masked_conv2d."""
    weight = torch.zeros(tuple(shape), dtype=x.dtype, device=x.device, requires_grad=True)
    everywhere = torch.ones_like(weight, dtype=torch.bool)
    with torch.enable_grad():
        if len(shape) == 2:
            out = masked_linear(x.detach(), weight, everywhere)
        else:
            out = masked_conv2d(x.detach(), weight, everywhere, **geometry)
        return torch.autograd.grad(out, weight, grad_out)[0]


def absent_scores(grad: Tensor, blocked: Tensor, granularity: str = "weight") -> tuple[Tensor, Tensor]:
    """(index, signed score) of every candidate, by rising index.

    A weight's score is its gradient; a kernel's the root mean square of its unblocked taps' gradients.
    """
    if granularity == "weight":
        index = (~blocked).flatten().nonzero().flatten()
        return index, grad.flatten()[index]
    taps = grad.flatten(2) if grad.dim() > 2 else grad.unsqueeze(2)
    free = ~blocked.reshape(taps.shape)
    count = free.sum(2)
    score = ((taps * free).square().sum(2) / count.clamp(min=1)).sqrt().flatten()
    index = (count > 0).flatten().nonzero().flatten()
    return index, score[index]


def absent_topk(
    x: Tensor,
    grad_out: Tensor,
    mask: Tensor,
    k: int,
    *,
    exclude: Tensor | None = None,
    granularity: str = "weight",
    **geometry,
) -> tuple[Tensor, Tensor]:
    """(index, signed score) of the k best candidates by falling magnitude, ties by rising index."""
    grad = weight_gradient(x, grad_out, mask.shape, **geometry)
    blocked = mask if exclude is None else mask | exclude
    index, score = absent_scores(grad, blocked, granularity)
    order = score.abs().sort(descending=True, stable=True).indices[:k]
    return index[order], score[order]
