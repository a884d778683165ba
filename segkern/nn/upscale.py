"""Doubles the resolution of a map of features.

Letters: B image, h w size of the map, C channels.

    y[2i + a, 2j + b] = gelu(W_ab x[i, j] + bias)      a transposed convolution: a product
    out               = layer_norm(depthwise 3 x 3 (y))

Source: EoMT (Kerssies et al., CVPR 2025), section 3.2.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..ops import linear, upscale
from ..ops.upscale import as_product, masks_of, refined


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

    def forward(self, x: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """[B, h, w, C] to [B, 2h, 2w, C], or to its products with embeddings [B, Q, C], which are
        masks [B, Q, 2h, 2w]."""
        filters, norm = self.conv2.weight, (self.norm.weight, self.norm.bias)
        if self.activation is None:
            weights = self.conv1.weight, self.conv1.bias, filters, *norm
            return upscale(x, *weights, self.norm.eps, embeddings)
        y = self.activation(linear(x, *as_product(self.conv1.weight, self.conv1.bias)))
        out = refined(y, filters, *norm, self.norm.eps)
        return out if embeddings is None else masks_of(embeddings, out.to(embeddings.dtype))
