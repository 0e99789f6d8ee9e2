"""The search's template network in torch's own dense layers: what the sparse one is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilnas.structure import Structure
from ilnas.template import Network


class TwinBlock(nn.Module):
    """bn(relu(conv(x))), with further conv + relu before the normalisation where the template has them."""

    def __init__(self, in_channels: int, width: int, identities: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, kernel_size, padding=kernel_size // 2)
        self.identities = nn.ModuleList(
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2) for _ in range(identities)
        )
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv(x))
        for layer in self.identities:
            x = F.relu_(layer(x))
        return self.norm(x)


class TemplateTwin(nn.Module):
    """Stages whose blocks read, concatenated, the stage's input and all earlier blocks; 2x2 pooling; linear head."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.stages = nn.ModuleList()
        for s, stage in enumerate(structure.stages):
            sizes = structure.stage_sizes(s)
            self.stages.append(
                nn.ModuleList(
                    TwinBlock(sum(sizes[: b + 1]), block.width, block.identities, structure.kernel_size)
                    for b, block in enumerate(stage)
                )
            )
        shapes = [shape for name, shape in structure.layer_shapes().items() if name.startswith("head.")]
        self.head = nn.ModuleList(nn.Linear(before, after) for after, before in shapes)

    def forward(self, x: Tensor) -> Tensor:
        pool = F.max_pool2d if self.structure.reduction == "max" else F.avg_pool2d
        for s, stage in enumerate(self.stages):
            x = pool(x, 2) if s else x
            parts = [x]
            for block in stage:
                parts.append(block(torch.cat(parts, 1) if len(parts) > 1 else x))
            x = torch.cat(parts, 1) if self.structure.stage_output == "all" else parts[-1]
        x = F.adaptive_avg_pool2d(x, self.structure.head_grid).flatten(1)
        for layer in self.head[:-1]:
            x = F.relu(layer(x))
        return self.head[-1](x)

    @torch.no_grad()
    def copy_from(self, network: Network) -> "TemplateTwin":
        """The sparse network's function: absent weights are 0."""
        for ours, twin in zip(_layers(network), _layers(self), strict=True):
            twin.weight.copy_(ours.weight)
            twin.bias.copy_(ours.bias)
        return self


def _layers(model: nn.Module) -> list[nn.Module]:
    """Convolution and linear layers from input to output."""
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
