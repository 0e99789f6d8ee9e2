"""The template network (PAPER 4.1): stages of conv + ReLU + BN between reductions, then linear layers.

Everything between two conv layers stays in the batch-last layout, where a stage's channels are one block of memory
(``ilnas.stage_memory``).
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from ilnas.stage_memory import Memory, append_norm, begin, pooled_to_grid, reduced
from ilnas.structure import Part, Structure, identity_name, layer_name, module_name
from ilnas_kernels import MaskedConv2d, MaskedLinear, Pattern

MaskedLayer = MaskedConv2d | MaskedLinear


class Block(nn.Module):
    """``BN(ReLU(conv(x)))``, with any number of further conv + ReLU (identity layers at first) before the BN."""

    def __init__(self, conv: MaskedConv2d, identities: list[MaskedConv2d]) -> None:
        super().__init__()
        self.conv = conv
        self.identities = nn.ModuleList(identities)
        self.norm = nn.BatchNorm2d(conv.out_channels)

    @property
    def layers(self) -> list[MaskedConv2d]:
        return [self.conv, *self.identities]

    def forward(self, seen: Tensor, memory: Memory) -> Tensor:
        """seen: all that stands in the stage's memory; returns the same and this block's output behind it."""
        x = self.conv(seen, memory.gradient)
        for layer in self.identities:
            x = layer(F.relu(x))
        # The normalisation runs in the memory's type, float32, under autocast too.
        return append_norm(seen, x.to(seen.dtype), self.norm, memory)


class HeadLayer(nn.Module):
    """A linear layer, with any number of further ReLU + linear (identity layers at first) behind it."""

    def __init__(self, linear: MaskedLinear, identities: list[MaskedLinear]) -> None:
        super().__init__()
        self.linear = linear
        self.identities = nn.ModuleList(identities)

    @property
    def layers(self) -> list[MaskedLinear]:
        return [self.linear, *self.identities]

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        for layer in self.identities:
            x = layer(F.relu(x))
        return x


class Stage(nn.Module):
    """Blocks at one resolution, each fed by the stage's input and all earlier blocks of the stage."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """x: the stage's input, which stands in its memory already; returns all channels of the stage."""
        for block in self.blocks:
            x = block(x, memory)
        return x


class Network(nn.Module):
    """A template network of the given structure; ``patterns`` names the live weights of every layer.

    All conv and linear layers are packed. Input: images [batch, channels, height, width] in any layout; output:
    logits [batch, classes].
    """

    def __init__(self, structure: Structure, patterns: dict[str, Pattern]) -> None:
        super().__init__()
        self.structure = structure
        blocks = {}
        for part, block in structure.blocks().items():
            kind = HeadLayer if part[0] == "hidden" else Block
            identities = [masked_layer(patterns[identity_name(part, i)]) for i in range(block.identities)]
            blocks[part] = kind(masked_layer(patterns[layer_name(part)]), identities)
        self.stages = nn.ModuleList(
            Stage([blocks["block", s, b] for b in range(len(stage))]) for s, stage in enumerate(structure.stages)
        )
        classes = HeadLayer(masked_layer(patterns[layer_name(("hidden", len(structure.hidden)))]), [])
        self.head = nn.ModuleList([*(blocks["hidden", i] for i in range(len(structure.hidden))), classes])

    def block(self, part: Part) -> "Block | HeadLayer":
        """The module of a group of nodes (a key of ``structure.blocks()``)."""
        return self.get_submodule(module_name(part))

    def forward(self, x: Tensor) -> Tensor:
        structure, (height, width) = self.structure, x.shape[2:]
        memory = Memory(x, sum(structure.stage_sizes(0)), height, width)
        x = self.stages[0](begin(x, memory), memory)
        for s, stage in enumerate(self.stages[1:], 1):
            after = Memory(x, sum(structure.stage_sizes(s)), height >> s, width >> s)
            x = stage(reduced(x, self._skipped(s - 1), structure.reduction, memory, after), after)
            memory = after
        x = pooled_to_grid(x, self._skipped(len(self.stages) - 1), structure.head_grid, memory)
        for layer in self.head[:-1]:
            x = F.relu(layer(x))
        return self.head[-1](x)

    def _skipped(self, stage: int) -> int:
        """How many of a stage's first channels are not passed on."""
        return sum(self.structure.stage_sizes(stage)) - self.structure.passed_on(stage)


def masked_layer(pattern: Pattern) -> MaskedLayer:
    """A packed layer with the pattern's live weights (values not yet set): linear, or a conv layer that keeps the
    image's size."""
    rows, inputs, *kernel = pattern.shape
    # By way of meta, so that no dense weight is ever allocated.
    if kernel:
        layer = MaskedConv2d(inputs, rows, kernel[0], padding=kernel[0] // 2, device="meta", mask=pattern)
    else:
        layer = MaskedLinear(inputs, rows, device="meta", mask=pattern)
    return layer.pack_().to_empty(device=pattern.device)


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """All masked layers with their names, in the order of the model's definition."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedConv2d | MaskedLinear):
            yield name, module


def live_bias(layer: MaskedLayer) -> int:
    """How many biases of a layer are live."""
    if layer.bias is None:
        return 0
    return layer.bias.numel() if layer.bias_mask is None else int(layer.bias_mask.sum())


def live_parameters(model: nn.Module, *, count_norm: bool = False) -> int:
    """What counts towards C: live weights and biases, and the normalisation's parameters if asked."""
    live = sum(layer.nnz + live_bias(layer) for _, layer in masked_layers(model))
    if count_norm:
        live += sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    return live
