"""The pixel decoder of a plain feature pyramid: from the coarsest map to the finest.

Letters: B image, C channels, M channels of the mask features, Q query, h w map size.

    x = relu(norm(3x3(the coarsest map)))
    for each finer map:  x = relu(norm(3x3(norm(1x1(map)) + x at the map's size)))
    mask features = 3x3(x)
    mask logits   = embeddings . 3x3(x) = (embeddings . filters)(x)

A product of each pixel moves through a convolution, so that the logits of Q queries need Q filters
and not M, and no features (`mask_logits`): fewer operations where Q < M. A coarser map is brought
to a finer one's size by its nearest pixels. Maps are channels-last.
Source: Feature Pyramid Networks (Lin et al., CVPR 2017) with group norms, as in MaskFormer (Cheng
et al., NeurIPS 2021), section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import conv3x3, linear
from .maps import GROUPS, normed, pointwise


class FPNPixelDecoder(nn.Module):
    """From the maps of a backbone to the features of the masks.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        channels: C, a multiple of 32.
        mask_channels: M.
    """

    def __init__(
        self, in_channels: tuple[int, ...], channels: int = 256, mask_channels: int = 256
    ):
        super().__init__()
        self.checkpointing = False  # keep the levels' inputs alone, compute the rest again
        coarsest, *finer = reversed(in_channels)
        self.stem = _convolution(coarsest, channels, 3)
        self.adapters = nn.ModuleList(_convolution(n, channels, 1) for n in finer)
        self.blocks = nn.ModuleList(_convolution(channels, channels, 3) for _ in finer)
        self.mask_features = nn.Conv2d(channels, mask_channels, 3, padding=1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Runs the decoder.

        Args:
            features: maps [B, C_i, h_i, w_i], finest first.

        Returns:
            [B, M, h, w] at the finest map's size.
        """
        out = conv3x3(self._finest(features), self.mask_features.weight)
        return out.add_(self.mask_features.bias.to(out.dtype)[:, None, None])

    def mask_logits(self, features: list[Tensor], embeddings: Tensor) -> Tensor:
        """The product of mask embeddings and the mask features, which are not formed.

        Args:
            features: maps [B, C_i, h_i, w_i], finest first.
            embeddings: [B, Q, M].

        Returns:
            [B, Q, h, w].
        """
        x, (M, *filter) = self._finest(features), self.mask_features.weight.shape
        weight = self.mask_features.weight.view(M, -1)
        logits = []
        for image, embedding in zip(x, embeddings):  # each has filters of its own
            filters = linear(embedding, weight.t()).unflatten(1, filter)
            bias = embedding @ self.mask_features.bias
            logits.append(conv3x3(image[None], filters).add_(bias[:, None, None]))
        return torch.cat(logits).contiguous()

    def _finest(self, features: list[Tensor]) -> Tensor:
        """What the mask features are a convolution of, [B, C, h, w]."""
        coarsest, *finer = reversed(features)
        x = _block(self.stem, coarsest)
        for adapter, block, feature in zip(self.adapters, self.blocks, finer):
            inputs = (x, feature, adapter, block)
            if self.checkpointing and self.training:
                x = checkpoint(_level, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = _level(*inputs)
        return x


def _convolution(inputs: int, outputs: int, side: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, outputs))


def _block(block: nn.Sequential, x: Tensor) -> Tensor:
    convolution, norm = block
    return normed(conv3x3(x, convolution.weight), norm, relu=True)


def _level(x: Tensor, feature: Tensor, adapter: nn.Sequential, block: nn.Sequential) -> Tensor:
    """One step of the pyramid, from x to the size of a finer map."""
    convolution, norm = adapter
    left = normed(pointwise(convolution, feature), norm)
    # in place, as in `forward`: no op keeps its result, and new pages cost more than the sum
    return _block(block, left.add_(F.interpolate(x, left.shape[2:], mode="nearest")))
