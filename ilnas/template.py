"""The template network (PAPER 4.1): stages of conv + ReLU + BN between reductions, then linear layers.

Everything between two conv layers stays in the batch-last layout, where a stage's channels are one block of memory:
each layer writes its output behind those of the earlier layers and reads all that stands before it, so nothing is
concatenated.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilnas.structure import Part, Structure, identity_name, layer_name, module_name
from ilnas_kernels import MaskedConv2d, MaskedLinear, Pattern, to_batch_last

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

    def forward(self, seen: Tensor, memory: Tensor) -> Tensor:
        """seen: all that stands in the stage's memory; returns the same and this block's output behind it."""
        x = self.conv(seen)
        for layer in self.identities:
            x = layer(F.relu(x))
        norm = self.norm  # runs in the memory's type, float32, under autocast too
        if self.training:
            norm.num_batches_tracked.add_(1)
        return _NormAppend.apply(
            seen, x.to(memory.dtype), norm.weight, norm.bias, norm.running_mean, norm.running_var, self.training,
            norm.momentum, norm.eps, memory,
        )  # fmt: skip


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

    def __init__(self, blocks: list[Block], output: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, channels, height, width], batch-last. Returns all channels of the stage or the last block's."""
        batch, channels, height, width = x.shape
        widths = [block.conv.out_channels for block in self.blocks]
        memory = x.new_empty(channels + sum(widths), height, width, batch)
        seen = _Begin.apply(x, memory)
        for block in self.blocks:
            seen = block(seen, memory)
        return seen if self.output == "all" else seen[:, -widths[-1] :]


class _Begin(torch.autograd.Function):
    """Copy a stage's input to the beginning of the stage's memory [channels, height, width, batch]."""

    @staticmethod
    def forward(ctx, x: Tensor, memory: Tensor) -> Tensor:
        beginning = memory.data[: x.shape[1]]
        beginning.copy_(x.permute(1, 2, 3, 0))
        return beginning.permute(3, 0, 1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _NormAppend(torch.autograd.Function):
    """Write ``BN(ReLU(x))`` behind ``seen`` in the stage's memory; return both as one tensor, nothing of it copied.

    x: [batch, channels, height, width], batch-last, overwritten by its ReLU: a conv layer's output, which no other
    backward needs. ``seen`` is the beginning of ``memory`` already. Every result is a view of that memory over channels
    that are never written again, so what autograd has saved stays valid; ``.data`` gives each view a version counter
    of its own, as the counter of shared memory would call every later write a change.
    """

    @staticmethod
    def forward(ctx, seen, x, weight, bias, running_mean, running_var, training, momentum, eps, memory):
        ctx.start, ctx.stop = seen.shape[1], seen.shape[1] + x.shape[1]
        ctx.training, ctx.eps = training, eps
        own = memory.data
        rectified = F.relu_(to_batch_last(x.data))
        flat = _flat(rectified)
        _, mean, inverse_std = torch.native_batch_norm(
            flat, weight, bias, running_mean, running_var, training, momentum, eps,
            out=(own[ctx.start : ctx.stop].view(flat.shape), flat.new_empty(0), flat.new_empty(0)),
        )  # fmt: skip
        ctx.save_for_backward(rectified, weight, running_mean, running_var, mean, inverse_std)
        return own[: ctx.stop].permute(3, 0, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        rectified, weight, running_mean, running_var, mean, inverse_std = ctx.saved_tensors
        flat = _flat(rectified)
        grad_flat = _flat(to_batch_last(grad[:, ctx.start :]))
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_flat, flat, weight, running_mean, running_var, mean, inverse_std, ctx.training, ctx.eps,
            [True, True, True],
        )  # fmt: skip
        grad_x = torch.ops.aten.threshold_backward.grad_input(grad_x, flat, 0, grad_input=grad_x)
        _, channels, height, width = rectified.shape
        grad_x = grad_x.view(channels, height, width, -1).permute(3, 0, 1, 2)
        return grad[:, : ctx.start], grad_x, grad_weight, grad_bias, *[None] * 6


def _flat(x: Tensor) -> Tensor:
    """A batch-last tensor as [1, channels, height * width * batch], which is how its memory lies."""
    return x.permute(1, 2, 3, 0).reshape(1, x.shape[1], -1)


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
            Stage([blocks["block", s, b] for b in range(len(stage))], structure.stage_output)
            for s, stage in enumerate(structure.stages)
        )
        classes = HeadLayer(masked_layer(patterns[layer_name(("hidden", len(structure.hidden)))]), [])
        self.head = nn.ModuleList([*(blocks["hidden", i] for i in range(len(structure.hidden))), classes])

    def block(self, part: Part) -> "Block | HeadLayer":
        """The module of a group of nodes (a key of ``structure.blocks()``)."""
        return self.get_submodule(module_name(part))

    def forward(self, x: Tensor) -> Tensor:
        x = to_batch_last(x)
        for s, stage in enumerate(self.stages):
            x = stage(x if s == 0 else reduced(x, self.structure.reduction))
        x = pooled_to_grid(x, self.structure.head_grid).flatten(1)
        for layer in self.head[:-1]:
            x = F.relu(layer(x))
        return self.head[-1](x)


def reduced(x: Tensor, kind: str) -> Tensor:
    """2x2 pooling, stride 2, of a batch-last tensor: pooling a channels_last tensor whose batch is our channels."""
    swapped = x.permute(1, 0, 2, 3)
    pooled = F.max_pool2d(swapped, 2) if kind == "max" else F.avg_pool2d(swapped, 2)
    return pooled.permute(1, 0, 2, 3)


def pooled_to_grid(x: Tensor, grid: int) -> Tensor:
    """Each channel averaged over ``grid`` x ``grid`` cells: [batch, channels, grid, grid], in the default layout."""
    return F.adaptive_avg_pool2d(x.permute(1, 0, 2, 3), grid).permute(1, 0, 2, 3).contiguous()


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
