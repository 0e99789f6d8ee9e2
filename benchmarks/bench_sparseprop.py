"""masked_conv2d against SparseProp (Nikdan et al., ICML 2023), the other package that trains unstructured sparse
convolutions on CPUs. Measured where its package is installed.

SparseProp vectorises over the batch or over the width of the image; both ways are measured, from NCHW tensors. The
first leaves its output batch-last. Its library switches the process to flush-to-zero when it is loaded, and brings an
OpenMP runtime of its own, whose waiting threads take the cores from torch's: so all is measured on one thread.
"""

import os
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
from torch import nn

from . import bench_masked_conv2d
from .bench_masked_conv2d import backward, forward
from .cases import SPARSE_DENSITIES, Case, Contenders, groups, label

RIVALS = ("sparseprop_over_batch", "sparseprop_over_width")
NAMES = ("dense_nchw", *RIVALS, "ours_nchw")


def cases() -> list[Case]:
    if find_spec("sparseprop") is None:
        return []
    return [
        case
        for case in bench_masked_conv2d.cases_of("sparseprop ", NAMES, build, SPARSE_DENSITIES)
        if case.threads == 1
    ]


def build(
    direction: str, batch: int, in_channels: int, out_channels: int, size: int, kernel: int, density: float
) -> Contenders:
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when its runtime is loaded; torch's is by now
        from sparseprop.modules import SparseConv2d

    others = bench_masked_conv2d.build(direction, batch, in_channels, out_channels, size, kernel, density)
    generator = torch.Generator().manual_seed(0)
    dense = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    with torch.no_grad():
        dense.weight *= torch.rand(dense.weight.shape, generator=generator) < density
    x = torch.randn(batch, in_channels, size, size, generator=generator)
    grad_out = torch.randn(batch, out_channels, size, size, generator=generator)
    contenders = {"dense_nchw": others["dense_nchw"]}
    for name in RIVALS:
        layer = SparseConv2d.from_dense(dense, vectorizing_over_on=name == "sparseprop_over_width")
        with torch.no_grad():
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-3, atol=1e-3)
        contenders[name] = forward(layer, x) if direction == "forward" else backward(layer, x, grad_out, layer.W_val)
    return contenders | {"ours_nchw": others["ours_nchw"]}


@pytest.mark.parametrize("case, contender", groups(cases()), ids=label)
def test_sparseprop(case: Case, contender: str, compare) -> None:
    compare(case, contender)
