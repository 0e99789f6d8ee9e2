"""The alternation of algorithm 1: phase I trains the weights, phase II changes the architecture."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilnas import base
from ilnas.allocator import release_memory
from ilnas.checkpoint import (
    RunFolder,
    load_optimizer_state,
    network_from_state,
    network_state,
    optimizer_state,
)
from ilnas.config import Config
from ilnas.data import FLIPPED, Batches, Dataset, Images
from ilnas.evolve import architecture_step
from ilnas.measure import layer_costs, network_density, network_macs
from ilnas.randomness import generator_for
from ilnas.schedule import ArchitectureSchedule, learning_rate
from ilnas.structure import Structure
from ilnas.template import Network, live_parameters


@dataclass(frozen=True)
class Result:
    """The end of a run; accuracies in [0, 1], macs per image; training_macs of all forward passes of training
    and scoring; seconds of training in all its parts."""

    test_accuracy: float
    validation_accuracy: float | None
    live: int
    density: float
    macs: int
    training_macs: int
    seconds: float


class Interrupted(Exception):
    """The run was asked to stop; everything up to here is in its last checkpoint."""


class Trainer:
    """One search. ``progress`` is called after every step with (step, total, a few words)."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        run: RunFolder | None = None,
        *,
        state: dict[str, Any] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """state: a checkpoint's content to go on from."""
        self.config, self.dataset, self.run = config, dataset, run
        self.progress, self.on_event = progress, on_event
        self.batches = training_batches(config, dataset)
        self.total_steps = config.epochs * self.batches.per_epoch
        self.step = 0
        self.loss_sum, self.correct, self.seen, self.training_macs = 0.0, 0, 0, 0
        self.earlier_seconds, self.started = 0.0, time.monotonic()
        self.stop_requested = False
        self.network = network_from_state(state["network"]) if state else starting_network(config, dataset)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        start = live_parameters(self.network, count_norm=config.count_norm)
        first_live = state["schedule"]["base"] if state else start
        self.schedule = ArchitectureSchedule(config, first_live, self.total_steps, self.batches.per_epoch)
        if state:
            self._restore(state)
        else:
            self._log_start()

    def train(self) -> Result:
        """Run to the end. Raises Interrupted, after a checkpoint, when ``stop_requested`` was set."""
        if not self.total_steps:
            self.save()
        checkpoint_steps = max(1, round(self.config.checkpoint_every * self.batches.per_epoch))
        while self.step < self.total_steps:
            self._maybe_change_architecture()
            self.train_step()
            self.step += 1
            if self.step % self.batches.per_epoch == 0:
                self._end_epoch()
            if self.stop_requested or self.step % checkpoint_steps == 0 or self.step == self.total_steps:
                self.save()
            if self.stop_requested:
                raise Interrupted
        return self._finish()

    def train_step(self) -> None:
        """One step of SGD on the batch of the current step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total_steps)
        images, labels = self.batches.batch(self.step)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config):
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        loss.backward()
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        value = loss.item()
        self.loss_sum += value * len(labels)
        self.correct += int((logits.argmax(1) == labels).sum())
        self.seen += len(labels)
        self.training_macs += self.macs * len(labels)
        self.schedule.record_loss(value)
        if self.progress:
            self.progress(self.step + 1, self.total_steps, f"loss {value:.3f} live {self.live}")

    @property
    def live(self) -> int:
        return live_parameters(self.network, count_norm=self.config.count_norm)

    @property
    def macs(self) -> int:
        return network_macs(self.network)

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def save(self) -> None:
        """Write a checkpoint, if the run has a folder."""
        if self.run is None:
            return
        self.run.save(
            {
                "network": network_state(self.network),
                "optimizer": optimizer_state(self.network, self.optimizer),
                "schedule": self.schedule.state_dict(),
                "step": self.step,
                "epoch_sums": [self.loss_sum, self.correct, self.seen],
                "training_macs": self.training_macs,
                "log_size": self.run.log_size(),
                "seconds": self.seconds,
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        load_optimizer_state(self.network, self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        self.loss_sum, self.correct, self.seen = state["epoch_sums"]
        self.training_macs, self.earlier_seconds = state["training_macs"], state["seconds"]
        if self.run is not None:
            self.run.cut_log(state["log_size"])

    def _maybe_change_architecture(self) -> None:
        live = self.live
        target = self.schedule.due(self.step, live)
        if target is None:
            return
        began = time.monotonic()
        report = architecture_step(
            self.network, self.optimizer, self.config, self.batches, self.step, target,
            moved=self.schedule.moved(self.step, live), lr=learning_rate(self.config, self.step, self.total_steps),
            progress=self.schedule.progress(self.step),
        )  # fmt: skip
        self.schedule.record_expansion(self.step)
        release_memory()
        self.training_macs += report["scoring_macs"]
        self._log(
            "expansion", step=self.step, epoch=self.step / self.batches.per_epoch, live_before=live,
            live=self.live, target=target, **report, took=time.monotonic() - began,
        )  # fmt: skip

    def _end_epoch(self) -> None:
        epoch = self.step // self.batches.per_epoch
        entry = {
            "epoch": epoch, "step": self.step, "loss": self.loss_sum / self.seen,
            "train_accuracy": self.correct / self.seen, "live": self.live, "density": network_density(self.network),
            "lr": learning_rate(self.config, self.step - 1, self.total_steps), "macs": self.macs,
            "training_macs": self.training_macs,
            "layers": {cost.name: [cost.live, cost.size] for cost in layer_costs(self.network)},
        }  # fmt: skip
        self.loss_sum, self.correct, self.seen = 0.0, 0, 0
        last = self.step == self.total_steps
        if len(self.dataset.validation) and (epoch % self.config.test_every == 0 or last):
            loss, accuracy = evaluate(self.network, self.dataset.validation, self.dataset, self.config)
            entry |= {"validation_loss": loss, "validation_accuracy": accuracy}
        self._log("epoch", **entry, seconds=self.seconds)

    def _finish(self) -> Result:
        """Look at the test part: once, when nothing is left to be chosen."""
        _, test = evaluate(self.network, self.dataset.test, self.dataset, self.config)
        validation = None
        if len(self.dataset.validation):
            _, validation = evaluate(self.network, self.dataset.validation, self.dataset, self.config)
        result = Result(
            test, validation, self.live, network_density(self.network), self.macs, self.training_macs, self.seconds
        )
        self._log("result", step=self.step, **vars(result))
        return result

    def _log_start(self) -> None:
        self._log(
            "start", step=0, live=self.live, dense=self.network.structure.dense_parameters(),
            budget=self.config.budget, total_steps=self.total_steps, steps_per_epoch=self.batches.per_epoch,
            planned_expansions=len(self.schedule.planned),
            layers={cost.name: [cost.live, cost.size] for cost in layer_costs(self.network)},
        )  # fmt: skip

    def _log(self, event: str, **entry: Any) -> None:
        entry = {"event": event} | entry
        if self.run is not None:
            self.run.log(**entry)
        if self.on_event:
            self.on_event(entry)


def starting_network(config: Config, dataset: Dataset) -> Network:
    """The network that the method starts from: sparse at the base or at the budget, or dense."""
    structure = Structure.from_config(config, dataset.image_shape, dataset.classes)
    generator = generator_for(config.seed, "base network")
    norm = 2 * sum(b.width for stage in structure.stages for b in stage) if config.count_norm else 0
    if config.method == "dense":
        return base.dense_network(base.narrowed(structure, config.budget), generator)
    if config.method == "prune":
        return base.dense_network(structure, generator)
    share = config.base if config.method in ("ilnas", "random") else 1.0
    return base.random_network(structure, math.floor(share * config.budget) - norm, generator)


def training_batches(config: Config, dataset: Dataset) -> Batches:
    """Batches of the training part with the augmentation that the options name."""
    crop = config.crop if config.crop >= 0 else dataset.image_shape[-1] // 8
    flip = bool(config.flip) if config.flip >= 0 else dataset.name in FLIPPED
    return Batches(dataset.train, dataset, config.batch_size, seed=config.seed, crop=crop, flip=flip)


def autocast(config: Config, device: str = "cpu"):
    """The context in which the forward pass runs on a kind of device."""
    if not config.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=getattr(torch, config.autocast))


@torch.inference_mode()
def evaluate(model: nn.Module, part: Images, dataset: Dataset, config: Config) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in eval mode."""
    release_memory()
    model.eval()
    loss, correct = 0.0, 0
    for images, labels in Batches(part, dataset, max(config.batch_size, 256)).in_order():
        with autocast(config):
            logits: Tensor = model(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
    release_memory()
    return loss / max(len(part), 1), correct / max(len(part), 1)
