"""Scores against dense autograd, exact budgets for every option, and what happens when nothing can be ranked."""

import copy

import pytest
import torch
from ilnas_testing import LABELS, images, plain_forward, scoring_backward, trained_network
from torch import nn
from torch.nn import functional as F

from ilnas.config import METHODS, make_config
from ilnas.evolve import change_architecture
from ilnas.expansion import (
    NonFinite,
    Scoring,
    random_candidates,
    remove_weights,
    score_candidates,
    smallest_weights,
    tentative_copy,
)
from ilnas.granularity import group_scores
from ilnas.selection import Conditions, choose, smallest
from ilnas.template import live_parameters, masked_layers
from ilnas_kernels import convert, use_route


def test_candidates_and_scoring_leave_the_network_alone():
    network, optimizer = trained_network()
    before = copy.deepcopy(network.state_dict())
    score_candidates(tentative_copy(network), scoring_backward, 50, "weight", Scoring())
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all("momentum_buffer" in state for state in optimizer.state.values())


OPTIONS = [
    {},
    {"hyper_step": False},
    {"selection": "top", "move": 0.0},
    {"ranking": "quota"},
    {"ranking": "normalised"},
    {"nodes": 2},
    {"layers": 2},
    {"nodes": 2, "layers": 1, "count_norm": True, "selection": "top"},
    {"method": "random", "nodes": 2, "layers": 1},
    {"granularity": "kernel"},
    {"granularity": "mixed", "candidates": 1.0},
    {"nodes": 3, "layers": 1, "granularity": "kernel"},
    {"granularity": "layer"},
    {"granularity": "layer", "nodes": 2, "layers": 2, "selection": "top"},
    {"granularity": "layer", "ranking": "quota"},
    {"granularity": "top-down", "ranking": "normalised"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("more", [1, 37, 200])
@pytest.mark.parametrize("moved", [0, 40])
def test_the_target_is_met_exactly(options, more, moved):
    config = make_config(options)
    network, optimizer = trained_network()
    live = live_parameters(network, count_norm=config.count_norm)
    report = change_architecture(
        network, optimizer, config, scoring_backward, live + more, moved=moved, lr=0.1, progress=0.3, step=7
    )
    assert live_parameters(network, count_norm=config.count_norm) == live + more
    assert report["removed"] == moved
    assert report["added"] == more + moved
    logits, _ = plain_forward(network.eval(), images())
    with torch.no_grad():
        torch.testing.assert_close(network(images()).double(), logits.detach(), rtol=0, atol=2**-10)
    optimizer.zero_grad(set_to_none=True)
    scoring_backward(network.train(), 0)
    optimizer.step()  # the optimiser's state fits the grown network
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters()}


@pytest.mark.parametrize("options", [{}, {"granularity": "kernel"}, {"granularity": "layer"}], ids=str)
def test_an_expansion_leaves_the_outputs_as_they_are_bit_for_bit(options):
    """Connections, nodes and layers of stages and head at once, on a trained network with BN."""
    found = {"added": 0, "nodes": 0, "layers": 0}
    for step in range(4):
        network, optimizer = trained_network(hidden=[9, 6], kernel_size=5)
        config = make_config({"nodes": 4, "layers": 2} | options)
        with use_route("sparse"):
            before = network.eval()(images(40))
            report = change_architecture(
                network, optimizer, config, scoring_backward, 900, moved=0, lr=0.1, progress=0, step=step
            )
            assert torch.equal(network.eval()(images(40)), before)
        found = {name: count + report[name] for name, count in found.items()}
    assert all(count > 0 for count in found.values()), found


def test_nodes_and_layers_are_really_picked_in_stages_and_head():
    found = {"nodes": 0, "layers": 0, "hidden nodes": 0, "hidden layers": 0}
    for step in range(8):
        network, optimizer = trained_network(hidden=[9, 6])
        config = make_config({"nodes": 4, "layers": 2})
        before = network.structure.copy()
        report = change_architecture(
            network, optimizer, config, scoring_backward, 1100, moved=0, lr=0.1, progress=0, step=step
        )
        new = {
            part: (block.width - before.blocks()[part].width, block.identities)
            for part, block in network.structure.blocks().items()
        }
        assert sum(nodes for nodes, _ in new.values()) == report["nodes"]
        assert sum(layers for _, layers in new.values()) == report["layers"]
        hidden = [count for part, count in new.items() if part[0] == "hidden"]
        in_head = {"hidden nodes": sum(n for n, _ in hidden), "hidden layers": sum(n for _, n in hidden)}
        found = {name: count + (report | in_head)[name] for name, count in found.items()}
    assert all(count > 0 for count in found.values()), found


def test_caps_on_channels_and_layers_hold():
    config = make_config({"nodes": 50, "layers": 50, "max_channels": 12, "max_layers": 4})
    network, optimizer = trained_network()
    change_architecture(network, optimizer, config, scoring_backward, 1500, moved=0, lr=0.1, progress=0, step=0)
    assert max(block.width for block in network.structure.blocks().values()) <= 12
    assert network.structure.conv_layers <= 4


def test_growth_to_the_last_absent_weight_and_no_further():
    network, optimizer = trained_network()
    whole = network.structure.dense_parameters()
    config = make_config({})
    change_architecture(network, optimizer, config, scoring_backward, whole, moved=0, lr=0.1, progress=0, step=0)
    assert live_parameters(network) == whole


@pytest.mark.parametrize("options", [{}, {"nodes": 2, "layers": 1}, {"method": "rigl"}])
def test_non_finite_gradients_change_nothing(options):
    network, optimizer = trained_network()
    before = copy.deepcopy(network.state_dict())

    def broken(model, which):
        (F.cross_entropy(model(images(16)), LABELS) * float("nan")).backward()

    report = change_architecture(
        network, optimizer, make_config(options), broken, 700, moved=30, lr=0.1, progress=0, step=0
    )
    assert "non-finite" in report["skipped"]
    assert (report["added"], report["removed"]) == (0, 0)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_non_finite_is_raised_with_the_layers():
    network, _ = trained_network()

    def overflow(model, which):
        (model(images(16)).sum() * float("inf")).backward()

    with pytest.raises(NonFinite, match="non-finite"):
        score_candidates(tentative_copy(network), overflow, 10, "weight", Scoring())


def test_random_candidates_are_absent_distinct_and_uniform():
    network, _ = trained_network()
    layers = dict(masked_layers(network))
    hits = torch.zeros(2)
    for seed in range(30):
        pool = random_candidates(network, 100, torch.Generator().manual_seed(seed))
        assert len(pool) == 100
        keys = set(zip(pool.layer.tolist(), pool.index.tolist(), pool.is_bias.tolist(), strict=True))
        assert len(keys) == 100
        for name, (weights, biases) in pool.by_layer().items():
            assert not layers[name].mask.flatten()[pool.index[weights]].any()
            assert not len(biases) or not layers[name].bias_mask[pool.index[biases]].any()
        hits += torch.stack([(pool.layer == 1).sum(), torch.tensor(100)])
    absent = [layer.pattern.numel - layer.nnz for layer in layers.values()]
    share = absent[1] / sum(absent)
    # 3000 draws: five standard deviations of the share, and the biases' small part.
    assert abs(hits[0] / hits[1] - share) < 5 * (share * (1 - share) / 3000) ** 0.5 + 0.01
    everything = random_candidates(network, 10**6, torch.Generator())
    assert len(everything) == network.structure.dense_parameters() - live_parameters(network)


def test_smallest_weights_over_the_network_and_by_layer():
    network, _ = trained_network()
    chosen = smallest_weights(network, 50)
    everything = torch.cat([layer.values.detach().abs() for _, layer in masked_layers(network)]).sort().values
    remove_weights(network, chosen, None)
    left = torch.cat([layer.values.detach().abs() for _, layer in masked_layers(network)]).sort().values
    assert torch.equal(left, everything[50:])
    sizes = {name: layer.nnz for name, layer in masked_layers(network)}
    by_layer = smallest_weights(network, sum(sizes.values()) // 5, by_layer=True)
    assert all(sizes[name] / 5 - 2 < len(by_layer[name]) <= sizes[name] / 5 for name in sizes)


def test_set_and_rigl_keep_each_layers_size():
    for method in ("set", "rigl"):
        network, optimizer = trained_network()
        sizes = {name: layer.nnz for name, layer in masked_layers(network)}
        patterns = {name: layer.pattern for name, layer in masked_layers(network)}
        config, live = make_config({"method": method}), live_parameters(network)
        report = change_architecture(
            network, optimizer, config, scoring_backward, live, moved=60, lr=0.1, progress=0, step=3
        )
        assert {name: layer.nnz for name, layer in masked_layers(network)} == sizes
        assert any(layer.pattern != patterns[name] for name, layer in masked_layers(network))
        assert report["added"] == report["removed"] > 40


def test_choose_walks_groups_and_pays_for_conditions():
    network, _ = trained_network()
    pool = random_candidates(network, 8, torch.Generator().manual_seed(0))
    pool.score = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2])
    pool.group = torch.arange(8)
    needs = torch.tensor([0, 0, -1, 1, -1, -1, -1, -1])
    chosen, paid = choose(pool, Conditions(needs, [3, 100]), 6, "top", torch.Generator())
    assert (chosen.tolist(), paid) == ([0, 1, 2], {0})  # 1 + 3, then 1 with the condition paid, then 1
    chosen, paid = choose(pool, Conditions(needs, [7, 100]), 5, "top", torch.Generator())
    assert (chosen.tolist(), paid) == ([2, 4, 5, 6, 7], set())  # neither condition fits
    pool.group = torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])
    chosen, paid = choose(pool, Conditions(needs, [3, 100]), 4, "top", torch.Generator())
    assert (chosen.tolist(), paid) == ([0], {0})  # the better member beside its condition
    pool.group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    none = Conditions(torch.full((8,), -1))
    chosen, _ = choose(pool, none, 5, "top", torch.Generator())
    assert chosen.tolist() == [0, 1, 2, 3, 4]  # the second group gives its two best
    assert choose(pool.take(torch.arange(0)), none, 5, "top", torch.Generator())[0].numel() == 0


def test_the_smallest_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(7, (101,), generator=generator).float()
    values[::10], values[5] = torch.inf, -torch.inf
    for count in (-1, 0, 1, 13, 50, 95, 100, 101, 150):
        expected = values.argsort(stable=True)[: max(count, 0)].sort().values
        assert torch.equal(smallest(values, count), expected)
    values[3] = torch.nan
    assert smallest(values, 89).tolist() == [i for i in range(101) if values[i] < torch.inf]
    assert smallest(values, 100).tolist() == list(range(100))


def test_sampling_is_in_proportion_to_the_squared_score():
    network, _ = trained_network()
    pool = random_candidates(network, 4, torch.Generator().manual_seed(0))
    pool.score = torch.tensor([0.0, 1.0, 2.0, 5.0]).sqrt()
    generator = torch.Generator().manual_seed(1)
    none = Conditions(torch.full((4,), -1))
    first = torch.bincount(
        torch.cat([choose(pool, none, 1, "sampled", generator)[0] for _ in range(4000)]), minlength=4
    )
    expected = torch.tensor([0.0, 0.125, 0.25, 0.625])
    assert first[0] == 0
    assert ((first / 4000 - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()


def test_groups_score_by_root_mean_square():
    network, _ = trained_network()
    pool = random_candidates(network, 3, torch.Generator().manual_seed(0))
    pool.group, pool.score = torch.tensor([5, 9, 5]), torch.tensor([3.0, 1.0, 4.0])
    groups, sizes, scores = group_scores(pool)
    assert (groups.tolist(), sizes.tolist()) == ([5, 9], [2, 1])
    torch.testing.assert_close(scores, torch.tensor([12.5**0.5, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_known(method):
    assert make_config({"method": method}).method == method


def test_any_model_of_masked_layers_grows():
    layers = nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = convert(nn.Sequential(*layers), density=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    live = live_parameters(model)
    config = make_config({"nodes": 3})
    change_architecture(model, optimizer, config, scoring_backward, live + 20, moved=5, lr=0.1, progress=0, step=0)
    assert live_parameters(model) == live + 20
