r"""A query decoder's layer behind its cross attention, and what the next prediction needs of it.

    x = norm(x + attended Wc^T + bc)
    x = norm(x + self attention(x + position; x))                    of H heads, with projections
    x = norm(x + relu(x W1^T + b1) W2^T + b2)
    prediction:  normed    = norm(x)
                 embedding = relu(relu(normed V1^T) V2^T) V3^T       with biases
                 query     = (x + position) U^T + u                  of the next cross attention

Letters: B image, Q query, C channels, H head, D = C / H channels a head, F hidden channels, M
channels of the mask features.

A hundred queries of 256 channels are little work, for which PyTorch launches over twenty kernels,
each of which waits for the last. In inference in half precision a GPU runs four here, over tiles
of 16 rows times something: queries, keys, values; heads; chunks of F; embedding, query. So each
program waits for few weights, and what only a sum joins is left in parts that the next kernel adds
up.
Bytes: the weights (10 C^2 + 2 F C + M C values), read once a tile, from the L2 cache but for the
first, and 4 (H + F / 128) B Q C of parts; FLOPs: 2 a weight and row, 4 B Q^2 C of attention.
Source: Mask2Former (Cheng et al., CVPR 2022), section 3.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._checks import expect

ROWS = 512  # the most that the kernel takes: each 16 read all weights, which libraries read less


class Layer(NamedTuple):
    """The tensors of a layer, as torch.nn.Linear and torch.nn.LayerNorm hold them."""

    cross_weight: Tensor  # [C, C], output projection of the cross attention
    cross_bias: Tensor  # [C]
    cross_scale: Tensor  # [C], the norm after it
    cross_shift: Tensor  # [C]
    query_weight: Tensor  # [C, C], of the self attention
    query_bias: Tensor  # [C]
    key_weight: Tensor  # [C, C]
    key_bias: Tensor  # [C]
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    out_weight: Tensor  # [C, C]
    out_bias: Tensor  # [C]
    self_scale: Tensor  # [C], the norm after it
    self_shift: Tensor  # [C]
    weight1: Tensor  # [F, C], of the feed-forward network
    bias1: Tensor  # [F]
    weight2: Tensor  # [C, F]
    bias2: Tensor  # [C]
    scale: Tensor  # [C], the norm after it
    shift: Tensor  # [C]


class Prediction(NamedTuple):
    """The tensors of a prediction."""

    scale: Tensor  # [C], the decoder's norm
    shift: Tensor  # [C]
    weight1: Tensor  # [C, C], of the mask embedding
    bias1: Tensor  # [C]
    weight2: Tensor  # [C, C]
    bias2: Tensor  # [C]
    weight3: Tensor  # [M, C]
    bias3: Tensor  # [M]
    next_weight: Tensor | None = None  # [C, C], of the next layer's queries, if there is one
    next_bias: Tensor | None = None  # [C]


SHAPES = {"weight": "C C", "bias": "C", "scale": "C", "shift": "C"}
LAYER_SHAPES = {"weight1": "F C", "bias1": "F", "weight2": "C F", "bias2": "C"}
PREDICTION_SHAPES = {"weight1": "C C", "weight2": "C C", "weight3": "M C"}
PREDICTION_SHAPES |= {"bias1": "C", "bias2": "C", "bias3": "M"}


def query_prediction_reference(
    x: Tensor, position: Tensor, prediction: Prediction, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The specification, in plain PyTorch; arguments as `query_prediction`."""
    p = prediction
    normed = F.layer_norm(x, x.shape[2:], p.scale, p.shift, eps)
    first = F.relu(F.linear(normed, p.weight1, p.bias1))
    embedding = F.linear(F.relu(F.linear(first, p.weight2, p.bias2)), p.weight3, p.bias3)
    query = None
    if p.next_weight is not None:
        query = F.linear(x + position, p.next_weight, p.next_bias)
    return normed, embedding, query


def query_layer_reference(
    x: Tensor,
    attended: Tensor,
    position: Tensor,
    layer: Layer,
    prediction: Prediction,
    heads: int,
    eps: float = 1e-5,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The specification, in plain PyTorch; arguments as `query_layer`."""

    def dropped(y):
        return F.dropout(y, dropout) if dropout else y

    def split(y):
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    w, channels = layer, x.shape[2:]
    cross = dropped(F.linear(attended, w.cross_weight, w.cross_bias))
    x = F.layer_norm(x + cross, channels, w.cross_scale, w.cross_shift, eps)
    placed = x + position
    q = split(F.linear(placed, w.query_weight, w.query_bias))
    k = split(F.linear(placed, w.key_weight, w.key_bias))
    v = split(F.linear(x, w.value_weight, w.value_bias))
    attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    attention = dropped(F.linear(attention, w.out_weight, w.out_bias))
    x = F.layer_norm(x + attention, channels, w.self_scale, w.self_shift, eps)
    hidden = dropped(F.relu(F.linear(x, w.weight1, w.bias1)))
    hidden = dropped(F.linear(hidden, w.weight2, w.bias2))
    x = F.layer_norm(x + hidden, channels, w.scale, w.shift, eps)
    return x, *query_prediction_reference(x, position, prediction, eps)


def _some(outputs: tuple) -> tuple[Tensor, ...]:
    """Of an op, which returns tensors only: no query is one of no image."""
    *others, query = outputs
    return *others, others[0].new_empty((0, *others[0].shape[1:])) if query is None else query


def _composed(x, attended, position, layer, prediction, heads, eps) -> tuple[Tensor, ...]:
    named = Layer(*layer), Prediction(*prediction)
    return _some(query_layer_reference(x, attended, position, *named, heads, eps))


def _composed_prediction(x, position, prediction, eps) -> tuple[Tensor, ...]:
    return _some(query_prediction_reference(x, position, Prediction(*prediction), eps))


def _fake_prediction(x, position, prediction, eps) -> tuple[Tensor, Tensor, Tensor]:
    B, Q, C = x.shape
    embedding = x.new_empty((B, Q, prediction[6].shape[0]))
    return x.new_empty(x.shape), embedding, x.new_empty((B if len(prediction) > 8 else 0, Q, C))


def _fake(x, attended, position, layer, prediction, heads, eps) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_fake_prediction(x, position, prediction, eps)


_layer = _library.define(
    "query_layer(Tensor x, Tensor attended, Tensor position, Tensor[] layer, Tensor[] prediction,"
    " int heads, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    triton="query_layer",
    composed=_composed,
)
_prediction = _library.define(
    "query_prediction(Tensor x, Tensor position, Tensor[] prediction, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_prediction,
    triton="query_layer",
    composed=_composed_prediction,
)


def _checked(
    op: str, name: str, tensors: Layer | Prediction, shapes: dict, sizes: dict
) -> list[Tensor]:
    """The tensors, without those of a next query where there is none."""
    given = tensors._asdict()
    if given.get("next_weight", op) is given.get("next_bias", op) is None:
        del given["next_weight"], given["next_bias"]
    for field, tensor in given.items():
        shape = shapes.get(field) or SHAPES[field.rpartition("_")[2]]
        expect(op, f"{name}.{field}", tensor, shape, "float", sizes)
    return list(given.values())


def _suits(tensors: Sequence[Tensor], sizes: dict) -> bool:
    """Whether the kernel is made for a call, or what PyTorch does instead has to run."""
    x = tensors[0]
    C, D = sizes["C"], sizes["C"] // sizes.get("H", 1)
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and all(t.dtype == x.dtype for t in tensors)
        and 0 < sizes["B"] * sizes["Q"] <= ROWS
        and (32 <= C <= 256 and C & (C - 1) == 0)
        and ("H" not in sizes or (16 <= D <= 128 and D & (D - 1) == 0))
        and all(0 < sizes.get(letter, 1) <= 2**20 for letter in "FM")
        and not torch.is_autocast_enabled(x.device.type)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def query_prediction(
    x: Tensor,
    position: Tensor,
    prediction: Prediction,
    eps: float = 1e-5,
    impl: str = "kernel",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a prediction needs of queries: `query_layer` without the layer.

    Args:
        x: [B, Q, C] floating.
        position, prediction, eps, impl: as for `query_layer`.

    Returns:
        normed [B, Q, C], embedding [B, Q, M] and query [B, Q, C], or None.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    op, sizes = "query_prediction", {}
    expect(op, "x", x, "B Q C", "float", sizes)
    expect(op, "position", position, "Q C", "float", sizes)
    given = _checked(op, "prediction", prediction, PREDICTION_SHAPES, sizes)
    if not _library.use_kernel(op, impl, x) or not _suits([x, position, *given], sizes):
        return query_prediction_reference(x, position, prediction, eps)
    normed, embedding, query = _prediction(x, position, given, eps)
    return normed, embedding, query if len(given) > 8 else None


def query_layer(
    x: Tensor,
    attended: Tensor,
    position: Tensor,
    layer: Layer,
    prediction: Prediction,
    heads: int,
    eps: float = 1e-5,
    dropout: float = 0.0,
    impl: str = "kernel",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A decoder layer behind its cross attention, and what the next prediction needs.

    Args:
        x: [B, Q, C] floating, the layer's input.
        attended: [B, Q, C], what each query's heads found in the pixels, before the output
            projection.
        position: [Q, C], added to what queries and keys are made of.
        layer: the layer's tensors; gradients flow to these and to all others.
        prediction: those of the prediction; without `next_weight` no query is made.
        heads: H, which divides C.
        eps: of all norms.
        dropout: probability; 0 in inference.
        impl: "kernel", or "reference" for plain PyTorch, which also runs on the CPU and where the
            kernel is not made for the call: with gradients, dropout or autocast, in float32 and
            float64, for tensors of several dtypes, where C is no power of two from 32 to 256 or
            C / H none from 16 to 128, for more than 512 queries in all.

    Returns:
        x [B, Q, C], normed [B, Q, C], embedding [B, Q, M] and query [B, Q, C], or None.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or number.
    """
    op, sizes = "query_layer", {}
    expect(op, "x", x, "B Q C", "float", sizes)
    expect(op, "attended", attended, "B Q C", "float", sizes)
    expect(op, "position", position, "Q C", "float", sizes)
    weights = _checked(op, "layer", layer, LAYER_SHAPES, sizes)
    given = _checked(op, "prediction", prediction, PREDICTION_SHAPES, sizes)
    if heads < 1 or sizes["C"] % heads:
        raise ValueError(f"query_layer: heads must divide C = {sizes['C']}, got {heads}")
    sizes["H"] = heads
    suits = dropout == 0 and _suits([x, attended, position, *weights, *given], sizes)
    if not _library.use_kernel(op, impl, x) or not suits:
        named = layer, prediction, heads, eps, dropout
        return query_layer_reference(x, attended, position, *named)
    *out, query = _layer(x, attended, position, weights, given, heads, eps)
    return *out, query if len(given) > 8 else None
