"""One training step of the network that the search grows, 5 % of its weights live, against its dense twin in torch."""

import pytest
import torch

from ilnas.base import random_network
from ilnas.structure import Block, Structure

from .bench_masked_conv2d import LAYOUTS
from .bench_training_step import BATCH, training_step
from .cases import THREADS, Case, Contenders, groups, label
from .template_twin import TemplateTwin

NAMES = ("dense_nchw", "dense_channels_last", "ours_batch_last")
# CIFAR-10's images; 13 million weights dense, 0.65 million live, near the paper's smallest network.
STAGES = ((64,) * 4, (128,) * 4, (256,) * 4)
DENSITY = 0.05


def cases() -> list[Case]:
    return [
        Case(
            op="training step ILNAS network",
            shape=f"{BATCH}x3 32x32",
            density=DENSITY,
            threads=count,
            names=NAMES,
            build=build,
        )
        for count in THREADS
    ]


def template() -> Structure:
    return Structure((3, 32, 32), 10, [[Block(width) for width in stage] for stage in STAGES])


def build() -> Contenders:
    structure = template()
    live = round(DENSITY * structure.dense_parameters())
    network = random_network(structure, live, torch.Generator().manual_seed(0))
    contenders: Contenders = {}
    for layout in ("nchw", "channels_last"):
        twin = TemplateTwin(structure).copy_from(network)
        if layout == "channels_last":
            twin = twin.to(memory_format=torch.channels_last)
        contenders[f"dense_{layout}"] = training_step(twin, LAYOUTS[layout])
    contenders["ours_batch_last"] = training_step(network, LAYOUTS["batch_last"])
    return contenders


@pytest.mark.parametrize("case, contender", groups(cases()), ids=label)
def test_search_network(case: Case, contender: str, compare) -> None:
    compare(case, contender)
