"""Sparse masked convolution and linear layers for PyTorch."""

from importlib.util import find_spec

import torch

from . import _C, _live_values, _registration  # noqa: F401 - operators, their kernels, fake kernels and gradients

if torch.version.cuda is not None and find_spec("ilnas_kernels._C_cuda") is not None:
    from . import _C_cuda  # noqa: F401 - registers the CUDA kernels; a failure here must be seen

from ._masked import GradientSum
from .calibration import calibrate
from .dispatch import current_instruction_set, instruction_set, instruction_sets, use_route
from .fused import (
    average_pool,
    average_pool_backward,
    max_pool,
    max_pool_backward,
    relu_norm,
    relu_norm_backward,
)
from .growth import AbsentTopK, Candidates, GrowthResult, grow_, prune_
from .layout import cat_channels, is_batch_last, keep_batch_last, to_batch_last
from .nn import MaskedConv2d, MaskedLinear, convert
from .ops import absent_topk, masked_conv2d, masked_linear
from .pattern import Pattern

__all__ = [
    "AbsentTopK",
    "Candidates",
    "GradientSum",
    "GrowthResult",
    "MaskedConv2d",
    "MaskedLinear",
    "Pattern",
    "absent_topk",
    "average_pool",
    "average_pool_backward",
    "calibrate",
    "cat_channels",
    "convert",
    "current_instruction_set",
    "grow_",
    "instruction_set",
    "instruction_sets",
    "is_batch_last",
    "keep_batch_last",
    "masked_conv2d",
    "masked_linear",
    "max_pool",
    "max_pool_backward",
    "prune_",
    "relu_norm",
    "relu_norm_backward",
    "to_batch_last",
    "use_route",
]
