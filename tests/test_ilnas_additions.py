"""Connections, nodes and identity layers: the function stays as it is bit for bit, and the optimiser goes on."""

import copy

import pytest
import torch
from ilnas_testing import images, plain_forward, small_network, train_a_little
from torch.nn import functional as F

from ilnas.additions import add_identity, add_nodes
from ilnas.expansion import grow_candidates, random_candidates
from ilnas.template import live_parameters, masked_layers
from ilnas_kernels import use_route

PARTS = [("block", 0, 0), ("block", 0, 1), ("block", 1, 0), ("hidden", 0)]


def trained(**changes):
    network = small_network(**changes)
    return network, train_a_little(network)


@pytest.fixture(params=["sparse", "dense"])
def route(request):
    with use_route(request.param):
        yield request.param


def fan_in(network, part, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pattern = network.block(part).layers[0].pattern
    row = pattern.numel // pattern.shape[0]
    return [
        (torch.randperm(row, generator=generator)[:4].sort().values, torch.randn(4, generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch", [17, 144])
def test_connections_change_nothing(route, batch):
    """More than 16 images: with fewer the linear kernel sums each output in several chains, which a further weight
    of 0 can regroup."""
    network, optimizer = trained()
    network.eval()
    before = network(images(batch))
    pool = random_candidates(network, 150, torch.Generator().manual_seed(2))
    grow_candidates(network, pool, 0.0, optimizer)
    assert live_parameters(network) == 750
    assert torch.equal(network(images(batch)), before)


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"stage_output": "last"}, {"hidden": [6, 8]}], ids=str)
def test_nodes_change_nothing(part, changes):
    network, optimizer = trained(**changes)
    width = network.structure.blocks()[part].width
    with use_route("sparse"):
        before = network.eval()(images(17))
        add_nodes(network, {part: fan_in(network, part, 3)}, optimizer)
        assert torch.equal(network(images(17)), before)
    assert network.block(part).layers[0].pattern.shape[0] == network.structure.blocks()[part].width == width + 3
    assert live_parameters(network) == 600 + 3 * 4  # the new biases are absent


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_identity_layers_change_nothing(part, route):
    network, optimizer = trained()
    before = network.eval()(images())
    width = network.structure.blocks()[part].width
    for depth in range(2):
        assert add_identity(network, part, optimizer).endswith(f"identities.{depth}")
        assert torch.equal(network(images()), before)
    assert live_parameters(network) == 600 + 2 * width


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_nodes_after_identity_layers_pass_through_them(part):
    network, optimizer = trained()
    add_identity(network, part, optimizer)
    width = network.structure.blocks()[part].width
    with use_route("sparse"):
        before = network.eval()(images(17))
        other = PARTS[PARTS.index(part) - 1]
        add_nodes(network, {part: fan_in(network, part, 2), other: fan_in(network, other, 1)}, optimizer)
        assert torch.equal(network(images(17)), before)
    identity = network.block(part).identities[0]
    assert identity.nnz == width + 2
    centre = identity.weight if part[0] == "hidden" else identity.weight[:, :, 1, 1]
    torch.testing.assert_close(centre, torch.eye(width + 2))


def test_the_grown_network_computes_what_its_structure_says():
    network, optimizer = trained()
    add_nodes(network, {part: fan_in(network, part, 2) for part in PARTS}, optimizer)
    add_identity(network, ("block", 0, 1), optimizer)
    add_identity(network, ("hidden", 0), optimizer)
    grow_candidates(network, random_candidates(network, 300, torch.Generator().manual_seed(1)), 0.0, optimizer)
    with torch.no_grad():
        for _, layer in masked_layers(network):
            layer.values.add_(torch.randn(layer.nnz, generator=torch.Generator().manual_seed(3)) * 0.1)
    shapes = network.structure.layer_shapes()
    assert {name: tuple(layer.pattern.shape) for name, layer in masked_layers(network)} == shapes
    got, expected = network.eval()(images()), plain_forward(network.eval(), images())[0]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2**-13 * float(expected.detach().abs().max()))


def test_old_parameters_train_on_as_if_nothing_had_been_added():
    """Steps after additions whose new weights are held at their start equal the steps of the network without them."""
    network, optimizer = trained()
    twin = copy.deepcopy(network)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    add_nodes(network, {part: fan_in(network, part, 2) for part in PARTS}, optimizer)
    x, labels = images(16, seed=5), torch.arange(16) % 4
    for model, sgd in ((network, optimizer), (twin, twin_optimizer)):
        sgd.zero_grad(set_to_none=True)
        F.cross_entropy(model.train()(x), labels).backward()
        sgd.step()
    for (name, grown), (_, old) in zip(masked_layers(network), masked_layers(twin), strict=True):
        values = grown.values.detach()[: old.nnz]  # new rows stand behind
        # The sums are regrouped, over at most 16 * 72 images and positions of values below 4.
        tolerance = {"rtol": 0, "atol": 4 * 16 * 72 * 2**-24}
        torch.testing.assert_close(values, old.values.detach(), **tolerance, msg=name)
        momentum = optimizer.state[grown.values]["momentum_buffer"]
        torch.testing.assert_close(
            momentum[: old.nnz], twin_optimizer.state[old.values]["momentum_buffer"], **tolerance, msg=name
        )


@pytest.mark.parametrize("part", [("block", 0, 0), ("hidden", 0)], ids=str)
def test_new_parameters_are_trained(part):
    network, optimizer = trained()
    identity = network.get_submodule(add_identity(network, part, optimizer))
    before = identity.values.detach().clone()
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(network.train()(images(16)), torch.arange(16) % 4).backward()
    optimizer.step()
    assert not torch.equal(identity.values.detach(), before)
