"""What pixel decoders do to the maps of a backbone: 1 x 1 convolutions and group norms.

Letters: B image, C channels, h w map size.
"""

from torch import Tensor, nn

from ..ops import group_norm, linear

GROUPS = 32


def pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution [B, C, h, w] as the matrix product that it is."""
    weight = convolution.weight.flatten(1)
    return linear(x.permute(0, 2, 3, 1), weight, convolution.bias).permute(0, 3, 1, 2)


def normed(x: Tensor, norm: nn.GroupNorm, **then) -> Tensor:
    """The norm of a map [B, C, h, w], with what `ops.group_norm` does after it."""
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **then)
