"""Placeholder nodes and virtual identity layers: offered on the hyper-architecture, kept only if picked (PAPER 3.2)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ilnas.additions import add_identity, add_nodes, moved_inputs
from ilnas.config import Config
from ilnas.granularity import Pool
from ilnas.selection import Conditions
from ilnas.structure import Part, Structure, identity_name, output_part
from ilnas.template import Network, masked_layers
from ilnas_kernels import Pattern

NORM_PER_NODE = 2  # weight and bias


@dataclass
class Offers:
    """What is offered on one hyper-architecture.

    nodes: per block, each placeholder's live inputs (positions in its row, before the offer) and their values.
    layers: blocks that have a virtual identity layer; never a block with placeholders, so that each candidate hangs
    on one offer at most.
    """

    old: Structure
    nodes: dict[Part, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    layers: list[Part] = field(default_factory=list)


def draw_offers(network: Network, config: Config, generator: torch.Generator) -> Offers:
    """Blocks and fan-in drawn at random, within the caps on channels and conv layers."""
    structure = network.structure
    offers = Offers(structure.copy())
    blocks = structure.blocks()
    free = max(config.max_layers - structure.conv_layers, 0)
    for i in torch.randperm(len(blocks), generator=generator).tolist():
        part = list(blocks)[i]
        if len(offers.layers) < config.layers and (part[0] == "hidden" or free > 0):
            offers.layers.append(part)
            free -= part[0] != "hidden"
    offers.layers.sort(key=list(blocks).index)
    for part, block in blocks.items():
        room = min(config.nodes, config.max_channels - block.width)
        if part not in offers.layers and room > 0:
            layer = network.block(part).layers[0]
            offers.nodes[part] = [_fan_in(layer, config.fan_in, generator) for _ in range(room)]
    return offers


def offer(hyper: Network, offers: Offers) -> None:
    """Put the offers into a copy of the network; its function stays as it is."""
    add_nodes(hyper, offers.nodes)
    for part in offers.layers:
        add_identity(hyper, part)


def conditions_of(pool: Pool, hyper: Network, offers: Offers, *, count_norm: bool = False) -> tuple[Pool, Conditions]:
    """The candidates that can be added, each with the offer that it needs.

    A weight out of a placeholder needs the placeholder; a weight in a virtual layer needs the layer. Weights and
    biases into a placeholder are dropped: nothing flows out of it yet, so their gradient is 0. Where members of a group
    need different offers, the group is split.
    count_norm: a placeholder costs its normalisation as well.
    """
    numbers, cost = {}, []
    layers = dict(masked_layers(hyper))
    old = offers.old.blocks()
    for part, nodes in offers.nodes.items():
        for k, (position, _) in enumerate(nodes):
            numbers[part, k] = len(cost)
            norm = NORM_PER_NODE if count_norm and part[0] == "block" else 0
            cost.append(len(position) + old[part].identities + norm)
    for part in offers.layers:
        numbers[part] = len(cost)
        cost.append(old[part].width)
    needs = torch.full((len(pool),), -1)
    possible = torch.ones(len(pool), dtype=torch.bool)
    for name, (weights, biases) in pool.by_layer().items():
        inside = torch.cat([weights, biases])
        part = output_part(name)
        if _is_virtual(name, offers):
            needs[inside] = numbers[part]
            continue
        first_of_row = old[part].width if part in old else layers[name].pattern.shape[0]
        row_size = layers[name].pattern.numel // layers[name].pattern.shape[0]
        row = torch.cat([pool.index[weights] // row_size, pool.index[biases]])
        possible[inside] = row < first_of_row
        channel = pool.index[weights] % row_size // layers[name].pattern.taps
        needs[weights] = _needs_by_channel(name, hyper.structure, offers, numbers)[channel]
    pool, needs = pool.take(possible), needs[possible]
    pool.group = (pool.group * (len(cost) + 1) + needs + 1).unique(return_inverse=True)[1]
    return pool, Conditions(needs, cost)


def commit(
    network: Network, hyper: Network, offers: Offers, picked: set[int], pool: Pool,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[Pool, int, int]:  # fmt: skip
    """Add the picked nodes and layers to the network itself.

    Returns the pool with positions in the network, and how many nodes and layers were added.
    """
    number = 0
    kept: dict[Part, list[int]] = {}
    for part, nodes in offers.nodes.items():
        kept[part] = [k for k in range(len(nodes)) if number + k in picked]
        number += len(nodes)
    layers = [part for k, part in enumerate(offers.layers) if number + k in picked]
    add_nodes(network, {part: [offers.nodes[part][k] for k in ks] for part, ks in kept.items()}, optimizer)
    for part in layers:
        add_identity(network, part, optimizer)
    moved = pool.take(torch.arange(len(pool)))
    for name, (weights, _) in pool.by_layer().items():
        shape = hyper.structure.layer_shapes()[name]
        channels = _kept_channels(name, hyper.structure, network.structure, offers, kept)
        taps = math.prod(shape[2:])
        row, rest = pool.index[weights] // (shape[1] * taps), pool.index[weights] % (shape[1] * taps)
        width = network.structure.layer_shapes()[name][1]
        moved.index[weights] = (row * width + channels[rest // taps]) * taps + rest % taps
    return moved, sum(len(ks) for ks in kept.values()), len(layers)


def moved_patterns(removed: dict[str, Tensor], hyper: Network, offers: Offers) -> dict[str, Pattern]:
    """Positions in the network before the offer as patterns of the hyper-architecture's layers."""
    before, after = offers.old.layer_shapes(), hyper.structure.layer_shapes()
    patterns = {}
    for name, index in removed.items():
        taps = math.prod(after[name][2:])
        row, rest = index // (before[name][1] * taps), index % (before[name][1] * taps)
        channel = moved_inputs(offers.old, hyper.structure, name)[rest // taps]
        patterns[name] = Pattern.from_index(after[name], (row * after[name][1] + channel) * taps + rest % taps)
    return patterns


def _fan_in(layer, wanted: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random sparse row: ``wanted`` inputs, 0 for as many as the layer's nodes have on average; He's values."""
    row_size = layer.pattern.numel // layer.pattern.shape[0]
    count = min(wanted or max(1, round(layer.nnz / layer.pattern.shape[0])), row_size)
    position = torch.randperm(row_size, generator=generator)[:count].sort().values
    return position, torch.randn(count, generator=generator) * (2 / count) ** 0.5


def _is_virtual(name: str, offers: Offers) -> bool:
    """Whether this is the virtual layer of a block."""
    part = output_part(name)
    return part in offers.layers and name == identity_name(part, offers.old.blocks()[part].identities)


def _needs_by_channel(name: str, structure: Structure, offers: Offers, numbers: dict[tuple, int]) -> Tensor:
    """For each input channel of a layer the number of the placeholder it comes from, -1 for a node that exists."""
    sizes = structure.node_offsets()
    needs = []
    for part in structure.input_parts(name):
        column = torch.full((sizes[part][1],), -1)
        if part in offers.nodes:
            first = offers.old.blocks()[part].width
            column[first:] = torch.tensor([numbers[part, k] for k in range(len(offers.nodes[part]))])
        needs.append(column)
    return torch.cat(needs).repeat_interleave(structure.cells(name))


def _kept_channels(name: str, hyper: Structure, real: Structure, offers: Offers, kept: dict[Part, list[int]]) -> Tensor:
    """Where each input channel of the hyper-architecture's layer is in the network; -1 for dropped placeholders."""
    before, after, cells = hyper.node_offsets(), real.node_offsets(), hyper.cells(name)
    places, start = [], 0
    for part in hyper.input_parts(name):
        place = torch.arange(before[part][1])
        if part in kept:
            first = offers.old.blocks()[part].width
            place[first:] = -1
            place[[first + k for k in kept[part]]] = torch.arange(len(kept[part])) + first
        spread = place[:, None] * cells + torch.arange(cells)
        places.append(torch.where(place[:, None] < 0, -1, spread + start).flatten())
        start += after[part][1] * cells
    return torch.cat(places)
