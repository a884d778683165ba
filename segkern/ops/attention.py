r"""Attention of every query to every key, without their scores in memory.

    out[b, q, h] = sum_s p[s] v[b, s, h],    p = softmax over s of scale * q[b, q, h] . k[b, s, h]

Letters: B image, Q query, S key, H head, D channel a head.

On a CPU the products are those of `linear`: a head's keys and values are copied once to dense
panels, and 24 queries at a time go through all keys, 256 after another, so that scores stay in the
first cache. Softmax is online: a row's running maximum is followed when it grows by 2^8, and then
the sums so far are scaled. PyTorch's kernel asks MKL for small products, which takes its path for
AVX2 on AMD's CPUs. Where gradients flow, in half precision and elsewhere PyTorch's kernel runs.
FLOPs: 4 B H Q S D; bytes: q, k, v and the result once.
Source: FlashAttention-2 (Dao, 2023), section 3.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._checks import alike, exact_dtype, expect


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The specification, in plain PyTorch; arguments as `attention`."""
    exact, scale = exact_dtype(q), q.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        scores = scale * torch.einsum("bqhd,bshd->bhqs", q.to(exact), k.to(exact))
        out = torch.einsum("bhqs,bshd->bqhd", scores.softmax(-1), v.to(exact))
    return out.flatten(2).to(q.dtype)


def of_pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's kernel, which has gradients and half precision; arguments as `attention`."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3]))


_op = _library.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor", _fake, cpu_only=True
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, impl: str = "kernel"
) -> Tensor:
    """Softmax attention of all queries to all keys.

    Args:
        q: [B, Q, H, D] floating.
        k, v: [B, S, H, D] in q's dtype, S at least 1; under autocast they may differ, and then all
            three are cast to its dtype. Slices of a wider projection are read in place: only the
            last dimension has to be dense. Gradients flow to all three.
        scale: multiplies the scores; None is D^-1/2.
        impl: "kernel", or "reference" for plain PyTorch. Where gradients flow, in half precision,
            under autocast and for CUDA tensors "kernel" is PyTorch's.

    Returns:
        [B, Q, H * D] in q's dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    sizes = {}
    expect("attention", "q", q, "B Q H D", "float", sizes)
    expect("attention", "k", k, "B S H D", "float", sizes)
    expect("attention", "v", v, "B S H D", "float", sizes)
    q, k, v = alike("attention", q=q, k=k, v=v)
    if sizes["S"] == 0:
        raise ValueError("attention: k must have at least one key, got S = 0")
    flows = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    autocast = torch.is_autocast_enabled(q.device.type)
    if impl == "kernel" and (flows or autocast or q.is_cuda or q.dtype.itemsize < 4):
        return of_pytorch(q, k, v, scale)
    if not _library.use_kernel("attention", impl, q):
        return attention_reference(q, k, v, scale)
    return _op(q, k, v, sizes["D"] ** -0.5 if scale is None else float(scale))
