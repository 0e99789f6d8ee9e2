"""When the architecture changes and how large it is then; and the learning rate (PAPER 3.3, 5.1, algorithm 1)."""

import math
from dataclasses import dataclass, field
from typing import Any

from ilnas.config import Config


def alr_factor(decay: str, progress: float) -> float:
    """What A_lr is multiplied with when this share of the growth period has passed: 1 at the start."""
    if decay == "constant":
        return 1.0
    if decay == "cosine":  # to a tenth, not to 0: the last expansions would add nothing and cost as much
        return 0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0))
    return math.exp(-3.0 * min(progress, 1.0))  # to 5 % of the start


def solve_targets(base: int, budget: int, alr: float, decay: str, most: int) -> list[int]:
    """The live count after each expansion, the last one exactly ``budget``.

    The fewest expansions K, at most ``most``, for which growing by ``alr * alr_factor(k / K)`` each time reaches the
    budget; the growth rates are then scaled in the exponent so that the K-th ends on it exactly.
    """
    if base >= budget or most < 1:
        return []
    gap = math.log(budget / base)

    def gains(count: int) -> list[float]:
        return [math.log1p(alr * alr_factor(decay, k / count)) for k in range(count)]

    count = 1
    while count < most and sum(gains(count)) < gap:
        count += 1
    steps = gains(count)
    scale, total, targets = gap / sum(steps), 0.0, []
    for gain in steps:
        total += gain * scale
        targets.append(min(budget, math.ceil(base * math.exp(total) - 1e-6)))
    targets[-1] = budget
    return targets


@dataclass
class ArchitectureSchedule:
    """Says at each step whether the architecture changes now and to how many live parameters.

    ilnas, random: growth from base to budget until ``growth_end``, then moves at the budget until ``move_end``. set,
    rigl: moves alone. The moved share falls as a cosine to 0 at ``move_end`` (Evci et al., 2020). prune: from all live
    down to the budget at ``move_end``, cubically (Zhu and Gupta, 2017). static, dense: never.
    """

    config: Config
    base: int
    total_steps: int
    steps_per_epoch: int
    done: int = 0
    last_step: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.first = math.ceil(self.config.growth_start * self.total_steps)
        least = min(1, self.total_steps)
        self.end = max(math.floor(self.config.growth_end * self.total_steps), least)
        self.last = max(math.floor(self.config.move_end * self.total_steps), least)
        if self.config.method in ("ilnas", "random"):
            self.last = max(self.last, self.end) if self.config.move else self.end
        self.interval = max(1, round(self.config.interval * self.steps_per_epoch))
        self.planned = self._plan() if self.config.trigger == "solved" or self.config.method == "prune" else {}

    def due(self, step: int, live: int) -> int | None:
        """The live count that the architecture step at this training step must reach; None when none is due."""
        config = self.config
        if config.method in ("static", "dense") or step > self.last or step < self.first:
            return None
        if self.planned or config.trigger == "solved" or config.method == "prune":
            return self.planned.get(step)
        triggered = step - self.last_step >= self.interval or (config.trigger == "plateau" and self._stalled())
        if not triggered or step == 0:
            return None
        if config.method in ("set", "rigl") or (live >= config.budget and config.move):
            return live
        if live >= config.budget or step > self.end:
            return None
        return min(config.budget, live + math.ceil(self.alr(step) * live))

    def alr(self, step: int) -> float:
        return self.config.alr * alr_factor(self.config.alr_decay, self.progress(step))

    def progress(self, step: int) -> float:
        """The share of the growth period that has passed at this step, in [0, 1]."""
        return min(max((step - self.first) / max(self.end - self.first, 1), 0.0), 1.0)

    def moved(self, step: int, live: int) -> int:
        """How many of the smallest live weights are moved at this step."""
        passed = min(max((step - self.first) / max(self.last - self.first, 1), 0.0), 1.0)
        return math.floor(self.config.move * 0.5 * (1 + math.cos(math.pi * passed)) * live)

    def record_loss(self, loss: float) -> None:
        if self.config.trigger == "plateau":
            self.losses = [*self.losses, loss][-2 * self.config.patience :]

    def record_expansion(self, step: int) -> None:
        self.done += 1
        self.last_step = step
        self.losses = []

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "last_step": self.last_step, "losses": list(self.losses), "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.last_step, self.losses = state["done"], state["last_step"], list(state["losses"])

    def _stalled(self) -> bool:
        patience = self.config.patience
        if len(self.losses) < 2 * patience:
            return False
        before, now = sum(self.losses[:patience]), sum(self.losses[patience:])
        return now > (1 - self.config.tolerance) * before

    def _plan(self) -> dict[int, int]:
        """The steps and live counts of the solved schedule."""
        config = self.config
        end = self.last if config.method == "prune" else self.end
        span = end - self.first
        if config.method in ("ilnas", "random"):
            targets = solve_targets(self.base, config.budget, config.alr, config.alr_decay, max(span, 1))
        elif config.method == "prune":
            count = max(min(span // self.interval, span), 1)
            excess = max(self.base - config.budget, 0)
            targets = [config.budget + round(excess * (1 - k / count) ** 3) for k in range(1, count + 1)]
        else:
            targets = []
        sizes = {self.first + (span * k) // len(targets): target for k, target in enumerate(targets, 1)}
        if config.move and config.method != "prune":
            start, size = max(sizes, default=self.first), targets[-1] if targets else self.base
            sizes |= {step: size for step in range(start + self.interval, self.last + 1, self.interval)}
        return sizes


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """Rises linearly over the warm-up, then falls as half a cosine to 0 at the last step."""
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))
