"""Calls of the CUDA operators with the device made up: forms kept between calls, and running out of memory."""

from types import SimpleNamespace

import pytest
import torch

from ilnas_kernels import (
    MaskedConv2d,
    MaskedLinear,
    Pattern,
    _calls,
    _condensed_forms,
    absent_topk,
    dispatch,
    use_route,
)
from ilnas_kernels._condensed_forms import kept_form

GEOMETRY = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
OUT_OF_MEMORY = (
    "CUDA out of memory. masked_conv2d tried to allocate 512 bytes on device 0, where 8 of 99 bytes are free"
)


class Stream:
    def __init__(self):
        self.waited_for = []
        self.done = False

    def record_event(self):
        return SimpleNamespace(query=lambda: self.done)

    def wait_event(self, event):
        self.waited_for.append(event)


@pytest.fixture
def gpu(monkeypatch):
    """The current stream, whether it is being captured, and the forms built, by the size of their input."""
    gpu = SimpleNamespace(stream=Stream(), capturing=False, built=[])

    def build(row_ptr, col, x_size, out_channels, *geometry_and_backward):
        gpu.built.append((x_size, row_ptr, col, geometry_and_backward[-1]))
        return torch.full((3,), len(gpu.built), dtype=torch.uint8)

    operators = SimpleNamespace(condensed_form=SimpleNamespace(default=build))
    monkeypatch.setattr(_condensed_forms, "torch", FakeTorch(gpu, operators))
    return gpu


class FakeTorch:
    """torch, but for its current stream and the operator that builds a form."""

    def __init__(self, gpu, operators):
        self.ops = SimpleNamespace(ilnas=operators)
        self.cuda = SimpleNamespace(
            current_stream=lambda device=None: gpu.stream, is_current_stream_capturing=lambda: gpu.capturing
        )

    def __getattr__(self, name):
        return getattr(torch, name)


def kept(pattern, batch=4, *, backward=False, dtype=torch.float16):
    x = torch.empty(batch, 8, 5, 5, dtype=dtype)
    return kept_form(pattern, x, x.shape, GEOMETRY, backward=backward)


def test_a_form_is_built_once_for_a_size_and_direction(gpu):
    pattern = Pattern.random((6, 8, 3, 3), 0.2)
    first = kept(pattern)
    assert kept(pattern) is first and len(gpu.built) == 1
    assert kept(pattern, backward=True) is not first
    assert kept(pattern, batch=5) is not first
    assert [(size[0], backward) for size, _, _, backward in gpu.built] == [(4, False), (4, True), (5, False)]
    assert gpu.built[0][1] is pattern.row_ptr and gpu.built[1][1] is pattern.t_row_ptr
    assert kept(Pattern.random((6, 8, 3, 3), 0.2)) is not first
    assert kept(pattern, dtype=torch.float32) is None


def test_only_so_many_sizes_are_kept(gpu):
    pattern = Pattern.random((6, 8, 3, 3), 0.2)
    for batch in range(1, 20):
        kept(pattern, batch)
    assert len(pattern._plans["condensed forms"]) == _condensed_forms._MOST_KEPT
    kept(pattern, 19)
    assert len(gpu.built) == 19
    kept(pattern, 1)
    assert len(gpu.built) == 20


def test_another_stream_waits_until_the_form_is_known_to_be_done(gpu):
    pattern, first = Pattern.random((6, 8, 3, 3), 0.2), gpu.stream
    form = kept(pattern)
    assert kept(pattern) is form and not first.waited_for
    gpu.stream = second = Stream()
    assert kept(pattern) is form and len(second.waited_for) == 1
    first.done = True
    assert kept(pattern) is form and len(second.waited_for) == 1


def test_a_captured_graph_takes_a_form_that_is_done_and_builds_none(gpu):
    pattern, first = Pattern.random((6, 8, 3, 3), 0.2), gpu.stream
    gpu.capturing = True
    assert kept(pattern) is None and not gpu.built
    gpu.capturing = False
    form = kept(pattern)
    gpu.capturing = True
    assert kept(pattern) is None
    gpu.capturing, first.done = False, True
    assert kept(pattern) is form
    gpu.capturing, gpu.stream = True, Stream()
    assert kept(pattern) is form and not gpu.stream.waited_for


@pytest.fixture
def fails(monkeypatch):
    """Makes the operator of a name fail as a CUDA device without memory would; fails(None): none does."""
    genuine, failing = _calls.operator, []

    def operator(name, route):
        def fail(*arguments):
            raise RuntimeError(OUT_OF_MEMORY)

        return fail if name in failing else genuine(name, route)

    monkeypatch.setattr(_calls, "operator", operator)
    return lambda name: failing.append(name) if name else failing.clear()


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("kind", ("masked_conv2d", "masked_linear"))
@pytest.mark.parametrize("suffix", ("", "_backward"))
def test_out_of_memory_is_torch_s_own_error_and_changes_nothing(fails, kind, suffix, packed):
    layer = MaskedConv2d(4, 6, 3, density=0.3) if kind == "masked_conv2d" else MaskedLinear(4, 6, density=0.3)
    layer = layer.pack_() if packed else layer
    x = torch.randn(2, 4, 5, 5) if kind == "masked_conv2d" else torch.randn(3, 4)
    x.requires_grad_()
    with use_route("sparse"):
        layer(x).sum().backward()
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        gradients = [t.grad.clone() for t in (x, *layer.parameters())]
        fails(kind + suffix)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory. masked_conv2d tried to allocate"):
            layer(x).sum().backward()
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
        assert all(torch.equal(t.grad, g) for t, g in zip((x, *layer.parameters()), gradients, strict=True))
        fails(None)
        layer(x).sum().backward()
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip((x, *layer.parameters()), gradients, strict=True))


def test_out_of_memory_in_absent_topk(monkeypatch):
    def fail(*arguments):
        raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(dispatch, "topk_route", lambda x, grad_out, pattern: (fail, x, grad_out))
    with pytest.raises(torch.OutOfMemoryError):
        absent_topk(torch.ones(3, 5), torch.ones(3, 6), torch.zeros(6, 5, dtype=torch.bool), 4)


def test_other_errors_pass_unchanged():
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        _calls.run_operator(fail)
    assert type(caught.value) is RuntimeError


def test_a_failed_allocation_names_the_operator_and_the_bytes():
    """2**43 rows of 8 floats are more than any machine has."""
    pattern = Pattern.from_mask(torch.ones(8, 2, dtype=torch.bool))
    x = torch.ones(1).expand(2**43, 2)
    with pytest.raises(RuntimeError, match=f"masked_linear: out of memory. Tried to allocate {2**48} bytes"):
        torch.ops.ilnas.masked_linear(x, torch.ones(16), None, *pattern.operands, "")
