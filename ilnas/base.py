"""The random sparse base network that a search starts from (PAPER 4.1), and other fixed starting points."""

import math

import torch
from torch import Tensor

from ilnas.structure import Structure
from ilnas.template import MaskedLayer, Network, masked_layers
from ilnas_kernels import Pattern


def random_network(structure: Structure, live: int, generator: torch.Generator) -> Network:
    """A network of exactly ``live`` live weights and biases, where every node has an input and an output.

    All biases are live. First each node gets one random input, and one random output where none came of that; the
    rest is drawn uniformly within each layer, the layers' shares by ``layer_counts``. ValueError where ``live`` is
    too small to connect all nodes or larger than the network.
    """
    shapes = structure.layer_shapes()
    biases = sum(shape[0] for shape in shapes.values())
    needed = _connecting_weights(structure, shapes, generator)
    fewest = biases + sum(len(index) for index in needed.values())
    if live < fewest:
        raise ValueError(
            f"a base network of {live} live parameters cannot connect these nodes: {fewest} are needed; "
            "raise --budget or --base, or lower --widths"
        )
    if live > structure.dense_parameters():
        raise ValueError(
            f"{live} live parameters are more than the dense network's {structure.dense_parameters()}; "
            "raise --widths or lower --budget"
        )
    counts = layer_counts(shapes, live - biases, {name: len(index) for name, index in needed.items()})
    patterns = {name: _filled(shape, needed[name], counts[name], generator) for name, shape in shapes.items()}
    network = Network(structure, patterns)
    initialise(network, generator)
    return network


def layer_counts(shapes: dict[str, tuple[int, ...]], live: int, least: dict[str, int]) -> dict[str, int]:
    """Live weights of each layer, summing to ``live``: density proportional to ``1 / sqrt(size)``.

    Small layers come out denser than large ones. (The Erdos-Renyi-kernel rule, (sum of dimensions) / (their product),
    would spend most of a small base on a head with many inputs.) A layer is neither over its size nor under ``least``.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    share = {name: math.sqrt(size) for name, size in sizes.items()}  # density * size

    def counts(scale: float) -> dict[str, int]:
        return {name: min(sizes[name], max(least[name], math.floor(scale * share[name]))) for name in shapes}

    low, high = 0.0, 1.0
    while sum(counts(high).values()) < live:
        high *= 2
    for _ in range(200):  # halves the interval to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle).values()) <= live else (low, middle)
    result = counts(low)
    for name in sorted(shapes, key=lambda name: least[name] - sizes[name]):
        room = min(sizes[name] - result[name], live - sum(result.values()))
        result[name] += max(room, 0)
    return result


def dense_network(structure: Structure, generator: torch.Generator) -> Network:
    """The same template with every weight live."""
    patterns = {
        name: Pattern.from_mask(torch.ones(shape, dtype=torch.bool)) for name, shape in structure.layer_shapes().items()
    }
    network = Network(structure, patterns)
    initialise(network, generator)
    return network


def narrowed(structure: Structure, budget: int) -> Structure:
    """The widest scaled copy of a structure whose dense network has at most ``budget`` parameters."""

    def scaled(scale: float) -> Structure:
        copy = structure.copy()
        for block in copy.blocks().values():
            block.width = max(1, round(block.width * scale))
        return copy

    low, high = 0.0, 1.0
    while scaled(high).dense_parameters() <= budget:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle).dense_parameters() <= budget else (low, middle)
    if scaled(low).dense_parameters() > budget:
        raise ValueError(f"--budget {budget} is too small for a dense network of this depth")
    return scaled(low)


def initialise(network: Network, generator: torch.Generator) -> None:
    """Normal, by each node's live inputs: standard deviation sqrt(2 / live inputs), He's; biases 0.

    The last layer gets sqrt(1 / (3 live inputs)), PyTorch's variance for a linear layer: no ReLU follows it.
    """
    with torch.no_grad():
        for _, layer in masked_layers(network):
            gain = math.sqrt(1 / 6) if layer is network.head[-1].linear else 1.0
            layer.values.copy_(gain * random_values(layer, generator))
            layer.bias.zero_()


def random_values(layer: MaskedLayer, generator: torch.Generator) -> Tensor:
    """float32 [nnz]: normal, with variance 2 / (live inputs of the weight's node)."""
    counts = (layer.pattern.row_ptr[1:] - layer.pattern.row_ptr[:-1]).long()
    fan_in = torch.repeat_interleave(counts, counts)
    return torch.randn(layer.nnz, generator=generator) * (2 / fan_in).sqrt()


def _connecting_weights(structure: Structure, shapes: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Flat positions by layer that give every node an input and an output."""
    chosen: dict[str, list[Tensor]] = {}
    offsets = structure.node_offsets()
    read = torch.zeros(sum(count for _, count in offsets.values()), dtype=torch.bool)
    readers: dict[tuple, list[tuple[str, int]]] = {part: [] for part in offsets}  # layer, its first channel of the part
    for layer, shape in shapes.items():
        # A shuffled deal of the inputs over the rows: more nodes get an output this way than by separate draws.
        deal = torch.randperm(shape[1], generator=generator)
        channel = deal[torch.arange(shape[0]) % shape[1]]
        chosen[layer] = [_positions(shape, torch.arange(shape[0]), channel, generator)]
        read[structure.input_nodes(layer)[channel]] = True
        start = 0
        for part in structure.input_parts(layer):
            readers[part].append((layer, start))
            start += offsets[part][1] * structure.cells(layer)
    for part, places in readers.items():
        first, count = offsets[part]
        lonely = (~read[first : first + count]).nonzero().flatten()
        if not places:  # the classes: what reads them is the loss
            continue
        choice = torch.randint(len(places), lonely.shape, generator=generator)
        for number, (layer, start) in enumerate(places):
            nodes, cells = lonely[choice == number], structure.cells(layer)
            channel = start + nodes * cells + torch.randint(cells, nodes.shape, generator=generator)
            row = torch.randint(shapes[layer][0], nodes.shape, generator=generator)
            chosen[layer].append(_positions(shapes[layer], row, channel, generator))
    return {layer: torch.cat(index).unique() for layer, index in chosen.items()}


def _positions(shape: tuple[int, ...], row: Tensor, channel: Tensor, generator: torch.Generator) -> Tensor:
    """Flat positions of weights between the given rows and input channels, at random taps."""
    taps = math.prod(shape[2:])
    return (row * shape[1] + channel) * taps + torch.randint(taps, row.shape, generator=generator)


def _filled(shape: tuple[int, ...], needed: Tensor, count: int, generator: torch.Generator) -> Pattern:
    """``needed`` and further positions drawn uniformly, ``count`` in all."""
    return Pattern.from_index(shape, drawn_positions(math.prod(shape), needed, count, generator))


def drawn_positions(numel: int, needed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` positions below ``numel``: ``needed``, the rest drawn uniformly; in O(count) memory when sparse."""
    if 4 * count > numel:
        free = torch.ones(numel, dtype=torch.bool)
        free[needed] = False
        rest = free.nonzero().flatten()
        return torch.cat([needed, rest[torch.randperm(len(rest), generator=generator)[: count - len(needed)]]])
    found = needed.sort().values
    while len(found) < count:
        more = torch.randint(numel, (count - len(found),), generator=generator).unique()
        found = torch.cat([found, more[~torch.isin(more, found)]]).sort().values
    return found
