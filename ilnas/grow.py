"""Evolving a model of one's own: any network whose layers are convolutions and linear layers (connections only)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilnas.base import drawn_positions, layer_counts
from ilnas.config import Config, make_config
from ilnas.config import options as all_options
from ilnas.evolve import change_architecture
from ilnas.randomness import generator_for
from ilnas.schedule import ArchitectureSchedule, learning_rate
from ilnas.template import live_parameters, masked_layers
from ilnas.trainer import autocast
from ilnas_kernels import Pattern, convert

# Of the groups "search" and "training", what concerns the template or the trainer's own data and loss.
NOT_HERE = ("nodes", "fan_in", "layers", "scoring_batch", "batch_size", "label_smoothing", "test_every")
BESIDE = ("base", "preset", "seed")


def grow(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    budget: int,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train ``model`` in place while its live weights and biases grow to ``budget``; returns what happened, as a log.

    Plain nn.Conv2d and nn.Linear layers become masked ones first. A model that has more live parameters than the base
    (``base * budget``) is made sparse at random, unless the method is "prune", which starts from what is there.

        model = torchvision.models.resnet18(num_classes=10)
        ilnas.grow(model, loader, budget=500_000, epochs=30)

    loader: batches (inputs, targets), with a length; goes through once per epoch. optimizer: one that holds the
    model's parameters already, whose learning rate is then left alone; default SGD as ``options`` say, with a cosine.
    loss(outputs, targets). options: those of ``ilnas search`` (docs/options.md) that concern search and training, such
    as ``method="rigl"``, ``alr=0.05``, ``granularity="kernel"``. ValueError names an option that is wrong or has no
    meaning here.
    """
    config = make_config(options, {"budget": budget, "epochs": epochs})
    _check_meaning(options)
    convert(model)
    layers = list(masked_layers(model))
    if not layers:
        raise ValueError("grow: the model has no convolution or linear layer")
    if config.method in ("ilnas", "random"):
        _thin_out(model, round(config.base * budget), config)
    elif config.method in ("static", "set", "rigl"):
        _thin_out(model, budget, config)

    def live_now() -> int:
        return live_parameters(model, count_norm=config.count_norm)

    own_optimizer = optimizer is None
    if optimizer is None:
        for _, layer in layers:
            layer.pack_()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    steps_per_epoch = len(loader)
    total = epochs * steps_per_epoch
    schedule = ArchitectureSchedule(config, live_now(), total, steps_per_epoch)
    log: list[dict[str, Any]] = []

    def record(entry: dict[str, Any]) -> None:
        log.append(entry)
        if on_event:
            on_event(entry)

    step = 0
    recent: list[tuple[Tensor, Tensor]] = []  # the scoring batches: the one about to be trained on and the one before
    for epoch in range(epochs):
        loss_sum = 0.0
        for inputs, targets in loader:
            recent = [(inputs, targets), *recent[:1]]
            live = live_now()
            target = schedule.due(step, live)
            if target is not None:
                done = change_architecture(
                    model, optimizer, config, _scoring(recent, loss), target, moved=schedule.moved(step, live),
                    lr=optimizer.param_groups[0]["lr"], progress=schedule.progress(step), step=step,
                )  # fmt: skip
                schedule.record_expansion(step)
                record({"event": "expansion", "step": step, "live": live_now(), **done})
            if own_optimizer:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, total)
            model.train()
            optimizer.zero_grad(set_to_none=True)
            with autocast(config, inputs.device.type):
                value = loss(model(inputs), targets)
            value.backward()
            if config.clip:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.record_loss(float(value.detach()))
            loss_sum += float(value.detach())
            step += 1
        record({"event": "epoch", "epoch": epoch + 1, "loss": loss_sum / steps_per_epoch, "live": live_now()})
    if own_optimizer:
        for _, layer in layers:
            layer.unpack_()
    return log


def _scoring(recent: list[tuple[Tensor, Tensor]], loss: Callable) -> Callable[[nn.Module, int], None]:
    def backward(model: nn.Module, which: int) -> None:
        inputs, targets = recent[which % len(recent)]
        loss(model(inputs), targets).backward()

    return backward


def _check_meaning(given: dict[str, Any]) -> None:
    groups = {option.name: option.metadata["group"] for option in all_options()}
    for name in given:
        if name not in BESIDE and (groups[name] not in ("search", "training") or name in NOT_HERE):
            raise ValueError(f"grow: option {name!r} has no meaning for a model, loader and loss of one's own")


def _thin_out(model: nn.Module, live: int, config: Config) -> None:
    """Keep ``live`` parameters at random where more are live: every row keeps an input, shares by ``layer_counts``."""
    excess = live_parameters(model, count_norm=config.count_norm) - live
    if excess <= 0:
        return
    layers = dict(masked_layers(model))
    weights = sum(layer.nnz for layer in layers.values()) - excess
    shapes = {name: tuple(layer.pattern.shape) for name, layer in layers.items()}
    least = {name: shape[0] for name, shape in shapes.items()}
    if weights < sum(least.values()):
        raise ValueError(
            f"grow: {live} live parameters are too few for {sum(least.values())} rows with an input each and "
            "their biases; raise budget or base"
        )
    generator = generator_for(config.seed, "thinning out")
    counts = layer_counts(shapes, weights, least)
    for name, layer in layers.items():
        layer.set_mask(_random_rows(layer.pattern, counts[name], generator))


def _random_rows(full: Pattern, count: int, generator: torch.Generator) -> Pattern:
    """``count`` positions, at least one in every row."""
    rows = full.shape[0]
    per_row = full.numel // rows
    first = torch.arange(rows) * per_row + torch.randint(per_row, (rows,), generator=generator)
    index = drawn_positions(full.numel, first, count, generator)
    return Pattern.from_index(full.shape, index, full.groups).to(full.device)
