"""A run's folder: its configuration, its log, and checkpoints that are whole or not there at all."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ilnas.config import Config, make_config, read_toml, to_toml
from ilnas.structure import Structure
from ilnas.template import Network, masked_layers
from ilnas_kernels import Pattern

FORMAT = 2


class RunError(Exception):
    """A run folder that cannot be used: the message says which, why, and what to do."""


class RunFolder:
    """``config.toml``, ``log.jsonl`` and ``checkpoint.pt`` in one folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint_path = self.path / "checkpoint.pt"
        self.log_path = self.path / "log.jsonl"
        self.config_path = self.path / "config.toml"

    @classmethod
    def create(cls, path: str | Path, config: Config) -> "RunFolder":
        """A new run in a folder that holds none yet. RunError where one is there or the folder cannot be written."""
        run = cls(path)
        if run.config_path.exists():
            raise RunError(f"{path} holds a run already; continue it with --resume, or name another folder with --run")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run.config_path.write_text(to_toml(config))
            run.log_path.write_text("")
        except OSError as error:
            raise RunError(f"cannot write the run folder {path}: {error.strerror or error}") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The run in a folder. RunError where there is none."""
        run = cls(path)
        if not run.config_path.is_file():
            raise RunError(f"{path} holds no run (there is no config.toml); start one with: ilnas search --run {path}")
        return run

    def config(self) -> Config:
        return make_config(read_toml(self.config_path))

    def log(self, **entry: Any) -> None:
        """Append one line to the log."""
        try:
            with self.log_path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise RunError(self._lost("the log", error)) from error

    def log_size(self) -> int:
        try:
            return self.log_path.stat().st_size
        except OSError as error:
            raise RunError(self._lost("the log", error)) from error

    def cut_log(self, size: int) -> None:
        """Drop what was logged after the checkpoint that a run is resumed from: it will be logged again."""
        try:
            with self.log_path.open("r+b") as file:
                file.truncate(size)
        except OSError as error:
            raise RunError(self._lost("the log", error)) from error

    def read_log(self) -> list[dict[str, Any]]:
        """The log's whole lines: a run that was killed while writing one leaves a part of it."""
        if not self.log_path.is_file():
            return []
        whole, _, _ = self.log_path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint in one move, when the new one is wholly on the disk."""
        unfinished = self.path / "checkpoint.unfinished"
        try:
            with unfinished.open("wb") as file:
                torch.save(state | {"format": FORMAT}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.checkpoint_path)
            self._sync_folder()
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
            raise RunError(self._lost("a checkpoint", error)) from error

    def load(self) -> dict[str, Any]:
        """The last checkpoint. RunError where there is none or it cannot be read."""
        if not self.checkpoint_path.is_file():
            raise RunError(f"{self.path} holds no checkpoint yet")
        try:
            state = torch.load(self.checkpoint_path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(f"{self.checkpoint_path} cannot be read: {error}") from error
        if state.get("format") != FORMAT:
            raise RunError(f"{self.checkpoint_path} has format {state.get('format')}; this version reads {FORMAT}")
        return state

    def _sync_folder(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # so that the new name itself survives a power cut
        finally:
            os.close(descriptor)

    def _lost(self, what: str, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = (
            f"the last good checkpoint is {self.checkpoint_path}"
            if self.checkpoint_path.is_file()
            else ("there is no checkpoint of this run")
        )
        return f"cannot write {what} in {self.path}: {reason}; {kept}"


def network_state(network: Network) -> dict[str, Any]:
    """A network as plain values and tensors: its structure, live positions and values, and everything else by name."""
    layers = {}
    for name, layer in masked_layers(network):
        layers[name] = {
            "index": layer.pattern.index,
            "values": layer.values.detach(),
            "bias": layer.bias.detach(),
            "bias_mask": layer.bias_mask,
        }
    norms = {name: dict(norm.state_dict()) for name, norm in _norms(network)}
    return {"structure": network.structure.to_dict(), "layers": layers, "norms": norms}


def network_from_state(state: dict[str, Any]) -> Network:
    """The network that ``network_state`` described."""
    structure = Structure.from_dict(state["structure"])
    shapes = structure.layer_shapes()
    patterns = {name: Pattern.from_index(shape, state["layers"][name]["index"]) for name, shape in shapes.items()}
    network = Network(structure, patterns)
    with torch.no_grad():
        for name, layer in masked_layers(network):
            saved = state["layers"][name]
            layer.values.copy_(saved["values"])
            if saved["bias_mask"] is not None:
                layer.set_bias_mask(saved["bias_mask"])
            layer.bias.copy_(saved["bias"])
    for name, norm in _norms(network):
        norm.load_state_dict(state["norms"][name])
    return network


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimiser's state by parameter name: the order of its parameters changes as the network grows."""
    return {name: dict(optimizer.state[p]) for name, p in network.named_parameters() if p in optimizer.state}


def load_optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict]) -> None:
    for name, parameter in network.named_parameters():
        if name in state:
            optimizer.state[parameter] = dict(state[name])


def _norms(network: Network):
    return [(name, m) for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
