"""The template network against a plain twin in float64, and the random base network."""

import math

import pytest
import torch
from ilnas_testing import images, live_edges, plain_forward, small_network, small_structure, train_a_little
from torch.nn import functional as F

from ilnas.base import dense_network, layer_counts, narrowed, random_network
from ilnas.config import make_config
from ilnas.structure import Block, Structure
from ilnas.template import live_parameters, masked_layers

# One float32 rounding is 2^-24 relative. The longest chain here: five conv and linear layers with up to 136 live terms
# a sum, and BN over few values, which can divide by a spread some ten times smaller than what it subtracts.
ROUNDINGS = 5 * (136 + 16) * 2**-24 * 10
VARIANTS = [
    {},
    {"stage_output": "last"},
    {"reduction": "average"},
    {"kernel_size": 5, "hidden": []},
    {"head_grid": 1, "hidden": [3, 8]},
]


def assert_near(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=ROUNDINGS * float(expected.abs().max() + 1e-30))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [2, 7])
def test_forward_and_gradients_against_the_plain_twin(changes, training, batch):
    network = small_network(**changes).train(training)
    x = images(batch)
    labels = torch.arange(batch) % 4
    expected, dense = plain_forward(network, x)
    F.cross_entropy(expected, labels).backward()
    logits = network(x)
    F.cross_entropy(logits, labels).backward()
    assert_near(logits.detach(), expected.detach())
    for name, layer in masked_layers(network):
        weight, bias = dense[name]
        assert_near(layer.values.grad, weight.grad.flatten()[layer.pattern.index])
        assert_near(layer.bias.grad, bias.grad)


def test_input_layout_does_not_matter():
    network, x = small_network().eval(), images(5)
    expected = network(x)
    assert torch.equal(network(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(network(x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)), expected)


def test_stage_memory_holds_one_copy_of_each_channel():
    """What autograd keeps of a stage of many layers is linear in its channels: no concatenated inputs."""
    structure = Structure((1, 8, 8), 4, [[Block(4) for _ in range(12)]], head_grid=1)
    network = random_network(structure, 600, torch.Generator().manual_seed(0))
    inputs = []
    for name, layer in masked_layers(network):
        if name.startswith("stages"):
            layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    network(images(3, channels=1, height=8, width=8))
    assert [x.shape[1] for x in inputs] == [1 + 4 * b for b in range(12)]
    assert len({x.untyped_storage().data_ptr() for x in inputs}) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("live", [180, 181, 600])
def test_base_is_exact_and_every_node_has_an_input_and_an_output(seed, changes, live):
    network = small_network(seed, live, **changes)
    assert live_parameters(network) == live
    edges = live_edges(network)
    offsets = network.structure.node_offsets()
    nodes = {n for start, count in offsets.values() for n in range(start, start + count)}
    start, count = offsets[("image",)]
    image = set(range(start, start + count))
    logits_start, classes = offsets[("hidden", len(network.structure.hidden))]
    logits = set(range(logits_start, logits_start + classes))
    assert {target for _, target in edges} == nodes - image
    assert {source for source, _ in edges} == nodes - logits


def test_base_is_drawn_by_the_generator_alone():
    one, same, other = small_network(3), small_network(3), small_network(4)
    for (_, a), (_, b) in zip(masked_layers(one), masked_layers(same), strict=True):
        assert a.pattern == b.pattern
        assert torch.equal(a.values, b.values)
    assert one.stages[0].blocks[1].conv.pattern != other.stages[0].blocks[1].conv.pattern


def test_bad_base_sizes_say_what_is_needed():
    with pytest.raises(ValueError, match=r"cannot connect these nodes: \d+ are needed"):
        small_network(live=40)
    structure = small_structure()
    with pytest.raises(ValueError, match=f"more than the dense network's {structure.dense_parameters()}"):
        random_network(structure, 10**6, torch.Generator())


def test_layer_counts_fill_to_the_last_weight():
    shapes = {"a": (4, 3, 3, 3), "b": (50, 40, 3, 3), "c": (10, 200)}
    least = {"a": 4, "b": 60, "c": 30}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for live in (94, 95, 1000, 12_345, sum(sizes.values())):
        counts = layer_counts(shapes, live, least)
        assert sum(counts.values()) == live
        assert all(least[name] <= counts[name] <= sizes[name] for name in shapes)


def test_dense_and_narrowed():
    structure = small_structure()
    assert live_parameters(dense_network(structure, torch.Generator())) == structure.dense_parameters()
    budget = structure.dense_parameters() // 3
    narrow = narrowed(structure, budget)
    assert 0.7 * budget < narrow.dense_parameters() <= budget


def test_what_counts_towards_the_budget():
    network = small_network()
    norm = 2 * (5 + 7 + 6)
    assert live_parameters(network, count_norm=True) == live_parameters(network) + norm
    network.head[0].linear.set_bias_mask(torch.arange(9) < 4)
    assert live_parameters(network) == 600 - 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widths": "4/4/4/4/4"}, "5 stages halve"),
        ({"widths": "2000"}, "--max-channels 1024"),
        ({"widths": "4,4,4", "max_layers": 2}, "--max-layers 2"),
        ({"kernel_size": 4}, "--kernel-size must be odd"),
    ],
)
def test_impossible_templates(given, message):
    with pytest.raises(ValueError, match=message):
        Structure.from_config(make_config(given), (1, 8, 8), 10)


def test_structure_survives_a_dictionary():
    structure = small_structure()
    structure.stages[0][1].identities = 2
    structure.hidden[0].identities = 1
    assert Structure.from_dict(structure.to_dict()) == structure


def test_training_lowers_the_loss():
    network = small_network(hidden=[])
    x, labels = images(16, seed=100), torch.arange(16) % 4
    before = F.cross_entropy(network.train()(x), labels).item()
    train_a_little(network, 20)
    assert F.cross_entropy(network.train()(x), labels).item() < before
