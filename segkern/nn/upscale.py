"""Doubles the resolution of a map of features.

Letters: B image, h w size of the map, C channels.

    y[2i + a, 2j + b] = gelu(W_ab x[i, j] + bias)      a transposed convolution: a product
    out               = layer_norm(depthwise 3 x 3 (y))

Source: EoMT (Kerssies et al., CVPR 2025), section 3.2.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear


class Upscale(nn.Module):
    """A block.

    Args:
        channels: C.
        activation: in place of gelu, if any.
    """

    def __init__(self, channels: int, activation: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.activation = activation
        self.conv1 = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] to [B, 2h, 2w, C]."""
        B, h, w, C = x.shape
        weight = self.conv1.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [a b C, C]
        bias = self.conv1.bias.repeat(4)
        y = linear(x, weight, bias, "gelu" if self.activation is None else "none")
        if self.activation is not None:
            y = self.activation(y)
        y = y.view(B, h, w, 2, 2, C).transpose(2, 3).reshape(B, 2 * h, 2 * w, C)
        y = F.conv2d(y.movedim(3, 1), self.conv2.weight, padding=1, groups=C)
        return self.norm(y.movedim(1, 3))
