"""What the tests of the search share: a plain twin of the template, and small networks that have been trained."""

import copy

import torch
from torch.nn import functional as F

from ilnas.base import random_network
from ilnas.structure import Block, Structure, output_part
from ilnas.template import masked_layers


def small_structure(**changes):
    options = {"hidden": [9], "head_grid": 2, "stage_output": "all", "reduction": "max", "kernel_size": 3} | changes
    stages = [[Block(5), Block(7)], [Block(6)]]
    return Structure((2, 9, 8), 4, stages, **(options | {"hidden": [Block(width) for width in options["hidden"]]}))


def small_network(seed=0, live=600, **changes):
    return random_network(small_structure(**changes), live, torch.Generator().manual_seed(seed))


def images(batch=6, seed=1, channels=2, height=9, width=8):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def train_a_little(network, steps=5):
    """SGD steps with momentum, so that weights, BN statistics and the optimiser's state are those of a trained net."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    network.train()
    for step in range(steps):
        x = images(16, seed=100 + step)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(x), torch.arange(16) % 4).backward()
        optimizer.step()
    return optimizer


def plain_forward(network, x):
    """The network's function written down with torch.cat and dense weights, in float64.

    Returns the logits and the dense weights and biases by layer, which hold gradients after a backward pass.
    """
    layers = {}
    for name, layer in masked_layers(network):
        layers[name] = (
            layer.weight.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()
        )  # fmt: skip
    structure, x = network.structure, x.double()
    for s, stage in enumerate(network.stages):
        if s:
            x = F.max_pool2d(x, 2) if structure.reduction == "max" else F.avg_pool2d(x, 2)
        parts = [x]
        for b, block in enumerate(stage.blocks):
            out = F.relu(_conv(torch.cat(parts, 1), *layers[f"stages.{s}.blocks.{b}.conv"]))
            for i in range(len(block.identities)):
                out = F.relu(_conv(out, *layers[f"stages.{s}.blocks.{b}.identities.{i}"]))
            norm = block.norm
            out = F.batch_norm(
                out, norm.running_mean.double(), norm.running_var.double(), norm.weight.double(), norm.bias.double(),
                network.training, norm.momentum, norm.eps,
            )  # fmt: skip
            parts.append(out)
        x = torch.cat(parts, 1) if structure.stage_output == "all" else parts[-1]
    x = F.adaptive_avg_pool2d(x, structure.head_grid).flatten(1)
    for i, block in enumerate(network.head):
        x = F.linear(F.relu(x) if i else x, *layers[f"head.{i}.linear"])
        for k in range(len(block.identities)):
            x = F.linear(F.relu(x), *layers[f"head.{i}.identities.{k}"])
    return x, layers


def _conv(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def live_edges(network):
    """For every layer, the live (input node, output node) pairs as numbers of the structure's nodes."""
    structure = network.structure
    edges = set()
    for name, layer in masked_layers(network):
        row_size = layer.pattern.numel // layer.pattern.shape[0]
        start = structure.node_offsets()[output_part(name)][0]
        sources = structure.input_nodes(name)[layer.pattern.index % row_size // layer.pattern.taps]
        targets = layer.pattern.index // row_size + start
        edges |= set(zip(sources.tolist(), targets.tolist(), strict=True))
    return edges


LABELS = torch.arange(16) % 4


def scoring_backward(model, which):
    """Forward and backward of one of two fixed scoring batches."""
    F.cross_entropy(model(images(16, seed=40 + which)), LABELS).backward()


def trained_network(**changes):
    """A trained network some of whose biases are absent, and its optimiser."""
    network = small_network(**changes)
    optimizer = train_a_little(network)
    for _, layer in list(masked_layers(network))[:2]:
        layer.set_bias_mask(torch.arange(layer.bias.numel()) % 2 == 0)
    return network, optimizer


def dense_gradients(network):
    """The gradient of every weight and bias on the first scoring batch, all dense, in float64."""
    logits, dense = plain_forward(copy.deepcopy(network).train(), images(16, seed=40))
    F.cross_entropy(logits, LABELS).backward()
    return {name: (weight.grad, bias.grad) for name, (weight, bias) in dense.items()}
