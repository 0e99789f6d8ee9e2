"""``python -m benchmarks.concatenation``: what copying stage inputs together would cost at 16 layers a stage.

One training step of the template as it is, where a stage's channels lie in one block of memory, beside the same network
whose blocks read ``cat_channels`` of all earlier outputs; the share of time and of peak memory (Linux) by which the
second is larger. Live weights: 5 %.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilnas.base import random_network
from ilnas.structure import Block, Structure
from ilnas.template import Network
from ilnas_kernels import cat_channels, keep_batch_last, to_batch_last

from .memory import peak_of
from .timing import interleave, keep_freed_memory, speedup, threads


class Concatenating(nn.Module):
    """The same layers and the same function, every block's input a new tensor."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = keep_batch_last(network)
        self.pool = keep_batch_last(nn.MaxPool2d(2))
        self.grid = keep_batch_last(nn.AdaptiveAvgPool2d(network.structure.head_grid))

    def forward(self, x: Tensor) -> Tensor:
        x = to_batch_last(x)
        for s, stage in enumerate(self.network.stages):
            parts = [self.pool(x) if s else x]
            for block in stage.blocks:
                parts.append(block.norm(F.relu(block.conv(cat_channels(parts) if len(parts) > 1 else parts[0]))))
            x = cat_channels(parts)
        x = self.grid(x).flatten(1)
        for layer in self.network.head:
            x = layer(x)
        return x


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.concatenation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=16, help="layers a stage (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="nodes a layer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    options = parser.parse_args()
    stages = [[Block(options.width) for _ in range(options.layers)] for _ in range(3)]
    structure = Structure((3, 32, 32), 10, stages)
    live = structure.dense_parameters() // 20
    images, labels = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))

    def step_of(model: nn.Module):
        return lambda: F.cross_entropy(model(images), labels).backward()

    def network() -> Network:
        return random_network(structure, live, torch.Generator().manual_seed(0))

    steps = {"one block of memory": step_of(network()), "concatenated": step_of(Concatenating(network()))}
    with threads(options.threads):
        for step in steps.values():
            step()
        peaks = {name: peak_of(step) for name, step in steps.items()}
        keep_freed_memory()
        samples = interleave(steps, 20)
    for name in steps:
        print(f"{name:<22}{statistics.median(samples[name]):8.3f} s{peaks[name] / 2**20:10.0f} MiB")
    ours, rival = steps
    print(f"share of time {1 - 1 / speedup(samples, ours, rival):.0%}, of memory {1 - peaks[ours] / peaks[rival]:.0%}")


if __name__ == "__main__":
    main()
