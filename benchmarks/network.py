"""A residual network (He et al. 2016) for 32x32 images: its stem is one 3x3 convolution without pooling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """relu(x' + bn(conv(relu(bn(conv(x)))))) with x' = x, or bn(1x1 conv(x)) where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(inner)))


class ResNet(nn.Module):
    """Two blocks at each width, the image halved between widths; the defaults are ResNet-18's, 11.2 million weights."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks, in_channels = [], widths[0]
        for stage, width in enumerate(widths):
            blocks += [Block(in_channels, width, 1 if stage == 0 else 2), Block(width, width, 1)]
            in_channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.mean(self.blocks(self.stem(x)), dim=(2, 3)))
