"""Fake kernels and gradients that masked_conv2d and masked_linear have in common."""

from torch import Tensor

from .._registration import register_gradients
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


def register_backward(name: str, backward) -> None:
    """The fake kernel of a layer's backward operator, and the gradients of ``name`` and of its backward."""

    def fake_backward(grad_out, x, values, row_ptr, *rest):
        *_, output_mask, _ = rest
        return empty_gradients(x, values, row_ptr.shape[0] - 1, output_mask)

    backward.register_fake(fake_backward)
    register_gradients(name, "_triton")
