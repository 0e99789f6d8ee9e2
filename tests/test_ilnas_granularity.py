"""Layers, kernels and weights as the grain of the search: scores against dense autograd, and what is picked."""

import pytest
import torch
from ilnas_testing import (
    LABELS,
    dense_gradients,
    images,
    plain_forward,
    scoring_backward,
    trained_network,
)
from torch import nn
from torch.nn import functional as F

from ilnas.config import make_config
from ilnas.evolve import change_architecture
from ilnas.expansion import Scoring, score_candidates, tentative_copy
from ilnas.granularity import grain_at, group_scores
from ilnas.template import live_parameters, masked_layers
from ilnas_kernels import convert, grow_


@pytest.mark.parametrize("grain", ["weight", "kernel"])
def test_first_level_scores_against_dense_autograd(grain):
    network, _ = trained_network()
    dense = dense_gradients(network)
    pool = score_candidates(tentative_copy(network), scoring_backward, 90, grain, Scoring(hyper_step=False))
    layers = dict(masked_layers(network))
    expected = torch.empty(len(pool), dtype=torch.float64)
    everything = []
    for name, (weights, biases) in pool.by_layer().items():
        expected[weights] = dense[name][0].flatten()[pool.index[weights]]
        expected[biases] = dense[name][1][pool.index[biases]]
    for name, layer in layers.items():
        everything.append(dense[name][0].flatten()[~layer.mask.flatten()].abs())
        if layer.bias_mask is not None:
            everything.append(dense[name][1][~layer.bias_mask].abs())
    largest = torch.cat(everything).max()
    tolerance = 16 * 72 * 2**-24 * float(largest) * 10  # sums over images and positions, then back through BN
    torch.testing.assert_close(pool.grad.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(pool.score, pool.grad.abs())
    if grain == "weight":
        assert len(pool) == 90
        best = torch.cat(everything).sort(descending=True).values[:90]
        torch.testing.assert_close(pool.score.double().sort(descending=True).values, best, rtol=0, atol=tolerance)
    else:
        index = pool.index[~pool.is_bias]
        assert not any(
            layers[n].mask.flatten()[index[pool.layer[~pool.is_bias] == i]].any() for i, n in enumerate(pool.names)
        )
        assert len(pool.group.unique()) == 10


@pytest.mark.parametrize("grain", ["weight", "kernel", "layer"])
def test_the_hyper_step_adds_the_gradient_at_the_stepped_weights(grain):
    network, _ = trained_network()
    lr = 0.3
    pool = score_candidates(tentative_copy(network), scoring_backward, 60, grain, Scoring(hyper_lr=lr))
    # By hand, all dense: W* = W - lr * g for live weights and candidates, then g* on the second batch.
    twin = tentative_copy(network)
    names = pool.names
    logits = twin(images(16, seed=40))
    F.cross_entropy(logits, LABELS).backward()
    step = {name: parameter.grad for name, parameter in twin.named_parameters()}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.sub_(lr * step[name])
    layers = dict(masked_layers(twin))
    for number, name in enumerate(names):
        here = pool.layer == number
        weights, biases = here & ~pool.is_bias, here & pool.is_bias
        layer = layers[name]
        grow_(
            layer,
            pool.index[weights],
            -lr * pool.grad[weights],
            bias_index=pool.index[biases],
            bias_value=-lr * pool.grad[biases],
        )
    logits, dense = plain_forward(twin.train(), images(16, seed=41))
    F.cross_entropy(logits, LABELS).backward()
    for number, name in enumerate(names):
        for is_bias in (False, True):
            here = (pool.layer == number) & (pool.is_bias == is_bias)
            second = dense[name][int(is_bias)].grad.flatten()[pool.index[here]]
            expected = (pool.grad[here].double() + second).abs()
            torch.testing.assert_close(pool.score[here].double(), expected, rtol=0, atol=2**-12)


@pytest.mark.parametrize("ranking", ["global", "normalised"])
def test_a_layer_is_scored_by_the_root_mean_square_of_its_best_absent_weights(ranking):
    network, _ = trained_network()
    dense, count, members = dense_gradients(network), 60, 20
    scoring = Scoring(hyper_step=False, ranking=ranking, candidates=count / members)
    expected = {}
    for name, layer in masked_layers(network):
        weight, bias = dense[name]
        absent = weight.flatten()[~layer.mask.flatten()]
        if layer.bias_mask is not None:
            absent = torch.cat([absent, bias[~layer.bias_mask]])
        unit = weight.flatten()[layer.pattern.index].square().mean().sqrt() if ranking == "normalised" else 1.0
        expected[name] = (absent.abs().sort(descending=True).values[:members] / unit).square().mean().sqrt().item()
    pool = score_candidates(tentative_copy(network), scoring_backward, count, "layer", scoring)
    groups, sizes, scores = group_scores(pool)
    best = sorted(expected, key=expected.get, reverse=True)[:3]  # three layers of 20 candidates are the first level
    assert sizes.tolist() == [members] * 3
    assert {pool.names[g] for g in groups.tolist()} == set(best)
    for group, score in zip(groups.tolist(), scores.tolist(), strict=True):
        assert score == pytest.approx(expected[pool.names[group]], rel=2**-10)


def test_a_layer_takes_all_that_a_step_adds():
    network, optimizer = trained_network()
    before = {name: layer.nnz for name, layer in masked_layers(network)}
    live = live_parameters(network)
    config = make_config({"granularity": "layer", "selection": "top", "move": 0.0})
    change_architecture(network, optimizer, config, scoring_backward, live + 25, moved=0, lr=0.1, progress=0, step=0)
    grown = [name for name, layer in masked_layers(network) if layer.nnz != before[name]]
    assert len(grown) == 1
    assert live_parameters(network) == live + 25


def test_grains_follow_each_other_top_down():
    assert [grain_at("top-down", k / 6) for k in range(7)] == ["layer"] * 2 + ["kernel"] * 2 + ["weight"] * 3
    assert [grain_at("mixed", k / 4) for k in range(5)] == ["kernel"] * 2 + ["weight"] * 3
    assert {grain_at(grain, 0.9) for grain in ("layer", "kernel", "weight")} == {"layer", "kernel", "weight"}


def dilated_teacher(x):
    """A 3x3 convolution of dilation 2, which fits a 5x5 box: taps 0, 2, 4 of rows 0, 2, 4; no weight is small."""
    weight = torch.rand(3, 2, 3, 3, generator=torch.Generator().manual_seed(5)) - 0.5
    weight += 0.5 * weight.sign()
    return F.conv2d(x, weight, padding=2, dilation=2)


DILATED_TAPS = torch.tensor([5 * i + k for i in (0, 2, 4) for k in (0, 2, 4)])


@pytest.mark.parametrize("hyper_step", [True, False])
def test_a_dilated_kernel_emerges_in_a_5x5_box(hyper_step):
    """Growth by single weights finds the nine taps of each kernel of the teacher, and no other."""
    student = convert(nn.Sequential(nn.Conv2d(2, 3, 5, padding=2, bias=False)))
    student[0].set_mask(torch.zeros(3, 2, 5, 5, dtype=torch.bool))

    def backward(model, which):
        x = images(64, seed=70 + which)
        F.mse_loss(model(x), dilated_teacher(x)).backward()

    config = make_config({"selection": "top", "hyper_step": hyper_step, "move": 0.0})
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for step, live in enumerate((18, 36, 54)):
        change_architecture(student, optimizer, config, backward, live, moved=0, lr=0.5, progress=0, step=step)
        for _ in range(40):
            optimizer.zero_grad(set_to_none=True)
            backward(student, 0)
            optimizer.step()
    expected = torch.zeros(3, 2, 25, dtype=torch.bool)
    expected[:, :, DILATED_TAPS] = True
    assert torch.equal(student[0].mask.flatten(2), expected)
