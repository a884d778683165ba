r"""Attention under a packed mask that all heads share.

    p[s]         = softmax over the open keys s of scale * q[b, q, h] . k[b, s, h]
    out[b, q, h] = sum_s p[s] v[b, s, h]

Letters: B image, Q query, S key, H head, D channel a head, W = ceil(S / 32) words.

A key is open to a query where its bit is set (`mask_bits`); a query without an open key attends
to all of them. The kernel takes small groups of keys and, of each, only the queries that have one
of them open: masks of objects are compact, so most pairs are never multiplied. Softmax is online:
running maximum and sum, results of separate chunks of keys are merged at the end, and both
are kept, from which the backward pass forms the weights again. Gradients of a key are
summed by one thread; those of a query by chunks of fixed size: no atomics, the same bits each run.
Bytes: Q, K, V, out and the mask once; FLOPs: at most 4 B H Q S D forward, 10 backward.
Source: Masked-attention Mask Transformer (Cheng et al., CVPR 2022), section 3.2.1;
FlashAttention-2 (Dao, 2023), section 3.1.
Differs: one mask for all heads, never repeated; a closed key is skipped, not multiplied by zero,
so what is not finite there may or may not show; backward gets maximum and 1/sum and not their
log-sum-exp, whose rounding would shift all weights of a row.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import alike, exact_dtype, expect
from .mask_bits import unpack_bits


def masked_attn_reference(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, open: Tensor, scale: float | None = None
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `masked_attn`."""
    exact, scale = exact_dtype(q), q.shape[3] ** -0.5 if scale is None else scale
    closed = ~unpack_bits(bits, k.shape[1]) & (open > 0).unsqueeze(-1)  # [B, Q, S]
    with torch.autocast(q.device.type, enabled=False):
        scores = scale * torch.einsum("bqhd,bshd->bhqs", q.to(exact), k.to(exact))
        weights = scores.masked_fill(closed.unsqueeze(1), -torch.inf).softmax(-1)
        return torch.einsum("bhqs,bshd->bqhd", weights, v.to(exact)).flatten(2).to(q.dtype)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, open: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    B, Q, H, D = q.shape
    exact = exact_dtype(q)
    return q.new_empty((B, Q, H * D), dtype=exact), q.new_empty((B, H, Q, 2), dtype=exact)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    open: Tensor,
    out: Tensor,
    norm: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(k.shape)


_forward = _library.define(
    "masked_attn(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor open, float scale)"
    " -> (Tensor, Tensor)",
    _fake,
    triton="masked_attn",
)
_backward = _library.define(
    "masked_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bits, Tensor open,"
    " Tensor out, Tensor norm, float scale) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    triton="masked_attn_backward",
)


class _MaskedAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bits, open, scale):
        out, norm = _forward(q, k, v, bits, open, scale)
        ctx.save_for_backward(q, k, v, bits, open, out, norm)
        ctx.scale = scale
        # a copy: torch 2.11 compiles wrong gradients where a saved tensor is the output itself
        return out.to(q.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


def _check_open(open: Tensor, bits: Tensor) -> None:
    """Raises ValueError for a row that contradicts its bits."""
    some = (bits != 0).any(-1)
    wrong = (open > 0) != some
    if wrong.any():
        b, q = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"masked_attn: open must count the bits set in each row, got {open[b, q].item()} for "
            f"row [{b}, {q}], which has {'some' if some[b, q] else 'none'}"
        )


def masked_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    open: Tensor | None = None,
    scale: float | None = None,
    impl: str = "kernel",
) -> Tensor:
    """Softmax attention of queries to the keys that `bits` opens to them.

    Args:
        q: [B, Q, H, D] floating.
        k, v: [B, S, H, D] in q's dtype, S at least 1; under autocast they may differ, and then all
            three are cast to its dtype. Slices of a wider projection are read in place: only the
            last dimension has to be dense.
        bits: [B, Q, ceil(S / 32)] int32 of `mask_bits`, for all heads: bit j of word w opens key
            32 w + j; bits beyond S must be 0. Gradients flow to q, k and v only.
        open: [B, Q] int32, the number of bits set in each row, as `mask_bits` returns it; a row
            with 0 attends to every key. None finds out. One that contradicts the bits is an error
            on the CPU in eager mode; elsewhere reading it would wait for the device, and such a
            row is NaN or ignores its bits.
        scale: multiplies the scores; None is D^-1/2.
        impl: "kernel", or "reference" for plain PyTorch.

    Returns:
        [B, Q, H * D] in q's dtype; sums are float32 (float64 where q is float64).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, or a wrong `open`.
    """
    sizes = {}
    expect("masked_attn", "q", q, "B Q H D", "float", sizes)
    expect("masked_attn", "k", k, "B S H D", "float", sizes)
    expect("masked_attn", "v", v, "B S H D", "float", sizes)
    q, k, v = alike("masked_attn", q=q, k=k, v=v)
    if sizes["S"] == 0:
        raise ValueError("masked_attn: k must have at least one key, got S = 0")
    sizes["ceil(S/32)"] = (sizes["S"] + 31) // 32
    expect("masked_attn", "bits", bits, "B Q ceil(S/32)", "int32", sizes)
    if open is None:
        open = (bits != 0).any(-1).int()  # only whether it is 0 counts
    expect("masked_attn", "open", open, "B Q", "int32", sizes)
    if open.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_open(open, bits)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if _library.use_kernel("masked_attn", impl, q):
        return _library.applied(_MaskedAttn, q, k, v, bits, open, scale)
    return masked_attn_reference(q, k, v, bits, open, scale)
