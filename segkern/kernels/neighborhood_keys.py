"""The second backward kernel of neighborhood_attn: gradients of keys and values.

Letters as in neighborhood_attn.py. A tile of keys goes over all queries that attend to any of it.
"""

import triton
import triton.language as tl

from .neighborhood_tiles import ACROSS, SIZES, first_query, last_query, pixels, related, tile_at
from .window_tokens import load, product, store, weights


@triton.jit(do_not_specialize=[*SIZES, "places"])
def of_keys(
    grad,  # [B, h, w, H, D], contiguous
    q,  # [B, h, w, H, D], with a pixel's heads and their channels side by side
    k,  # likewise
    v,  # likewise
    bias,  # [H, 2 Ky - 1, 2 Kx - 1], contiguous, in the precision of the sums
    rests,  # [3, B, h, w, H], contiguous: maximum, inverse of the sum, mean of p dp
    grad_k,  # [B, h, w, H, D], contiguous
    grad_v,  # likewise
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
    places,  # B h w H
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
    grad += head * D
    q += head * D
    k += head * D
    v += head * D
    grad_k += head * D
    grad_v += head * D
    rests += head
    bias += head * (2 * Ky - 1) * (2 * Kx - 1)
    factor = tl.full((), scale, exact)
    for tile in range(first, tl.minimum(first + run, N)):
        image, gy, ny, gx, nx, top, left = tile_at(tile, h, w, ty, tx, rows, columns, TALL)
        image *= h * w
        i = tl.arange(0, BLOCK_I)
        ky, kx = top + i // ACROSS, left + i % ACROSS
        there = (ky < ny) & (kx < nx)
        token = pixels(ky, kx, gy, gx, ty, tx, w)
        key = load(k + image * D * k_step, token, there, k_step * D, D, CHANNELS)
        row = load(v + image * D * v_step, token, there, v_step * D, D, CHANNELS)
        low, low_x = first_query(top, Ky), first_query(left, Kx)
        high = last_query(tl.minimum(top + TALL, ny) - 1, ny, Ky) + 1
        wide = last_query(tl.minimum(left + ACROSS, nx) - 1, nx, Kx) + 1 - low_x
        queries = tl.where((top < ny) & (left < nx), (high - low) * wide, 0)
        dk, dv = tl.zeros((BLOCK_I, CHANNELS), exact), tl.zeros((BLOCK_I, CHANNELS), exact)
        for start in range(0, queries, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            py, px = low + j // wide, low_x + j % wide
            asked = j < queries
            asks = pixels(py, px, gy, gx, ty, tx, w)
            near, at = related(py[None, :], px[None, :], ky[:, None], kx[:, None], ny, nx, Ky, Kx)
            near &= asked[None, :] & there[:, None]
            added = tl.load(bias + at, mask=near, other=float("-inf"))
            query = load(q + image * D * q_step, asks, asked, q_step * D, D, CHANNELS)
            score = product(key, query, exact) * factor + added
            rest = rests + (image + asks) * H
            most = tl.load(rest, mask=asked, other=0.0)
            inverse = tl.load(rest + places, mask=asked, other=0.0)
            mean = tl.load(rest + 2 * places.to(tl.int64), mask=asked, other=0.0)
            p = weights(score, most[None, :]) * inverse[None, :]
            up = load(grad + image * D * H, asks, asked, H * D, D, CHANNELS)
            dv = tl.dot(p.to(value), up, dv, input_precision="ieee", out_dtype=exact)
            ds = (p * (product(row, up, exact) - mean[None, :])).to(value)
            dk = tl.dot(ds, query, dk, input_precision="ieee", out_dtype=exact)
        store(grad_k + image * D * H, token, there, H * D, dk * factor, D, CHANNELS)
        store(grad_v + image * D * H, token, there, H * D, dv, D, CHANNELS)
