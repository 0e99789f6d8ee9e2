"""A searched network as a plain dense PyTorch module: what is not needed for the output is squeezed out."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilnas.checkpoint import RunFolder, network_from_state
from ilnas.structure import Part, Structure, identity_name, layer_name
from ilnas.template import MaskedLayer, Network, live_parameters

Kept = dict[Part, Tensor]
"""By group of nodes which of them stay, bool; (*part, i) for the nodes behind the i-th layer of a block in which
identity layers follow."""


class PlainBlock(nn.Module):
    """Conv + ReLU, once or more, then BN."""

    def __init__(self, convs: list[nn.Conv2d], norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.norm(x)


class PlainNetwork(nn.Module):
    """The network's function with torch's own layers only; can be traced, exported and read by anyone."""

    def __init__(
        self, stages: list[list[PlainBlock]], head: list[nn.Linear], grid: int, output: str, reduction: str
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.head = nn.ModuleList(head)
        self.grid, self.output, self.reduction = grid, output, reduction

    def forward(self, x: Tensor) -> Tensor:
        for s, blocks in enumerate(self.stages):
            if s:
                x = F.max_pool2d(x, 2) if self.reduction == "max" else F.avg_pool2d(x, 2)
            for block in blocks:
                out = block(x)
                x = torch.cat([x, out], 1)
            if self.output == "last":
                x = out
        x = F.adaptive_avg_pool2d(x, self.grid).flatten(1)
        for layer in self.head[:-1]:
            x = F.relu(layer(x))
        return self.head[-1](x)


def to_plain(network: Network, *, squeeze: bool = True) -> PlainNetwork:
    """A dense module with the same outputs up to rounding, in eval mode.

    squeeze: leave out every node from which no live weight leads to the output. (A node without inputs but with an
    output is a constant that the zero padding of the next layer makes different at the border: it stays.) Image
    channels stay, and each layer keeps at least one node.
    """
    structure = network.structure
    kept = needed_nodes(network) if squeeze else {}
    stages: list[list[PlainBlock]] = [[] for _ in structure.stages]
    for s, stage in enumerate(network.stages):
        for b, block in enumerate(stage.blocks):
            part = ("block", s, b)
            norm = _plain_norm(block.norm, kept.get(part, torch.ones(block.conv.out_channels).bool()))
            stages[s].append(PlainBlock(_plain_layers(network, part, kept), norm))
    head = [layer for i in range(len(network.head)) for layer in _plain_layers(network, ("hidden", i), kept)]
    plain = PlainNetwork(stages, head, structure.head_grid, structure.stage_output, structure.reduction)
    return plain.eval()


def needed_nodes(network: Network) -> Kept:
    """Which nodes the output depends on, found from the output backwards."""
    structure = network.structure
    kept: Kept = {part: torch.zeros(count).bool() for part, (_, count) in structure.node_offsets().items()}
    kept["image",].fill_(True)
    kept["hidden", len(network.head) - 1].fill_(True)
    for name, layer, rows_part, inputs_part in _layers_backwards(network):
        rows = kept[rows_part]
        if not rows.any():
            rows[0] = True
        matrix = layer.mask.flatten(2).any(2) if layer.mask.dim() == 4 else layer.mask
        used = matrix[rows].any(0)
        if inputs_part is not None:
            kept[inputs_part] = used
            continue
        start, cells = 0, structure.cells(name)
        for part in structure.input_parts(name):
            count = len(kept[part])
            kept[part] |= used[start : start + count * cells].view(count, cells).any(1)
            start += count * cells
    return kept


def _layers_backwards(network: Network) -> Iterator[tuple[str, MaskedLayer, Part, Part | None]]:
    """(name, layer, its nodes, the nodes inside its block that it reads, or None where it reads whole groups)."""
    for part in reversed([*network.structure.blocks(), ("hidden", len(network.head) - 1)]):
        nodes = part
        first, *identities = network.block(part).layers
        for i in reversed(range(len(identities))):
            yield identity_name(part, i), identities[i], nodes, (*part, i)
            nodes = (*part, i)
        yield layer_name(part), first, nodes, None


def _input_mask(structure: Structure, layer: str, kept: Kept) -> Tensor:
    """Which input channels of a layer stay: all that its groups of nodes keep, whether this layer reads them or not."""
    offsets = structure.node_offsets()
    masks = [kept.get(part, torch.ones(offsets[part][1]).bool()) for part in structure.input_parts(layer)]
    return torch.cat(masks).repeat_interleave(structure.cells(layer))


def _plain_layers(network: Network, part: Part, kept: Kept) -> list[nn.Module]:
    """The layers of one group of nodes."""
    inputs = _input_mask(network.structure, layer_name(part), kept)
    layers, made = network.block(part).layers, []
    for i, layer in enumerate(layers):
        nodes = part if i + 1 == len(layers) else (*part, i)
        rows = kept.get(nodes, torch.ones(len(layer.bias)).bool())
        made.append(_plain_layer(layer, rows, inputs))
        inputs = rows
    return made


def _plain_layer(layer: MaskedLayer, rows: Tensor, inputs: Tensor) -> nn.Module:
    dense = layer.to_dense()
    sizes = int(inputs.sum()), int(rows.sum())
    if isinstance(dense, nn.Conv2d):
        plain: nn.Module = nn.Conv2d(*sizes, layer.kernel_size, padding=layer.padding)
    else:
        plain = nn.Linear(*sizes)
    with torch.no_grad():
        plain.weight.copy_(dense.weight[rows][:, inputs])
        plain.bias.copy_(dense.bias[rows])
    return plain


def _plain_norm(norm: nn.BatchNorm2d, nodes: Tensor) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(int(nodes.sum()), norm.eps, norm.momentum)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(plain, name).copy_(getattr(norm, name)[nodes])
    return plain


def export_run(run: RunFolder, folder: Path, *, onnx: bool = False) -> list[str]:
    """Write ``network.pt2`` (torch.export, any batch size) and ``network.onnx``; returns what to tell the user."""
    if onnx and any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise ValueError("--onnx needs the extra: pip install 'ilnas[onnx]'")
    network = network_from_state(run.load()["network"]).eval()
    plain = to_plain(network)
    example = torch.zeros(2, *network.structure.image_shape)
    batch = {0: torch.export.Dim("batch", min=1)}
    folder.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(plain, (example,), dynamic_shapes=(batch,))
    torch.export.save(program, folder / "network.pt2")
    written = [folder / "network.pt2"]
    if onnx:
        torch.onnx.export(
            plain, (example,), folder / "network.onnx", dynamo=True, dynamic_shapes=(batch,), external_data=False,
            input_names=["images"], output_names=["logits"], verbose=False,
        )  # fmt: skip
        written.append(folder / "network.onnx")
    whole, squeezed = (sum(p.numel() for p in to_plain(network, squeeze=s).parameters()) for s in (False, True))
    lines = [
        f"live weights and biases {live_parameters(network):,}; as a dense module {whole:,} parameters, "
        f"{squeezed:,} when nodes that the output does not need are left out"
    ]
    return lines + [f"{path}  {path.stat().st_size:,} bytes" for path in written]
