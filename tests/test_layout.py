"""Networks that stay batch-last between layers."""

import pytest
import torch
from torch import nn

from ilnas_kernels import cat_channels, convert, is_batch_last, keep_batch_last, to_batch_last
from ilnas_kernels.layout import BATCH_LAST, CHANNELS_LAST, NCHW, layout_of, to_layout


class Stage(nn.Module):
    """Two convolutions whose outputs are concatenated, as in the search's template."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(7, 6, 3, padding="same")
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.norm(self.relu(self.first(x)))
        return self.relu(self.second(cat_channels([x, y])))


def network():
    torch.manual_seed(5)
    return nn.Sequential(
        Stage(), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1), nn.AvgPool2d(2, padding=1),
        nn.Conv2d(8, 5, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def strides_of(model, x):
    """The layout in which each layer handed on images, by layer name."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, name=name: seen.__setitem__(name, out) if out.dim() == 4 and out.shape[2] > 1 else None
        )
        for name, module in model.named_modules()
    ]
    out = model(x)
    for handle in handles:
        handle.remove()
    return seen, out


@pytest.mark.parametrize("density", (0.3, None))
def test_a_network_stays_batch_last(density):
    generator = torch.Generator().manual_seed(1)
    plain = convert(network(), density=density, generator=generator)
    ours = keep_batch_last(convert(network(), density=density, generator=generator.manual_seed(1)))
    x = torch.randn(6, 3, 16, 16)
    seen, out = strides_of(ours, to_batch_last(x))
    assert {"0.first", "0.norm", "0.second", "0", "1", "2", "3", "4", "5"} <= seen.keys()
    for name, image in seen.items():
        batch, _, height, width = image.shape
        assert image.stride() == (1, height * width * batch, width * batch, batch), name
    expected = plain(x)
    torch.testing.assert_close(out, expected)
    expected.square().sum().backward()
    out.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_between_layers_stay_batch_last():
    model = keep_batch_last(convert(network(), density=0.4))
    layouts = []
    model[2].register_full_backward_hook(lambda _, grad_in, grad_out: layouts.extend([*grad_in, *grad_out]))
    model(to_batch_last(torch.randn(6, 3, 16, 16)).requires_grad_()).sum().backward()
    assert layouts
    assert all(is_batch_last(g) for g in layouts)


def test_layout_aware_layers_are_torchs_on_other_layouts():
    x = torch.randn(4, 6, 9, 7)
    pools = nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((2, 1)))
    expected = pools(x)
    pools = keep_batch_last(pools)
    assert torch.equal(pools(x), expected)
    torch.testing.assert_close(pools(to_batch_last(x)), expected)
    values, places = keep_batch_last(nn.MaxPool2d(3, return_indices=True))(to_batch_last(x))
    expected_values, expected_places = nn.MaxPool2d(3, return_indices=True)(x)
    assert torch.equal(values, expected_values)
    assert torch.equal(places, expected_places)


@pytest.mark.parametrize("order", (NCHW, CHANNELS_LAST, BATCH_LAST), ids=str)
def test_layouts_are_told_apart(order):
    x = torch.randn(2, 3, 4, 5)
    moved = to_layout(x, order)
    assert torch.equal(moved, x)
    assert layout_of(moved) == order
    assert is_batch_last(moved) == (order == BATCH_LAST)
    assert to_layout(moved, order).data_ptr() == moved.data_ptr()


def test_concatenation_is_torchs():
    images = [torch.randn(2, channels, 3, 4) for channels in (1, 5, 2)]
    assert torch.equal(cat_channels(images), torch.cat(images, 1))
    joined = cat_channels([to_batch_last(x) for x in images])
    assert torch.equal(joined, torch.cat(images, 1))
    assert is_batch_last(joined)


def test_batch_last_strides():
    assert to_batch_last(torch.randn(2, 3, 4, 5)).stride() == (1, 40, 10, 2)
    assert not is_batch_last(torch.randn(3, 4, 5))
