"""The forward kernel of window_attn: one head of a run of windows.

Letters as in window_attn.py.
"""

import triton
import triton.language as tl

from .window_tokens import SIZES, load_bias, load_projected, places, weights_of


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
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0)
    head, first = program % H, program // H * run
    exact: tl.constexpr = bias.dtype.element_ty
    S: tl.constexpr = W * W
    C = H * D
    qkv += head * D
    qkv_bias += head * D
    out += head * D
    bias += head.to(tl.int64) * S * S
    added = load_bias(bias, 0, S, BLOCK_I, BLOCK_S)
    d = tl.arange(0, CHANNELS)
    for window in range(first, tl.minimum(first + run, N)):
        image = (window // (rows * columns)).to(tl.int64) * h * w * C
        x, result_of = qkv + image * 3, out + image
        token, there, real, region = places(window, h, w, shift, rows, columns, 0, W, BLOCK_S)
        k = load_projected(x + C, qkv_bias + C, token, there, real, 3 * C, D, CHANNELS)
        v = load_projected(x + 2 * C, qkv_bias + 2 * C, token, there, real, 3 * C, D, CHANNELS)
        for start in range(0, S, BLOCK_I):
            asks, _, stored, region_q = places(
                window, h, w, shift, rows, columns, start, W, BLOCK_I
            )
            q = load_projected(x, qkv_bias, asks, stored, stored, 3 * C, D, CHANNELS)
            if S > BLOCK_I:
                added = load_bias(bias, start, S, BLOCK_I, BLOCK_S)
            p, inverse = weights_of(q, k, added, region_q, region, scale, exact)
            result = tl.dot(p.to(v.dtype), v, input_precision="ieee", out_dtype=exact)
            to = result_of + asks[:, None] * C + d[None, :]
            tl.store(to, result * inverse[:, None], stored[:, None] & (d < D)[None, :])
