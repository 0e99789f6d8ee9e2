"""The layers: drop-in behaviour, the two storage forms, saving and loading, absent weights that stay absent."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_sum_close
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from ilnas_kernels import _C, MaskedConv2d, MaskedLinear, Pattern, convert, masked_conv2d, masked_linear, use_route
from ilnas_kernels.nn import MaskedLayer


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3, stride=2, groups=2, bias=False),
        nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip


def masked_network(density=0.4, packed=False):
    model = convert(network(), density=density, generator=torch.Generator().manual_seed(1))
    for layer in masked_layers(model):
        if packed:
            layer.pack_()
    return model


def masked_layers(model):
    return [m for m in model.modules() if isinstance(m, MaskedLayer)]


@pytest.fixture
def x():
    return torch.randn(5, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", ("nn.functional.conv2d", "nn.functional.linear"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_torchs_sample_inputs_of_the_functions(name, dtype):
    info = next(op for op in op_db if op.name == name)
    ours = masked_conv2d if name.endswith("conv2d") else masked_linear
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        weight = sample.args[0]
        if weight.dim() < 2:
            continue  # linear with a vector for a weight is no layer
        arguments = dict(zip(("bias", "stride", "padding", "dilation", "groups"), sample.args[1:], strict=False))
        arguments |= sample.kwargs
        groups = arguments.get("groups", 1)
        pattern = Pattern.full(weight.shape, groups)
        leaves = [t for t in (sample.input, weight, arguments.get("bias")) if t is not None]
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        for route in ("sparse", "dense"):
            with use_route(route):
                out = ours(sample.input, weight, pattern, **arguments)
                found = torch.autograd.grad(out.square().sum(), leaves)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(found, wanted, atol=1e-3 if dtype == torch.float32 else 1e-8, rtol=1e-4)
        count += 1
    assert count >= 5


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("cls", (nn.Conv2d, nn.Linear))
def test_torchs_module_inputs(cls):
    info = next(m for m in module_db if m.module_cls is cls)
    ours = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}[cls]
    inputs = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=True, training=True)
    assert len(inputs) >= 2
    for given in inputs:
        dense = cls(*given.constructor_input.args, **given.constructor_input.kwargs)
        masked = ours(*given.constructor_input.args, **given.constructor_input.kwargs)
        masked.load_state_dict(dense.state_dict(), strict=True)
        arguments, named = given.forward_input.args, given.forward_input.kwargs
        expected = dense(*arguments, **named)
        assert torch.equal(masked(*arguments, **named), expected)
        with use_route("sparse"):
            torch.testing.assert_close(masked(*arguments, **named), expected)


@pytest.mark.parametrize("mode", ("zeros", "reflect", "replicate", "circular"))
@pytest.mark.parametrize("padding", (1, (2, 1), "same", "valid"), ids=str)
@pytest.mark.parametrize("route", ("sparse", "dense"))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_every_padding(mode, padding, route, x):
    dense = nn.Conv2d(3, 4, (3, 2), padding=padding, padding_mode=mode)
    layer = MaskedConv2d.from_dense(dense, torch.rand(dense.weight.shape) < 0.5)
    with use_route(route):
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        torch.testing.assert_close(layer(x[0]), layer.to_dense()(x[0]))


def test_is_a_torch_layer_with_exactly_the_density():
    layer = MaskedConv2d(5, 7, 3, density=0.3, generator=torch.Generator().manual_seed(1))
    assert isinstance(layer, nn.Conv2d)
    assert layer.nnz == round(0.3 * 315) == layer.mask.sum() == layer.weight.count_nonzero()
    assert layer.density == layer.nnz / 315
    again = MaskedConv2d(5, 7, 3, density=0.3, generator=torch.Generator().manual_seed(1))
    assert layer.pattern == again.pattern
    linear = MaskedLinear(5, 4)
    assert isinstance(linear, nn.Linear)
    assert linear.density == 1.0
    assert "density=1" in repr(linear)


def test_an_all_live_layer_is_torchs(x):
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 4, 3)
    torch.manual_seed(0)
    layer = MaskedConv2d(3, 4, 3)
    assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1),
    ],
    ids=("sgd", "adamw", "rmsprop"),
)
@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_absent_weights_stay_exactly_zero(optimiser, packed, route, x):
    model = masked_network(packed=packed)
    optimizer = optimiser(model.parameters())
    with use_route(route):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for layer in masked_layers(model):
        assert layer.weight[~layer.mask].count_nonzero() == 0
        assert layer.weight[layer.mask].count_nonzero() == layer.nnz


@pytest.mark.parametrize("route", ("sparse", "dense"))
@pytest.mark.parametrize("write", (nn.init.kaiming_normal_, lambda w: w.data.fill_(torch.nan)), ids=("init", "nan"))
def test_what_others_write_into_absent_weights_does_not_matter(write, route, x):
    layer = MaskedConv2d(3, 4, 3, density=0.4)
    live = torch.randn(layer.nnz)
    write(layer.weight)
    with torch.no_grad():
        layer.weight[layer.mask] = live
    with use_route(route):
        out = layer(x)
        out.sum().backward()
    clean = layer.to_dense()
    torch.testing.assert_close(out, clean(x))
    assert clean.weight[~layer.mask].count_nonzero() == 0
    assert layer.weight.grad[~layer.mask].count_nonzero() == 0


@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_packed_and_dense_train_alike(route, x):
    losses = []
    for packed in (False, True):
        model = masked_network(packed=packed)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        with use_route(route):
            for _ in range(4):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert losses[:4] == losses[4:]
    layer = masked_layers(model)[0]
    assert layer.values.shape == layer.values.grad.shape == (layer.nnz,)
    state = optimizer.state[layer.values]["momentum_buffer"]
    assert state.shape == (layer.nnz,)


def test_packing_and_unpacking_keep_weights_gradients_and_order(x):
    layer = MaskedConv2d(3, 4, 3, density=0.4)
    layer(x).sum().backward()
    weight, grad, names = layer.weight.detach().clone(), layer.weight.grad.clone(), ["weight", "bias"]
    assert [n for n, _ in layer.named_parameters()] == names
    assert layer.pack_() is layer
    assert layer.packed
    assert [n for n, _ in layer.named_parameters()] == ["values", "bias"]
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.values.grad, grad[layer.mask])
    layer.weight.sum().backward()  # the dense reading is differentiable
    assert torch.equal(layer.values.grad, grad[layer.mask] + 1)
    layer.unpack_()
    assert [n for n, _ in layer.named_parameters()] == names
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("source", (False, True))
@pytest.mark.parametrize("target", (False, True))
def test_either_form_loads_into_either_form(source, target, x):
    saved = masked_network(0.3, source)
    masked_layers(saved)[0].set_bias_mask(torch.tensor([True, False] * 3))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = masked_network(0.6, target)
    parameters = list(loaded.parameters())
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert all(a is b for a, b in zip(parameters, loaded.parameters(), strict=True))
    for a, b in zip(masked_layers(saved), masked_layers(loaded), strict=True):
        assert a.pattern == b.pattern
        assert torch.equal(a.weight, b.weight)
        assert (a.bias_mask is None) == (b.bias_mask is None)
        assert a.bias_mask is None or torch.equal(a.bias_mask, b.bias_mask)
    torch.testing.assert_close(loaded(x), saved(x))
    loaded(x).sum().backward()


def test_the_mask_is_saved_as_bits_and_loads_as_bool():
    layer = MaskedLinear(10, 3, density=0.5)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "weight_mask"]
    assert state["weight_mask"].dtype == torch.uint8
    assert state["weight_mask"].shape == (4,)
    mask = torch.rand(3, 10) < 0.5
    layer.load_state_dict({**state, "weight_mask": mask})
    assert torch.equal(layer.mask, mask)
    assert layer.weight[~mask].count_nonzero() == 0


@pytest.mark.parametrize("packed", (False, True))
def test_a_dense_checkpoint_loads_strictly_and_leaves_the_mask(packed, x):
    model = masked_network(packed=packed)
    masks = [layer.mask for layer in masked_layers(model)]
    dense = network()
    nn.init.normal_(dense[0].weight)
    model.load_state_dict(dense.state_dict(), strict=True)
    for layer, mask, module in zip(masked_layers(model), masks, (dense[0], dense[2], dense[4]), strict=True):
        assert torch.equal(layer.mask, mask)
        assert torch.equal(layer.weight, torch.where(mask, module.weight, 0))


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_mask": torch.zeros(3, dtype=torch.uint8)}, "4 bytes"),
        ({"weight_mask": torch.ones(2, 10, dtype=torch.bool)}, r"weight's shape \(3, 10\), got \(2, 10\)"),
        ({"weight_mask": torch.ones(3, 10)}, "bool tensor or a Pattern, got dtype torch.float32"),
        ({"weight": torch.ones(3, 9)}, r"\(3, 9\)|\[3, 9\]"),
        ({"bias_mask": torch.ones(4, dtype=torch.bool)}, "bias_mask must be bool and of the bias's shape"),
    ],
)
def test_a_bad_checkpoint_changes_nothing(packed, change, message):
    layer = MaskedLinear(10, 3, density=0.5)
    state = layer.state_dict()
    other = MaskedLinear(10, 3, density=0.5)
    other = other.pack_() if packed else other
    before = {k: v.clone() for k, v in other.state_dict().items() if k != "bias"}
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict({**state, **change})
    for key, value in before.items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("packed", (False, True))
def test_strict_loading_reports_what_is_missing_and_unknown(packed):
    layer = MaskedLinear(4, 3, density=0.5)
    layer = layer.pack_() if packed else layer
    with pytest.raises(RuntimeError, match=r"Missing key.*\"(weight|values)\""):
        layer.load_state_dict({"bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="Unexpected key.*scale"):
        layer.load_state_dict({**layer.state_dict(), "scale": torch.zeros(1)})


@pytest.mark.parametrize("packed", (False, True))
def test_copies_moves_and_pickles(packed, x):
    model = masked_network(packed=packed)
    masked_layers(model)[0].set_bias_mask(torch.tensor([True, False] * 3))
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), expected)
    meta = copy.deepcopy(model).to("meta")
    meta.to_empty(device="cpu")
    meta.load_state_dict(model.state_dict())
    assert torch.equal(meta(x), expected)
    with torch.device("meta"):
        layer = MaskedConv2d(3, 4, 3, density=0.5)
    assert layer.weight.is_meta
    assert layer.nnz == 54


@pytest.mark.parametrize("packed", (False, True))
def test_set_mask_keeps_what_stays_live(packed):
    layer = MaskedConv2d(3, 4, 3, density=0.5)
    layer = layer.pack_() if packed else layer
    old_mask, old_weight = layer.mask, layer.weight.detach().clone()
    mask = torch.rand(old_mask.shape) < 0.5
    layer.set_mask(mask)
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, torch.where(mask & old_mask, old_weight, 0))
    layer(torch.randn(2, 3, 5, 5)).sum().backward()


@pytest.mark.parametrize("route", ("sparse", "dense"))
def test_absent_biases(route, x):
    layer = MaskedConv2d(3, 4, 3, density=0.5)
    mask = torch.tensor([True, False, True, False])
    layer.set_bias_mask(mask)
    assert layer.bias[~mask].count_nonzero() == 0
    nn.init.constant_(layer.bias, 7.0)
    with use_route(route):
        out = layer(x)
        out.sum().backward()
    assert layer.bias.grad[~mask].count_nonzero() == 0
    torch.testing.assert_close(out, F.conv2d(x, layer.weight, torch.where(mask, 7.0, 0.0)))
    assert torch.equal(layer.state_dict()["bias_mask"], mask)
    layer.set_bias_mask(None)
    assert layer.bias_mask is None
    assert "bias_mask" not in layer.state_dict()


def test_converting_keeps_parameters_hooks_and_outputs(x):
    model = network()
    expected, parameters, calls = model(x), list(model.parameters()), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert convert(model) is model
    assert torch.equal(model(x), expected)
    assert calls == [1]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert len(masked_layers(model)) == 3


def test_converting_with_masks_densities_and_a_filter(x):
    mask = torch.rand(6, 3, 3, 3) < 0.5
    model = convert(network(), density=0.2, masks={"0": mask}, filter=lambda name, _: name != "4")
    assert torch.equal(model[0].mask, mask)
    assert model[2].nnz == round(0.2 * model[2].weight.numel())
    assert type(model[4]) is nn.Linear
    assert isinstance(convert(nn.Linear(3, 2)), MaskedLinear)
    attention = convert(nn.MultiheadAttention(4, 2), density=0.5)
    assert attention(*[torch.randn(3, 4)] * 3)[0].shape == (3, 4)


def test_channels_last_weights(x):
    layer = MaskedConv2d(3, 4, 3, density=0.5)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    for route in ("sparse", "dense"):
        layer.weight.grad = None
        with use_route(route):
            out = layer(x)
        out.sum().backward()
        torch.testing.assert_close(out, expected)
        assert layer.weight.grad[~layer.mask].count_nonzero() == 0
        assert torch.equal(copy.deepcopy(layer).pack_().weight, layer.weight)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MaskedLinear(3, 2, density=1.1), ValueError, r"density must lie in \[0, 1\], got 1.1"),
        (lambda: MaskedLinear(3, 2, density=-0.1), ValueError, r"density must lie in \[0, 1\], got -0.1"),
        (lambda: MaskedLinear(3, 2, mask=torch.ones(2, 3)), TypeError, "mask must be a bool tensor.*torch.float32"),
        (lambda: MaskedLinear(3, 2, mask=torch.ones(3, 2) > 0), ValueError, r"weight's shape \(2, 3\), got \(3, 2\)"),
        (lambda: MaskedLinear(3, 2, mask=torch.ones(2, 3) > 0, density=0.5), ValueError, "not both"),
        (lambda: MaskedConv2d(2, 2, 1, mask=Pattern.full((2, 2, 1, 1), 2)), ValueError, "Pattern of groups=2"),
        (lambda: MaskedConv2d.from_dense(nn.Linear(1, 1)), TypeError, "module must be a Conv2d"),
        (lambda: MaskedLinear(3, 2, bias=False).set_bias_mask(torch.ones(2) > 0), ValueError, "no bias"),
        (lambda: MaskedLinear(3, 2).set_bias_mask(torch.ones(3) > 0), ValueError, r"must be \(2,\), got \(3,\)"),
        (lambda: MaskedLinear(3, 2).set_bias_mask(torch.ones(2)), TypeError, "bool tensor or None"),
        (lambda: convert(network(), density=2), ValueError, "density must lie"),
        (lambda: convert(network(), masks={"1": torch.ones(1) > 0}), ValueError, "masks names '1'"),
        (lambda: convert(network(), masks={"0": torch.ones(6, 3, 3, 3)}), TypeError, r"masks\['0'\] must be a bool"),
        (lambda: convert(network(), masks={"0": torch.ones(1) > 0}), ValueError, "weight's shape"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("density", (None, 0.6))
@pytest.mark.parametrize("lead", ((64,), (4, 16)), ids=str)
def test_large_dense_linear_by_the_faster_library(density, lead, monkeypatch):
    """Where MKL is slower the dense route takes oneDNN's product, all-live layers included."""
    monkeypatch.setattr(_C, "mkl_is_slower", True)
    layer = MaskedLinear(512, 513, density=density)
    x = torch.randn(*lead, 512, requires_grad=True)
    assert layer.call().outruns_torch(x) == torch.backends.mkldnn.is_available()
    out = layer(x)
    grad_out = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, layer.weight, layer.bias), grad_out)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    spec = F.linear(exact[0], exact[1] * layer.mask, exact[2])
    wanted = torch.autograd.grad(spec, exact, grad_out.double())
    sizes = [t.detach().abs().requires_grad_() for t in exact]
    size = F.linear(sizes[0], sizes[1], sizes[2])
    size_gradients = torch.autograd.grad(size, sizes, grad_out.double().abs())
    assert_sum_close(out.detach(), spec.detach(), size.detach(), 513)
    for got, want, magnitude, terms in zip(found, wanted, size_gradients, (513, 64, 64), strict=True):
        assert_sum_close(got, want * layer.mask if want.shape == layer.mask.shape else want, magnitude, terms)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), out)


def test_all_live_linear_knows_vmap_and_second_derivatives(monkeypatch):
    monkeypatch.setattr(_C, "mkl_is_slower", True)
    layer, x = MaskedLinear(512, 513), torch.randn(3, 64, 512)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    x = x[0]
    (first,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), layer.weight)
    wanted = 2 * (x * x.sum(1, keepdim=True)).sum(0).expand(513, 512)  # of 2 * sum over b of out[b, o] * x[b, i]
    torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-2)
