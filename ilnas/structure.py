"""The shape of a template network as plain numbers: what a checkpoint keeps, and what names every channel."""

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ilnas.config import Config

Part = tuple
"""A group of nodes: ("image",), ("block", stage, block), ("hidden", i), where the last hidden part is the classes."""


@dataclass
class Block:
    """One conv layer of a stage or hidden linear layer of the head: ``width`` nodes; ``identities`` layers of its kind
    stand behind its ReLU, in a stage before its BN."""

    width: int
    identities: int = 0


@dataclass
class Structure:
    """A template network (PAPER 4.1): stages of blocks, 2x2 reductions between them, a head of linear layers.

    Block b of a stage reads the stage's input and blocks 0 .. b-1 of the stage, concatenated in that order.
    """

    image_shape: tuple[int, int, int]
    classes: int
    stages: list[list[Block]]
    hidden: list[Block] = field(default_factory=list)
    kernel_size: int = 3
    head_grid: int = 2
    stage_output: str = "all"
    reduction: str = "max"

    @classmethod
    def from_config(cls, config: Config, image_shape: tuple[int, int, int], classes: int) -> "Structure":
        stages = [[Block(width) for width in stage] for stage in config.stage_widths]
        hidden = [Block(width) for width in config.hidden_widths]
        structure = cls(
            tuple(image_shape), classes, stages, hidden, config.kernel_size, config.head_grid, config.stage_output,
            config.reduction,
        )  # fmt: skip
        structure.check(config.max_channels, config.max_layers)
        return structure

    def check(self, max_channels: int, max_layers: int) -> None:
        """ValueError where a cap is broken or the image is too small for the reductions."""
        widest = max(block.width for block in self.blocks().values())
        if widest > max_channels:
            raise ValueError(f"--widths: a layer of {widest} nodes is over --max-channels {max_channels}")
        if self.conv_layers > max_layers:
            raise ValueError(f"--widths: {self.conv_layers} conv layers are over --max-layers {max_layers}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"--kernel-size must be odd (layers keep the image's size), got {self.kernel_size}")
        if min(self.resolution(len(self.stages) - 1)) < 1:
            raise ValueError(f"--widths: {len(self.stages)} stages halve {self.image_shape} to nothing; use fewer")

    def blocks(self) -> dict[Part, Block]:
        """What can gain nodes and identity layers, from input to output: all but the image and the classes."""
        found: dict[Part, Block] = {}
        for s, stage in enumerate(self.stages):
            found |= {("block", s, b): block for b, block in enumerate(stage)}
        return found | {("hidden", i): block for i, block in enumerate(self.hidden)}

    @property
    def conv_layers(self) -> int:
        return sum(1 + block.identities for stage in self.stages for block in stage)

    def resolution(self, stage: int) -> tuple[int, int]:
        """Height and width of the images in a stage."""
        return self.image_shape[1] >> stage, self.image_shape[2] >> stage

    def stage_sizes(self, stage: int) -> list[int]:
        """Channels of each part of a stage: its input, then each block."""
        incoming = self.image_shape[0] if stage == 0 else self.passed_on(stage - 1)
        return [incoming, *(block.width for block in self.stages[stage])]

    def passed_on(self, stage: int) -> int:
        """Channels that a stage hands to the next stage or to the head."""
        if self.stage_output == "last":
            return self.stages[stage][-1].width
        return sum(self.stage_sizes(stage))

    def conv_shape(self, stage: int, block: int) -> tuple[int, int, int, int]:
        """Shape of the weight of a block's first conv layer."""
        sizes = self.stage_sizes(stage)
        return sizes[block + 1], sum(sizes[: block + 1]), self.kernel_size, self.kernel_size

    def identity_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of the weight of an identity layer behind a block."""
        width = self.blocks()[part].width
        return (width, width) if part[0] == "hidden" else (width, width, self.kernel_size, self.kernel_size)

    def head_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the head's linear layers, identity layers left out."""
        inputs = self.passed_on(len(self.stages) - 1) * self.head_grid**2
        sizes = [inputs, *(block.width for block in self.hidden), self.classes]
        return [(after, before) for before, after in pairwise(sizes)]

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shapes of all masked layers by the names that they have in the network, from input to output."""
        head = self.head_shapes()
        shapes: dict[str, tuple[int, ...]] = {}
        for part, block in self.blocks().items():
            shapes[layer_name(part)] = head[part[1]] if part[0] == "hidden" else self.conv_shape(*part[1:])
            for i in range(block.identities):
                shapes[identity_name(part, i)] = self.identity_shape(part)
        return shapes | {layer_name(("hidden", len(self.hidden))): head[-1]}

    def node_offsets(self) -> dict[Part, tuple[int, int]]:
        """Every node has a number: the first one and the count of each group, from input to output."""
        offsets: dict[Part, tuple[int, int]] = {}
        counts = {("image",): self.image_shape[0]} | {part: block.width for part, block in self.blocks().items()}
        start = 0
        for part, count in (counts | {("hidden", len(self.hidden)): self.classes}).items():
            offsets[part] = (start, count)
            start += count
        return offsets

    def input_parts(self, layer: str) -> list[Part]:
        """The groups of nodes that a layer reads, in the order of its input channels."""
        part = output_part(layer)
        if is_identity(layer):
            return [part]
        if part[0] == "block":
            return self._stage_parts(*part[1:])
        return [("hidden", part[1] - 1)] if part[1] else self._passed_parts(len(self.stages) - 1)

    def cells(self, layer: str) -> int:
        """How many neighbouring input channels of a layer belong to one node: the head's grid cells, else 1."""
        return self.head_grid**2 if layer == layer_name(("hidden", 0)) else 1

    def input_nodes(self, layer: str) -> Tensor:
        """The number of the node behind each input channel of a layer, int64 [inputs]."""
        offsets = self.node_offsets()
        numbers = [torch.arange(offsets[part][1]) + offsets[part][0] for part in self.input_parts(layer)]
        return torch.cat(numbers).repeat_interleave(self.cells(layer))

    def _stage_parts(self, stage: int, blocks: int) -> list[Part]:
        incoming = self._passed_parts(stage - 1) if stage else [("image",)]
        return incoming + [("block", stage, b) for b in range(blocks)]

    def _passed_parts(self, stage: int) -> list[Part]:
        last = len(self.stages[stage]) - 1
        return [("block", stage, last)] if self.stage_output == "last" else self._stage_parts(stage, last + 1)

    def dense_parameters(self) -> int:
        """Weights and biases if all were live."""
        return sum(math.prod(shape) + shape[0] for shape in self.layer_shapes().values())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"image_shape": list(self.image_shape)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Structure":
        stages = [[Block(**block) for block in stage] for stage in state["stages"]]
        hidden = [Block(**block) for block in state["hidden"]]
        return cls(**(state | {"stages": stages, "hidden": hidden, "image_shape": tuple(state["image_shape"])}))

    def copy(self) -> "Structure":
        return Structure.from_dict(self.to_dict())


def module_name(part: Part) -> str:
    """The name that a group of nodes has in the network: "stages.0.blocks.1", "head.0"."""
    return f"head.{part[1]}" if part[0] == "hidden" else f"stages.{part[1]}.blocks.{part[2]}"


def layer_name(part: Part) -> str:
    """The name of a group's own layer."""
    return f"{module_name(part)}.{'linear' if part[0] == 'hidden' else 'conv'}"


def identity_name(part: Part, number: int) -> str:
    """The name of a group's identity layer."""
    return f"{module_name(part)}.identities.{number}"


def output_part(layer: str) -> Part:
    """The group of nodes that a layer's rows are."""
    kind, first, *rest = layer.split(".")
    return ("hidden", int(first)) if kind == "head" else ("block", int(first), int(rest[1]))


def is_identity(layer: str) -> bool:
    """Whether a layer of this name came as an identity layer."""
    return layer.split(".")[-2] == "identities"
