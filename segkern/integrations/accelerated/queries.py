"""The query decoder of Mask2Former and OneFormer over the weights of transformers' layers.

Letters: B image, R prediction, Q query, S keys of one level, H head, D channels a head,
C channels, M channels of the mask features.

What `nn.query_decoder` does, from where the source of all formulas is: masks are made of the
features resized once to the three levels and packed 32 keys to a word, the keys and values of the
layers that share a level are projected together, and the mask logits of a prediction are not
formed for it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.recompute import recomputed
from ...ops import attention, linear, mask_bits, masked_attn, query_layer, query_prediction
from ...ops.mask_bits import as_features
from ...ops.query_layer import Layer, Prediction

LEVELS = 3


def decode(
    x: Tensor,  # [B, Q, C], the queries
    position: Tensor,  # [Q, C], added where queries and keys are made of them
    pixels: Sequence[Tensor],  # [B, S, C] of each level
    places: Sequence[Tensor],  # [S, C] of each level, added where keys are made of pixels
    features: Tensor,  # [B, M, h, w]
    sizes: Sequence[tuple[int, int]],  # (h, w) of each level
    crosses: Sequence[nn.MultiheadAttention],  # of each layer, to pixels
    layers: Sequence[Layer],  # what comes after it
    norm: nn.LayerNorm,  # of each prediction
    head: Sequence[nn.Linear],  # three, to mask embeddings
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Runs the decoder.

    Returns:
        the queries [B, Q, C] before the first layer and after each, the same normed, and their
        mask embeddings [B, Q, M]; R = layers + 1 of each.
    """
    with torch.no_grad():
        levels = [
            as_features(F.interpolate(features, size, mode="bilinear", align_corners=False))
            for size in sizes
        ]
    keys, values = _keys_values(pixels, places, crosses)
    own = [t for part in (norm, *head) for t in (part.weight, part.bias)]
    nexts = [(c.in_proj_weight.chunk(3)[0], c.in_proj_bias.chunk(3)[0]) for c in crosses]
    first, *others = [Prediction(*own, *into) for into in nexts] + [Prediction(*own)]
    normed, embedding, query = query_prediction(x, position, first, norm.eps)
    out = [(x, normed, embedding)]
    for i, (cross, layer, prediction) in enumerate(zip(crosses, layers, others)):
        mask = mask_bits(embedding, levels[i % LEVELS])
        query = query.unflatten(-1, (cross.num_heads, -1))
        attended = masked_attn(query, keys[i], values[i], *mask)
        options = cross.num_heads, norm.eps
        x, normed, embedding, query = query_layer(
            x, attended, position, layer, prediction, *options
        )
        out.append((x, normed, embedding))
    return tuple(list(part) for part in zip(*out))


def _keys_values(
    pixels: Sequence[Tensor], places: Sequence[Tensor], crosses: Sequence[nn.MultiheadAttention]
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values [B, S, H, D] of every layer, those of a level in one product each."""
    keys, values = [None] * len(crosses), [None] * len(crosses)
    for level, (x, place) in enumerate(zip(pixels, places)):
        users = range(level, len(crosses), LEVELS)
        if not users:
            continue

        def project(x: Tensor, place: Tensor, users=users) -> tuple[Tensor, Tensor]:
            out = []
            for part, source in ((1, x + place), (2, x)):
                weight = torch.cat([crosses[i].in_proj_weight.chunk(3)[part] for i in users])
                bias = torch.cat([crosses[i].in_proj_bias.chunk(3)[part] for i in users])
                out.append(linear(source, weight, bias))
            return tuple(out)

        for out, rows in zip((keys, values), recomputed(project, x, place)):
            split = rows.unflatten(-1, (len(users), crosses[0].num_heads, -1)).unbind(2)
            for i, part in zip(users, split):
                out[i] = part
    return keys, values


def attend(
    attn: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:  # of [B, Q, C], [B, S, C] and [B, S, C] to [B, Q, C]
    """What torch.nn.MultiheadAttention computes, without its weights."""
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    parts = (
        linear(x, weight, bias).unflatten(-1, (attn.num_heads, -1))
        for x, weight, bias in zip((query, key, value), weights, biases)
    )
    out = attn.out_proj
    return linear(attention(*parts), out.weight, out.bias)
