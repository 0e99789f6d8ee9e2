"""One whole training step (forward, loss, backward, SGD with momentum) of a sparse network against its dense twin."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ilnas_kernels import MaskedConv2d, MaskedLinear, convert, keep_batch_last

from .bench_masked_conv2d import LAYOUTS
from .cases import THREADS, Case, Contenders, groups, label
from .network import ResNet

BATCH = 64
NAMES = ("dense_nchw", "dense_channels_last", "ours_nchw", "ours_channels_last", "ours_batch_last")


def cases() -> list[Case]:
    return [
        Case(
            op="training step ResNet-18",
            shape=f"{BATCH}x3 32x32",
            density=density,
            threads=count,
            names=NAMES,
            build=partial(build, density),
        )
        for count in THREADS
        for density in (0.1, 0.05)
    ]


def build(density: float) -> Contenders:
    torch.manual_seed(0)
    dense = ResNet()
    contenders: Contenders = {}
    for name in NAMES:
        who, layout = name.split("_", 1)
        model = ResNet()
        model.load_state_dict(dense.state_dict())
        if layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        if who == "ours":
            model = packed(convert(model, density=density))
        if layout == "batch_last":
            model = keep_batch_last(model)
        contenders[name] = training_step(model, LAYOUTS[layout])
    return contenders


def packed(model: nn.Module) -> nn.Module:
    """The model with weights, gradients and momentum that hold live weights only."""
    for layer in model.modules():
        if isinstance(layer, (MaskedConv2d, MaskedLinear)):
            layer.pack_()
    return model


def training_step(model: nn.Module, place: Callable) -> Callable[[], None]:
    """A step on a fixed batch in NCHW, as a data loader yields it; bringing it into the layout is part of the step."""
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(place(images)), labels).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("case, contender", groups(cases()), ids=label)
def test_training_step(case: Case, contender: str, compare) -> None:
    compare(case, contender)
