"""The architecture step of every method: phase II of algorithm 1, and its rivals, which move or drop weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ilnas.config import Config
from ilnas.data import Batches
from ilnas.expansion import (
    NonFinite,
    Scoring,
    best_by_layer,
    grow_candidates,
    random_candidates,
    remove_weights,
    score_candidates,
    smallest_weights,
    tentative_copy,
)
from ilnas.granularity import Pool, grain_at
from ilnas.measure import network_macs
from ilnas.offers import commit, conditions_of, draw_offers, moved_patterns, offer
from ilnas.randomness import generator_for
from ilnas.selection import Conditions, choose
from ilnas.template import Network, live_parameters, masked_layers
from ilnas_kernels import Pattern


def architecture_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, config: Config, batches: Batches, step: int, target: int,
    *, moved: int, lr: float, progress: float,
) -> dict[str, Any]:  # fmt: skip
    """Bring the network to ``target`` live parameters, moving ``moved`` of the smallest live weights as well.

    Returns what was done, for the log, with the multiply-accumulates of the scoring batches' forward passes. With
    non-finite scoring gradients nothing is changed and "skipped" says why.
    """
    size, macs = config.scoring_batch or config.batch_size, 0

    def backward(model: nn.Module, which: int) -> None:
        nonlocal macs
        images, labels = batches.sample(size, f"scoring {which}", step)
        F.cross_entropy(model(images), labels).backward()
        macs += network_macs(model) * len(labels)

    report = change_architecture(
        network, optimizer, config, backward, target, moved=moved, lr=lr, progress=progress, step=step
    )
    return report | {"scoring_macs": macs}


def change_architecture(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, config: Config, backward: Callable, target: int,
    *, moved: int, lr: float, progress: float, step: int,
) -> dict[str, Any]:  # fmt: skip
    """``architecture_step`` for any model of masked layers; nodes and layers are offered to template networks only."""
    live = live_parameters(model, count_norm=config.count_norm)
    if config.method == "prune":
        removed = smallest_weights(model, max(live - target, 0))
        remove_weights(model, removed, optimizer)
        return {"added": 0, "removed": sum(map(len, removed.values()))}
    generator = generator_for(config.seed, "architecture", step)
    layerwise = config.method in ("set", "rigl")
    removed = smallest_weights(model, moved, by_layer=layerwise) if moved else {}
    report = {"added": 0, "removed": sum(map(len, removed.values())), "nodes": 0, "layers": 0}
    try:
        step_of = _Step(model, optimizer, config, backward, lr, progress, generator)
        if layerwise:
            step_of.replace(removed)
        else:
            step_of.grow(target, removed, report)
    except NonFinite as error:
        report |= {"skipped": str(error), "added": 0, "removed": 0}
        return report
    report["added"] = live_parameters(model, count_norm=config.count_norm) - live + report["removed"]
    return report


class _Step:
    """One architecture step on one model."""

    def __init__(self, model, optimizer, config, backward, lr, progress, generator) -> None:
        self.model, self.optimizer, self.config, self.backward = model, optimizer, config, backward
        self.generator = generator
        self.grain = grain_at(config.granularity, progress)
        self.scoring = Scoring(
            config.hyper_step and config.method == "ilnas", config.hyper_lr or lr, config.ranking, config.candidates
        )

    @property
    def live(self) -> int:
        return live_parameters(self.model, count_norm=self.config.count_norm)

    def grow(self, target: int, removed: dict, report: dict[str, Any]) -> None:
        """Rounds until the target is met: a second one, for connections only, where offers left parameters over.

        The weights to be removed go only when a first round has succeeded, so that a failed step changes nothing.
        """
        report["added_by_layer"] = {}
        for with_offers in (True, False):
            missing = target - self.live + sum(map(len, removed.values()))
            if missing <= 0:
                break
            try:
                self._grow_once(missing, removed, with_offers, report)
            except NonFinite:
                if with_offers:
                    raise
                break
            removed = {}
        remove_weights(self.model, removed, self.optimizer)
        if (missing := target - self.live) > 0:  # scores of exactly 0 or too few groups: any absent weight will do
            self._add(random_candidates(self.model, missing, self.generator), report)

    def _grow_once(self, missing: int, removed: dict, with_offers: bool, report: dict[str, Any]) -> None:
        config, structured = self.config, isinstance(self.model, Network)
        hyper = tentative_copy(self.model)
        remove_weights(hyper, removed, None)
        offers = None
        if structured and with_offers and (config.nodes or config.layers):
            offers = draw_offers(hyper, config, self.generator)
            offer(hyper, offers)
            exclude = moved_patterns(removed, hyper, offers)
        else:
            layers = dict(masked_layers(hyper))
            exclude = {name: Pattern.from_index(layers[name].pattern.shape, index) for name, index in removed.items()}
        pool = self._pool(hyper, missing, exclude)
        conditions = Conditions(torch.full((len(pool),), -1))
        if offers is not None:
            pool, conditions = conditions_of(pool, hyper, offers, count_norm=config.count_norm)
        selection = "top" if config.method == "random" else config.selection
        chosen, picked = choose(pool, conditions, missing, selection, self.generator)
        pool = pool.take(chosen)
        remove_weights(self.model, removed, self.optimizer)
        if offers is not None:
            pool, nodes, layers = commit(self.model, hyper, offers, picked, pool, self.optimizer)
            report["nodes"] += nodes
            report["layers"] += layers
        self._add(pool, report)

    def _pool(self, hyper: nn.Module, missing: int, exclude: dict[str, Pattern]) -> Pool:
        count = max(missing, round(self.config.candidates * missing))
        if self.config.method == "random":
            return random_candidates(hyper, count, self.generator)
        return score_candidates(hyper, self.backward, count, self.grain, self.scoring, exclude)

    def _add(self, pool: Pool, report: dict[str, Any]) -> None:
        """New weights start at 0 with no momentum: the function stays as it is."""
        grow_candidates(self.model, pool, 0.0, self.optimizer)
        for name, (weights, biases) in pool.by_layer().items():
            report["added_by_layer"][name] = report["added_by_layer"].get(name, 0) + len(weights) + len(biases)

    def replace(self, removed: dict) -> None:
        """SET (Mocanu et al., 2018) and RigL (Evci et al., 2020): every layer regrows as many weights as it loses."""
        hyper = tentative_copy(self.model)
        remove_weights(hyper, removed, None)
        counts = {name: len(index) for name, index in removed.items() if len(index)}
        if not counts:
            return
        if self.config.method == "rigl":
            pool = best_by_layer(hyper, self.backward, counts)
        remove_weights(self.model, removed, self.optimizer)
        if self.config.method == "rigl":
            grow_candidates(self.model, pool, 0.0, self.optimizer)
        else:
            layers = dict(masked_layers(self.model))
            for name, count in counts.items():
                alone = nn.ModuleDict({"layer": layers[name]})
                grow_candidates(alone, random_candidates(alone, count, self.generator), 0.0, self.optimizer)
