"""masked_attn's gradients in Triton; letters, chunks, slots and `norm` as in masked_attn.

A program owns the gradients of its keys. It keeps those of the queries of its slots in registers,
and where there are more slots than these hold, it goes over its keys again for the next group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, KINDS, on
from .masked_attn import base, factors, load, open_keys, prepare, slots_of, store

# as masked_attn.FORWARD
BACKWARD = {
    ("99 KB", 2): {
        32: (64, 1, 32, 8, 2, 1),
        64: (32, 1, 32, 8, 2, 1),
        128: (32, 1, 32, 8, 2, 1),
        256: (16, 1, 32, 8, 1, 1),
    },
    ("163 KB", 2): {
        32: (64, 1, 64, 8, 2, 1),
        64: (32, 1, 32, 4, 2, 2),
        128: (32, 1, 32, 8, 2, 1),
        256: (16, 1, 32, 8, 1, 1),
    },
    ("227 KB", 2): {
        32: (64, 2, 64, 4, 2, 2),
        64: (64, 1, 64, 8, 2, 1),
        128: (32, 1, 32, 8, 2, 1),
        256: (16, 1, 32, 8, 1, 1),
    },
    ("227 KB, 10.x", 2): {
        32: (64, 2, 64, 8, 2, 1),
        64: (64, 1, 64, 8, 2, 1),
        128: (32, 1, 32, 8, 2, 1),
        256: (16, 1, 32, 8, 1, 1),
    },
}
FLOAT32 = {64: (32, 1, 32, 8, 2, 2), 128: (16, 1, 32, 8, 2, 2)}
FLOAT64 = {32: (16, 1, 32, 4, 1, 2), 128: (16, 1, 32, 8, 1, 1)}
BACKWARD |= {(kind, 4): FLOAT32 for kind in KINDS} | {(kind, 8): FLOAT64 for kind in KINDS}


@triton.jit(do_not_specialize=["Q", "S", "H", "groups", "splits", "tiles"])
def _backward(
    q,  # [B, Q, H, D]
    k,  # [B, S, H, D]
    v,  # [B, S, H, D]
    bits,  # [B, Q, W] int32, contiguous
    open,  # [B, Q] int32, contiguous
    plan,  # [B, splits, 2 Q + 1] int32
    grad,  # [B, Q, H, D], contiguous
    out,  # [B, Q, H, D], contiguous
    norm,  # [B, H, Q, 2], contiguous
    grad_q,  # [B, splits, Q, H, D], contiguous, for _add
    grad_k,  # [B, S, H, D], contiguous
    grad_v,  # [B, S, H, D], contiguous
    rest_k,  # [B, S, H, D]: what rounding left of grad_k, until the last group is added
    rest_v,  # [B, S, H, D]
    scale: tl.float64,
    Q,
    S,
    H,
    groups,  # of slots, one after the other
    splits,
    tiles,
    q_image: tl.int64,
    q_row: tl.int64,
    q_head: tl.int64,
    k_image: tl.int64,
    k_row: tl.int64,
    k_head: tl.int64,
    v_image: tl.int64,
    v_row: tl.int64,
    v_head: tl.int64,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,  # divides all strides
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    h = (program % H).to(tl.int64)
    chunk = (program // H).to(tl.int64)
    b, first = chunk // splits, (chunk % splits).to(tl.int32) * tiles
    exact: tl.constexpr = norm.dtype.element_ty
    value: tl.constexpr = q.dtype.element_ty
    inner, outer = factors(scale, exact, value == exact)
    q = base(q, b, h, q_image, q_head, UNIT)
    k = base(k, b, h, k_image, k_head, UNIT)
    v = base(v, b, h, v_image, v_head, UNIT)
    bits += b * Q * tl.cdiv(S, 32)
    plan += chunk * (2 * Q + 1)
    used = tl.load(plan + 2 * Q)
    head = b * Q * H * D + h * D
    norm += (b * H + h) * Q * 2
    grad_q += chunk * Q * H * D + h * D
    line = b * S * H * D + h * D
    tiles = tl.minimum(tiles, tl.cdiv(S, KEYS) - first)
    for group in range(groups):
        slots, dqs = (), ()
        union = 0
        more = used > (group + 1) * TILES * ROWS if value != exact else False
        for r in tl.static_range(TILES):
            row, n, wanted = slots_of(plan, open + b * Q, (group * TILES + r) * ROWS, Q, ROWS)
            real = row < Q
            query = load(q, row, q_row // UNIT * UNIT, real, D, CHANNELS)
            up = load(grad + head, row, H * D, real, D, CHANNELS)
            o = load(out + head, row, H * D, real, D, CHANNELS)
            top = tl.load(norm + row * 2, mask=real, other=0.0)
            inverse = tl.load(norm + row * 2 + 1, mask=real, other=1.0)
            if value != exact:
                top -= tl.log2(inverse)
            # the weight of a lone key is 1 whatever its score: not dp - mean, which rounds
            many = tl.where(tl.where(n == 0, S, n) == 1, 0.0, 1.0).to(exact)
            mean = tl.sum(up.to(exact) * o, 1) * many
            slots += ((row, n, wanted, query, up, top, inverse, many, mean),)
            dqs += (tl.zeros((ROWS, CHANNELS), exact),)
            union |= wanted
        for t in tl.range(0, tl.where((group > 0) & (union == 0), 0, tiles), num_stages=STAGES):
            key = (first + t).to(tl.int64) * KEYS + tl.arange(0, KEYS)
            limit = tl.where((union >> t & 1) != 0, S, 0)
            keys = load(k, key, k_row // UNIT * UNIT, key < limit, D, CHANNELS)
            values = load(v, key, v_row // UNIT * UNIT, key < limit, D, CHANNELS)
            dk = tl.zeros((KEYS, CHANNELS), exact)
            dv = tl.zeros((KEYS, CHANNELS), exact)
            for r in tl.static_range(TILES):
                row, n, wanted, query, up, top, inverse, many, mean = slots[r]
                if (wanted >> t & 1) != 0:
                    pair = open_keys(bits, row, n, first + t, Q, S, KEYS)
                    x = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=exact)
                    p = tl.exp2((x * inner - top[:, None]) * outer)
                    if value == exact:
                        p *= inverse[:, None]
                    p = tl.where(pair, p, 0.0)
                    pt = tl.trans(p.to(value))
                    dv = tl.dot(pt, up, dv, input_precision="ieee", out_dtype=exact)
                    dp = tl.dot(up, tl.trans(values), input_precision="ieee", out_dtype=exact)
                    ds = (p * (dp * many[:, None] - mean[:, None])).to(value)
                    dk = tl.dot(tl.trans(ds), query, dk, input_precision="ieee", out_dtype=exact)
                    dq = tl.dot(ds, keys, dqs[r], input_precision="ieee", out_dtype=exact)
                    dqs = dqs[:r] + (dq,) + dqs[r + 1 :]
            dk *= tl.full((), scale, exact)
            given = key < tl.where(group > 0, limit, S)
            if group > 0:
                dk += load(grad_k + line, key, H * D, given, D, CHANNELS)
                dv += load(grad_v + line, key, H * D, given, D, CHANNELS)
                if value != exact:
                    dk += load(rest_k + line, key, H * D, given, D, CHANNELS)
                    dv += load(rest_v + line, key, H * D, given, D, CHANNELS)
            store(grad_k + line, key, H * D, given, dk, D, CHANNELS)
            store(grad_v + line, key, H * D, given, dv, D, CHANNELS)
            if more:
                dk -= dk.to(value).to(exact)
                dv -= dv.to(value).to(exact)
                store(rest_k + line, key, H * D, given, dk, D, CHANNELS)
                store(rest_v + line, key, H * D, given, dv, D, CHANNELS)
        for r in tl.static_range(TILES):
            row = slots[r][0]
            store(grad_q, row, H * D, row < Q, dqs[r], D, CHANNELS)
        tl.debug_barrier()  # other threads read what these have written


@triton.jit(do_not_specialize=["n", "splits"])
def _add(
    parts,  # [B, splits, n]
    out,  # [B, n]
    scale: tl.float64,
    n,
    splits,
    PARTS: tl.constexpr,  # at a time
    LINE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lines = tl.cdiv(n, LINE)
    b = program // lines
    i = program % lines * LINE + tl.arange(0, LINE)
    exact: tl.constexpr = parts.dtype.element_ty
    total = tl.zeros((LINE,), exact)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        place = (b * splits + split)[:, None] * n + i[None, :]
        mask = (split < splits)[:, None] & (i < n)[None, :]
        total += tl.sum(tl.load(parts + place, mask=mask, other=0.0), 0)
    tl.store(out + b * n + i, total * tl.full((), scale, exact), mask=i < n)


def masked_attn_backward(
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
    """As `segkern::masked_attn_backward`."""
    (B, Q, H, D), S = q.shape, k.shape[1]
    grads = [torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, k)]
    if norm.numel() == 0:
        return tuple(t.zero_() for t in grads)
    with on(q):
        tensors, sizes, constants = prepare(BACKWARD, q, k, v, bits, open, scale)
        groups, splits = sizes[:2]
        parts = torch.empty((B, splits, Q, H * D), dtype=norm.dtype, device=q.device)
        rests = [torch.empty_like(t) for t in grads[1:]] if groups > 1 else grads[1:]
        upper = grad.contiguous(), out.contiguous(), norm.contiguous()
        _backward[(B * splits * H,)](
            *tensors, *upper, parts, *grads[1:], *rests, abs(scale), Q, S, H, *sizes, **constants
        )
        n = Q * H * D
        _add[(B * triton.cdiv(n, 128),)](
            parts, grads[0], scale, n, splits, PARTS=16, LINE=128, **FUSED
        )
    return tuple(grads)
