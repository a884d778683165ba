"""The forward kernel of neighborhood_attn: one head of a run of tiles of queries.

Letters as in neighborhood_attn.py.
"""

import triton
import triton.language as tl

from .neighborhood_tiles import ACROSS, SIZES, first_key, pixels, related, tile_at
from .sigmoid import reciprocal
from .window_tokens import LOWEST, load, product, store, weights


@triton.jit(do_not_specialize=SIZES)
def forward(
    q,  # [B, h, w, H, D], with a pixel's heads and their channels side by side
    k,  # likewise
    v,  # likewise
    bias,  # [H, 2 Ky - 1, 2 Kx - 1], contiguous, in the precision of the sums
    out,  # [B, h, w, H, D], contiguous
    scale: tl.float64,
    h,
    w,
    H,
    Ky,
    Kx,
    ty,
    tx,
    rows,  # of a group's tiles
    columns,
    N,
    run,  # tiles of a program
    q_step,  # from pixel to pixel, in heads
    k_step,
    v_step,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    program = tl.program_id(0)
    head, first = program % H, program // H * run
    exact: tl.constexpr = bias.dtype.element_ty
    value: tl.constexpr = q.dtype.element_ty
    TALL: tl.constexpr = BLOCK_I // ACROSS
    q += head * D
    k += head * D
    v += head * D
    out += head * D
    bias += head * (2 * Ky - 1) * (2 * Kx - 1)
    factor = tl.full((), scale, exact)
    for tile in range(first, tl.minimum(first + run, N)):
        image, gy, ny, gx, nx, top, left = tile_at(tile, h, w, ty, tx, rows, columns, TALL)
        image *= h * w * D
        i = tl.arange(0, BLOCK_I)
        py, px = top + i // ACROSS, left + i % ACROSS
        asked = (py < ny) & (px < nx)
        asks = pixels(py, px, gy, gx, ty, tx, w)
        query = load(q + image * q_step, asks, asked, q_step * D, D, CHANNELS)
        low, low_x = first_key(top, ny, Ky), first_key(left, nx, Kx)
        high = first_key(tl.minimum(top + TALL, ny) - 1, ny, Ky) + Ky
        wide = first_key(tl.minimum(left + ACROSS, nx) - 1, nx, Kx) + Kx - low_x
        keys = tl.where((top < ny) & (left < nx), (high - low) * wide, 0)
        most = tl.full((BLOCK_I,), LOWEST, exact)
        total = tl.zeros((BLOCK_I,), exact)
        acc = tl.zeros((BLOCK_I, CHANNELS), exact)
        for start in range(0, keys, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            ky, kx = low + j // wide, low_x + j % wide
            real = j < keys
            token = pixels(ky, kx, gy, gx, ty, tx, w)
            near, at = related(py[:, None], px[:, None], ky[None, :], kx[None, :], ny, nx, Ky, Kx)
            near &= real[None, :]
            added = tl.load(bias + at, mask=near, other=float("-inf"))
            key = load(k + image * k_step, token, real, k_step * D, D, CHANNELS)
            score = product(query, key, exact) * factor + added
            before, most = most, tl.maximum(most, tl.max(score, 1))
            p, old = weights(score, most[:, None]), weights(before, most)
            total = total * old + tl.sum(p, 1)
            rows_of_v = load(v + image * v_step, token, real, v_step * D, D, CHANNELS)
            acc = tl.dot(
                p.to(value), rows_of_v, acc * old[:, None], input_precision="ieee", out_dtype=exact
            )
        result = acc * reciprocal(total)[:, None]
        store(out + image * H, asks, asked, H * D, result, D, CHANNELS)
