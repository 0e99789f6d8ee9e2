"""Placeholder nodes and virtual identity layers: offered on the hyper-architecture, kept only if picked (PAPER 3.2)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ilnas.additions import BlockKey, add_identity, add_nodes, moved_inputs
from ilnas.config import Config
from ilnas.granularity import Pool
from ilnas.selection import Conditions
from ilnas.structure import Structure
from ilnas.template import Network, masked_layers
from ilnas_kernels import Pattern


@dataclass
class Offers:
    """What is offered on one hyper-architecture.

    nodes: per block, each placeholder's live inputs (positions in its row, before the offer) and their values.
    layers: blocks that have a virtual identity layer; never a block with placeholders, so that each candidate hangs
    on one offer at most.
    """

    old: Structure
    nodes: dict[BlockKey, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    layers: list[BlockKey] = field(default_factory=list)


def draw_offers(network: Network, config: Config, generator: torch.Generator) -> Offers:
    """Blocks and fan-in drawn at random, within the caps on channels and layers."""
    structure = network.structure
    offers = Offers(structure.copy())
    blocks = [(s, b) for s, stage in enumerate(structure.stages) for b in range(len(stage))]
    free = max(min(config.layers, config.max_layers - structure.conv_layers), 0)
    order = torch.randperm(len(blocks), generator=generator)[:free].tolist()
    offers.layers = [blocks[i] for i in sorted(order)]
    for s, b in blocks:
        room = min(config.nodes, config.max_channels - structure.stages[s][b].width)
        if (s, b) not in offers.layers and room > 0:
            layer = network.stages[s].blocks[b].conv
            offers.nodes[s, b] = [_fan_in(layer, config.fan_in, generator) for _ in range(room)]
    return offers


def offer(hyper: Network, offers: Offers) -> None:
    """Put the offers into a copy of the network; its function stays as it is."""
    add_nodes(hyper, offers.nodes)
    for key in offers.layers:
        add_identity(hyper, key)


def conditions_of(pool: Pool, hyper: Network, offers: Offers) -> tuple[Pool, Conditions]:
    """The candidates that can be added, each with the offer that it needs.

    A weight out of a placeholder needs the placeholder; a weight in a virtual layer needs the layer. Weights and
    biases into a placeholder are dropped: nothing flows out of it yet, so their gradient is 0.
    """
    numbers, cost = {}, []
    layers = dict(masked_layers(hyper))
    for (s, b), nodes in offers.nodes.items():
        for k, (position, _) in enumerate(nodes):
            numbers["node", s, b, k] = len(cost)
            cost.append(len(position) + offers.old.stages[s][b].identities)
    for s, b in offers.layers:
        numbers["layer", s, b] = len(cost)
        cost.append(offers.old.stages[s][b].width)
    needs = torch.full((len(pool),), -1)
    possible = torch.ones(len(pool), dtype=torch.bool)
    for name, (weights, biases) in pool.by_layer().items():
        inside = torch.cat([weights, biases])
        if (key := _virtual_block(name, offers)) is not None:
            needs[inside] = numbers[("layer", *key)]
            continue
        first_of_row = _first_placeholder(hyper.structure.output_part(name), offers)
        row_size = layers[name].pattern.numel // layers[name].pattern.shape[0]
        row = torch.cat([pool.index[weights] // row_size, pool.index[biases]])
        possible[inside] = row < first_of_row
        channel = pool.index[weights] % row_size // layers[name].pattern.taps
        needs[weights] = _needs_by_channel(name, hyper.structure, offers, numbers)[channel]
    return pool.take(possible), Conditions(needs[possible], cost)


def commit(
    network: Network, hyper: Network, offers: Offers, picked: set[int], pool: Pool,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[Pool, int, int]:  # fmt: skip
    """Add the picked nodes and layers to the network itself.

    Returns the pool with positions in the network, and how many nodes and layers were added.
    """
    number = 0
    kept: dict[BlockKey, list[int]] = {}
    for key, nodes in offers.nodes.items():
        kept[key] = [k for k in range(len(nodes)) if number + k in picked]
        number += len(nodes)
    layers = [key for k, key in enumerate(offers.layers) if number + k in picked]
    add_nodes(network, {key: [offers.nodes[key][k] for k in ks] for key, ks in kept.items()}, optimizer)
    for key in layers:
        add_identity(network, key, optimizer)
    moved = pool.take(torch.arange(len(pool)))
    for name, (weights, _) in pool.by_layer().items():
        shape = hyper.structure.layer_shapes()[name]
        channels = _kept_channels(name, hyper.structure, network.structure, offers, kept)
        taps = shape[2] * shape[3] if len(shape) == 4 else 1
        row, rest = pool.index[weights] // (shape[1] * taps), pool.index[weights] % (shape[1] * taps)
        width = network.structure.layer_shapes()[name][1]
        moved.index[weights] = (row * width + channels[rest // taps]) * taps + rest % taps
    return moved, sum(len(ks) for ks in kept.values()), len(layers)


def moved_patterns(removed: dict[str, Tensor], hyper: Network, offers: Offers) -> dict[str, Pattern]:
    """Positions in the network before the offer as patterns of the hyper-architecture's layers."""
    before, after = offers.old.layer_shapes(), hyper.structure.layer_shapes()
    patterns = {}
    for name, index in removed.items():
        taps = after[name][2] * after[name][3] if len(after[name]) == 4 else 1
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


def _virtual_block(name: str, offers: Offers) -> BlockKey | None:
    """The block whose virtual layer this is."""
    kind, first, *rest = name.split(".")
    if kind != "stages" or rest[2] != "identities":
        return None
    key = (int(first), int(rest[1]))
    return key if key in offers.layers and int(rest[3]) == offers.old.stages[key[0]][key[1]].identities else None


def _first_placeholder(part: tuple, offers: Offers) -> int:
    """The first row of a group of nodes that is a placeholder; beyond the last row where none is."""
    if part[0] != "block":
        return 2**62
    return offers.old.stages[part[1]][part[2]].width


def _needs_by_channel(name: str, structure: Structure, offers: Offers, numbers: dict[tuple, int]) -> Tensor:
    """For each input channel of a layer the number of the placeholder it comes from, -1 for a node that exists."""
    sizes = structure.node_offsets()
    needs = []
    for part in structure.input_parts(name):
        column = torch.full((sizes[part][1],), -1)
        if part[0] == "block":
            first = offers.old.stages[part[1]][part[2]].width
            for k in range(sizes[part][1] - first):
                column[first + k] = numbers["node", part[1], part[2], k]
        needs.append(column)
    return torch.cat(needs).repeat_interleave(structure.cells(name))


def _kept_channels(
    name: str, hyper: Structure, real: Structure, offers: Offers, kept: dict[BlockKey, list[int]]
) -> Tensor:
    """Where each input channel of the hyper-architecture's layer is in the network; -1 for dropped placeholders."""
    before, after, cells = hyper.node_offsets(), real.node_offsets(), hyper.cells(name)
    places, start = [], 0
    for part in hyper.input_parts(name):
        place = torch.arange(before[part][1])
        if part[0] == "block":
            first = offers.old.stages[part[1]][part[2]].width
            place[first:] = -1
            survivors = kept.get(part[1:], [])
            place[[first + k for k in survivors]] = torch.arange(len(survivors)) + first
        spread = place[:, None] * cells + torch.arange(cells)
        places.append(torch.where(place[:, None] < 0, -1, spread + start).flatten())
        start += after[part][1] * cells
    return torch.cat(places)
