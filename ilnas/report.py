"""What a network is made of and what it costs, in words and numbers, and measured against the same network dense."""

import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from ilnas.config import Config
from ilnas.export import to_plain
from ilnas.measure import layer_costs, network_density
from ilnas.template import Network, live_parameters

BYTES_PER_PARAMETER = 12  # the value, its gradient and its momentum, 4 bytes each
BYTES_PER_INDEX = 20  # the pattern by row (column) and by input channel (column, place) as int32, and their pointers


def describe(network: Network, config: Config, *, repeats: int = 5) -> str:
    """The table that ``ilnas info`` prints."""
    shapes = network.structure.layer_shapes()
    lines = [f"{'layer':<34}{'weight':>22}{'live':>10}{'of':>12}{'density':>9}{'MACs':>14}"]
    costs = layer_costs(network)
    for cost in costs:
        shape = "x".join(map(str, shapes[cost.name]))
        lines.append(
            f"{cost.name:<34}{shape:>22}{cost.live:>10,}{cost.size:>12,}{100 * cost.density:>8.2f}%{cost.macs:>14,}"
        )
    live, macs = live_parameters(network), sum(cost.macs for cost in costs)
    dense_macs = sum(cost.dense_macs for cost in costs)
    norm = live_parameters(network, count_norm=True) - live
    lines += [
        "",
        f"live parameters       {live:,} of {network.structure.dense_parameters():,} "
        f"({100 * network_density(network):.2f} %), budget {config.budget:,}; normalisation {norm:,} beside them",
        f"multiply-accumulates  {macs:,} an image, {dense_macs:,} if dense",
        f"training memory       {_mib(live * BYTES_PER_PARAMETER + live * BYTES_PER_INDEX)} for weights, gradients, "
        f"momentum and patterns; {_mib(network.structure.dense_parameters() * BYTES_PER_PARAMETER)} if dense",
    ]
    sparse, dense = step_times(network, config.batch_size, repeats)
    lines.append(
        f"a training step       {1e3 * sparse:.1f} ms; the same network dense in torch {1e3 * dense:.1f} ms; "
        f"{dense / sparse:.2f} times as fast (batch {config.batch_size}, {torch.get_num_threads()} threads)"
    )
    return "\n".join(lines)


def step_times(network: Network, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a training step of the network and of its dense twin in torch's best layout, in turn."""
    images = torch.randn(batch, *network.structure.image_shape)
    labels = torch.arange(batch) % network.structure.classes
    dense = to_plain(network, squeeze=False).to(memory_format=torch.channels_last)
    rivals = [
        (network, images),
        (dense, images.contiguous(memory_format=torch.channels_last)),
        (to_plain(network, squeeze=False), images),
    ]
    steps = [_stepper(model, x, labels) for model, x in rivals]
    times: list[list[float]] = [[] for _ in steps]
    for round_ in range(repeats + 1):
        for step, found in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            if round_:  # the first round warms up
                found.append(time.perf_counter() - started)
    sparse, *others = (statistics.median(found) for found in times)
    return sparse, min(others)


def _stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
