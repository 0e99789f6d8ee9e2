"""Growing and pruning: the best absent weights of a whole model, and changing what is live."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from ._change import grow_, prune_
from ._layer import MaskedLayer
from .nn import MaskedConv2d
from .pattern import Pattern

__all__ = ["AbsentTopK", "Candidates", "GrowthResult", "grow_", "prune_"]


class Candidates(NamedTuple):
    """Flat positions, int64, and their signed gradients, float32, by falling score."""

    index: Tensor
    grad: Tensor


@dataclass
class GrowthResult:
    """The best absent weights and biases by layer name; layers without any are left out.

    non_finite: how many candidates of a layer had a NaN or infinite gradient (only with ``allow_non_finite``).
    """

    weights: dict[str, Candidates] = field(default_factory=dict)
    biases: dict[str, Candidates] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of candidates over the network, weights and biases."""
        return sum(c.index.numel() for group in (self.weights, self.biases) for c in group.values())


class AbsentTopK:
    """The ``k`` absent weights and biases of largest ``|dL/dparameter|`` over the masked layers of a model.

    Run forward and backward inside it, as often as wanted; gradients of all passes and of all uses of a layer are
    summed. Afterwards ``result`` holds a :class:`GrowthResult`. Candidate scoring of ILNAS, section 3.3.

        with AbsentTopK(model, k=100) as search:
            loss(model(x), y).backward()
        for name, (index, grad) in search.result.weights.items(): ...

    granularity: "weight", or "kernel" for (output, input) channel pairs, see :func:`ilnas_kernels.absent_topk`.
    exclude: by layer name, positions never proposed (bool of the weight's shape, or a Pattern).
    biases: whether absent biases compete. per_layer: at most so many weights of one layer, an int or by layer name.
    scale: by layer name, a positive factor on a layer's scores before layers are compared; default 1.
    allow_non_finite: report candidates with NaN or infinite gradients in ``result.non_finite`` instead of raising
    ArithmeticError, which names the layer. Ties go to the earlier layer, then to the lower position.
    The dense gradient never exists; the inputs and output gradients of the layers are kept until the context ends.
    """

    def __init__(
        self,
        model: nn.Module,
        k: int,
        *,
        granularity: str = "weight",
        exclude: Mapping[str, Tensor | Pattern] | None = None,
        biases: bool = True,
        per_layer: int | Mapping[str, int] | None = None,
        scale: Mapping[str, float] | None = None,
        allow_non_finite: bool = False,
    ) -> None:
        ops.check_topk_options("AbsentTopK", k, granularity)
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, MaskedLayer)}
        if not self._layers:
            raise ValueError("AbsentTopK: the model has no MaskedConv2d or MaskedLinear")
        self._k, self._granularity, self._biases = k, granularity, biases
        self._exclude, self._scale = dict(exclude or {}), dict(scale or {})
        self._per_layer = dict(per_layer) if isinstance(per_layer, Mapping) else per_layer
        self._allow_non_finite = allow_non_finite
        for option, by_layer in (("exclude", self._exclude), ("scale", self._scale), ("per_layer", self._per_layer)):
            if isinstance(by_layer, dict) and (unknown := sorted(by_layer.keys() - self._layers.keys())):
                raise ValueError(f"AbsentTopK: {option} names {unknown[0]!r}, which is no masked layer of the model")
        for name, factor in self._scale.items():
            if not 0 < factor < math.inf:
                raise ValueError(f"AbsentTopK: scale[{name!r}] must be positive and finite, got {factor}")
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._handles: list = []
        self._result: GrowthResult | None = None

    @property
    def result(self) -> GrowthResult:
        """What was found; RuntimeError before the context has ended."""
        if self._result is None:
            raise RuntimeError("AbsentTopK: result exists once the context has ended without an error")
        return self._result

    def __enter__(self) -> "AbsentTopK":
        self._seen, self._result = {}, None
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._watch(name)))
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        seen, self._seen = self._seen, {}
        if error_type is None:
            with torch.no_grad():
                self._result = self._rank(seen)

    def _watch(self, name: str):
        def on_forward(layer, inputs, out):
            if not out.requires_grad:
                return
            x = inputs[0].detach()
            out.register_hook(lambda grad_out: self._seen.setdefault(name, []).append((x, grad_out.detach())))

        return on_forward

    def _rank(self, seen: dict[str, list[tuple[Tensor, Tensor]]]) -> GrowthResult:
        best = _Best(self._k)
        non_finite = {}
        for name, layer in self._layers.items():
            if name not in seen:
                continue
            pairs = seen.pop(name)
            for kind, index, grad, bad in self._candidates(name, layer, pairs, best):
                if bad and not self._allow_non_finite:
                    raise ArithmeticError(
                        f"AbsentTopK: layer {name!r} has {bad} absent {kind} whose gradient is NaN or infinite"
                    )
                if bad:
                    non_finite[name] = non_finite.get(name, 0) + bad
                best.offer((kind, name), index, grad, self._scale.get(name, 1.0))
        result = GrowthResult(non_finite=non_finite)
        for (kind, name), found in best.groups():
            getattr(result, kind)[name] = found
        return result

    def _candidates(self, name, layer, pairs, best) -> Iterator[tuple[str, Tensor, Tensor, int]]:
        x, grad_out = _one_pair(layer, pairs)
        quota = self._per_layer.get(name, self._k) if isinstance(self._per_layer, dict) else self._per_layer
        k = self._k if quota is None else min(self._k, quota)
        if k > 0 and layer.nnz < layer.pattern.numel:
            geometry = {}
            if isinstance(layer, MaskedConv2d):
                call = layer.call()
                geometry = {
                    "stride": call.stride, "padding": call.padding, "dilation": call.dilation, "groups": layer.groups
                }  # fmt: skip
            index, grad, bad = ops.topk_with_count(
                f"AbsentTopK, layer {name!r}", x, grad_out, layer.pattern, k, exclude=self._exclude.get(name),
                granularity=self._granularity, floor=best.floor(self._scale.get(name, 1.0)), **geometry,
            )  # fmt: skip
            yield "weights", index, grad, bad
        if self._biases and layer.bias_mask is not None:
            index = (~layer.bias_mask).nonzero().view(-1)
            channel = 1 if isinstance(layer, MaskedConv2d) else grad_out.dim() - 1
            others = [d for d in range(grad_out.dim()) if d != channel]
            wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
            grad = grad_out.sum(others, dtype=wide)[index].float()
            finite = grad.isfinite()
            index, grad, bad = index[finite], grad[finite], int((~finite).sum())
            order = grad.abs().sort(descending=True, stable=True).indices
            yield "biases", index[order], grad[order], bad


class _Best:
    """The k best of everything offered so far, ties to what was offered first."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._held: list[tuple] = []  # (source, -score, index, gradient), each by rising -score
        self._least = 0.0  # the k-th score

    def floor(self, scale: float) -> float:
        """The |gradient| below which nothing of a layer with this scale can enter."""
        return self._least if scale == 1.0 else self._least / scale * (1 - 1e-6)  # outweighs the rounding of float32

    def offer(self, source, index: Tensor, grad: Tensor, scale: float) -> None:
        """index, grad: by falling |grad|."""
        index, grad = index.cpu(), grad.cpu()
        self._held.append((source, grad.abs() * -scale, index, grad))
        keys = torch.cat([key for _, key, *_ in self._held])
        if keys.numel() < self._k:
            return
        last = keys.kthvalue(self._k).values
        self._least = -float(last)
        # What a source keeps is a beginning of what it holds, since that is sorted.
        better = [int(torch.searchsorted(key, last)) for _, key, *_ in self._held]
        room = self._k - sum(better)
        for i, ((held, *columns), count) in enumerate(zip(self._held, better, strict=True)):
            ties = min(int(torch.searchsorted(columns[0], last, right=True)) - count, room)
            room -= ties
            self._held[i] = (held, *(_beginning(column, count + ties) for column in columns))

    def groups(self) -> Iterator[tuple[tuple[str, str], Candidates]]:
        for source, _, index, grad in self._held:
            if index.numel():
                yield source, Candidates(index, grad)


def _beginning(column: Tensor, count: int) -> Tensor:
    """The first entries of a vector, as a copy where that frees more than it takes."""
    freed = column.untyped_storage().nbytes() - count * column.itemsize
    return column[:count].clone() if freed > count * column.itemsize else column[:count]


def _one_pair(layer: MaskedLayer, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One (x, grad_out) whose weight gradient is the sum of those of all pairs."""
    dtype = pairs[0][1].dtype
    pairs = [(x.to(dtype), grad_out.to(dtype)) for x, grad_out in pairs]
    if not isinstance(layer, MaskedConv2d):
        if len(pairs) == 1:
            return pairs[0]
        return tuple(torch.cat([t.reshape(-1, t.shape[-1]) for t in side]) for side in zip(*pairs, strict=True))
    if layer.padding_mode != "zeros":
        border = layer._reversed_padding_repeated_twice
        pairs = [(F.pad(x, border, mode=layer.padding_mode), grad_out) for x, grad_out in pairs]
    pairs = [(x.unsqueeze(0), g.unsqueeze(0)) if x.dim() == 3 else (x, g) for x, g in pairs]
    if len(pairs) == 1:
        return pairs[0]
    # Images of several sizes: zeros at the far edges, with zero gradients there, add nothing to the sums.
    height, width = (max(x.shape[d] for x, _ in pairs) for d in (2, 3))
    out_height, out_width = layer.call().output_size(height, width)
    xs = [F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x, _ in pairs]
    grads = [F.pad(g, (0, out_width - g.shape[3], 0, out_height - g.shape[2])) for _, g in pairs]
    return torch.cat(xs), torch.cat(grads)
