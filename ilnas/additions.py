"""Additions of nodes and layers that leave the network's function as it is (PAPER 3.2, figure 1)."""

import math

import torch
from torch import Tensor, nn

from ilnas.structure import Part, Structure, identity_name, layer_name
from ilnas.template import MaskedLayer, Network, masked_layer, masked_layers
from ilnas_kernels import Pattern, grow_

FanIn = dict[Part, list[tuple[Tensor, Tensor]]]


def add_nodes(network: Network, fan_in: FanIn, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Append nodes without outgoing weights to blocks.

    fan_in: per block, for each new node the positions of its live inputs within its row of the block's layer, counted
    in the network as it is before the call, and their values. The bias starts absent. Where identity layers stand in
    the block, the node passes through each by one weight of 1. No weight leaves the node, so the output cannot change.
    """
    fan_in = {part: nodes for part, nodes in fan_in.items() if nodes}
    old = network.structure.copy()
    for part, nodes in fan_in.items():
        network.structure.blocks()[part].width += len(nodes)
    _reshape(network, old, optimizer)
    for part, nodes in fan_in.items():
        layer, *identities = network.block(part).layers
        first = old.blocks()[part].width
        moved = moved_inputs(old, network.structure, layer_name(part))
        inputs, taps = layer.pattern.shape[1], layer.pattern.taps
        index, values = [], []
        for k, (position, value) in enumerate(nodes):
            channel = moved[position // taps]
            index.append(((first + k) * inputs + channel) * taps + position % taps)
            values.append(value)
        _insert(layer, torch.cat(index), torch.cat(values), optimizer)
        for identity in identities:
            diagonal = identity_index(identity.pattern.shape)[first:]
            _insert(identity, diagonal, torch.ones(len(diagonal)), optimizer)


def add_identity(network: Network, part: Part, optimizer: torch.optim.Optimizer | None = None) -> str:
    """Put an identity layer (weight 1 at the centre of the diagonal, biases absent) behind a block's last ReLU, in a
    stage before its BN, and return its name: ReLU(ReLU(x)) = ReLU(x), so the output does not change."""
    structure, block = network.structure, network.block(part)
    shape = structure.identity_shape(part)
    layer = masked_layer(Pattern.from_index(shape, identity_index(shape)))
    with torch.no_grad():
        layer.values.fill_(1.0)
        layer.bias.zero_()
    layer.set_bias_mask(torch.zeros(shape[0], dtype=torch.bool))
    block.identities.append(layer)
    structure.blocks()[part].identities += 1
    if optimizer is not None:
        settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        optimizer.add_param_group({"params": list(layer.parameters()), **settings})
    return identity_name(part, len(block.identities) - 1)


def identity_index(shape: tuple[int, ...]) -> Tensor:
    """Flat positions of the centre taps on the diagonal of a weight [width, width, *kernel]."""
    taps = math.prod(shape[2:])
    return torch.arange(shape[0]) * (shape[1] * taps + taps) + taps // 2


def _reshape(network: Network, old: Structure, optimizer: torch.optim.Optimizer | None) -> None:
    """Give every layer the shape that the network's structure now says; new rows and columns hold nothing live.

    Rows are appended and inputs inserted in order, so the live weights keep their order: each layer's ``values`` stay
    the same Parameter, and the optimiser need not know.
    """
    shapes = network.structure.layer_shapes()
    for name, layer in list(masked_layers(network)):
        if tuple(layer.pattern.shape) == tuple(shapes[name]):
            continue
        taps = layer.pattern.taps
        row, col = layer.pattern.index // (layer.pattern.shape[1] * taps), layer.pattern.col.long()
        channel = moved_inputs(old, network.structure, name)[col // taps]
        pattern = Pattern.from_index(shapes[name], (row * shapes[name][1] + channel) * taps + col % taps)
        _replace(network, name, layer, pattern, optimizer)
    for stage in network.stages:
        for block in stage.blocks:
            _widen_norm(block.norm, block.conv.out_channels, optimizer)


def _replace(
    network: Network, name: str, layer: MaskedLayer, pattern: Pattern, optimizer: torch.optim.Optimizer | None
) -> None:
    """Put a layer with another pattern of as many live weights in the place of ``layer``, with the same Parameters."""
    made = masked_layer(pattern)
    made.values, made.bias = layer.values, layer.bias
    new = pattern.shape[0] - layer.bias.numel()
    mask = layer.bias_mask
    if new:
        mask = torch.ones(layer.bias.numel(), dtype=torch.bool) if mask is None else mask
        mask = torch.cat([mask, torch.zeros(new, dtype=torch.bool)])
        _extend(made.bias, new, 0.0, optimizer)
    made.set_bias_mask(mask)
    made.train(layer.training)
    parent, _, child = name.rpartition(".")
    network.get_submodule(parent)._modules[child] = made


def moved_inputs(old: Structure, new: Structure, layer: str) -> Tensor:
    """Where each input channel of a layer stands after blocks have been widened, int64 [old inputs]."""
    cells = old.cells(layer)
    before, after = old.node_offsets(), new.node_offsets()
    places, start = [], 0
    for part in old.input_parts(layer):
        places.append(start + torch.arange(before[part][1] * cells))
        start += after[part][1] * cells
    return torch.cat(places)


def _widen_norm(norm: nn.BatchNorm2d, width: int, optimizer: torch.optim.Optimizer | None) -> None:
    new = width - norm.num_features
    if not new:
        return
    norm.num_features = width
    _extend(norm.weight, new, 1.0, optimizer)
    _extend(norm.bias, new, 0.0, optimizer)
    norm.running_mean = torch.cat([norm.running_mean, norm.running_mean.new_zeros(new)])
    norm.running_var = torch.cat([norm.running_var, norm.running_var.new_ones(new)])


def _extend(parameter: nn.Parameter, new: int, value: float, optimizer: torch.optim.Optimizer | None) -> None:
    """Append elements to a vector parameter, and zeros to what the optimiser keeps for it element by element."""
    size = parameter.numel()
    parameter.grad = None
    parameter.data = torch.cat([parameter.data, parameter.data.new_full((new,), value)])
    if optimizer is not None and parameter in optimizer.state:
        state = optimizer.state[parameter]
        for name, entry in state.items():
            if isinstance(entry, Tensor) and entry.shape == (size,):
                state[name] = torch.cat([entry, entry.new_zeros(new)])


def _insert(layer: MaskedLayer, index: Tensor, values: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Make weights live with the given values."""
    order = index.argsort()
    grow_(layer, index[order], values[order], optimizer)
