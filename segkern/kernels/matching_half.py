"""Sums over a range of points, where features and embeddings are of 16 bits.

Letters as in matching_cost.py.

Sampling commutes with the product even corner by corner: x = sum_k w_k (e . f_k). The features are
multiplied as they lie, four corners a point: every term is exact in float32, and rows of the map
go from global to shared memory without passing a register. (Interpolated first, they would have to
be split in three to be as accurate, 3 products for 4, and be worked on before.)
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
def half_sums(
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
    corner = tl.arange(0, 4)[:, None] * BLOCK_P + j[None, :]
    order = column_order(j)
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
    # Three tiles are under way: the product of one runs on the matrix units while the
    # logits of the one before are worked on; the sums over points of a third end it. y is read
    # before the next product starts and `pairs` waits for it: else they run one by one.
    e = tl.load(embed + q[:, None] * C + c[None, :], (q < Q)[:, None] & (c < C)[None, :], 0.0)
    pixel = tl.load(pixels + corner)
    weight = tl.zeros([4, BLOCK_P], exact)
    y = tl.zeros([BLOCK_Q, 4 * BLOCK_P], exact)
    x = tl.zeros([BLOCK_Q, BLOCK_P], exact)
    s = x
    m = tl.zeros([BLOCK_P, BLOCK_T], exact)
    m_next = m
    for tile in tl.range(0, tiles + 1, num_stages=STAGES):
        pairs += sum_over_points(x, s, m, BLOCK_Q, BLOCK_P, BLOCK_T)

        x = tl.sum(tl.reshape(y, [BLOCK_Q, 4, BLOCK_P]) * weight[None, :, :], 1)
        p = begin + (tile - 1) * BLOCK_P + j
        x = tl.where(((p >= begin) & (p < P))[None, :], x, -1e30)
        positive += tl.sum(tl.maximum(x, 0.0), 1)
        row = tl.reshape(pixel, [4 * BLOCK_P])[:, None]
        there = (row >= 0) & (c < C)[None, :]
        f = tl.load(features + row.to(tl.int64) * C + c[None, :], there, 0.0)
        near = (tile + 1) * BLOCK_P + j < tiles * BLOCK_P
        pixel = tl.load(pixels + (tile + 1) * (4 * BLOCK_P) + corner, near[None, :], -1)
        y = tl.dot(e, f.trans())

        m = m_next
        s, factor = sigmoid_and_factor(x)
        factors *= factor
        sigmoid += tl.sum(s, 1)

        near = tile * BLOCK_P + j < tiles * BLOCK_P
        weight = tl.load(weights + tile * (4 * BLOCK_P) + corner, near[None, :], 0.0)
        p = begin + tile * BLOCK_P + order
        there = near & (p < P)
        m_next = targets_at(mask, counts, points + p * 2, there, H, W, y_stride, x_stride, exact)
        target += tl.sum(m_next, 0)
    pairs += sum_over_points(x, s, m, BLOCK_Q, BLOCK_P, BLOCK_T)
    sums = pairs, positive, sigmoid, target
    write_sums(
        *(sums, factors, pair_sums, query_sums, target_sums, part, tile_q, tile_t, counts),
        *(Q, T, BLOCK_Q, BLOCK_T),
    )
