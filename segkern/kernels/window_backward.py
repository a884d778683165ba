"""The backward kernel of window_attn: one head of a run of windows, and its part of the biases'.

Letters as in window_attn.py.
"""

import triton
import triton.language as tl

from .window_tokens import SIZES, load, load_bias, load_projected, places, weights_of


@triton.jit
def _store(to, token, real, stride, x, D: tl.constexpr, CHANNELS: tl.constexpr):
    d = tl.arange(0, CHANNELS)
    mask = real[:, None]
    if D < CHANNELS:
        mask = mask & (d < D)[None, :]
    tl.store(to + token[:, None] * stride + d[None, :], x, mask)


@triton.jit(do_not_specialize=SIZES)
def backward(
    grad,  # [B, h, w, H, D], contiguous
    qkv,  # [B, h, w, 3, H, D], contiguous
    qkv_bias,  # [3, H, D], contiguous, in the precision of the sums
    bias,  # [H, S, S], contiguous, likewise
    grad_qkv,  # [B, h, w, 3, H, D], contiguous
    qkv_parts,  # [runs, 3, H, D], contiguous: of the gradient of qkv_bias
    parts,  # [runs, H, S, S], contiguous, zeros if a window has several blocks of queries
    scale: tl.float64,
    h,
    w,
    H,
    shift,
    rows,  # of windows
    columns,
    N,
    run,  # windows of a program
    W: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0)
    head, first = program % H, program // H * run
    exact: tl.constexpr = bias.dtype.element_ty
    value: tl.constexpr = qkv.dtype.element_ty
    S: tl.constexpr = W * W
    C = H * D
    qkv += head * D
    qkv_bias += head * D
    grad += head * D
    grad_qkv += head * D
    bias += head.to(tl.int64) * S * S
    parts += program.to(tl.int64) * S * S
    factor = tl.full((), scale, exact)
    i, j = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_I, BLOCK_S), exact)  # of the gradient of bias
    total_q = tl.zeros((CHANNELS,), exact)
    total_k = tl.zeros((CHANNELS,), exact)
    total_v = tl.zeros((CHANNELS,), exact)
    for window in range(first, tl.minimum(first + run, N)):
        image = (window // (rows * columns)).to(tl.int64) * h * w * C
        x, dx, upper = qkv + image * 3, grad_qkv + image * 3, grad + image
        token, there, real, region = places(window, h, w, shift, rows, columns, 0, W, BLOCK_S)
        k = load_projected(x + C, qkv_bias + C, token, there, real, 3 * C, D, CHANNELS)
        dk = tl.zeros((BLOCK_S, CHANNELS), exact)
        dv = tl.zeros((BLOCK_S, CHANNELS), exact)
        for start in range(0, S, BLOCK_I):
            asks, _, asked, region_q = places(
                window, h, w, shift, rows, columns, start, W, BLOCK_I
            )
            q = load_projected(x, qkv_bias, asks, asked, asked, 3 * C, D, CHANNELS)
            up = load(upper, asks, asked, C, D, CHANNELS)
            added = load_bias(bias, start, S, BLOCK_I, BLOCK_S)  # again: registers
            p, inverse = weights_of(q, k, added, region_q, region, scale, exact)
            p *= inverse[:, None]
            pt = tl.trans(p.to(value))
            dv = tl.dot(pt, up, dv, input_precision="ieee", out_dtype=exact)
            v = load_projected(x + 2 * C, qkv_bias + 2 * C, token, there, real, 3 * C, D, CHANNELS)
            dp = tl.dot(up, tl.trans(v), input_precision="ieee", out_dtype=exact)
            ds = p * (dp - tl.sum(p * dp, 1)[:, None])
            if S > BLOCK_I:
                at = parts + (start + i)[:, None] * S + j[None, :]
                inside = (start + i < S)[:, None] & (j < S)[None, :]
                tl.store(at, tl.load(at, inside, 0.0) + ds, inside)
            else:
                total += ds
            ds = ds.to(value)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee", out_dtype=exact)
            dq = tl.dot(ds, k, input_precision="ieee", out_dtype=exact) * factor
            total_q += tl.sum(dq, 0)
            _store(dx, asks, asked, 3 * C, dq, D, CHANNELS)
        dk *= factor
        total_k += tl.sum(dk, 0)
        total_v += tl.sum(dv, 0)
        _store(dx + C, token, real, 3 * C, dk, D, CHANNELS)
        _store(dx + 2 * C, token, real, 3 * C, dv, D, CHANNELS)
    if S <= BLOCK_I:
        tl.store(parts + i[:, None] * S + j[None, :], total, (i < S)[:, None] & (j < S)[None, :])
    d = tl.arange(0, CHANNELS)
    qkv_parts += program // H * (3 * C) + head * D + d
    tl.store(qkv_parts, total_q, d < D)
    tl.store(qkv_parts + C, total_k, d < D)
    tl.store(qkv_parts + 2 * C, total_v, d < D)
