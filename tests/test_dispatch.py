"""Routes, their reasons, calibration and its file, instruction sets."""

import json

import pytest
import torch

from ilnas_kernels import (
    MaskedConv2d,
    MaskedLinear,
    _crossovers,
    calibrate,
    calibration,
    current_instruction_set,
    dispatch,
    instruction_set,
    instruction_sets,
    to_batch_last,
    use_route,
)

CPU = torch.device("cpu")


@pytest.fixture
def cache_file(tmp_path, monkeypatch):
    """An empty cache of crossovers."""
    path = tmp_path / "folder" / "crossovers.json"
    monkeypatch.setattr(_crossovers, "cache_file", lambda: path)
    small = {"conv": ((2, 8, 8, 8),), "conv1x1": ((2, 8, 8, 8),), "linear": ((8, 32, 32),)}
    monkeypatch.setattr(calibration, "_SHAPES", small)
    _crossovers.forget()
    yield path
    _crossovers.forget()


def routes(layer, shape):
    return [choice.route for choice in layer.explain(shape).choices]


def test_density_decides():
    assert routes(MaskedConv2d(8, 8, 3, density=0.05), (2, 8, 9, 9)) == ["sparse"] * 3
    assert routes(MaskedConv2d(8, 8, 3, density=0.99), (2, 8, 9, 9)) == ["dense"] * 3
    assert routes(MaskedLinear(50, 8, density=0.02), (4, 50)) == ["sparse"] * 3


def test_explanations_say_why():
    layer = MaskedConv2d(8, 8, 3, density=0.05)
    text = str(layer.explain((2, 8, 9, 9)))
    assert [line.split()[0] for line in text.splitlines()] == ["forward", "grad_input", "grad_weight"]
    assert "density 0.0503" in text
    assert "below the crossover (default table)" in text
    assert "not below the crossover" in str(MaskedConv2d(8, 8, 3, density=0.99).explain((2, 8, 9, 9)))
    assert "all weights are live" in str(MaskedLinear(3, 4).explain((2, 3)))
    assert "no sparse kernels for torch.float32 on meta" in str(MaskedLinear(3, 4, device="meta").explain((2, 3)))
    with use_route("sparse"):
        assert "forced by use_route" in str(MaskedLinear(3, 4).explain((2, 3)))
    with pytest.raises(ValueError, match=r"x must be \[N, 8, H, W\]"):
        layer.explain((2, 7, 9, 9))
    with pytest.raises(ValueError, match="too small for kernel"):
        layer.explain((2, 8, 2, 9))


@pytest.mark.parametrize("operation", range(3))
def test_each_operation_takes_its_own_route(operation, cache_file):
    """Whatever mixture of routes, the numbers are those of the dense route."""
    crossovers = [0.0] * 3
    crossovers[operation] = 1.0
    cache_file.parent.mkdir()
    cache_file.write_text(json.dumps({_crossovers.machine_key(CPU): {"cpu/conv": crossovers}}))
    layer = MaskedConv2d(4, 6, 3, padding=1, density=0.4).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected = ["sparse" if i == operation else "dense" for i in range(3)]
    assert routes(layer.float(), x.shape) == expected
    layer = layer.double()
    assert routes(layer, x.shape) == expected
    results = []
    for forced in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with use_route("dense") if forced else torch.enable_grad():
            out = layer(leaf)
            out.square().sum().backward()
        results.append((out.detach(), leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    torch.testing.assert_close(*results)


def test_calibration_is_kept_and_read(cache_file):
    found = calibrate(kinds=("linear",), seconds=0.02)
    assert list(found) == ["cpu/linear"]
    assert all(0.0 <= crossover <= 0.8 for crossover in found["cpu/linear"])
    assert json.loads(cache_file.read_text())[_crossovers.machine_key(CPU)] == {"cpu/linear": list(found["cpu/linear"])}
    crossovers = _crossovers.crossovers_for(CPU, "linear", torch.float32, False)
    assert crossovers == (*found["cpu/linear"], "calibrated on this machine")
    assert _crossovers.crossovers_for(CPU, "conv", torch.float32, False).source == "default table"
    more = calibrate(kinds=("conv1x1",), dtypes=(torch.float64,), seconds=0.02)
    assert list(more) == ["cpu/conv1x1/float64", "cpu/conv1x1/batch-last/float64"]
    assert set(json.loads(cache_file.read_text())[_crossovers.machine_key(CPU)]) == {"cpu/linear", *more}


@pytest.mark.parametrize("content", ("", "[1, 2]", '{"torch', '{"other machine": {"cpu/linear": [9, 9, 9]}}'))
def test_a_file_that_is_not_ours_is_as_none(cache_file, content):
    cache_file.parent.mkdir()
    cache_file.write_text(content)
    assert _crossovers.crossovers_for(CPU, "linear", torch.float32, False).source == "default table"


def test_measuring_without_keeping(cache_file):
    calibrate(kinds=("linear",), seconds=0.02, store=False)
    assert not cache_file.exists()


def test_crossing():
    densities = (0.1, 0.3, 0.5)
    assert calibration.crossing(densities, (0.5, 0.75, 1.25)) == pytest.approx(0.4)
    assert calibration.crossing(densities, (0.5, 0.6, 0.7)) == 0.5
    assert calibration.crossing(densities, (1.2, 0.6, 0.7)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("pool",)}, "kinds must be among .*got 'pool'"),
        ({"seconds": 0}, "seconds must be positive, got 0"),
        ({"device": "meta"}, "no sparse kernels for torch.float32 on meta here"),
    ],
)
def test_bad_calibration(arguments, message, cache_file):
    with pytest.raises(ValueError, match=message):
        calibrate(**arguments)


def test_instruction_sets_nest_and_are_left():
    best = current_instruction_set()
    assert instruction_sets()[best]
    with instruction_set("baseline"):
        assert current_instruction_set() == "baseline"
        with instruction_set(best):
            assert current_instruction_set() == best
        assert current_instruction_set() == "baseline"
    assert current_instruction_set() == best


def test_backward_keeps_the_instruction_set_of_its_forward():
    layer, x = MaskedLinear(64, 32, density=0.3), torch.randn(33, 64)

    def gradient(around_backward):
        layer.zero_grad()
        with use_route("sparse"), instruction_set("baseline"):
            loss = layer(x).square().sum()
        with instruction_set(around_backward):
            loss.backward()
        return layer.weight.grad.clone()

    assert torch.equal(gradient("baseline"), gradient(current_instruction_set()))


def test_batch_last_has_its_own_crossovers():
    layer, x = MaskedConv2d(8, 8, 3, density=0.7), torch.randn(2, 8, 9, 9)
    keys = [_crossovers.table_key("cpu", "conv", torch.float32, last) for last in (False, True)]
    assert keys == ["cpu/conv", "cpu/conv/batch-last"]
    assert dispatch.converts_layout(layer.call(), to_batch_last(x))
    assert not dispatch.converts_layout(layer.call(), x)
    torch.testing.assert_close(layer(to_batch_last(x)), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("in_channels", "route"), [(3, "sparse"), (16, "sparse"), (17, "dense")])
def test_few_inputs_are_not_worth_a_change_of_layout(in_channels, route):
    layer = MaskedConv2d(in_channels, 20, 3, padding=1).pack_()
    x = torch.randn(5, in_channels, 6, 7)
    assert set(dispatch.routes_for(layer.call(), to_batch_last(x))) == {route}
    assert set(dispatch.routes_for(layer.call(), x)) == {"dense"}
    explanation = dispatch.explain(layer.call(), to_batch_last(x)).choices[0]
    assert explanation.route == route
    assert ("few weights" if route == "sparse" else "all weights are live") in explanation.why
    torch.testing.assert_close(layer(to_batch_last(x)), layer(x), atol=1e-5, rtol=1e-5)
