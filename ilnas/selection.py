"""Which candidates are added: a ranking walked down until the budget is spent to the last parameter."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ilnas.granularity import Pool, are_single, group_scores


@dataclass
class Conditions:
    """What a candidate needs besides itself: a placeholder node or a virtual layer, which then counts as well.

    needs: per candidate the number of its condition, -1 for none; cost: parameters of each condition.
    """

    needs: Tensor
    cost: list[int] = field(default_factory=list)


def choose(
    pool: Pool, conditions: Conditions, budget: int, selection: str, generator: torch.Generator
) -> tuple[Tensor, set[int]]:
    """Positions in the pool of the candidates to add, and the conditions they need; together at most ``budget``.

    selection "top": groups by falling score. "sampled": groups drawn without replacement, each time in proportion to
    score^2, what a step of gradient descent on the group takes off the loss per parameter (the largest of log score^2 +
    Gumbel noise). A group that does not fit any more gives its best members, so what is spent falls short of the budget
    only when candidates run out or cannot pay their condition.
    """
    if not len(pool) or budget <= 0:
        return torch.empty(0, dtype=torch.int64), set()
    _, sizes, scores = group_scores(pool)
    keys = scores
    if selection == "sampled":
        uniform = torch.rand(len(scores), dtype=torch.float64, generator=generator)
        keys = 2 * scores.log() - (-uniform.clamp_min(1e-300).log()).log()
    if not conditions.cost and are_single(pool):
        return smallest(-keys, budget), set()
    order = keys.argsort(descending=True, stable=True)
    members = pool.group.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    needs, counts = conditions.needs[members[starts]].tolist(), sizes.tolist()
    whole: list[int] = []
    rest = members[:0]
    paid: set[int] = set()
    for g in order.tolist():  # over plain numbers: there can be millions of groups
        need, count = needs[g], counts[g]
        extra = 0 if need < 0 or need in paid else conditions.cost[need]
        if extra >= budget:
            continue
        if need >= 0:
            paid.add(need)
        if count > budget - extra:
            inside = members[starts[g] : starts[g] + count]
            rest = inside[pool.score[inside].argsort(descending=True, stable=True)[: budget - extra]]
            break
        whole.append(g)
        budget -= count + extra
        if budget == 0:
            break
    taken = torch.tensor(whole, dtype=torch.int64)
    first, last = starts[taken], starts[taken] + sizes[taken]
    places = torch.arange(int(sizes[taken].sum())) + (last - sizes[taken].cumsum(0)).repeat_interleave(last - first)
    return torch.cat([members[places], rest]), paid


def smallest(values: Tensor, count: int) -> Tensor:
    """Positions, rising, of the ``count`` smallest values (all, where there are fewer), ties to the first of them.

    NaN counts as infinite. To sort all values takes many times as long.
    """
    if count >= len(values):
        return torch.arange(len(values))
    if count <= 0:
        return torch.empty(0, dtype=torch.int64)
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    last = values.kthvalue(count).values
    chosen = values < last
    ties = (values == last).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()
