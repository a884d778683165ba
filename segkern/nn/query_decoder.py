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
its level, thresholded and packed 32 keys to a word (`mask_bits`). Keys and values are projected
when their layer asks: those of all layers would be the most that an inference holds. What comes
after the product of a layer's cross attention is one op, with the next prediction and the next
layer's queries (`query_layer`).
Source: Mask2Former (Cheng et al., CVPR 2022), section 3; sigmoid(m) < 0.5 there is m < 0 here.
"""

from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear, mask_bits, masked_attn, query_layer, query_prediction
from ..ops.mask_bits import as_features
from ..ops.query_layer import Layer, Prediction
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

    read_from_outside = True  # other layers use its weights: FSDP must not free them here

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

    def tensors(self) -> Layer:
        """The weights of all that comes after the product of the cross attention."""
        attn = self.self_attn
        parts = (self.cross_attn.out_proj, self.cross_norm, attn.q_proj, attn.k_proj, attn.v_proj)
        parts += (attn.out_proj, self.self_norm, self.linear1, self.linear2, self.norm)
        return Layer(*chain.from_iterable((part.weight, part.bias) for part in parts))

    def keys_values(
        self,
        pixels: Tensor,  # [B, S, C]
        position: Tensor,  # [S, C]
        embed: Tensor,  # [C], of the level
    ) -> tuple[Tensor, Tensor]:  # [B, S, H, D] each
        """What the queries attend to."""
        return recomputed(self._project, pixels, position, embed)

    def _project(self, pixels: Tensor, position: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        pixels, attn = pixels + embed, self.cross_attn
        out = []
        for part, source in ((attn.k_proj, pixels + position), (attn.v_proj, pixels)):
            out.append(linear(source, part.weight, part.bias).unflatten(-1, (self.heads, -1)))
        return tuple(out)

    def forward(
        self,
        x: Tensor,  # [B, Q, C]
        position: Tensor,  # [Q, C]
        query: Tensor,  # [B, Q, C], x + position by cross_attn.q_proj
        key: Tensor,  # [B, S, H, D]
        value: Tensor,  # [B, S, H, D]
        bits: Tensor,  # [B, Q, ceil(S/32)] int32
        open_keys: Tensor,  # [B, Q] int32, how many keys each query may attend to
        prediction: Prediction,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [B, Q, C], and of the prediction after it what `query_layer` returns."""
        query = query.unflatten(-1, (self.heads, -1))
        attended = masked_attn(query, key, value, bits, open_keys)
        dropout = self.dropout.p if self.training else 0.0
        options = self.heads, self.norm.eps, dropout
        return query_layer(x, attended, position, self.tensors(), prediction, *options)


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
        learned: whether queries start from learned values, or from those given to `forward`.
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
        learned: bool = True,
    ):
        super().__init__()
        self.heads = heads
        if learned:
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
        last: bool = False,  # only the last prediction
        start: Tensor | None = None,  # [B, Q, C], where it is not learned
    ) -> tuple[Tensor, Tensor]:
        """Runs the decoder.

        Returns:
            class logits [B, R, Q, K + 1] (the last class is "no object") and mask embeddings [B,
            R, Q, M], R = layers + 1, or 1 of the last prediction.
        """
        return self.run(pixels, shapes, mask_features, last, start)[:2]

    def run(
        self,
        pixels: Tensor,
        shapes: tuple,
        mask_features: Tensor,
        last: bool,
        start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As `forward`; and what goes into each layer and comes out of the last, [B, Q, C]."""
        sizes, channels = [h * w for h, w in shapes], pixels.shape[2]
        positions = sine_position(shapes, channels, pixels.device, pixels.dtype).split(sizes)
        sources = list(zip(pixels.split(sizes, 1), positions, self.level_embed.weight))
        features = self._level_features(mask_features, shapes)
        x = self.query_feat.weight.expand(pixels.shape[0], -1, -1) if start is None else start
        position, eps = self.query_embed.weight, self.norm.eps
        first, *others = self._predictions()
        normed, embedding, query = query_prediction(x, position, first, eps)
        outputs, states = [(normed, embedding)], [x]
        for i, (layer, prediction) in enumerate(zip(self.layers, others)):
            mask = mask_bits(embedding, features[i % LEVELS])
            given = query, *layer.keys_values(*sources[i % LEVELS]), *mask, prediction
            x, normed, embedding, query = layer(x, position, *given)
            outputs.append((normed, embedding))
            states.append(x)
        rows, embeddings = (
            torch.stack(tensors, 1) for tensors in zip(*(outputs[-1:] if last else outputs))
        )
        return self.class_embed(rows), embeddings, tuple(states)

    def _predictions(self) -> list[Prediction]:
        """The weights of each prediction, and of the queries of the layer after it."""
        parts = self.norm, *self.mask_embed
        own = [tensor for part in parts for tensor in (part.weight, part.bias)]
        queries = [layer.cross_attn.q_proj for layer in self.layers]
        return [Prediction(*own, q.weight, q.bias) for q in queries] + [Prediction(*own)]

    @torch.no_grad()
    def _level_features(self, mask_features: Tensor, shapes: tuple) -> list[Tensor]:
        """The mask features [B, M, S] at the three levels, without gradient as masks are."""
        resized = (
            F.interpolate(mask_features, size, mode="bilinear", align_corners=False)
            for size in shapes
        )
        return [as_features(x) for x in resized]
