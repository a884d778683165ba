r"""Self-attention in windows of a map: padding, shift, cut, bias, softmax and the way back in one.

    p[j]                 = softmax over the S places j of a window of
                           scale * q_i . k_j + bias[h, i, j] + (-100 where i, j are no neighbours)
    out[token of i, h]   = sum_j p[j] v_j

Letters: B image, h w map, H head, D channels a head, C = H D, W window's side, S = W W places of a
window, N = B ceil(h/W) ceil(w/W) windows.

Maps are padded at the right and below to whole windows first and rolled by -shift then. q, k and v
are products plus a bias, which is added as they are read; a padded token, the projection of zeros,
is the bias alone: a key like others, whose own result is dropped. After
the shift the last row and column of windows hold tokens of both ends of the map: those are no
neighbours. The kernel takes one window and head at a time: rows of q, k and v are read from their
tokens, the S x S scores stay in the cache, and rows of the result go to their tokens; backward
forms the scores anew. A token lies in one window: no atomics; the gradients of the biases are
summed in an order that the shape alone decides, the same bits each run.
Bytes: q, k, v, out and the bias once; FLOPs: 4 N H S^2 D forward, 10 backward.
Source: Swin Transformer (Liu et al., ICCV 2021), section 3.2.
Differs: no mask is stored and nothing is copied to be padded, rolled or cut; padded queries are
not computed; in float32 a weight below e^-64 of its row's largest is 0. As in the published
segmentation checkpoints (detectron2's and transformers' alike, and unlike timm) padding comes
before the roll.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import exact_dtype, expect

LARGEST = 16  # side of a window that the kernel on a GPU takes
BLOCKED = -100.0  # added where two tokens of a window are no neighbours on the map


def _cut(x: Tensor, window: int) -> Tensor:
    """[B, y, x, ...] to [B, y/W, x/W, S, ...]."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4)


def window_attn_reference(
    qkv: Tensor,
    qkv_bias: Tensor,
    bias: Tensor,
    window: int,
    shift: int = 0,
    scale: float | None = None,
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `window_attn`."""
    B, h, w, _, H, D = qkv.shape
    y, x = -(-h // window) * window, -(-w // window) * window
    with torch.autocast(qkv.device.type, enabled=False):
        tokens = qkv_bias.to(qkv.dtype).expand(B, y, x, 3, H, D).clone()
        tokens[:, :h, :w] += qkv
        if shift:
            tokens = tokens.roll((-shift, -shift), (1, 2))
        tokens = _cut(tokens, window)  # [B, y/W, x/W, S, 3, H, D]
        q, k, v = tokens.flatten(0, 2).permute(2, 0, 3, 1, 4)  # each [N, H, S, D]

        mask = bias.to(qkv.dtype)[None]  # [1, H, S, S], the same for all windows
        if shift:
            # what the roll brought from the other end of the map is another region
            low = torch.arange(y, device=qkv.device)[:, None] >= y - shift
            right = torch.arange(x, device=qkv.device) >= x - shift
            region = _cut((2 * low + right)[None], window).flatten(0, 2)  # [N / B, S]
            apart = region[:, None, :, None] != region[:, None, None, :]
            mask = (bias.to(exact_dtype(qkv)) + BLOCKED * apart).to(qkv.dtype)
            mask = mask.expand(B, -1, -1, -1, -1).flatten(0, 1)  # [N, H, S, S]
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

        out = out.transpose(1, 2).reshape(B, y // window, x // window, window, window, H * D)
        out = out.transpose(2, 3).reshape(B, y, x, H * D)
        if shift:
            out = out.roll((shift, shift), (1, 2))
        return out[:, :h, :w]


def _fake(
    qkv: Tensor, qkv_bias: Tensor, bias: Tensor, window: int, shift: int, scale: float
) -> Tensor:
    B, h, w, _, H, D = qkv.shape
    return qkv.new_empty((B, h, w, H * D))


def _fake_backward(
    grad: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    bias: Tensor,
    window: int,
    shift: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (qkv, qkv_bias, bias))


_forward = _library.define(
    "window_attn(Tensor qkv, Tensor qkv_bias, Tensor bias, int window, int shift, float scale)"
    " -> Tensor",
    _fake,
    triton="window_attn",
)
_backward = _library.define(
    "window_attn_backward(Tensor grad, Tensor qkv, Tensor qkv_bias, Tensor bias, int window,"
    " int shift, float scale) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    triton="window_attn",
)


class _WindowAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, qkv_bias, bias, window, shift, scale):
        ctx.save_for_backward(qkv, qkv_bias, bias)
        ctx.options = window, shift, scale
        return _forward(qkv, qkv_bias, bias, window, shift, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def window_attn(
    qkv: Tensor,
    qkv_bias: Tensor,
    bias: Tensor,
    window: int,
    shift: int = 0,
    scale: float | None = None,
    impl: str = "kernel",
) -> Tensor:
    """Multi-head self-attention of the tokens of each window, in Swin's windows.

    Args:
        qkv: [B, h, w, 3, H, D] floating: queries, keys and values of each token of a map, of any
            size, without their bias. The result of one projection to 3 C channels is
            `.unflatten(-1, (3, H, -1))`.
        qkv_bias: [3, H, D] floating: the bias of that projection.
        bias: [H, S, S] floating: what is added to the scaled score of a query (first) and a key at
            their places in the window, row by row. Both biases are taken in float32 (float64 where
            qkv is), also under autocast. Gradients flow to all three.
        window: W, at least 1.
        shift: how far the map is rolled up and left before it is cut, in [0, W).
        scale: multiplies the scores; None is D^-1/2.
        impl: "kernel", or "reference" for plain PyTorch, where products and biases are in qkv's
            dtype; CUDA tensors take the reference for windows of more than 16 x 16.

    Returns:
        [B, h, w, H * D] in qkv's dtype; sums are float32 (float64 where qkv is float64).

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or number.
    """
    if window < 1:
        raise ValueError(f"window_attn: window must be at least 1, got {window}")
    if not 0 <= shift < window:
        raise ValueError(f"window_attn: shift must be in [0, {window}), got {shift}")
    sizes = {"S": window * window}
    expect("window_attn", "qkv", qkv, "B h w 3 H D", "float", sizes)
    expect("window_attn", "qkv_bias", qkv_bias, "3 H D", "float", sizes)
    expect("window_attn", "bias", bias, "H S S", "float", sizes)
    scale = qkv.shape[5] ** -0.5 if scale is None else float(scale)
    if qkv.is_cuda and window > LARGEST and impl == "kernel":
        impl = "reference"
    if not _library.use_kernel("window_attn", impl, qkv):
        return window_attn_reference(qkv, qkv_bias, bias, window, shift, scale)
    exact = exact_dtype(qkv)
    qkv_bias, bias = qkv_bias.to(exact), bias.to(exact)
    return _library.applied(_WindowAttn, qkv, qkv_bias, bias, window, shift, scale)
