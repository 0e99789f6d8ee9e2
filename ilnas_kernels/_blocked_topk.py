"""absent_topk in plain torch, where no kernel serves a device or a size: the dense gradient in blocks of rows."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._live_values import absent_positions

# Gradients that exist at once. A block has whole rows; one longer row is a block of its own.
_BLOCK = 1 << 20


def absent_topk(
    x: Tensor, grad_out: Tensor, row_ptr: Tensor, col: Tensor, k: int, kernel_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, by_kernel: bool,
    floor: float, isa: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The arguments and results of ilnas::absent_topk. float64 is summed as such, all else in float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, grad_out = x.to(wide), grad_out.to(wide)
    top, bottom, left, right = padding
    x = F.pad(x, (left, right, top, bottom))
    channels, rows_per_group = x.shape[1] // groups, (row_ptr.shape[0] - 1) // groups
    starts = row_ptr.tolist()
    best = _Best(k, floor, x.device)
    for group, first, end in _row_blocks(groups, rows_per_group, channels * kernel_size[0] * kernel_size[1]):
        images = x[:, group * channels : (group + 1) * channels]
        grad = torch.stack(
            [shifted @ grad_out[:, first:end].transpose(0, 1).flatten(1).t()
             for shifted in _shifted(images, grad_out.shape[2:], kernel_size, stride, dilation)]
        ).permute(2, 1, 0)  # fmt: skip
        here = row_ptr[first : end + 1] - starts[first], col[starts[first] : starts[end]]
        absent = absent_positions(grad.shape, *here)
        if by_kernel:
            best.offer(first * channels, *_root_mean_squares(grad, absent))
        else:
            best.offer(first * channels * grad.shape[2], grad.reshape(-1), absent.view(-1))
    return best.results()


def _row_blocks(groups: int, rows_per_group: int, cols: int) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end row), rows counted over all groups."""
    step = max(_BLOCK // max(cols, 1), 1)
    for group in range(groups):
        group_end = (group + 1) * rows_per_group
        for first in range(group * rows_per_group, group_end, step):
            yield group, first, min(first + step, group_end)


def _shifted(images, out_size, kernel_size, stride, dilation) -> Iterator[Tensor]:
    """For each tap the pixels it meets, [channels, batch * positions]."""
    height, width = ((size - 1) * step + 1 for size, step in zip(out_size, stride, strict=True))
    for row in range(0, kernel_size[0] * dilation[0], dilation[0]):
        for col in range(0, kernel_size[1] * dilation[1], dilation[1]):
            met = images[:, :, row : row + height : stride[0], col : col + width : stride[1]]
            yield met.transpose(0, 1).flatten(1)


def _root_mean_squares(grad: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    """The score of every kernel, in float64 where no square overflows, and whether it has an absent tap."""
    count = absent.sum(2)
    squares = torch.where(absent, grad.double(), 0.0).square().sum(2)
    return (squares / count.clamp(min=1)).sqrt().flatten(), (count > 0).flatten()


class _Best:
    """The k candidates of largest magnitude among all offered, which come by rising index."""

    def __init__(self, k: int, floor: float, device: torch.device) -> None:
        self._k, self._floor = k, floor
        self._index = torch.empty(0, dtype=torch.int64, device=device)
        self._grad = torch.empty(0, dtype=torch.float32, device=device)
        self._non_finite = torch.zeros(1, dtype=torch.int64, device=device)

    def offer(self, first_index: int, grad: Tensor, exists: Tensor) -> None:
        grad = grad.float()
        size, finite = grad.abs(), grad.isfinite()
        self._non_finite += (exists & ~finite).sum()
        wanted = exists & finite & (size >= self._floor)
        if self._grad.numel() == self._k:
            wanted &= size > self._grad[-1].abs()  # an equal one of a lower index is there already
        place = wanted.nonzero().view(-1)
        index = torch.cat([self._index, place + first_index])
        grad = torch.cat([self._grad, grad[place]])
        order = grad.abs().sort(descending=True, stable=True).indices[: self._k]
        self._index, self._grad = index[order], grad[order]

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """index and grad padded with -1 and 0 to k places, and the number of candidates that are not finite."""
        missing = self._k - self._index.numel()
        return F.pad(self._index, (0, missing), value=-1), F.pad(self._grad, (0, missing)), self._non_finite
