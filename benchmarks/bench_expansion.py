"""One expansion of the search beside what it may cost: three training steps and the dense gradients of all weights.

The gradients are torch's, of the scoring batch, in channels_last (``dense_gradients``); they
stand for the pass in which absent_topk ranks every absent weight.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from ilnas.config import make_config
from ilnas.data import Dataset, Images
from ilnas.evolve import architecture_step
from ilnas.measure import layer_costs
from ilnas.trainer import Trainer

from .cases import THREADS, Case, Contenders, groups, label

NAMES = ("three_steps", "dense_gradients", "ours_expansion")
TEMPLATES = {  # widths, image, budget; the base is half of it
    "default 1x28x28": ("16,16/32,32/64", (1, 28, 28), 20_000),
    "wide 3x32x32": (",".join(["64"] * 4) + "/" + ",".join(["128"] * 4) + "/" + ",".join(["256"] * 4), (3, 32, 32),
                     1_300_000),
}  # fmt: skip


def cases() -> list[Case]:
    return [
        Case(
            op="expansion", shape=shape, density=0.05, threads=count, names=NAMES,
            build=partial(build, *template),
        )
        for shape, template in TEMPLATES.items()
        for count in THREADS
    ]  # fmt: skip


def noise(image: tuple[int, int, int], count: int = 1024) -> Dataset:
    """Random images, as many as a scoring batch and more."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *image), generator=generator, dtype=torch.uint8)
    part = Images(images, torch.randint(10, (count,), generator=generator))
    return Dataset("noise", part, part, part, torch.full(image[:1], 0.5), torch.full(image[:1], 0.25))


def build(widths: str, image: tuple[int, int, int], budget: int) -> Contenders:
    config = make_config({"widths": widths, "budget": budget})
    trainer = Trainer(config, noise(image))
    for _ in range(2):
        trainer.train_step()

    def three_steps() -> None:
        for _ in range(3):
            trainer.train_step()

    return {
        "three_steps": three_steps,
        "dense_gradients": dense_gradients(trainer),
        "ours_expansion": partial(expand, trainer),
    }


def expand(trainer: Trainer) -> dict:
    """One expansion that adds and moves as the options say but keeps the live count: each call finds the same task."""
    config, live = trainer.config, trainer.live
    return architecture_step(
        trainer.network, trainer.optimizer, config, trainer.batches, trainer.step, live,
        moved=round((config.alr + config.move) * live), lr=config.lr, progress=0.0,
    )  # fmt: skip


def dense_gradients(trainer: Trainer) -> Callable[[], None]:
    """torch's gradient of every conv and linear weight, from inputs and gradients of the scoring batch's size."""
    structure, batch = trainer.network.structure, trainer.config.scoring_batch or trainer.config.batch_size
    calls = []
    for cost in layer_costs(trainer.network):
        rows, inputs, *kernel = structure.layer_shapes()[cost.name]
        if not kernel:
            x, grad = torch.randn(batch, inputs), torch.randn(batch, rows)
            calls.append(partial(torch.mm, grad.t(), x))
            continue
        size = structure.resolution(int(cost.name.split(".")[1]))
        x, grad = (
            torch.randn(batch, channels, *size).contiguous(memory_format=torch.channels_last)
            for channels in (inputs, rows)
        )
        weight = torch.empty(rows, inputs, *kernel).contiguous(memory_format=torch.channels_last)
        padding = [kernel[0] // 2] * 2
        calls.append(
            partial(
                torch.ops.aten.convolution_backward,
                grad,
                x,
                weight,
                None,
                [1, 1],
                padding,
                [1, 1],
                False,
                [0, 0],
                1,
                [False, True, False],
            )  # fmt: skip
        )

    def run() -> None:
        for call in calls:
            call()

    return run


@pytest.mark.parametrize("case, contender", groups(cases()), ids=label)
def test_expansion(case: Case, contender: str, compare) -> None:
    compare(case, contender)
