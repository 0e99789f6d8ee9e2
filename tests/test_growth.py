# ruff: noqa: E501 - a table of cases reads best with one case a line
"""AbsentTopK, grow_ and prune_: against a dense-masked twin trained in parallel, and their errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ilnas_kernels import AbsentTopK, MaskedConv2d, MaskedLinear, convert, grow_, prune_, use_route
from ilnas_kernels.nn import MaskedLayer


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5),
    ).double()  # fmt: skip


def masked_network(packed=False):
    model = convert(network(), density=0.4, generator=torch.Generator().manual_seed(1))
    for layer in layers_of(model).values():
        if packed:
            layer.pack_()
    return model


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedLayer)}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.randn(6, 3, 8, 8, generator=generator).double(), torch.randint(0, 5, (6,), generator=generator))
        for _ in range(8)
    ]


class DenseTwin:
    """The same network kept dense, with masks applied by hand to weights, gradients and optimiser state."""

    def __init__(self, model, optimiser):
        self.model = network()
        self.masks = {name: layer.mask for name, layer in layers_of(model).items()}
        self.bias_masks = {name: torch.ones_like(layer.bias) > 0 for name, layer in layers_of(model).items()}
        self.project()
        self.optimizer = optimiser(self.model.parameters())

    def project(self):
        for name, mask in self.masks.items():
            layer = self.model.get_submodule(name)
            for parameter, live in ((layer.weight, mask), (layer.bias, self.bias_masks[name])):
                parameter.data[~live] = 0
                if parameter.grad is not None:
                    parameter.grad[~live] = 0

    def step(self, x, y):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.project()
        self.optimizer.step()
        self.project()
        return loss.item()

    def absent_gradients(self, batches):
        """By layer: the summed dense gradient, 0 where live."""
        self.optimizer.zero_grad()
        for x, y in batches:
            F.cross_entropy(self.model(x), y).backward()
        return {
            name: (layer.weight.grad.masked_fill(mask, 0), layer.bias.grad.masked_fill(self.bias_masks[name], 0))
            for name, mask in self.masks.items()
            for layer in [self.model.get_submodule(name)]
        }

    def prune(self, name, index, bias_index):
        layer = self.model.get_submodule(name)
        self.masks[name].view(-1)[index] = False
        self.bias_masks[name][bias_index] = False
        for parameter, gone in ((layer.weight, index), (layer.bias, bias_index)):
            for state in self.optimizer.state[parameter].values():
                if isinstance(state, torch.Tensor) and state.shape == parameter.shape:
                    state.view(-1)[gone] = 0
        self.project()

    def grow(self, name, index, bias_index):
        self.masks[name].view(-1)[index] = True
        self.bias_masks[name][bias_index] = True


OPTIMISERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=1e-2, amsgrad=True),
}


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_training_growing_and_pruning_like_a_dense_twin(optimiser, packed, route, batches):
    model = masked_network(packed)
    optimizer = OPTIMISERS[optimiser](model.parameters())
    twin = DenseTwin(model, OPTIMISERS[optimiser])

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    none = torch.empty(0, dtype=torch.int64)
    with use_route(route):
        for number, (x, y) in enumerate(batches):
            assert step(x, y) == pytest.approx(twin.step(x, y), rel=1e-10)
            if number == 2:
                for name, layer in layers_of(model).items():
                    gone = layer.pattern.index[::5]
                    prune_(layer, gone, optimizer, bias_index=torch.tensor([1, 2]))
                    twin.prune(name, gone, torch.tensor([1, 2]))
            if number == 5:
                with AbsentTopK(model, 40) as search:
                    F.cross_entropy(model(x), y).backward()
                assert search.result.count == 40
                for name, layer in layers_of(model).items():
                    index = search.result.weights[name].index if name in search.result.weights else none
                    bias_index = search.result.biases[name].index if name in search.result.biases else none
                    grow_(layer, index, 0.0, optimizer, bias_index=bias_index)
                    twin.grow(name, index, bias_index)
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(layer.weight, twin.model.get_submodule(name).weight, rtol=1e-9, atol=1e-12)
        assert torch.equal(layer.mask, twin.masks[name])


def ranked(gradients, k, scale=None):
    """(score, layer, is_bias, index) of the k best by the dense gradients."""
    entries = [
        (abs(value) * (scale or {}).get(name, 1.0), name, bool(kind), index)
        for name, pair in gradients.items()
        for kind, grad in enumerate(pair)
        for index, value in enumerate(grad.flatten().tolist())
        if value != 0
    ]
    return sorted(entries, key=lambda entry: -entry[0])[:k]


def found(result):
    return {
        (name, kind == "biases", index)
        for kind in ("weights", "biases")
        for name, candidates in getattr(result, kind).items()
        for index in candidates.index.tolist()
    }


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("scale", (None, {"0": 100.0, "5": 0.01}), ids=("plain", "scaled"))
@pytest.mark.parametrize("k", (1, 17, 150))
def test_the_network_wide_best(k, scale, packed, batches):
    model = masked_network(packed)
    twin = DenseTwin(model, OPTIMISERS["momentum"])
    for name, layer in layers_of(model).items():
        layer.set_bias_mask(torch.arange(layer.bias.numel()) % 2 == 0)
        twin.bias_masks[name] = layer.bias_mask
    twin.project()
    with AbsentTopK(model, k, scale=scale) as search:
        for x, y in batches[:2]:
            F.cross_entropy(model(x), y).backward()
    gradients = twin.absent_gradients(batches[:2])
    best = ranked(gradients, k, scale)
    assert found(search.result) == {entry[1:] for entry in best}
    for kind, group in enumerate((search.result.weights, search.result.biases)):
        for name, (index, grad) in group.items():
            torch.testing.assert_close(grad.double(), gradients[name][kind].flatten()[index], rtol=1e-5, atol=1e-9)
            assert (grad.abs()[1:] <= grad.abs()[:-1]).all()


def test_options_restrict_the_candidates(batches):
    model = masked_network()
    x, y = batches[0]
    excluded = torch.rand(model[0].weight.shape) < 0.8
    with AbsentTopK(model, 500, exclude={"0": excluded}, biases=False, per_layer={"2": 3, "5": 7}) as search:
        F.cross_entropy(model(x), y).backward()
    result = search.result
    assert not excluded.view(-1)[result.weights["0"].index].any()
    assert result.weights["0"].index.numel() == (~excluded & ~model[0].mask).sum()
    assert result.weights["2"].index.numel() == 3
    assert result.weights["5"].index.numel() == 7
    assert not result.biases
    with AbsentTopK(model, 4, per_layer=1) as search:
        F.cross_entropy(model(x), y).backward()
    assert [c.index.numel() for c in search.result.weights.values()] == [1, 1, 1]


def test_a_layer_used_on_images_of_several_sizes():
    layer = MaskedConv2d(2, 3, 3, stride=2, padding=1, density=0.2, padding_mode="reflect").double()
    dense = layer.to_dense()
    images = [torch.randn(2, 2, *size).double() for size in ((7, 5), (4, 9), (6, 6))] + [torch.randn(2, 5, 5).double()]
    with AbsentTopK(layer, 1000) as search:
        for image in images:
            layer(image).square().sum().backward()
    for image in images:
        dense(image).square().sum().backward()
    (index, grad), wanted = search.result.weights[""], dense.weight.grad.masked_fill(layer.mask, 0).flatten()
    assert index.numel() == (~layer.mask).sum()
    torch.testing.assert_close(grad.double(), wanted[index], rtol=1e-5, atol=1e-6)


def test_a_linear_layer_used_twice():
    layer = MaskedLinear(6, 4, density=0.3).double()
    inputs = [torch.randn(3, 6).double(), torch.randn(2, 5, 6).double()]
    with AbsentTopK(layer, 100) as search:
        sum(layer(x).square().sum() for x in inputs).backward()
    dense = layer.to_dense()
    sum(dense(x).square().sum() for x in inputs).backward()
    (index, grad), wanted = search.result.weights[""], dense.weight.grad.flatten()
    assert sorted(index.tolist()) == (~layer.mask).flatten().nonzero().flatten().tolist()
    torch.testing.assert_close(grad.double(), wanted[index], rtol=1e-5, atol=1e-6)


class Sum(nn.Module):
    """Layers side by side: with inputs of 1 every gradient of the summed output is the same."""

    def __init__(self):
        super().__init__()
        self.first, self.second = MaskedLinear(5, 4, density=0.5), MaskedLinear(5, 4, density=0.25)
        self.first.set_bias_mask(torch.tensor([True, False, True, False]))

    def forward(self, x):
        return self.second(x) + self.first(x)


@pytest.mark.parametrize("k", (1, 9, 10, 11, 12, 13, 20, 27, 40))
def test_ties_go_to_the_earlier_layer_then_to_the_lower_position(k):
    model = Sum()
    with AbsentTopK(model, k) as search:
        model(torch.ones(3, 5)).sum().backward()
    weights = {name: absent(layer).tolist() for name, layer in (("first", model.first), ("second", model.second))}
    wanted = [(name, False, i) for name in ("first",) for i in weights[name]] + [("first", True, 1), ("first", True, 3)]
    wanted += [("second", False, i) for i in weights["second"]]
    assert found(search.result) == set(wanted[:k])


def test_kernels_as_candidates(batches):
    model = masked_network()
    with AbsentTopK(model, 9, granularity="kernel", biases=False) as search:
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    assert search.result.count == 9
    twin = DenseTwin(model, OPTIMISERS["momentum"])
    scores = []
    for name, (grad, _) in twin.absent_gradients(batches[:1]).items():
        absent = (~twin.masks[name]).flatten(2).sum(2) if grad.dim() == 4 else ~twin.masks[name]
        square = grad.flatten(2).square().sum(2) if grad.dim() == 4 else grad.square()
        score = (square / absent.clamp(min=1)).sqrt().flatten()
        scores += [(value, name, False, index) for index, value in enumerate(score.tolist())]
    assert found(search.result) == {entry[1:] for entry in sorted(scores, reverse=True)[:9]}


def test_non_finite_gradients_name_the_layer(batches):
    model = masked_network()
    x, y = batches[0]
    x = x.clone()
    x[0, 0, 0, 0] = torch.inf
    with pytest.raises(ArithmeticError, match="layer '0' has .* absent weights whose gradient is NaN or infinite"):
        with AbsentTopK(model, 5) as search:
            F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="result exists once"):
        _ = search.result
    with AbsentTopK(model, 5, allow_non_finite=True) as search:
        F.cross_entropy(model(x), y).backward()
    assert search.result.non_finite["0"] > 0


def test_the_context_leaves_nothing_behind(batches):
    model = masked_network()
    with pytest.raises(KeyError), AbsentTopK(model, 5):
        raise KeyError
    assert not any(m._forward_hooks for m in model.modules())
    twin = copy.deepcopy(model)
    with AbsentTopK(model, 5):
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    F.cross_entropy(twin(batches[0][0]), batches[0][1]).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    with AbsentTopK(model, 5) as search:
        pass
    assert search.result.count == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be an int of at least 1, got 0"),
        ({"k": 2.0}, ValueError, "k must be an int of at least 1, got 2.0"),
        ({"granularity": "row"}, ValueError, "granularity must be 'weight' or 'kernel', got 'row'"),
        ({"exclude": {"1": None}}, ValueError, "exclude names '1'"),
        ({"scale": {"0": 0.0}}, ValueError, r"scale\['0'\] must be positive and finite, got 0.0"),
        ({"model": nn.ReLU()}, ValueError, "no MaskedConv2d or MaskedLinear"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        AbsentTopK(**{"model": masked_network(), "k": 3, **options})


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda layer, opt: grow_(layer, layer.pattern.index[:1], 0.0, opt),
            ValueError,
            "grow_: index holds .*live already",
        ),
        (lambda layer, opt: prune_(layer, absent(layer)[:1], opt), ValueError, "prune_: index holds .*absent already"),
        (lambda layer, opt: grow_(layer, torch.tensor([999]), 0.0, opt), ValueError, r"must lie in \[0, 40\), got 999"),
        (lambda layer, opt: grow_(layer, torch.tensor([-1]), 0.0, opt), ValueError, r"must lie in \[0, 40\), got -1"),
        (lambda layer, opt: grow_(layer, absent(layer)[[0, 0]], 0.0, opt), ValueError, "more than once"),
        (lambda layer, opt: grow_(layer, torch.tensor([1.0]), 0.0, opt), TypeError, "integer tensor of one dimension"),
        (
            lambda layer, opt: grow_(layer, absent(layer)[:3], torch.zeros(2), opt),
            ValueError,
            r"one per index, \[3\], got \(2,\)",
        ),
        (
            lambda layer, opt: grow_(layer, absent(layer)[:1], 0.0, opt, bias_index=torch.tensor([0])),
            ValueError,
            "bias_index holds 0",
        ),
        (
            lambda layer, opt: grow_(layer, absent(layer)[:1], 0.0, other_optimizer()),
            ValueError,
            "optimizer does not hold",
        ),
        (lambda layer, opt: grow_(nn.Linear(2, 2), absent(layer)[:1]), TypeError, "layer must be a MaskedConv2d or"),
    ],
)
def test_a_bad_change_changes_nothing(change, error, message, packed):
    layer = MaskedLinear(10, 4, density=0.5)
    layer = layer.pack_() if packed else layer
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.randn(3, 10)).sum().backward()
    optimizer.step()
    before = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=message):
        change(layer, optimizer)
    torch.testing.assert_close((layer.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)


def absent(layer):
    return (~layer.mask).flatten().nonzero().flatten()


def other_optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)


@pytest.mark.parametrize("packed", (False, True))
def test_grown_weights_take_their_values_in_any_order(packed):
    layer = MaskedConv2d(3, 4, 3, density=0.5)
    layer = layer.pack_() if packed else layer
    old = layer.weight.detach().clone()
    index = absent(layer)[torch.randperm(54)[:10]]
    grow_(layer, index, torch.arange(10.0))
    assert torch.equal(layer.weight.flatten()[index], torch.arange(10.0))
    prune_(layer, index)
    assert torch.equal(layer.weight, old)
    grow_(layer, absent(layer), 2.0)
    assert layer.nnz == layer.pattern.numel
    prune_(layer, layer.pattern.index)
    assert layer.nnz == 0
    assert torch.equal(layer(torch.randn(1, 3, 3, 3)).flatten(), layer.bias)
