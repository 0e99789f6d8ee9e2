"""The shape of a template network as plain numbers: what a checkpoint keeps, and what names every channel."""

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ilnas.config import Config


@dataclass
class Block:
    """One conv layer of a stage: ``width`` nodes; ``identities`` conv layers stand between its ReLU and its BN."""

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
    hidden: list[int] = field(default_factory=list)
    kernel_size: int = 3
    head_grid: int = 2
    stage_output: str = "all"
    reduction: str = "max"

    @classmethod
    def from_config(cls, config: Config, image_shape: tuple[int, int, int], classes: int) -> "Structure":
        structure = cls(
            tuple(image_shape), classes, [[Block(width) for width in stage] for stage in config.stage_widths],
            config.hidden_widths, config.kernel_size, config.head_grid, config.stage_output, config.reduction,
        )  # fmt: skip
        structure.check(config.max_channels, config.max_layers)
        return structure

    def check(self, max_channels: int, max_layers: int) -> None:
        """ValueError where a cap is broken or the image is too small for the reductions."""
        widest = max([block.width for stage in self.stages for block in stage] + self.hidden)
        if widest > max_channels:
            raise ValueError(f"--widths: a layer of {widest} nodes is over --max-channels {max_channels}")
        if self.conv_layers > max_layers:
            raise ValueError(f"--widths: {self.conv_layers} conv layers are over --max-layers {max_layers}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"--kernel-size must be odd (layers keep the image's size), got {self.kernel_size}")
        if min(self.resolution(len(self.stages) - 1)) < 1:
            raise ValueError(f"--widths: {len(self.stages)} stages halve {self.image_shape} to nothing; use fewer")

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

    def identity_shape(self, stage: int, block: int) -> tuple[int, int, int, int]:
        width = self.stages[stage][block].width
        return width, width, self.kernel_size, self.kernel_size

    def head_shapes(self) -> list[tuple[int, int]]:
        sizes = [self.passed_on(len(self.stages) - 1) * self.head_grid**2, *self.hidden, self.classes]
        return [(after, before) for before, after in pairwise(sizes)]

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shapes of all masked layers by the names that they have in the network, from input to output."""
        shapes: dict[str, tuple[int, ...]] = {}
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(stage):
                shapes[f"stages.{s}.blocks.{b}.conv"] = self.conv_shape(s, b)
                for i in range(block.identities):
                    shapes[f"stages.{s}.blocks.{b}.identities.{i}"] = self.identity_shape(s, b)
        return shapes | {f"head.{i}": shape for i, shape in enumerate(self.head_shapes())}

    def node_offsets(self) -> dict[tuple, tuple[int, int]]:
        """Every node has a number: (first number, count) of ("image",), ("block", stage, block) and ("hidden", i)."""
        offsets: dict[tuple, tuple[int, int]] = {}
        parts = [(("image",), self.image_shape[0])]
        for s, stage in enumerate(self.stages):
            parts += [(("block", s, b), block.width) for b, block in enumerate(stage)]
        parts += [(("hidden", i), width) for i, width in enumerate([*self.hidden, self.classes])]
        start = 0
        for part, count in parts:
            offsets[part] = (start, count)
            start += count
        return offsets

    def input_parts(self, layer: str) -> list[tuple]:
        """The groups of nodes that a layer reads, in the order of its input channels (keys of ``node_offsets``)."""
        kind, first, *rest = layer.split(".")
        if kind == "head":
            return [("hidden", int(first) - 1)] if int(first) else self._passed_parts(len(self.stages) - 1)
        stage, block = int(first), int(rest[1])
        return [("block", stage, block)] if rest[2] == "identities" else self._stage_parts(stage, block)

    def output_part(self, layer: str) -> tuple:
        """The group of nodes that a layer's rows are."""
        kind, first, *rest = layer.split(".")
        return ("hidden", int(first)) if kind == "head" else ("block", int(first), int(rest[1]))

    def cells(self, layer: str) -> int:
        """How many neighbouring input channels of a layer belong to one node: the head's grid cells, else 1."""
        return self.head_grid**2 if layer == "head.0" else 1

    def input_nodes(self, layer: str) -> Tensor:
        """The number of the node behind each input channel of a layer, int64 [inputs]."""
        offsets = self.node_offsets()
        numbers = [torch.arange(offsets[part][1]) + offsets[part][0] for part in self.input_parts(layer)]
        return torch.cat(numbers).repeat_interleave(self.cells(layer))

    def _stage_parts(self, stage: int, blocks: int) -> list[tuple]:
        incoming = self._passed_parts(stage - 1) if stage else [("image",)]
        return incoming + [("block", stage, b) for b in range(blocks)]

    def _passed_parts(self, stage: int) -> list[tuple]:
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
        return cls(**(state | {"stages": stages, "image_shape": tuple(state["image_shape"])}))

    def copy(self) -> "Structure":
        return Structure.from_dict(self.to_dict())
