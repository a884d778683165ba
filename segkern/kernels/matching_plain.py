"""Sums over a range of points in float32 and, by plain sums and for checks, in float64.

Letters as in matching_cost.py.

The features are interpolated first, and multiplied in the precision of the sums.
"""

import triton
import triton.language as tl

from .matching_parts import (
    SIZES,
    column_order,
    count_of,
    part_of,
    sum_over_points,
    targets_at,
    write_sums,
)
from .sigmoid import sigmoid_and_factor


@triton.jit(do_not_specialize=SIZES)
def plain_sums(
    embed,  # [N, Q, C]
    features,  # [B, S, C]
    masks,  # [B, T, H, W] by its strides, uint8
    points,  # [N, P, 2], of the precision of the sums
    pixels,  # [N, G * range_tiles, 4, BLOCK_P]
    weights,  # [N, G * range_tiles, 4, BLOCK_P]
    n_targets,  # [B] or None
    n_points,  # [N] or None
    pair_sums,  # [N, G, 2, Q, T]: sum x t, sum s t
    query_sums,  # [N, G, 2, Q]: sum softplus(x), sum s
    target_sums,  # [N, G, T]: sum t
    R,
    Q,
    T,
    P,
    S,
    H,
    W,
    image_stride: tl.int64,
    target_stride: tl.int64,
    y_stride,
    x_stride,
    ranges,
    range_tiles,
    above,  # of images with more targets, and at most so many
    most,
    C: tl.constexpr,
    PRECISION: tl.constexpr,  # of the product of float32 features and embeddings
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    exact: tl.constexpr = points.dtype.element_ty
    tile_t, tile_q, part, n, b = part_of(R, Q, T, ranges, BLOCK_Q, BLOCK_T)
    count = count_of(n_targets, b, T)
    if (count <= above) | (count > most) | (tile_t * BLOCK_T >= count):
        return

    q = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    j = tl.arange(0, BLOCK_P)
    order = j if exact == tl.float64 else column_order(j)
    embed += n * Q * C
    features += b * S * C
    points += n * P * 2
    P = count_of(n_points, n, P)
    pixels += part * range_tiles * (4 * BLOCK_P)
    weights += part * range_tiles * (4 * BLOCK_P)
    mask = masks + b * image_stride + t.to(tl.int64) * target_stride
    counts = t < count
    begin = (part % ranges).to(tl.int32) * range_tiles * BLOCK_P
    tiles = tl.minimum(range_tiles, tl.cdiv(P - begin, BLOCK_P))

    pairs = tl.zeros([2 * BLOCK_Q, BLOCK_T], exact)
    # up to 128 factors of up to 2 (RANGE of matching_cost, over 8 points): 2^128 overflows
    factors = tl.full([BLOCK_Q, BLOCK_P], 0.5, exact)
    positive = tl.zeros([BLOCK_Q], exact)
    sigmoid = tl.zeros([BLOCK_Q], exact)
    target = tl.zeros([BLOCK_T], exact)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        pixel = pixels + tile * (4 * BLOCK_P) + j
        weight = weights + tile * (4 * BLOCK_P) + j
        x = tl.zeros([BLOCK_Q, BLOCK_P], exact)
        for first in range(0, C, BLOCK_C):
            d = first + c
            f = tl.zeros([BLOCK_P, BLOCK_C], exact)
            for k in tl.static_range(4):
                row = tl.load(pixel + k * BLOCK_P)[:, None]
                there = (row >= 0) & (d < C)[None, :]
                value = tl.load(features + row.to(tl.int64) * C + d[None, :], there, 0.0)
                f += tl.load(weight + k * BLOCK_P)[:, None] * value.to(exact)
            there = (q < Q)[:, None] & (d < C)[None, :]
            e = tl.load(embed + q[:, None] * C + d[None, :], there, 0.0).to(exact)
            if exact == tl.float64:
                x += tl.sum(e[:, None, :] * f[None, :, :], 2)
            else:
                x = tl.dot(e, f.trans(), x, input_precision=PRECISION)
        p = begin + tile * BLOCK_P
        x = tl.where((p + j < P)[None, :], x, -1e30)
        s, factor = sigmoid_and_factor(x)
        factors *= factor
        positive += tl.sum(tl.maximum(x, 0.0), 1)
        sigmoid += tl.sum(s, 1)
        p += order
        m = targets_at(mask, counts, points + p * 2, p < P, H, W, y_stride, x_stride, exact)
        target += tl.sum(m, 0)
        pairs += sum_over_points(x, s, m, BLOCK_Q, BLOCK_P, BLOCK_T)
    sums = pairs, positive, sigmoid, target
    write_sums(
        *(sums, factors, pair_sums, query_sums, target_sums, part, tile_q, tile_t, counts),
        *(Q, T, BLOCK_Q, BLOCK_T),
    )
