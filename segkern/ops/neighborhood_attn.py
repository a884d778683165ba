r"""Attention of each pixel to the K x K pixels around it, of which dilation leaves gaps.

Along an axis of length L pixel i is place p of group g, whose places lie t pixels apart:

    g, p = i mod t, i div t        n = ceil((L - g) / t) places in the group
    s    = clamp(p - r, 0, n - K)  its first key; the last one is s + K - 1
    key[j] = (s + j) t + g         rel[j] = s + j - p + K - 1, for j = 0 ... K - 1

and with the keys a, b of both axes

    p[a, b] = softmax over (a, b) of scale * q . k[a, b] + bias[h, rel_y[a], rel_x[b]]
    out     = sum_ab p[a, b] v[a, b]

Letters: B image, h w map, H head, D channels a head, K = 2 r + 1 kernel, t dilation; kernel and
dilation of the two axes may differ.

A pixel near the border attends to K x K keys too: its window is moved inwards, not cut. Hence no
key is masked, and an axis must have K t pixels at least. A layer that meets a smaller map pads
what its projection to q, k and v reads. The op does not: unlike with Swin's windows, which pad
most maps, it would have to take the biases of that projection for maps that are rare and small.
On the CPU a kernel takes a row of queries of a head, in the order of their first keys, so that a
vector of queries reads one vector of keys; on a GPU a tile of queries of one group of both axes
multiplies with the keys of all of them, and those that are too far away are masked. Backward forms
the scores anew; sums over queries are in an order that the shape alone decides, without atomics:
the same bits each run.
Bytes: q, k, v and out once; FLOPs: 4 B h w H K^2 D forward, 10 backward.
Source: Neighborhood Attention Transformer (Hassani et al., CVPR 2023) and Dilated Neighborhood
Attention Transformer (Hassani and Shi, 2022).
Differs: nothing of size K^2 a pixel is stored; in float32 a weight below e^-64 of its row's
largest may be 0.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import alike, exact_dtype, expect, expect_integer


def _axis(length: int, kernel: int, dilation: int, device) -> tuple[Tensor, Tensor]:
    """Of each pixel of an axis its keys, and the rows of the bias that belong to them; [L, K]."""
    i = torch.arange(length, device=device)
    group, place = i % dilation, i // dilation
    places = (length - 1 - group) // dilation + 1
    start = (place - kernel // 2).clamp_min(0).minimum(places - kernel)
    key = start[:, None] + torch.arange(kernel, device=device)
    return key * dilation + group[:, None], key - place[:, None] + kernel - 1


def neighborhood_attn_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `neighborhood_attn`."""
    _, h, w, _, D = q.shape
    (tall, wide), (down, right) = _pair(kernel), _pair(dilation)
    rows, rows_of_bias = _axis(h, tall, down, q.device)
    columns, columns_of_bias = _axis(w, wide, right, q.device)
    with torch.autocast(q.device.type, enabled=False):
        # [B, h, Ky, w, Kx, H, D] to [B, h, w, H, Ky Kx, D]
        k, v = (
            t[:, rows][:, :, :, columns].permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for t in (k, v)
        )
        scores = (q.unsqueeze(-2) @ k.mT).squeeze(-2) * (D**-0.5 if scale is None else scale)
        if bias is not None:
            added = bias.to(q.dtype)[
                :, rows_of_bias[:, None, :, None], columns_of_bias[None, :, None, :]
            ]  # [H, h, w, Ky, Kx]
            scores = scores + added.flatten(3).permute(1, 2, 0, 3)
        return (scores.softmax(-1).unsqueeze(-2) @ v).squeeze(-2)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    kernel: list[int],
    dilation: list[int],
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    kernel: list[int],
    dilation: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v, bias))


_forward = _library.define(
    "neighborhood_attn(Tensor q, Tensor k, Tensor v, Tensor bias, int[] kernel, int[] dilation,"
    " float scale) -> Tensor",
    _fake,
    triton="neighborhood_attn",
)
_backward = _library.define(
    "neighborhood_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bias,"
    " int[] kernel, int[] dilation, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    triton="neighborhood_attn",
)


class _NeighborhoodAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, kernel, dilation, scale):
        ctx.save_for_backward(q, k, v, bias)
        ctx.options = kernel, dilation, scale
        return _forward(q, k, v, bias, kernel, dilation, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def _pair(value) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _numbers(name: str, value) -> tuple[int, int]:
    """A number for each axis, checked."""
    pair = _pair(value)
    if len(pair) != 2:
        raise ValueError(
            f"neighborhood_attn: {name} must be a number or a pair (of rows, of columns),"
            f" got {value!r}"
        )
    for number in pair:
        expect_integer(f"neighborhood_attn: {name}", number)
    return pair


def neighborhood_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
    impl: str = "kernel",
) -> Tensor:
    """Multi-head attention of each pixel to the pixels around it.

    Args:
        q: [B, h, w, H, D] floating: queries. The three may be views of one projection to 3 C
            channels, `.unflatten(-1, (3, H, -1)).unbind(3)`: none is copied.
        k: [B, h, w, H, D] in q's dtype (without autocast): keys.
        v: [B, h, w, H, D] in q's dtype (without autocast): values.
        bias: [H, 2 Ky - 1, 2 Kx - 1] floating, added to the scaled score by the offset of key to
            query, from 1 - K to K - 1 places; None adds nothing. It is taken in float32 (float64
            where q is), also under autocast. Gradients flow to all four.
        kernel: K, odd; or (Ky, Kx) of rows and of columns.
        dilation: t, at least 1: pixels from one key to the next; or a pair likewise. On each axis
            the map must have K t pixels at least.
        scale: multiplies the scores; None is D^-1/2.
        impl: "kernel", or "reference" for plain PyTorch, where products and bias are in q's dtype.

    Returns:
        [B, h, w, H, D] in q's dtype; sums are float32 (float64 where q is float64).

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or number, or a map that is too small.
    """
    sizes = {}
    for name, t in (("q", q), ("k", k), ("v", v)):
        expect("neighborhood_attn", name, t, "B h w H D", "float", sizes)
    q, k, v = alike("neighborhood_attn", q=q, k=k, v=v)
    kernel, dilation = _numbers("kernel", kernel), _numbers("dilation", dilation)
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"neighborhood_attn: kernel must be odd, got {kernel}")
    sides = tuple(q.shape[1:3])
    least = kernel[0] * dilation[0], kernel[1] * dilation[1]
    if sides[0] < least[0] or sides[1] < least[1]:
        raise ValueError(
            f"neighborhood_attn: kernel {kernel} x dilation {dilation} must be at most the map's"
            f" sides, got {sides[0]} x {sides[1]}: pad what q, k and v are made of"
        )
    tables = sizes | {"Y": 2 * kernel[0] - 1, "X": 2 * kernel[1] - 1}
    if bias is not None:
        expect("neighborhood_attn", "bias", bias, "H Y X", "float", tables)
    scale = q.shape[4] ** -0.5 if scale is None else float(scale)
    if not _library.use_kernel("neighborhood_attn", impl, q):
        return neighborhood_attn_reference(q, k, v, bias, kernel, dilation, scale)
    exact = exact_dtype(q)
    if bias is None:
        bias = q.new_zeros((q.shape[3], tables["Y"], tables["X"]), dtype=exact)
    return _NeighborhoodAttn.apply(q, k, v, bias.to(exact), [*kernel], [*dilation], scale)
