"""Growing one's own model: a plain stack with a grouped convolution, and a ResNet."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ilnas
from ilnas.config import METHODS, make_config
from ilnas.evolve import change_architecture
from ilnas.template import live_parameters, masked_layers
from ilnas_kernels import MaskedConv2d, convert, use_route


def own_model():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def loader(batches=6):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 10) for _ in range(batches)]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_ones_own_model_ends_on_the_budget(method):
    model = own_model()
    log = ilnas.grow(model, loader(), budget=400, epochs=4, method=method, move=0.2, interval=0.5, lr=0.05)
    assert live_parameters(model) == 400
    assert [entry["event"] for entry in log].count("epoch") == 4
    assert log[-1]["loss"] < log[0].get("loss", 10)
    assert all(entry["live"] <= 400 or method == "prune" for entry in log)
    model.eval()(torch.randn(2, 1, 8, 8))
    assert model[0].weight.shape == (8, 1, 3, 3)


def test_ones_own_optimizer_goes_on():
    model = own_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ilnas.grow(model, loader(), budget=400, epochs=2, optimizer=optimizer, granularity="weight")
    assert live_parameters(model) == 400
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert len(optimizer.state) == len(list(model.parameters()))


def test_own_models_that_cannot_grow():
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        ilnas.grow(nn.ReLU(), loader(), budget=10, epochs=1)
    with pytest.raises(ValueError, match="too few for 30 rows"):
        ilnas.grow(own_model(), loader(), budget=60, epochs=1)
    with pytest.raises(ValueError, match="unknown option 'colour'"):
        ilnas.grow(own_model(), loader(), budget=400, epochs=1, colour=1)
    with pytest.raises(ValueError, match="option 'nodes' has no meaning for a model"):
        ilnas.grow(own_model(), loader(), budget=400, epochs=1, nodes=2)
    with pytest.raises(ValueError, match="option 'widths' has no meaning for a model"):
        ilnas.grow(own_model(), loader(), budget=400, epochs=1, widths="8")
    model = own_model()
    with pytest.raises(ValueError):
        ilnas.grow(model, loader(), budget=400, epochs=1, nodes=2)
    assert type(model[0]) is nn.Conv2d  # nothing has been changed yet


@pytest.mark.parametrize("method", ["ilnas", "set"])
def test_the_normalisation_counts_if_asked(method):
    model = own_model()
    ilnas.grow(model, loader(), budget=400, epochs=3, method=method, count_norm=True, interval=0.5)
    assert live_parameters(model, count_norm=True) == 400
    assert live_parameters(model) == 400 - 2 * 8


def test_autocast_and_the_papers_preset():
    model, computed = own_model(), set()
    model[6].register_forward_hook(lambda _, __, out: computed.add(out.dtype))
    ilnas.grow(model, loader(), budget=800, epochs=2, preset="paper", autocast="bfloat16", alr=0.5)
    assert torch.bfloat16 in computed
    assert live_parameters(model) == 800


class ResidualBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), with a 1x1 convolution on the way past where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.past = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.past = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.past(x))


def resnet():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        ResidualBlock(8, 8, 1), ResidualBlock(8, 16, 2), ResidualBlock(16, 24, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def patterns_of(model):
    return {name: layer.pattern for name, layer in masked_layers(model)}


@pytest.mark.parametrize("method", ["ilnas", "set", "rigl", "prune"])
def test_a_resnet_ends_on_the_budget(method):
    model = resnet()
    names, dense = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    seen = []
    log = ilnas.grow(
        model, loader(), budget=2000, epochs=4, method=method, move=0.2, interval=0.5, lr=0.05, growth_end=0.5,
        on_event=lambda entry: seen.append(patterns_of(model)),
    )  # fmt: skip
    assert live_parameters(model) == 2000
    steps = [entry for entry in log if entry["event"] == "expansion"]
    assert len(steps) > 2
    assert not any("skipped" in entry for entry in steps)
    live = [entry["live"] for entry in steps]
    if method == "ilnas":
        assert live == sorted(live)
        assert live[0] < live[-1] == 2000
    elif method == "prune":
        assert live == sorted(live, reverse=True)
        assert 2000 < live[0] < dense
    else:
        assert set(live) == {2000}
        assert seen[0] != seen[-1]
    losses = [entry["loss"] for entry in log if entry["event"] == "epoch"]
    assert losses[-1] < losses[0]
    assert [name for name in model.state_dict() if not name.endswith("weight_mask")] == names
    assert isinstance(model[4].conv1, MaskedConv2d)
    assert model[4].conv1.stride == (2, 2)
    for _, layer in masked_layers(model):
        assert not layer.weight[~layer.mask].any()
    assert model.eval()(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_a_resnet_converted_before_goes_on_from_its_masks():
    model = convert(resnet(), density=0.1, generator=torch.Generator().manual_seed(3))
    before, live = patterns_of(model), live_parameters(model)
    ilnas.grow(model, loader(), budget=live + 300, epochs=2, base=1.0, move=0.0)
    assert live_parameters(model) == live + 300
    for name, layer in masked_layers(model):
        assert layer.mask.flatten()[before[name].index].all()


def test_growth_changes_nothing_at_the_moment_of_an_expansion():
    """The outputs in eval mode before and after one, on a ResNet that has been trained."""
    model = convert(resnet(), density=0.1, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, labels in loader():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    def backward(copy, which):
        x, labels = loader()[which]
        F.cross_entropy(copy(x), labels).backward()

    x = torch.cat([x for x, _ in loader(8)])
    with use_route("sparse"):
        before, live = model.eval()(x), live_parameters(model)
        change_architecture(
            model, optimizer, make_config({"move": 0.0}), backward, live + 400, moved=0, lr=0.1, progress=0, step=0
        )
        assert live_parameters(model) == live + 400
        assert torch.equal(model.eval()(x), before)
