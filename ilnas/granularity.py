"""Candidates in groups: an element of alpha is a single weight, a kernel, or a layer (PAPER 3.4)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ilnas.template import masked_layers
from ilnas_kernels import AbsentTopK


@dataclass
class Pool:
    """Candidates for addition. All tensors have one entry per candidate.

    layer: number of the layer in ``names``; index: flat position in its weight, or the bias's number where
    ``is_bias``; grad: its gradient, g; group: which candidates are added together; score: what they are ranked by.
    """

    names: list[str]
    layer: Tensor
    index: Tensor
    is_bias: Tensor
    grad: Tensor
    group: Tensor
    score: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, keep: Tensor) -> "Pool":
        """The candidates that ``keep`` (bool, or positions) names."""
        return Pool(self.names, *(getattr(self, name)[keep] for name in _COLUMNS))

    def by_layer(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Positions in this pool of each layer's weight candidates and bias candidates."""
        found = {}
        for number, name in enumerate(self.names):
            here = (self.layer == number).nonzero().flatten()
            if len(here):
                is_bias = self.is_bias[here]
                found[name] = here[~is_bias], here[is_bias]
        return found


_COLUMNS = ("layer", "index", "is_bias", "grad", "group", "score")


SEQUENCES = {"mixed": ("kernel", "weight"), "top-down": ("layer", "kernel", "weight")}


def grain_at(granularity: str, progress: float) -> str:
    """The grain at a share of the growth period, which the grains of a sequence divide equally."""
    grains = SEQUENCES.get(granularity, (granularity,))
    return grains[min(int(progress * len(grains)), len(grains) - 1)]


def pool_of_weights(search: AbsentTopK, model: nn.Module) -> Pool:
    """Each candidate weight and bias is a group of its own, scored by |g|."""
    names = [name for name, _ in masked_layers(model)]
    rows = []
    for number, name in enumerate(names):
        for found, is_bias in ((search.result.weights.get(name), False), (search.result.biases.get(name), True)):
            if found is not None:
                rows.append((number, is_bias, found.index, found.grad))
    return _pool(names, rows)


def pool_of_kernels(search: AbsentTopK, model: nn.Module) -> Pool:
    """Each candidate (output, input) pair is the group of its absent taps; gradients and scores are still 0."""
    layers = dict(masked_layers(model))
    names = list(layers)
    rows, groups, count = [], [], 0
    for number, name in enumerate(names):
        if (found := search.result.weights.get(name)) is not None:
            taps = layers[name].pattern.taps
            index = (found.index[:, None] * taps + torch.arange(taps)).flatten()
            group = torch.arange(len(found.index)).repeat_interleave(taps) + count
            absent = ~torch.isin(index, layers[name].pattern.index)
            rows.append((number, False, index[absent], torch.zeros(int(absent.sum()))))
            groups.append(group[absent])
            count += len(found.index)
        if (found := search.result.biases.get(name)) is not None:
            rows.append((number, True, found.index, found.grad))
            groups.append(torch.arange(len(found.index)) + count)
            count += len(found.index)
    pool = _pool(names, rows)
    if groups:
        pool.group = torch.cat(groups)
    return pool


def best_layers(pool: Pool, members: int, count: int) -> Pool:
    """Of a pool of single candidates the best layers, enough of them for ``count`` candidates.

    A layer has more absent weights than the budget allows: its group is its ``members`` best candidates, as many as
    are to be added over the network.
    """
    best = []
    for number in range(len(pool.names)):
        inside = (pool.layer == number).nonzero().flatten()
        best.append(inside[pool.score[inside].argsort(descending=True, stable=True)[:members]])
    pool = pool.take(torch.cat(best))
    pool.group = pool.layer.clone()
    layers, sizes, scores = group_scores(pool)
    order = scores.argsort(descending=True, stable=True)
    enough = int((sizes[order].cumsum(0) < count).sum()) + 1
    return pool.take(torch.isin(pool.layer, layers[order[:enough]]))


def group_scores(pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    """(group numbers, members of each, root mean square of the members' scores): comparable per parameter."""
    if are_single(pool):
        return pool.group, torch.ones_like(pool.group), pool.score.double()
    groups, place, sizes = pool.group.unique(return_inverse=True, return_counts=True)
    squares = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, place, pool.score.double().square())
    return groups, sizes, (squares / sizes).sqrt()


def are_single(pool: Pool) -> bool:
    """Whether each candidate is a group of its own, in rising order."""
    return bool((pool.group.diff() > 0).all())


def _pool(names: list[str], rows: list[tuple[int, bool, Tensor, Tensor]]) -> Pool:
    if not rows:
        nothing = torch.empty(0, dtype=torch.int64)
        return Pool(names, nothing, nothing, nothing.bool(), nothing.float(), nothing, nothing.float())
    index = torch.cat([index for _, _, index, _ in rows])
    grad = torch.cat([grad for _, _, _, grad in rows])
    layer = torch.cat([torch.full_like(index, number) for number, _, index, _ in rows])
    is_bias = torch.cat([torch.full_like(index, is_bias, dtype=torch.bool) for _, is_bias, index, _ in rows])
    return Pool(names, layer, index, is_bias, grad, torch.arange(len(index)), grad.abs())
