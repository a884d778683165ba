"""The panoptic kernel of segment_map: the query of the largest score at each pixel, and areas.

Letters: B image, Q query, h w mask logits, H W result.

A score is scores[q] sigmoid(mask logit of q). A program takes tiles of output pixels. Bounds of
each query's logits in a tile tell which queries may win there (rivals) and which masks begin or
end there (edges); only these are looked at pixel by pixel.
"""

import triton
import triton.language as tl

from .segment_taps import SIZES, blend, extremes, rounding, taps
from .sigmoid import sigmoid


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["masks"])
def panoptic(
    scores,  # [B, Q]
    masks,  # [B, Q, h, w] by its strides
    place_y,  # [TAPS, H]
    weight_y,
    place_x,  # [TAPS, W]
    weight_x,
    bounds,  # [B, programs, 2, Q]
    listed,  # [B, programs, Q] int32
    map,  # [B, H, W] int32: the winner q, or ~q where its logit is below 0
    counts,  # [3, B, Q] int64, zeros: pixels won and inside; won; inside
    Q,
    H,
    W,
    tiles,
    tiles_x,
    programs,
    image_stride: tl.int64,
    query_stride: tl.int64,
    y_stride,
    x_stride,
    TAPS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    exact: tl.constexpr = bounds.dtype.element_ty
    program = tl.program_id(0)
    image, pid = (program // programs).to(tl.int64), program.to(tl.int64)
    images = (tl.num_programs(0) // programs).to(tl.int64)
    bounds += pid * 2 * Q
    listed += pid * Q
    scores += image * Q
    masks += image * image_stride
    areas = counts + image * Q
    won = areas + images * Q
    own = won + images * Q
    slack = rounding(1, exact)
    for tile in tl.range(program % programs, tiles, programs):
        tl.debug_barrier()  # what the last tile kept is read
        top, left = tile // tiles_x * BLOCK_Y, tile % tiles_x * BLOCK_X
        bottom, right = tl.minimum(top + BLOCK_Y, H) - 1, tl.minimum(left + BLOCK_X, W) - 1
        pixels = ((bottom - top + 1) * (right - left + 1)).to(tl.int64)

        # at every pixel of the tile some query's score is at least the largest lower bound
        least = tl.zeros((BLOCK_Q,), exact)
        for start in tl.range(0, Q, BLOCK_Q):
            q = start + tl.arange(0, BLOCK_Q)
            score = tl.load(scores + q, q < Q, 0.0)
            kept = tl.where(score > 0, 1, 0)  # not NaN
            if tl.max(kept) > 0:
                low, high = extremes(
                    masks + tl.minimum(q, Q - 1) * query_stride,
                    *(place_y, place_x, top, left, bottom, right, H, W, y_stride, x_stride),
                    *(exact, TAPS, BLOCK_Q, 4 * BLOCK_Y * BLOCK_X),
                )
                tl.store(bounds + q, low, q < Q)
                tl.store(bounds + Q + q, high, q < Q)
                floor = score * sigmoid(low) * (1 - slack)
                least = tl.where((kept > 0) & (floor > least), floor, least)
        floor = tl.max(least)
        tl.debug_barrier()

        # what is listed is 4 q + 2 (q may win a pixel) + 1 (its mask begins or ends in the tile);
        # a mask that does neither covers the whole tile or none of it, and is counted here
        length, rivals, first = 0, 0, Q
        for start in tl.range(0, Q, BLOCK_Q):
            q = start + tl.arange(0, BLOCK_Q)
            score = tl.load(scores + q, q < Q, 0.0)
            kept = score > 0
            low = tl.load(bounds + q, kept, 0.0)
            high = tl.load(bounds + Q + q, kept, 0.0)
            rival = (kept & ~(score * sigmoid(high) * (1 + slack) < floor)).to(tl.int32)
            edge = (kept & (low < 0) & (high >= 0)).to(tl.int32)
            tl.atomic_add(own + q, pixels, kept & (low >= 0), sem="relaxed")
            here = rival | edge
            at = length + tl.cumsum(here, 0) - 1
            tl.store(listed + at, q * 4 + rival * 2 + edge, here > 0)
            length += tl.sum(here)
            rivals += tl.sum(rival)
            first = tl.minimum(first, tl.min(tl.where(rival > 0, q, Q)))
        tl.debug_barrier()

        row = (top + tl.arange(0, BLOCK_Y))[:, None]
        column = (left + tl.arange(0, BLOCK_X))[None, :]
        y = taps(place_y, weight_y, row, H, y_stride, TAPS)
        x = taps(place_x, weight_x, column, W, x_stride, TAPS)
        there = (row < H) & (column < W)
        best = tl.full((BLOCK_Y, BLOCK_X), -1.0, exact)
        # a single rival wins the whole tile; pixel by pixel only if its mask has an edge here
        inside = tl.load(bounds + first, rivals == 1, -1.0) >= 0
        winner = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32) + tl.where(inside, first, ~first)
        for i in tl.range(0, length):
            code = tl.load(listed + i)
            if (code % 2 > 0) | (rivals > 1):
                q = code // 4
                logit = blend(masks + q * query_stride, y, x, TAPS)
                count = tl.sum(tl.where(there & (logit >= 0), 1, 0))
                tl.atomic_add(own + q, count.to(tl.int64), code % 2 > 0, sem="relaxed")
                value = tl.load(scores + q) * sigmoid(logit)
                better = (value > best) & (code // 2 % 2 > 0)
                winner = tl.where(better, tl.where(logit >= 0, q, ~q), winner)
                best = tl.where(better, value, best)
        tl.store(map + (image * H + row) * W + column, winner, there)
        for i in tl.range(0, length):
            code = tl.load(listed + i)
            if code // 2 % 2 > 0:
                q = code // 4
                found = tl.where(winner == q, 0x10001, tl.where(winner == ~q, 0x10000, 0))
                # two counts in one sum: the pixels that q wins, times 2^16, and those of them that
                # are inside its mask; a tile has fewer than 2^16
                found = tl.sum(tl.where(there, found, 0))
                both = (found % 0x10000).to(tl.int64)
                tl.atomic_add(areas + q, both, both > 0, sem="relaxed")
                tl.atomic_add(won + q, (found // 0x10000).to(tl.int64), found > 0, sem="relaxed")
