"""The backward kernel of window_attn: one head of a run of windows, and its part of the biases'.

Letters as in window_attn.py. A block of queries goes over the keys twice: for the maximum of its
scores, the sum of its weights and the mean of p dp; then for the gradients. Where all keys are one
block, the compiler finds that both do the same, and does it once. The gradients of the keys wait
in memory of the program's own for the next block of queries, if there is one.
"""

import triton
import triton.language as tl

from .sigmoid import reciprocal
from .window_tokens import (
    LOWEST,
    PART,
    SIZES,
    load,
    load_bias,
    load_projected,
    places,
    product,
    scores,
    store,
    weights,
)


@triton.jit(do_not_specialize=SIZES)
def backward(
    grad,  # [B, h, w, H, D], contiguous
    qkv,  # [B, h, w, 3, H, D], contiguous
    qkv_bias,  # [3, H, D], contiguous, in the precision of the sums
    bias,  # [H, S, S], contiguous, likewise
    grad_qkv,  # [B, h, w, 3, H, D], contiguous
    q_parts,  # [runs, H, D], contiguous: of the gradient of the bias of q
    parts,  # [runs, H, S, S], contiguous, zeros if a window has several blocks
    rests,  # [runs, H, 2, S, D], contiguous, if queries are several blocks: of values, of keys
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
    BLOCK_J: tl.constexpr,
):
    program = tl.program_id(0)
    head, first = program % H, program // H * run
    exact: tl.constexpr = bias.dtype.element_ty
    value: tl.constexpr = qkv.dtype.element_ty
    S: tl.constexpr = W * W
    several: tl.constexpr = S > BLOCK_I or S > BLOCK_J
    wide: tl.constexpr = CHANNELS > PART  # registers are short: queries are added up at once
    C = H * D
    qkv += head * D
    qkv_bias += head * D
    grad += head * D
    grad_qkv += head * D
    bias += head.to(tl.int64) * S * S
    parts += program.to(tl.int64) * S * S
    rests += program.to(tl.int64) * (2 * S * D)
    factor = tl.full((), scale, exact)
    total = tl.zeros((BLOCK_I, BLOCK_J), exact)  # of the gradient of bias
    total_q = tl.zeros((1 if wide else BLOCK_I, CHANNELS), exact)
    for window in range(first, tl.minimum(first + run, N)):
        image = (window // (rows * columns)).to(tl.int64) * h * w * C
        x, dx, upper = qkv + image * 3, grad_qkv + image * 3, grad + image
        for begin in range(0, S, BLOCK_I):
            i = begin + tl.arange(0, BLOCK_I)
            asks, _, asked, region_i = places(window, h, w, shift, rows, columns, i, W)
            q = load_projected(x, qkv_bias, asks, asked, asked, 3 * C, D, CHANNELS)
            up = load(upper, asks, asked, C, D, CHANNELS)
            most = tl.full((BLOCK_I,), LOWEST, exact)
            sum, mean = tl.zeros((BLOCK_I,), exact), tl.zeros((BLOCK_I,), exact)
            for start in range(0, S, BLOCK_J):
                j = start + tl.arange(0, BLOCK_J)
                token, there, real, region = places(window, h, w, shift, rows, columns, j, W)
                k = load_projected(x + C, qkv_bias + C, token, there, real, 3 * C, D, CHANNELS)
                score = scores(q, k, load_bias(bias, i, j, S), region_i, region, scale)
                before, most = most, tl.maximum(most, tl.max(score, 1))
                p, old = weights(score, most[:, None]), weights(before, most)
                sum = sum * old + tl.sum(p, 1)
                v = load_projected(
                    x + 2 * C, qkv_bias + 2 * C, token, there, real, 3 * C, D, CHANNELS
                )
                dp = product(up, v, exact)
                mean = mean * old + tl.sum(p * dp, 1)
            inverse = reciprocal(sum)
            mean *= inverse
            dq = tl.zeros((BLOCK_I, CHANNELS), exact)
            for start in range(0, S, BLOCK_J):
                j = start + tl.arange(0, BLOCK_J)
                token, there, real, region = places(window, h, w, shift, rows, columns, j, W)
                k = load_projected(x + C, qkv_bias + C, token, there, real, 3 * C, D, CHANNELS)
                score = scores(q, k, load_bias(bias, i, j, S), region_i, region, scale)
                p = weights(score, most[:, None]) * inverse[:, None]
                v = load_projected(
                    x + 2 * C, qkv_bias + 2 * C, token, there, real, 3 * C, D, CHANNELS
                )
                dp = product(up, v, exact)
                dv = tl.zeros((BLOCK_J, CHANNELS), exact)
                if S > BLOCK_I:
                    dv += load(rests, j, there & (begin > 0), D, D, CHANNELS)
                pt = tl.trans(p.to(value))
                dv = tl.dot(pt, up, dv, input_precision="ieee", out_dtype=exact)
                if begin + BLOCK_I < S:
                    store(rests, j, there, D, dv, D, CHANNELS)
                else:
                    store(dx + 2 * C, token, real, 3 * C, dv, D, CHANNELS)
                ds = p * (dp - mean[:, None])
                if several:
                    at = parts + i[:, None] * S + j[None, :]
                    inside = (i < S)[:, None] & (j < S)[None, :]
                    tl.store(at, tl.load(at, inside, 0.0) + ds, inside)
                else:
                    total += ds
                ds = ds.to(value)
                dk = tl.zeros((BLOCK_J, CHANNELS), exact)
                if S > BLOCK_I:
                    dk += load(rests + S * D, j, there & (begin > 0), D, D, CHANNELS)
                dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee", out_dtype=exact)
                if begin + BLOCK_I < S:
                    store(rests + S * D, j, there, D, dk, D, CHANNELS)
                else:
                    store(dx + C, token, real, 3 * C, dk * factor, D, CHANNELS)
                dq = tl.dot(ds, k, dq, input_precision="ieee", out_dtype=exact)
            total_q += tl.sum(dq, 0, keep_dims=True) if wide else dq
            store(dx, asks, asked, 3 * C, dq * factor, D, CHANNELS)
            if several:
                tl.debug_barrier()  # other threads read what these have written
    if not several:
        i, j = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
        tl.store(parts + i[:, None] * S + j[None, :], total, (i < S)[:, None] & (j < S)[None, :])
    d = tl.arange(0, CHANNELS)
    tl.store(q_parts + program.to(tl.int64) * D + d, tl.sum(total_q, 0) * factor, d < D)
