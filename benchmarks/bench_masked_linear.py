"""masked_linear against torch's dense linear (MKL), oneDNN's, and torch's compressed sparse rows (CSR).

Dense ways compute with a weight whose absent entries are 0. torch has no backward for oneDNN's linear, and its CSR
backward keeps no transposed matrix; both are given the matrices they need, ready made.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ilnas_kernels import MaskedLinear

from .bench_masked_conv2d import backward, forward
from .cases import DENSITIES, SPARSE_DENSITIES, THREADS, Case, Contenders, groups, label

SHAPES = ((512, 4096, 1024), (128, 1024, 1024))  # batch, in features, out features


def names_at(density: float) -> tuple[str, ...]:
    names = ("dense_mkl", "dense_onednn", "ours")
    return (*names, "csr") if density in SPARSE_DENSITIES else names


def cases() -> list[Case]:
    return [
        Case(
            op=f"linear {direction}",
            shape=f"{batch}x{in_features}->{out_features}",
            density=density,
            threads=count,
            names=names_at(density),
            build=partial(build, direction, batch, in_features, out_features, density),
        )
        for batch, in_features, out_features in SHAPES
        for direction in ("forward", "backward")
        for count in THREADS
        for density in DENSITIES
    ]


def build(direction: str, batch: int, in_features: int, out_features: int, density: float) -> Contenders:
    generator = torch.Generator().manual_seed(0)
    layer = MaskedLinear(in_features, out_features, bias=False, density=density, generator=generator)
    weight = layer.weight.detach().clone()
    if density in SPARSE_DENSITIES:
        layer.pack_()
    (ours,) = layer.parameters()
    x = torch.randn(batch, in_features, generator=generator)
    grad_out = torch.randn(batch, out_features, generator=generator)
    if direction == "forward":
        contenders = {
            "dense_mkl": forward(partial(F.linear, weight=weight), x),
            "dense_onednn": partial(_onednn, x, weight),
            "ours": forward(layer, x),
        }
        csr = _csr_forward
    else:
        dense = weight.clone().requires_grad_()
        contenders = {
            "dense_mkl": backward(partial(F.linear, weight=dense), x, grad_out, dense),
            "dense_onednn": _onednn_backward(x, weight, grad_out),
            "ours": backward(layer, x, grad_out, ours),
        }
        csr = _csr_backward
    if density in SPARSE_DENSITIES:
        contenders["csr"] = csr(x, weight, grad_out)
    return contenders


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _onednn_backward(x: Tensor, weight: Tensor, grad_out: Tensor):
    transposed = weight.t().contiguous()

    def call() -> tuple[Tensor, Tensor]:
        return _onednn(grad_out, transposed), _onednn(grad_out.t(), x.t())

    return call


def _csr_forward(x: Tensor, weight: Tensor, grad_out: Tensor):
    return partial(torch.sparse.mm, weight.to_sparse_csr(), x.t().contiguous())


def _csr_backward(x: Tensor, weight: Tensor, grad_out: Tensor):
    matrix = weight.to_sparse_csr()
    transposed = weight.t().contiguous().to_sparse_csr()
    grad_out = grad_out.t().contiguous()

    def call() -> tuple[Tensor, Tensor]:
        return torch.sparse.mm(transposed, grad_out), torch.sparse.sampled_addmm(matrix, grad_out, x, beta=0.0)

    return call


@pytest.mark.parametrize("case, contender", groups(cases()), ids=label)
def test_masked_linear(case: Case, contender: str, compare) -> None:
    compare(case, contender)
