"""A DETR decoder: object queries that attend to each other and to every pixel of one map.

Letters: B image, R prediction, Q query, S pixels of the map, H head, D channels a head,
C channels, M channels of the mask features, K class.

    x = 0
    layer:       x = norm(x + self attention; queries and keys are x + query_embed)
                 x = norm(x + attention to the pixels; queries are x + query_embed, keys the pixels
                          + their position)
                 x = norm(x + feed-forward);  a prediction from x
    prediction:  class logits = class_embed(norm(x));  mask embedding = MLP(norm(x))

The keys and values of all layers are projected together, as all read the same pixels.
Source: DETR (Carion et al., ECCV 2020), as in MaskFormer (Cheng et al., NeurIPS 2021).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention, feed_forward, linear
from .linear import use_own_products
from .maps import pointwise
from .position import sine_position
from .query_decoder import Attention


class DetrLayer(nn.Module):
    """Self attention, attention to the pixels, feed-forward network, normalised after each.

    Args:
        channels: C.
        heads: H.
        feedforward: width of the feed-forward network.
        dropout: probability, in what is added to the queries.
        inner_dropout: probability, in the weights of attention and in the hidden layer.
    """

    read_from_outside = True  # other layers use its weights: FSDP must not free them here

    def __init__(
        self,
        channels: int,
        heads: int,
        feedforward: int,
        dropout: float,
        inner_dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.inner_dropout = heads, inner_dropout
        self.self_attn = Attention(channels)
        self.self_norm = nn.LayerNorm(channels)
        self.cross_attn = Attention(channels)
        self.cross_norm = nn.LayerNorm(channels)
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
    ) -> Tensor:  # [B, Q, C]
        attn, query = self.self_attn, x + position
        own = (_heads(p(q), self.heads) for p, q in ((attn.k_proj, query), (attn.v_proj, x)))
        x = self.self_norm(self._attended(attn, query, *own, x))
        x = self.cross_norm(self._attended(self.cross_attn, x + position, key, value, x))
        return self.norm(self._fed_forward(x))

    def _attended(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, x: Tensor):
        """x + attention, [B, Q, C]."""
        query = _heads(attn.q_proj(query), self.heads)
        if self.training and self.inner_dropout:
            first = (t.transpose(1, 2) for t in (query, key, value))
            out = F.scaled_dot_product_attention(*first, dropout_p=self.inner_dropout)
            out = out.transpose(1, 2).flatten(2)
        else:
            out = attention(query, key, value)
        if self.training and self.dropout.p > 0:
            return x + self.dropout(attn.out_proj(out))
        return attn.out_proj(out, x)

    def _fed_forward(self, x: Tensor) -> Tensor:
        first, second = self.linear1, self.linear2
        if self.training and self.dropout.p > 0:
            hidden = F.dropout(F.relu(first(x)), self.inner_dropout)
            return x + self.dropout(second(hidden))
        weights = first.weight, first.bias, second.weight, second.bias
        rows = x.flatten(0, 1)
        return feed_forward(rows, *weights, "relu", residual=rows).view_as(x)


class DetrDecoder(nn.Module):
    """Predicts, for each of Q queries and after each layer, a class and the embedding of a mask.

    Args:
        num_labels: K.
        in_channels: of the map.
        channels: C; a map of other channels is projected to them.
        mask_channels: M.
        queries: Q.
        layers: decoder layers, R.
        heads: H.
        feedforward: width of the feed-forward networks.
        dropout: probability.
    """

    def __init__(
        self,
        num_labels: int,
        in_channels: int,
        channels: int = 256,
        mask_channels: int = 256,
        queries: int = 100,
        layers: int = 6,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.heads = heads
        self.query_embed = nn.Embedding(queries, channels)
        self.input_proj = None
        if in_channels != channels:
            self.input_proj = nn.Conv2d(in_channels, channels, 1)
            nn.init.xavier_uniform_(self.input_proj.weight)
            nn.init.zeros_(self.input_proj.bias)
        self.layers = nn.ModuleList(
            DetrLayer(channels, heads, feedforward, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)
        self.class_embed = nn.Linear(channels, num_labels + 1)
        widths = (channels, channels, channels, mask_channels)
        self.mask_embed = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        use_own_products(self)

    def forward(self, feature: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
        """Runs the decoder.

        Args:
            feature: [B, in_channels, h, w].
            last: only the last prediction.

        Returns:
            class logits [B, R, Q, K + 1] (the last class is "no object") and mask embeddings [B,
            R, Q, M], R = layers, or 1 of the last prediction.
        """
        return self.run(feature, last)[:2]

    def run(self, feature: Tensor, last: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As `forward`; and what goes into each layer and, normalised, comes out of the last,
        [B, Q, C] each."""
        position = self.query_embed.weight
        x = torch.zeros_like(position).expand(feature.shape[0], -1, -1)
        states = [x]
        for layer, key, value in zip(self.layers, *self._keys_values(feature)):
            x = layer(x, position, key, value)
            states.append(x)
        rows = self.norm(torch.stack(states[-1:] if last else states[1:], 1))
        states[-1] = rows[:, -1]
        *hidden, end = self.mask_embed
        embeddings = rows
        for part in hidden:
            embeddings = linear(embeddings, part.weight, part.bias, "relu")
        return self.class_embed(rows), end(embeddings), tuple(states)

    def _keys_values(self, feature: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values [B, S, H, D] of every layer, in one product each."""
        if self.input_proj is not None:
            feature = pointwise(self.input_proj, feature)
        pixels = feature.flatten(2).transpose(1, 2)  # [B, S, C]
        position = sine_position(
            (feature.shape[2:],), pixels.shape[2], pixels.device, pixels.dtype
        )
        out = []
        for name, source in (("k_proj", pixels + position), ("v_proj", pixels)):
            parts = [getattr(layer.cross_attn, name) for layer in self.layers]
            weight = torch.cat([part.weight for part in parts])
            rows = linear(source, weight, torch.cat([part.bias for part in parts]))
            out.append([_heads(part, self.heads) for part in rows.chunk(len(parts), 2)])
        return tuple(out)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] as [B, N, H, D]."""
    return x.unflatten(2, (heads, -1))
