"""Kernels and weights as the grain of the search: scores against dense autograd, and exact budgets."""

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
from torch.nn import functional as F

from ilnas.expansion import Scoring, score_candidates, tentative_copy
from ilnas.template import masked_layers
from ilnas_kernels import grow_


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


@pytest.mark.parametrize("grain", ["weight", "kernel"])
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
