"""A small ResNet for images of about 64 x 64 pixels.

Letters: B image, C channels, h w map size, H W image size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..maps import keep_channels_last


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al., CVPR 2016).

    Args:
        channels: of the input.
        out: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, out, h / stride, w / stride]
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


class ResNetDigits(nn.Module):
    """A small ResNet for images of about 64 x 64 pixels.

    Args:
        channels: of the four maps.
        depths: blocks of each map.
        in_chans: channels of the images.
    """

    strides = (2, 4, 8, 16)

    def __init__(
        self,
        channels: tuple[int, int, int, int] = (32, 64, 96, 128),
        depths: tuple[int, int, int, int] = (1, 1, 1, 1),
        in_chans: int = 3,
    ):
        super().__init__()
        self.channels = tuple(channels)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, channels[0], 3, 2, 1, bias=False), nn.BatchNorm2d(channels[0])
        )
        self.stages = nn.ModuleList()
        self.levels = tuple(f"stages.{i}" for i in range(len(self.channels)))
        before = channels[0]
        for i, (out, depth) in enumerate(zip(channels, depths)):
            first = BasicBlock(before, out, 1 if i == 0 else 2)
            rest = [BasicBlock(out, out, 1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            before = out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        keep_channels_last(self)  # halves the time of a step on a CPU

    def forward(self, x: Tensor) -> list[Tensor]:  # [B, C, H, W]
        x = F.relu(self.stem(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
