"""Triton kernels for GPUs, of every operator: importing this registers the operators ilnas::*_triton."""

from .absent_topk import absent_topk_triton
from .launch import why_not
from .masked_conv2d import conv2d_plan, masked_conv2d_backward_triton, masked_conv2d_triton
from .masked_linear import linear_plan, masked_linear_backward_triton, masked_linear_triton

__all__ = [
    "absent_topk_triton",
    "conv2d_plan",
    "linear_plan",
    "masked_conv2d_backward_triton",
    "masked_conv2d_triton",
    "masked_linear_backward_triton",
    "masked_linear_triton",
    "why_not",
]
