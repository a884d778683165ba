"""The pixel decoder: multi-scale deformable attention, then one step of a feature pyramid.

Letters: B image, S pixels of all levels, C channels, M channels of the mask features, H head,
D channels a head, L level, P point, h w size of a level.

    x = the backbone's maps 4, 3, 2, each norm(1x1(map)), flattened and put together    [B, S, C]
    six times:  x = norm1(x + attention of x + position + level_embed to x)
                x = norm2(x + linear2(relu(linear1(x))))
    y = norm(1x1(the backbone's map 1)) + the finest level of x, upsampled         [B, C, h1, w1]
    mask features = 1x1(relu(norm(3x3(y))))                                        [B, M, h1, w1]

Maps are channels-last: the flattened levels are views of the maps and the other way round.
Source: Deformable DETR (Zhu et al., ICLR 2021), Mask2Former (Cheng et al., CVPR 2022).
Differs: half precision goes through the whole decoder, only the sampling offsets stay in float32
(a bfloat16 offset of ten pixels is off by up to 0.03; of two bfloat16 terms for each factor, as a
GPU forms it beside half precision, by about 1e-4).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import conv3x3, feed_forward, ms_deform_attn
from ..ops._linear_exact import linear_exact
from .linear import Linear
from .maps import GROUPS, normed, pointwise
from .position import pixel_centres, sine_position
from .recompute import plus, recomputed

LEVELS = 3


class DeformableAttention(nn.Module):
    """Attention of each pixel to H * L * P places that it chooses itself.

    Args:
        channels: C = H * D.
        heads: H.
        levels: L.
        points: P, places of a head in a level.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int):
        super().__init__()
        self.grid = (heads, levels, points)
        self.sampling_offsets = Linear(channels, heads * levels * points * 2)
        self.attention_weights = Linear(channels, heads * levels * points)
        self.value_proj = Linear(channels, channels)
        self.output_proj = Linear(channels, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """At the start head i looks into direction i of H, its point p at a distance of p + 1
        pixels, all weights equal."""
        heads, levels, points = self.grid
        angle = torch.arange(heads) * (2.0 * math.pi / heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the square's edge
        distance = torch.arange(1, points + 1)[:, None]
        bias = (direction[:, None, None] * distance).expand(heads, levels, points, 2)
        self.sampling_offsets.bias.copy_(bias.flatten())
        for zero in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(zero)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,  # [B, S, C]
        position: Tensor,  # [S, C]
        shapes: tuple[tuple[int, int], ...],  # (h, w) of L levels
        reference: Tensor,  # [1, S, 1, 2]
        residual: Tensor | None,  # [B S, C], added
    ) -> Tensor:  # [B S, C]
        heads, levels, points = self.grid
        query = x + position
        value = self.value_proj(x).unflatten(-1, (heads, -1))
        to_offsets = self.sampling_offsets
        offsets = linear_exact(query, to_offsets.weight, to_offsets.bias)
        offsets = offsets.unflatten(-1, (heads, levels, points, 2))
        logits = self.attention_weights(query).unflatten(-1, (heads, levels, points))
        out = ms_deform_attn(value, shapes, reference, offsets, logits)
        return self.output_proj(out.flatten(0, 1), residual)


class PixelDecoderLayer(nn.Module):
    """Deformable attention and a feed-forward network, normalised after each.

    Args:
        channels: C.
        heads: H.
        points: P.
        feedforward: width of the feed-forward network.
        dropout: probability.
    """

    read_from_outside = True  # other layers use its weights: FSDP must not free them here

    def __init__(self, channels: int, heads: int, points: int, feedforward: int, dropout: float):
        super().__init__()
        self.attn = DeformableAttention(channels, heads, LEVELS, points)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = Linear(channels, feedforward)
        self.linear2 = Linear(feedforward, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self,
        x: Tensor,  # [B, S, C], before `norm`
        norm: nn.LayerNorm | None,  # the last one of the layer before
        position: Tensor,  # [S, C]
        shapes: tuple[tuple[int, int], ...],  # (h, w) of L levels
        reference: Tensor,  # [1, S, 1, 2]
        checkpointing: bool,  # keep x alone for backward
    ) -> Tensor:  # [B, S, C]
        """The layer up to its last sum, which `norm2` has to normalise.

        So training keeps two sums a layer, and not what norms make of them.
        """
        inputs, dropping = (x, norm, position, shapes, reference), self.training and self.dropout.p
        if checkpointing:
            function = self._dropping if dropping else self._sums
            # a generator's state cannot be read in a CUDA graph
            options = {"use_reentrant": False, "preserve_rng_state": bool(dropping)}
            return checkpoint(function, *inputs, **options)
        return self._dropping(*inputs) if dropping else recomputed(self._sums, *inputs)

    def _sums(self, x, norm, position, shapes, reference) -> Tensor:
        x = x if norm is None else norm(x)
        first, second = self.linear1, self.linear2
        y = self.norm1(self.attn(x, position, shapes, reference, x.flatten(0, 1)))
        weights = first.weight, first.bias, second.weight, second.bias
        return feed_forward(y, *weights, "relu", residual=y).view_as(x)

    def _dropping(self, x, norm, position, shapes, reference) -> Tensor:
        x = x if norm is None else norm(x)
        attended = recomputed(self.attn, x, position, shapes, reference, None)
        y = self.norm1(plus(self.dropout(attended), x.flatten(0, 1)))
        hidden = self.dropout(F.relu(self.linear1(y), inplace=True))
        return plus(self.dropout(self.linear2(hidden)), y).view_as(x)


class PixelDecoder(nn.Module):
    """From the four maps of a backbone to three levels for the queries and the features of the
    masks.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        channels: C, a multiple of 32.
        mask_channels: M, channels of the mask features.
        layers: number of attention layers.
        heads: H.
        points: P.
        feedforward: width of the feed-forward networks.
        dropout: probability.
    """

    def __init__(
        self,
        in_channels: tuple[int, int, int, int],
        channels: int = 256,
        mask_channels: int = 256,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        feedforward: int = 1024,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.checkpointing = False  # keep the layers' inputs alone, compute the rest again
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, channels, 1), nn.GroupNorm(GROUPS, channels))
            for n in reversed(in_channels[1:])
        )
        self.level_embed = nn.Parameter(torch.randn(LEVELS, channels))
        self.layers = nn.ModuleList(
            PixelDecoderLayer(channels, heads, points, feedforward, dropout) for _ in range(layers)
        )
        self.adapter = nn.Sequential(
            nn.Conv2d(in_channels[0], channels, 1, bias=False), nn.GroupNorm(GROUPS, channels)
        )
        self.output_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, channels)
        )
        self.mask_features = nn.Conv2d(channels, mask_channels, 1)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.adapter[0], self.output_conv[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(
        self, features: list[Tensor]
    ) -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
        """Runs the decoder.

        Args:
            features: four maps [B, C_i, h_i, w_i], finest first.

        Returns:
            mask features [B, M, h, w] at the finest map's size; the attended pixels [B, S, C] of
            the three other maps, coarsest first; the (h, w) of those three.
        """
        x, shapes = self._attended(features[1:])
        finest = x[:, -math.prod(shapes[-1]) :].unflatten(1, shapes[-1]).permute(0, 3, 1, 2)
        return self.pyramid(features[0], finest), x, shapes

    def _attended(self, features: list[Tensor]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Pixels [B, S, C] of all levels after all layers, coarsest first, and their (h, w)."""
        maps = [
            normed(pointwise(project, feature), norm)
            for (project, norm), feature in zip(self.input_proj, reversed(features))
        ]
        shapes = tuple((m.shape[2], m.shape[3]) for m in maps)
        # float32 under autocast, whose layer norms leave it so, too
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1).to(self.level_embed.dtype)
        del maps
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        reference = pixel_centres(shapes, x.device, exact)
        position = sine_position(shapes, x.shape[2], x.device, x.dtype)
        levels = [e.expand(h * w, -1) for e, (h, w) in zip(self.level_embed, shapes)]
        position = position + torch.cat(levels).to(x.dtype)
        norm = None
        for layer in self.layers:
            x = layer(x, norm, position, shapes, reference, self.checkpointing and self.training)
            norm = layer.norm2
        return (x if norm is None else norm(x)), shapes

    def pyramid(self, x: Tensor, coarser: Tensor) -> Tensor:  # [B, M, h, w]
        """The mask features, of the backbone's finest map and the finest level of the pixels."""
        return recomputed(self._pyramid, x, coarser)

    def _pyramid(self, x: Tensor, coarser: Tensor) -> Tensor:
        # `x` is overwritten at each step so that no map outlives its use: the allocator can then
        # give its memory, which is large, to the map after the next
        project, norm = self.adapter
        x = normed(pointwise(project, x), norm, up=coarser)
        convolution, norm = self.output_conv
        x = conv3x3(x, convolution.weight)
        x = normed(x, norm, relu=True)
        return pointwise(self.mask_features, x)
