"""How much faster two threads are than one, for our convolution and for dense torch's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from . import bench_masked_conv2d
from .cases import THREADS, Case, Contenders, groups, label

WAYS = ("dense_nchw", "ours_nchw", "ours_batch_last")
NAMES = tuple(f"{way}_{count}_threads" for way in WAYS for count in (1, 2))


def cases() -> list[Case]:
    if max(THREADS) < 2:
        return []
    return [
        Case(
            op=f"two threads conv{kernel}x{kernel} {direction}",
            shape=f"{batch}x{in_channels}->{out_channels} {size}x{size}",
            density=density,
            threads=2,
            names=NAMES,
            build=partial(build, direction, batch, in_channels, out_channels, size, kernel, density),
        )
        for batch, in_channels, out_channels, size, kernel in bench_masked_conv2d.SHAPES
        for direction in ("forward", "backward")
        for density in (0.1, 0.01)
    ]


def build(direction: str, *shape_and_density) -> Contenders:
    calls = bench_masked_conv2d.build(direction, *shape_and_density)
    return {f"{way}_{count}_threads": _with_threads(count, calls[way]) for way in WAYS for count in (1, 2)}


def _with_threads(count: int, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(count)  # takes well under a microsecond; Case.measure restores the number
        return call()

    return run


@pytest.mark.parametrize("case, contender", groups(cases()), ids=label)
def test_thread_scaling(case: Case, contender: str, compare) -> None:
    compare(case, contender)
