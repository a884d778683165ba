"""The forward kernel of window_attn: one head of a run of windows.

Letters as in window_attn.py.
"""

import triton
import triton.language as tl

from .sigmoid import reciprocal
from .window_tokens import (
    LOWEST,
    SIZES,
    load_bias,
    load_projected,
    places,
    scores,
    store,
    weights,
)


@triton.jit(do_not_specialize=SIZES)
def forward(
    qkv,  # [B, h, w, 3, H, D], contiguous
    qkv_bias,  # [3, H, D], contiguous, in the precision of the sums
    bias,  # [H, S, S], contiguous, likewise
    out,  # [B, h, w, H, D], contiguous
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
    C = H * D
    qkv += head * D
    qkv_bias += head * D
    out += head * D
    bias += head.to(tl.int64) * S * S
    kept = load_bias(bias, tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J), S)
    for window in range(first, tl.minimum(first + run, N)):
        image = (window // (rows * columns)).to(tl.int64) * h * w * C
        x, result = qkv + image * 3, out + image
        for begin in range(0, S, BLOCK_I):
            i = begin + tl.arange(0, BLOCK_I)
            asks, _, asked, region_i = places(window, h, w, shift, rows, columns, i, W)
            q = load_projected(x, qkv_bias, asks, asked, asked, 3 * C, D, CHANNELS)
            most = tl.full((BLOCK_I,), LOWEST, exact)
            total = tl.zeros((BLOCK_I,), exact)
            acc = tl.zeros((BLOCK_I, CHANNELS), exact)
            for start in range(0, S, BLOCK_J):
                j = start + tl.arange(0, BLOCK_J)
                token, there, real, region = places(window, h, w, shift, rows, columns, j, W)
                k = load_projected(x + C, qkv_bias + C, token, there, real, 3 * C, D, CHANNELS)
                added = kept
                if S > BLOCK_I or S > BLOCK_J:
                    added = load_bias(bias, i, j, S)
                score = scores(q, k, added, region_i, region, scale)
                before, most = most, tl.maximum(most, tl.max(score, 1))
                p, old = weights(score, most[:, None]), weights(before, most)
                total = total * old + tl.sum(p, 1)
                v = load_projected(
                    x + 2 * C, qkv_bias + 2 * C, token, there, real, 3 * C, D, CHANNELS
                )
                acc = tl.dot(
                    p.to(value), v, acc * old[:, None], input_precision="ieee", out_dtype=exact
                )
            store(result, asks, asked, C, acc * reciprocal(total)[:, None], D, CHANNELS)
