"""The semantic kernel of segment_map: the class of the largest score at each pixel.

Letters: B image, Q query, K class, h w mask logits, H W result.

A score is sum_q weights[q, k] sigmoid(mask logit of q). A program takes tiles of output pixels.
Bounds of each query's logits in a tile bound the scores of each class there; classes that lose
everywhere are left out, and a single one that is left takes the tile. For the others the sigmoids
of all queries are made once and kept in memory of the program's own, which the L2 cache holds;
the scores are their products with 32 classes at a time, on the matrix units: float32 as a sum of
two numbers of 11 bits, of whose four products the smallest is left out (2^-24 of the others).
"""

import triton
import triton.language as tl

from .segment_taps import SIZES, blend, extremes, rounding, taps
from .sigmoid import sigmoid


@triton.jit
def _taps_and_share(place, weight, i, n, stride, second):
    """Of positions i of the output one of two in the image: its two taps, and what it weighs."""
    share = tl.load(weight + (4 + second) * n + i, i < n, 0.0)
    return taps(place + 2 * second * n, weight + 2 * second * n, i, n, stride, 2), share


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["masks"])
def semantic_tiles(
    weights,  # [B, Q, K]
    masks,  # [B, Q, h, w] by its strides
    place_y,  # [TAPS, H]
    weight_y,
    place_x,  # [TAPS, W]
    weight_x,
    bounds,  # [B, programs, 2 Q + K]: sigmoids of a query's bounds; bounds of a class's score
    listed,  # [B, programs, K] int32
    kept,  # [B, programs, rows, BLOCK_Y * BLOCK_X]: sigmoids; rows is Q, up to a multiple of 16
    map,  # [B, H, W] int32
    areas,  # [B, K] int64, zeros
    scores,  # [B, K, H, W] or None
    Q,
    K,
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
    SCORES: tl.constexpr,  # scores are resized from image to output, and not the logits
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    AT_ONCE: tl.constexpr,  # queries whose sigmoids are made together
    PRECISION: tl.constexpr,  # of the product
    STAGES: tl.constexpr,
):
    exact: tl.constexpr = bounds.dtype.element_ty
    program = tl.program_id(0)
    image, pid = (program // programs).to(tl.int64), program.to(tl.int64)
    bounds += pid * (2 * Q + K)
    listed += pid * K
    kept += pid * tl.cdiv(Q, 16) * (16 * BLOCK_Y * BLOCK_X)
    weights += image * Q * K
    masks += image * image_stride
    areas += image * K
    j = tl.arange(0, 16)
    p = tl.arange(0, BLOCK_Y * BLOCK_X)
    for tile in tl.range(program % programs, tiles, programs):
        top, left = tile // tiles_x * BLOCK_Y, tile % tiles_x * BLOCK_X
        row, column = top + p // BLOCK_X, left + p % BLOCK_X
        there = (row < H) & (column < W)
        length = K
        tl.debug_barrier()  # what the last tile kept is read
        if scores is None:
            bottom, right = tl.minimum(top + BLOCK_Y, H) - 1, tl.minimum(left + BLOCK_X, W) - 1
            for start in tl.range(0, Q, BLOCK_Q):
                q = start + tl.arange(0, BLOCK_Q)
                low, high = extremes(
                    masks + tl.minimum(q, Q - 1) * query_stride,
                    *(place_y, place_x, top, left, bottom, right, H, W, y_stride, x_stride),
                    *(exact, TAPS, BLOCK_Q, 4 * BLOCK_Y * BLOCK_X),
                )
                tl.store(bounds + q, sigmoid(low), q < Q)
                tl.store(bounds + Q + q, sigmoid(high), q < Q)
            tl.debug_barrier()
            least = tl.zeros((BLOCK_K,), exact)
            for start in tl.range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                low, high = tl.zeros((BLOCK_K,), exact), tl.zeros((BLOCK_K,), exact)
                for begin in tl.range(0, Q, 16):
                    q = begin + j
                    inside = (q < Q)[:, None] & (k < K)[None, :]
                    weight = tl.load(weights + q[:, None] * K + k[None, :], inside, 0.0)
                    a = tl.load(bounds + q, q < Q, 0.0)
                    b = tl.load(bounds + Q + q, q < Q, 0.0)
                    low += tl.sum(a[:, None] * weight, 0)
                    high += tl.sum(b[:, None] * weight, 0)
                tl.store(bounds + 2 * Q + k, high, k < K)
                least = tl.where(low > least, low, least)
            floor = tl.max(least)
            tl.debug_barrier()
            length = 0
            for start in tl.range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                high = tl.load(bounds + 2 * Q + k, k < K, 0.0)
                rival = ((k < K) & ~(high * (1 + rounding(Q, exact)) < floor)).to(tl.int32)
                tl.store(listed + length + tl.cumsum(rival, 0) - 1, k, rival > 0)
                length += tl.sum(rival)
            tl.debug_barrier()

        best = tl.full((BLOCK_Y * BLOCK_X,), -1.0, exact)
        label = tl.zeros((BLOCK_Y * BLOCK_X,), tl.int32)
        if scores is None:
            label += tl.load(listed, length > 0, 0)
        many = length
        if scores is None:
            many = tl.where(length > 1, length, 0)
        if many > 0:
            line, point = row[None, :], column[None, :]
            if not SCORES:
                y = taps(place_y, weight_y, line, H, y_stride, TAPS)
                x = taps(place_x, weight_x, point, W, x_stride, TAPS)
            for begin in tl.range(0, tl.cdiv(Q, 16) * 16, AT_ONCE):
                q = (begin + tl.arange(0, AT_ONCE))[:, None]
                map_q = masks + tl.minimum(q, Q - 1) * query_stride
                if SCORES:  # one position after the other: registers
                    value = tl.zeros((AT_ONCE, BLOCK_Y * BLOCK_X), exact)
                    for corner in tl.range(0, 4):
                        y, u = _taps_and_share(place_y, weight_y, line, H, y_stride, corner // 2)
                        x, v = _taps_and_share(place_x, weight_x, point, W, x_stride, corner % 2)
                        value += u * v * sigmoid(blend(map_q, y, x, 2))
                else:
                    value = sigmoid(blend(map_q, y, x, TAPS))
                tl.store(kept + q * (BLOCK_Y * BLOCK_X) + p[None, :], value)
            tl.debug_barrier()
        for start in tl.range(0, many, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K)
            real, k = (at < length)[None, :], at[None, :]
            if scores is None:
                k = tl.load(listed + at, at < length, 0)[None, :]
            total = tl.zeros((BLOCK_Y * BLOCK_X, BLOCK_K), exact)
            for begin in tl.range(0, Q, 16, num_stages=STAGES):
                q = begin + j
                value = tl.load(kept + q[None, :] * (BLOCK_Y * BLOCK_X) + p[:, None])
                weight = tl.load(weights + q[:, None] * K + k, real & (q < Q)[:, None], 0.0)
                # the matrix units truncate what they add: these sums are added outside of them
                total += tl.dot(value, weight, input_precision=PRECISION, out_dtype=exact)
            if scores is not None:
                to = scores + (((image * K + k) * H + row[:, None]) * W + column[:, None])
                tl.store(to, total, real & there[:, None])
            total = tl.where(real, total, -1.0)
            most = tl.max(total, 1)
            first = tl.min(tl.where(total == most[:, None], k, K), 1)
            label = tl.where(most > best, first, label)
            best = tl.where(most > best, most, best)
        tl.store(map + (image * H + row) * W + column, label, there)
        for start in tl.range(0, length, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            real = k < length
            if scores is None:
                k = tl.load(listed + k, real, 0)
            hits = (label[None, :] == k[:, None]) & there[None, :] & real[:, None]
            count = tl.sum(hits.to(tl.int32), 1).to(tl.int64)
            tl.atomic_add(areas + k, count, count > 0, sem="relaxed")
