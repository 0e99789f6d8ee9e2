"""Which route a CUDA device takes, with the device made up: its properties, what was built, and what Triton says."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ilnas_kernels import Pattern, _blocked_topk, _crossovers, _cuda_routes, calibrate, calibration, dispatch, use_route
from ilnas_kernels._calls import ConvCall, LinearCall

DEVICE = torch.device("cuda", 0)
BUILT = "built for 7.5;8.0;8.6;9.0+PTX"
NOT_BUILT = "not built: no CUDA toolkit (nvcc and cuda_runtime.h) found"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes up the machine: machine(capability, built=..., triton=...)."""

    def forget():
        _cuda_routes.why_not.cache_clear()
        dispatch._why_not_triton.cache_clear()
        _crossovers.forget()

    def make(capability, built=BUILT, triton=True):
        found = [name for name, there in (("ilnas_kernels._C_cuda", built == BUILT), ("triton", triton)) if there]
        for module in (_cuda_routes, dispatch):
            monkeypatch.setattr(module, "find_spec", lambda name: name if name in found else None)
        monkeypatch.setattr(_cuda_routes, "_C", SimpleNamespace(cuda_outcome=built))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
        monkeypatch.setattr(_crossovers, "cache_file", lambda: tmp_path / "crossovers.json")
        forget()

    yield make
    monkeypatch.undo()
    forget()


def image(dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(4, 16, 8, 8, dtype=dtype, device=DEVICE)


def conv(density):
    return ConvCall(Pattern.random((16, 16, 3, 3), density), (1, 1), (1, 1, 1, 1), (1, 1))


def routes(x, density):
    explanation = dispatch.explain(conv(density), x)
    assert tuple(c.route for c in explanation.choices) == tuple(dispatch.routes_for(conv(density), x))
    return [choice.route for choice in explanation.choices], str(explanation)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_density_decides_by_compute_capability(machine, capability, dtype):
    machine(capability)
    expected = _cuda_routes.predicted("conv", dtype, capability)
    for density in (0.005, 0.05, 0.12, 0.5):
        found, text = routes(image(dtype), density)
        density = conv(density).pattern.density
        assert found == ["cuda" if density < crossover else "dense" for crossover in expected]
        assert text.count(_cuda_routes.SOURCE) == 3
    with use_route("sparse"):
        assert routes(image(dtype), 0.9)[0] == ["cuda"] * 3


def test_dense_is_kept_where_it_is_faster(machine):
    """Turing's FMA kernels win from a density at which Hopper's dense tensor cores are far ahead."""
    machine((7, 5))
    assert routes(image(), 0.1)[0] == ["cuda"] * 3
    assert routes(image(torch.float16), 0.15)[0] == ["cuda", "cuda", "dense"]
    machine((9, 0))
    assert routes(image(), 0.1)[0] == ["dense"] * 3
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert routes(image(), 0.1)[0] == ["cuda"] * 3
    assert routes(image(torch.float16), 0.015)[0] == ["cuda", "cuda", "dense"]
    assert routes(image(torch.float16), 0.05)[0] == ["dense"] * 3


def test_an_older_device_takes_the_next_route(machine):
    machine((7, 0))
    found, text = routes(image(), 0.005)
    assert found == ["triton"] * 3
    machine((7, 0), triton=False)
    found, text = routes(image(), 0.005)
    assert found == ["dense"] * 3
    assert "the CUDA kernels need compute capability 7.5, A GPU has 7.0, and Triton is not installed" in text
    assert "absent_topk computes the dense gradient in blocks" in text


def test_kernels_not_built_or_built_for_other_devices(machine):
    machine((8, 6), built=NOT_BUILT)
    assert routes(image(), 0.005)[0] == ["triton"] * 3
    machine((8, 6), built=NOT_BUILT, triton=False)
    found, text = routes(image(), 0.005)
    assert found == ["dense"] * 3
    assert f"the CUDA kernels are {NOT_BUILT}, and Triton is not installed" in text
    with use_route("sparse"):
        assert routes(image(), 0.005)[0] == ["dense"] * 3


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 5), "built for 7.5", True),
        ((8, 9), "built for 7.5;8.6", True),
        ((8, 0), "built for 8.6", False),
        ((9, 0), "built for 7.5 8.9", False),
        ((9, 0), "built for 7.5 8.9+PTX", True),
        ((12, 0), "built for 7.5;8.0;8.6;9.0+PTX", True),
        ((12, 0), "built for 7.5+PTX;9.0", True),
        ((10, 0), "built for 9.0;10.0", True),
    ],
)
def test_what_was_built_for_a_device(capability, built_for, runs):
    assert _cuda_routes.runs_on(capability, built_for) is runs


def test_float64_is_dense(machine):
    machine((9, 0))
    found, text = routes(image(torch.float64), 0.005)
    assert found == ["dense"] * 3 and "no sparse kernels for torch.float64 on cuda here" in text


def test_absent_topk_takes_what_there_is(machine):
    pattern = Pattern.random((16, 16, 3, 3), 0.1)

    def chosen(dtype, pattern=pattern):
        function, x, grad_out = dispatch.topk_route(image(dtype), image(dtype), pattern)
        assert x.dtype == grad_out.dtype
        return function, x.dtype

    machine((7, 5))
    assert chosen(torch.bfloat16) == (torch.ops.ilnas.absent_topk, torch.bfloat16)
    assert chosen(torch.float64) == (torch.ops.ilnas.absent_topk, torch.float32)
    assert chosen(torch.float32, SimpleNamespace(numel=2**32 - 2))[0] is torch.ops.ilnas.absent_topk
    assert chosen(torch.float32, SimpleNamespace(numel=2**32 - 1))[0] is _blocked_topk.absent_topk
    machine((7, 5), built=NOT_BUILT)
    assert chosen(torch.float16) == (dispatch._topk_triton, torch.float16)
    assert chosen(torch.bfloat16) == (dispatch._topk_triton, torch.float32)
    assert chosen(torch.float32, SimpleNamespace(numel=2**31))[0] is _blocked_topk.absent_topk
    machine((7, 5), built=NOT_BUILT, triton=False)
    assert chosen(torch.float16) == (_blocked_topk.absent_topk, torch.float16)


def test_linear_layers_have_their_own_crossovers(machine):
    machine((7, 5))
    with FakeTensorMode():
        x = torch.empty(8, 64, device=DEVICE)
    for density, expected in ((0.05, "cuda"), (0.1, "dense")):
        assert dispatch.routes_for(LinearCall(Pattern.random((32, 64), density)), x).forward == expected


def test_calibrated_numbers_hold_for_one_device(machine):
    machine((7, 5))
    _crossovers.write(DEVICE, {"cuda/conv": (0.4, 0.3, 0.0)})
    assert _crossovers.crossovers_for(DEVICE, "conv", torch.float32, False) == (
        0.4, 0.3, 0.0, "calibrated on this machine"
    )  # fmt: skip
    assert routes(image(), 0.2)[0] == ["cuda", "cuda", "dense"]
    assert _crossovers.crossovers_for(DEVICE, "conv", torch.float16, False).source == _cuda_routes.SOURCE
    assert _crossovers.crossovers_for(torch.device("cpu"), "conv", torch.float32, False).source == "default table"
    (key,) = json.loads(_crossovers.cache_file().read_text())
    assert key.endswith("A GPU")


def test_calibrate_measures_a_gpu_at_its_densities(machine, monkeypatch):
    machine((8, 0))
    seen = []

    def ratios(kind, shape, density, device, dtype, batch_last, seconds):
        seen.append((kind, density, device, dtype, batch_last))
        return density / 0.04, density / 0.015, density * 1000

    monkeypatch.setattr(calibration, "_ratios", ratios)
    found = calibrate(device=DEVICE, dtypes=(torch.float16,), kinds=("conv",))
    assert found == {"cuda/conv/float16": (0.04, 0.015, 0.0)}
    assert {s[2:] for s in seen} == {(DEVICE, torch.float16, False)}
    assert _crossovers.crossovers_for(DEVICE, "conv", torch.float16, False).forward == 0.04
    machine((7, 0), triton=False)
    with pytest.raises(ValueError, match=r"calibrate: there are no sparse kernels.*need compute capability 7.5"):
        calibrate(device=DEVICE)
