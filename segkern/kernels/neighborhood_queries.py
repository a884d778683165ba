"""The first backward kernel of neighborhood_attn: gradients of queries, and a program's part of
the bias's.

Letters as in neighborhood_attn.py. A tile of queries goes over its keys twice: for the maximum of
the scores, the sum of the weights and the mean of p dp, which the other kernel reads too; then for
the gradients. What each query of a tile adds to the bias stands in memory of the program's own,
where no two threads add to one element.
"""

import triton
import triton.language as tl

from .neighborhood_tiles import ACROSS, SIZES, first_key, pixels, related, tile_at
from .sigmoid import reciprocal
from .window_tokens import LOWEST, load, product, store, weights


@triton.jit(do_not_specialize=[*SIZES, "places"])
def of_queries(
    grad,  # [B, h, w, H, D], contiguous
    q,  # [B, h, w, H, D], with a pixel's heads and their channels side by side
    k,  # likewise
    v,  # likewise
    bias,  # [H, 2 Ky - 1, 2 Kx - 1], contiguous, in the precision of the sums
    grad_q,  # [B, h, w, H, D], contiguous
    parts,  # [programs, BLOCK_I, 2 Ky - 1, 2 Kx - 1], contiguous, zeros
    rests,  # [3, B, h, w, H], contiguous: maximum, inverse of the sum, mean of p dp
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
    table = (2 * Ky - 1) * (2 * Kx - 1)
    grad += head * D
    q += head * D
    k += head * D
    v += head * D
    grad_q += head * D
    rests += head
    bias += head * table
    parts += program.to(tl.int64) * (BLOCK_I * table)
    factor = tl.full((), scale, exact)
    i = tl.arange(0, BLOCK_I)
    for tile in range(first, tl.minimum(first + run, N)):
        image, gy, ny, gx, nx, top, left = tile_at(tile, h, w, ty, tx, rows, columns, TALL)
        image *= h * w
        py, px = top + i // ACROSS, left + i % ACROSS
        asked = (py < ny) & (px < nx)
        asks = pixels(py, px, gy, gx, ty, tx, w)
        query = load(q + image * D * q_step, asks, asked, q_step * D, D, CHANNELS)
        up = load(grad + image * D * H, asks, asked, H * D, D, CHANNELS)
        low, low_x = first_key(top, ny, Ky), first_key(left, nx, Kx)
        high = first_key(tl.minimum(top + TALL, ny) - 1, ny, Ky) + Ky
        wide = first_key(tl.minimum(left + ACROSS, nx) - 1, nx, Kx) + Kx - low_x
        keys = tl.where((top < ny) & (left < nx), (high - low) * wide, 0)
        most = tl.full((BLOCK_I,), LOWEST, exact)
        total, mean = tl.zeros((BLOCK_I,), exact), tl.zeros((BLOCK_I,), exact)
        for start in range(0, keys, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            ky, kx = low + j // wide, low_x + j % wide
            real = j < keys
            token = pixels(ky, kx, gy, gx, ty, tx, w)
            near, at = related(py[:, None], px[:, None], ky[None, :], kx[None, :], ny, nx, Ky, Kx)
            added = tl.load(bias + at, mask=near & real[None, :], other=float("-inf"))
            key = load(k + image * D * k_step, token, real, k_step * D, D, CHANNELS)
            score = product(query, key, exact) * factor + added
            before, most = most, tl.maximum(most, tl.max(score, 1))
            p, old = weights(score, most[:, None]), weights(before, most)
            total = total * old + tl.sum(p, 1)
            row = load(v + image * D * v_step, token, real, v_step * D, D, CHANNELS)
            mean = mean * old + tl.sum(p * product(up, row, exact), 1)
        inverse = reciprocal(total)
        mean *= inverse
        rest = rests + (image + asks) * H
        tl.store(rest, most, mask=asked)
        tl.store(rest + places, inverse, mask=asked)
        tl.store(rest + 2 * places.to(tl.int64), mean, mask=asked)
        dq = tl.zeros((BLOCK_I, CHANNELS), exact)
        for start in range(0, keys, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            ky, kx = low + j // wide, low_x + j % wide
            real = j < keys
            token = pixels(ky, kx, gy, gx, ty, tx, w)
            near, at = related(py[:, None], px[:, None], ky[None, :], kx[None, :], ny, nx, Ky, Kx)
            near &= real[None, :]
            added = tl.load(bias + at, mask=near, other=float("-inf"))
            key = load(k + image * D * k_step, token, real, k_step * D, D, CHANNELS)
            score = product(query, key, exact) * factor + added
            p = weights(score, most[:, None]) * inverse[:, None]
            row = load(v + image * D * v_step, token, real, v_step * D, D, CHANNELS)
            ds = p * (product(up, row, exact) - mean[:, None])
            near &= asked[:, None]
            sums = parts + i[:, None] * table + at
            tl.store(sums, tl.load(sums, mask=near, other=0.0) + ds, mask=near)
            dq = tl.dot(ds.to(value), key, dq, input_precision="ieee", out_dtype=exact)
        store(grad_q + image * D * H, asks, asked, H * D, dq * factor, D, CHANNELS)
        tl.debug_barrier()  # other threads add to what these have added to
