"""One expansion (PAPER 3.3): candidates, hyper-architecture, second gradient, |g + g*|, and the best are added."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ilnas.granularity import Pool, best_layers, pool_of_kernels, pool_of_weights
from ilnas.selection import smallest
from ilnas.template import masked_layers
from ilnas_kernels import AbsentTopK, Pattern, grow_, prune_

Backward = Callable[[nn.Module, int], None]
"""backward(model, k): forward and backward of the k-th scoring batch, adding to the gradients of ``model``."""


@dataclass(frozen=True)
class Scoring:
    """How candidates are found and ranked; the options of the same names in ilnas.config."""

    hyper_step: bool = True
    hyper_lr: float = 0.1
    ranking: str = "global"
    candidates: float = 2.0


class NonFinite(ArithmeticError):
    """A scoring gradient was NaN or infinite: nothing can be ranked."""


def score_candidates(
    hyper: nn.Module, backward: Backward, count: int, grain: str, scoring: Scoring,
    exclude: dict[str, Pattern] | None = None,
) -> Pool:  # fmt: skip
    """The ``count`` first-level candidates of a model with their final score. Changes ``hyper``: give a copy.

    First level: the absent parameters of largest |g| over the network, g = dL/d(alpha_i W_i) on scoring batch 0. The
    hyper-architecture has them live; one step of gradient descent takes all weights W to W* = W - hyper_lr * g; the
    final score is |g + g*| with g* taken at W* on scoring batch 1. Raises NonFinite.
    """
    options = ranking_options(hyper, count, scoring, backward)
    scale = options.get("scale", {})
    layers = dict(masked_layers(hyper))
    first_level, kind, members = count, "weight", max(1, round(count / scoring.candidates))
    if grain == "kernel":
        taps = max(layer.pattern.taps for layer in layers.values())
        first_level, kind = max(1, -(-count // taps)), "kernel"
    elif grain == "layer":
        first_level = sum(members + layer.pattern.shape[0] for layer in layers.values())  # weights and biases
        quota = options.get("per_layer", {})
        options["per_layer"] = {name: min(members, quota.get(name, members)) for name in layers}
    clear_gradients(hyper)
    with AbsentTopK(hyper, first_level, granularity=kind, exclude=exclude, allow_non_finite=True, **options) as search:
        backward(hyper, 0)
    if search.result.non_finite or not gradients_finite(hyper):
        raise NonFinite(f"non-finite gradients at candidates of {', '.join(search.result.non_finite) or 'no layer'}")
    if grain == "kernel":
        pool = pool_of_kernels(search, hyper)
        grow_candidates(hyper, pool, 0.0)
        clear_gradients(hyper)
        backward(hyper, 0)
        pool.grad = gradients_at(hyper, pool)
        if scoring.hyper_step:
            descend(hyper, scoring.hyper_lr)
    else:
        pool = pool_of_weights(search, hyper)
        if grain == "layer":
            rescale(pool, scale)
            pool = best_layers(pool, members, count)
        if scoring.hyper_step:
            descend(hyper, scoring.hyper_lr)
            grow_candidates(hyper, pool, -scoring.hyper_lr)
    pool.score = pool.grad.abs()
    if scoring.hyper_step and len(pool):
        clear_gradients(hyper)
        backward(hyper, 1)
        pool.score = (pool.grad + gradients_at(hyper, pool)).abs()
    if not bool(pool.score.isfinite().all()):
        raise NonFinite("non-finite gradients in the hyper-architecture")
    rescale(pool, scale)
    return pool


def rescale(pool: Pool, scale: dict[str, float]) -> None:
    """Multiply the scores of each layer by its factor."""
    for name, factor in scale.items():
        pool.score[pool.layer == pool.names.index(name)] *= factor


def ranking_options(model: nn.Module, count: int, scoring: Scoring, backward: Backward) -> dict:
    """What AbsentTopK is told for a ranking other than the global one.

    quota: no layer gives more candidates than its share of the network's absent weights (and at least one).
    normalised: a layer's scores are divided by the root mean square of its live weights' gradients.
    """
    if scoring.ranking == "quota":
        absent = {name: layer.pattern.numel - layer.nnz for name, layer in masked_layers(model)}
        total = max(sum(absent.values()), 1)
        return {"per_layer": {name: max(1, -(-count * n // total)) for name, n in absent.items()}}
    if scoring.ranking == "normalised":
        clear_gradients(model)
        backward(model, 0)
        scale = {}
        for name, layer in masked_layers(model):
            grad = weight_gradient(layer)
            size = float(grad.square().mean().sqrt()) if grad is not None and grad.numel() else 0.0
            if 0.0 < size < float("inf"):
                scale[name] = 1.0 / size
        return {"scale": scale}
    return {}


def best_by_layer(hyper: nn.Module, backward: Backward, counts: dict[str, int]) -> Pool:
    """The ``counts[name]`` absent weights of largest |g| of each layer (RigL's growth). Raises NonFinite."""
    quota = {name: counts.get(name, 0) for name, _ in masked_layers(hyper)}
    clear_gradients(hyper)
    with AbsentTopK(
        hyper, max(sum(counts.values()), 1), per_layer=quota, biases=False, allow_non_finite=True
    ) as search:
        backward(hyper, 0)
    if search.result.non_finite:
        raise NonFinite(f"non-finite gradients at candidates of {', '.join(search.result.non_finite)}")
    return pool_of_weights(search, hyper)


def random_candidates(model: nn.Module, count: int, generator: torch.Generator) -> Pool:
    """``count`` absent weights and biases drawn uniformly over the network, scored by the order of the draw."""
    layers = list(masked_layers(model))
    rows, total = [], 0
    for number, (_, layer) in enumerate(layers):
        rows.append((number, False, total, layer.pattern.numel))
        total += layer.pattern.numel
        if layer.bias_mask is not None:
            rows.append((number, True, total, layer.bias_mask.numel()))
            total += layer.bias_mask.numel()
    starts = torch.tensor([start for *_, start, _ in rows])
    found, held = torch.empty(0, dtype=torch.int64), 0
    absent = sum(int(absent_mask_count(layer)) for _, layer in layers)
    while len(found) < min(count, absent):
        drawn = torch.randint(total, (2 * count + 64,), generator=generator)
        found = _first_of_each(torch.cat([found, drawn[_is_absent(drawn, rows, layers, starts)]]))
        held = len(found)
    found = found[: min(count, held)]
    row = torch.searchsorted(starts, found, right=True) - 1
    layer_of = torch.tensor([number for number, *_ in rows])[row]
    is_bias = torch.tensor([bias for _, bias, *_ in rows])[row]
    score = torch.arange(len(found), 0, -1).float()
    return Pool(
        [name for name, _ in layers], layer_of, found - starts[row], is_bias, torch.zeros(len(found)),
        torch.arange(len(found)), score,
    )  # fmt: skip


def absent_mask_count(layer: nn.Module) -> int:
    """How many weights and biases of a layer are absent."""
    biases = 0 if layer.bias_mask is None else int((~layer.bias_mask).sum())
    return layer.pattern.numel - layer.nnz + biases


def smallest_weights(model: nn.Module, count: int, *, by_layer: bool = False) -> dict[str, Tensor]:
    """Flat positions by layer of the ``count`` live weights of smallest magnitude, over the network.

    by_layer: instead the same share of every layer's live weights, rounded down.
    """
    layers = list(masked_layers(model))
    nnz = [layer.nnz for _, layer in layers]
    if by_layer:
        share = count / max(sum(nnz), 1)
        return {
            name: layer.pattern.index[smallest(magnitudes(layer), int(share * layer.nnz))] for name, layer in layers
        }
    order = smallest(torch.cat([magnitudes(layer) for _, layer in layers]), count)
    chosen, start = {}, 0
    for (name, layer), size in zip(layers, nnz, strict=True):
        inside = order[(order >= start) & (order < start + size)] - start
        chosen[name] = layer.pattern.index[inside]
        start += size
    return chosen


def magnitudes(layer: nn.Module) -> Tensor:
    """|w| of the live weights in flat order."""
    if layer.packed:
        return layer.values.detach().abs()
    return layer.weight.detach().flatten()[layer.pattern.index].abs()


def remove_weights(model: nn.Module, removed: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    layers = dict(masked_layers(model))
    for name, index in removed.items():
        if len(index):
            prune_(layers[name], index, optimizer)


def grow_candidates(
    model: nn.Module, pool: Pool, factor: float, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Make the pool's candidates live with the value ``factor * grad``."""
    layers = dict(masked_layers(model))
    for name, (weights, biases) in pool.by_layer().items():
        grow_(
            layers[name], pool.index[weights], factor * pool.grad[weights], optimizer,
            bias_index=pool.index[biases], bias_value=factor * pool.grad[biases],
        )  # fmt: skip


def gradients_at(model: nn.Module, pool: Pool) -> Tensor:
    """The gradients at live positions, float32, one per candidate."""
    layers = dict(masked_layers(model))
    found = torch.zeros(len(pool))
    for name, (weights, biases) in pool.by_layer().items():
        layer = layers[name]
        live = layer.pattern.index
        # A candidate's position stands twice among both, first where it is live: the sort is stable.
        ordered, order = torch.cat([live, pool.index[weights]]).sort(stable=True)
        place = (ordered[1:] == ordered[:-1]).nonzero().view(-1)
        found[weights[order[place + 1] - len(live)]] = weight_gradient(layer)[order[place]].float()
        if len(biases):
            found[biases] = layer.bias.grad[pool.index[biases]].float()
    return found


def weight_gradient(layer: nn.Module) -> Tensor | None:
    """The gradients of the live weights in flat order; None without a gradient."""
    if layer.packed:
        return layer.values.grad
    grad = layer.weight.grad
    return None if grad is None else grad.flatten()[layer.pattern.index]


@torch.no_grad()
def descend(model: nn.Module, lr: float) -> None:
    """One step of plain gradient descent on every parameter."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.sub_(parameter.grad, alpha=lr)


def clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def gradients_finite(model: nn.Module) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def tentative_copy(model: nn.Module) -> nn.Module:
    """A copy to try a hyper-architecture on, in training mode, without gradients."""
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    clear_gradients(model)
    # A module keeps its hooks in some ten dictionaries; to copy the empty ones takes longer than everything else.
    empty = [v for m in model.modules() for v in vars(m).values() if isinstance(v, OrderedDict) and not v]
    made = copy.deepcopy(model, {id(hooks): OrderedDict() for hooks in empty}).train()
    for parameter, grad in held:
        parameter.grad = grad
    return made


def _is_absent(drawn: Tensor, rows: list, layers: list, starts: Tensor) -> Tensor:
    absent = torch.zeros(len(drawn), dtype=torch.bool)
    row = torch.searchsorted(starts, drawn, right=True) - 1
    for r, (number, is_bias, start, _) in enumerate(rows):
        here = row == r
        layer = layers[number][1]
        if is_bias:
            absent[here] = ~layer.bias_mask[drawn[here] - start]
        else:
            absent[here] = ~torch.isin(drawn[here] - start, layer.pattern.index)
    return absent


def _first_of_each(values: Tensor) -> Tensor:
    """The distinct values in the order of their first appearance."""
    distinct, place = values.unique(return_inverse=True)
    first = torch.full((len(distinct),), len(values)).scatter_reduce(0, place, torch.arange(len(values)), "amin")
    return values[first.sort().values]
