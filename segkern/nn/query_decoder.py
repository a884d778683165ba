"""The query decoder: object queries that attend to the pixels of their own last mask.

Letters: B image, R prediction, Q query, S keys of one level, H head, D channels a head,
C channels, M channels of the mask features, K class.

    x = query_feat;  prediction 0 from x
    layer i:       x = norm(x + attention to the pixels of level i mod 3 in prediction i's mask)
                   x = norm(x + self attention)
                   x = norm(x + feed-forward);  prediction i + 1 from x
    prediction:    class logits = class_embed(norm(x));  mask embedding = MLP(norm(x))
                   mask = mask embedding . mask features >= 0

The mask of a prediction is never built at full size: bilinear resizing commutes with the product,
so the mask features are resized once to the three levels, and each layer's mask is one product on
its level, thresholded and packed 32 keys to a word (`mask_bits`). The keys and values of the
layers that share a level are projected together.
Source: Mask2Former (Cheng et al., CVPR 2022), section 3; sigmoid(m) < 0.5 there is m < 0 here.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mask_bits, masked_attn
from ..ops.mask_bits import as_features
from .position import sine_position
from .recompute import recomputed

LEVELS = 3


class Attention(nn.Module):
    """The four projections of multi-head attention; the decoder says what attends to what.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            # the original initialises the three as one [3C, C] matrix
            nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)


class DecoderLayer(nn.Module):
    """Masked cross attention, self attention, feed-forward network, normalised after each.

    Args:
        channels: C.
        heads: H.
        feedforward: width of the feed-forward network.
        dropout: probability.
    """

    def __init__(self, channels: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.cross_attn = Attention(channels)
        self.cross_norm = nn.LayerNorm(channels)
        self.self_attn = Attention(channels)
        self.self_norm = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self,
        x: Tensor,  # [B, Q, C]
        position: Tensor,  # [Q, C]
        key: Tensor,  # [B, S, H, D]
        value: Tensor,  # [B, S, H, D]
        bits: Tensor,  # [B, Q, ceil(S/32)] int32
        open_keys: Tensor,  # [B, Q] int32, how many keys each query may attend to
    ) -> Tensor:  # [B, Q, C]
        query = self.cross_attn.q_proj(x + position).unflatten(-1, (self.heads, -1))
        attended = self.cross_attn.out_proj(masked_attn(query, key, value, bits, open_keys))
        x = self.cross_norm(x + self.dropout(attended))
        x = self.self_norm(x + self.dropout(self._self_attention(x, position)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))

    def _self_attention(self, x: Tensor, position: Tensor) -> Tensor:
        attn, placed = self.self_attn, x + position
        q, k, v = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, y in ((attn.q_proj, placed), (attn.k_proj, placed), (attn.v_proj, x))
        )
        return attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QueryDecoder(nn.Module):
    """Predicts, for each of Q queries and after each layer, a class and the embedding of a mask.

    Args:
        num_labels: K.
        channels: C.
        mask_channels: M.
        queries: Q.
        layers: decoder layers; there is one prediction more than layers.
        heads: H.
        feedforward: width of the feed-forward networks.
        dropout: probability.
    """

    def __init__(
        self,
        num_labels: int,
        channels: int = 256,
        mask_channels: int = 256,
        queries: int = 100,
        layers: int = 9,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads = heads
        self.query_feat = nn.Embedding(queries, channels)
        self.query_embed = nn.Embedding(queries, channels)
        self.level_embed = nn.Embedding(LEVELS, channels)
        self.layers = nn.ModuleList(
            DecoderLayer(channels, heads, feedforward, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)
        self.class_embed = nn.Linear(channels, num_labels + 1)
        widths = (channels, channels, channels, mask_channels)
        self.mask_embed = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(
        self,
        pixels: Tensor,  # [B, sum of S, C]
        shapes: tuple[tuple[int, int], ...],  # (h, w) of the three levels
        mask_features: Tensor,  # [B, M, h, w]
    ) -> tuple[Tensor, Tensor]:
        """Runs the decoder.

        Returns:
            class logits [B, R, Q, K + 1] (the last class is "no object") and mask embeddings [B,
            R, Q, M], R = layers + 1.
        """
        keys, values = self.keys_values(pixels, shapes)
        levels = self._level_features(mask_features, shapes)
        x = self.query_feat.weight.expand(pixels.shape[0], -1, -1)
        position = self.query_embed.weight
        normed, embeddings = [self.norm(x)], []
        for i, layer in enumerate(self.layers):
            embeddings.append(self._mask_embedding(normed[-1]))
            bits, open_keys = mask_bits(embeddings[-1], levels[i % LEVELS])
            x = layer(x, position, keys[i], values[i], bits, open_keys)
            normed.append(self.norm(x))
        embeddings.append(self._mask_embedding(normed[-1]))
        return self.class_embed(torch.stack(normed, 1)), torch.stack(embeddings, 1)

    def _mask_embedding(self, x: Tensor) -> Tensor:  # [B, Q, C] -> [B, Q, M]
        first, second, last = self.mask_embed
        return last(F.relu(second(F.relu(first(x)))))

    @torch.no_grad()
    def _level_features(self, mask_features: Tensor, shapes: tuple) -> list[Tensor]:
        """The mask features [B, M, S] at the three levels, without gradient as masks are."""
        resized = (
            F.interpolate(mask_features, size, mode="bilinear", align_corners=False)
            for size in shapes
        )
        return [as_features(x) for x in resized]

    def keys_values(self, pixels: Tensor, shapes: tuple) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values [B, S, H, D] of every layer, those of a level in one product each."""
        count = len(self.layers)
        keys, values = [None] * count, [None] * count
        position = sine_position(shapes, pixels.shape[2], pixels.device, pixels.dtype)
        sizes = [h * w for h, w in shapes]
        levels = zip(pixels.split(sizes, 1), position.split(sizes), self.level_embed.weight)
        for level, (x, pos, embed) in zip(range(count), levels):
            users = range(level, count, LEVELS)
            together = recomputed(self._project, x, pos, embed, users)
            for out, projected in zip((keys, values), together):
                split = projected.unflatten(-1, (len(users), self.heads, -1)).unbind(2)
                for i, part in zip(users, split):
                    out[i] = part
        return keys, values

    def _project(
        self, x: Tensor, position: Tensor, embed: Tensor, users: range
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, N C] of a level [B, S, C] for the N layers that use it."""
        x, out = x + embed, []
        for name, source in (("k_proj", x + position), ("v_proj", x)):
            project = [getattr(self.layers[i].cross_attn, name) for i in users]
            weight = torch.cat([p.weight for p in project])
            out.append(F.linear(source, weight, torch.cat([p.bias for p in project])))
        return tuple(out)
