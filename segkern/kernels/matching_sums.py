"""The sums over points of which `matching_cost` is made: logits, sigmoids and targets in one pass.

Letters: B image, R prediction, N = B R problems, Q query, C channel, S pixels of a feature map, T
target, H W mask, P point, G ranges of points.

Sampling commutes with the product even corner by corner: x = sum_k w_k (e . f_k). Features of 16
bits are multiplied as they lie, four corners a point: every term is exact in float32, and rows of
the map go from global to shared memory without passing a register. (Interpolated first, they would
have to be split in three to be as accurate, 3 products for 4, and be worked on before.) float32
features are interpolated first, and multiplied in float32.

Sums over points on the matrix units: x = high + low, of 11 bits each, and so the targets, are
exact in tf32 but for the last two bits of low; the sum of all four products is one product over a
fourfold range. The units truncate what they add, so that a tile's sums are added to the others'
outside of them. tf32 alone would be hundreds of times less accurate than float32.
"""

import math

import triton
import triton.language as tl

from .point_sample import find_corners
from .sigmoid import sigmoid_and_factor

LOG2 = tl.constexpr(math.log(2))
SIZES = ["R", "Q", "T", "P", "K1", "S", "h", "w", "H", "W", "tiles", "ranges", "range_tiles"]
SIZES += ["image_stride", "channel_stride", "target_stride", "y_stride", "x_stride"]

# (kind of device, path): queries of a program at most, points of a tile, warps, stages.
# Chosen by arithmetic, not yet measured. half: embeddings of 128 queries (64 KB at 256 channels)
# and three tiles of 4 x 16 rows of features (32 KB each) in shared memory, a program a
# multiprocessor; 4 x 8 rows where the registers of 16 points spill. single: 8 logits a thread, for
# the same reason.
TABLE = {
    ("99 KB", "half"): (128, 8, 8, 3),
    ("99 KB", "single"): (128, 16, 8, 2),
    ("163 KB", "half"): (128, 8, 8, 3),
    ("163 KB", "single"): (128, 16, 8, 2),
    ("227 KB", "half"): (128, 16, 8, 3),
    ("227 KB", "single"): (128, 16, 8, 2),
    ("227 KB, 10.x", "half"): (128, 8, 8, 3),
    ("227 KB, 10.x", "single"): (128, 16, 8, 2),
}
DOUBLE = (16, 16, 4, 1)  # by plain sums, for checks


@triton.jit
def _targets(
    mask,  # [BLOCK_T] pointers to masks [H, W] by their strides
    counts,  # [BLOCK_T]
    point,  # [BLOCK_P] pointers to points [2]
    there,  # [BLOCK_P]
    H,
    W,
    y_stride,
    x_stride,
    exact: tl.constexpr,
):
    """t [BLOCK_P, BLOCK_T]: the masks at points; 0 where a target does not count."""
    y, x, weight = find_corners(point, there, H, W, exact)
    corner = mask[None, :] + (y * y_stride + x * x_stride)[:, None]
    t = tl.zeros(corner.shape, exact)
    for k in tl.static_range(4):
        read = (weight[k] != 0)[:, None] & counts[None, :]
        value = tl.load(corner + (k // 2 * y_stride + k % 2 * x_stride), read, 0)
        t += weight[k][:, None] * value.to(exact)
    return t


@triton.jit
def _halves(x):
    """float32 as a sum of two numbers of 11 bits, as tf32 has; the second loses its last two."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return x - high, high


@triton.jit
def _left(x, s, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr):
    """x and s [BLOCK_Q, BLOCK_P], one below the other, each in two halves side by side, twice."""
    low, high = _halves(tl.join(x, s))
    a = tl.reshape(tl.join(low, high), [BLOCK_Q, BLOCK_P // 8, 4, 2, 2, 2])
    a = tl.reshape(tl.permute(a, 4, 0, 1, 3, 5, 2), [2 * BLOCK_Q, 1, 2 * BLOCK_P])
    a = tl.broadcast_to(a, [2 * BLOCK_Q, 2, 2 * BLOCK_P])
    return tl.reshape(a, [2 * BLOCK_Q, 4 * BLOCK_P])


@triton.jit
def _right(t, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """t [BLOCK_P, BLOCK_T]: its lower halves for both of x, then its higher ones."""
    low, high = _halves(t)
    t = tl.reshape(tl.permute(tl.join(low, high), 2, 0, 1), [BLOCK_P // 2, 1, 4, BLOCK_T])
    t = tl.broadcast_to(t, [BLOCK_P // 2, 2, 4, BLOCK_T])
    return tl.reshape(t, [4 * BLOCK_P, BLOCK_T])


@triton.jit
def _sum_over_points(x, s, t, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """x @ t and s @ t [2 BLOCK_Q, BLOCK_T], of float32 precision on the matrix units."""
    if t.dtype == tl.float64:
        a = tl.reshape(tl.permute(tl.join(x, s), 2, 0, 1), [2 * BLOCK_Q, BLOCK_P])
        sums = tl.sum(a[:, :, None] * t[None, :, :], 1)
    else:
        # the matrix units truncate: sums of more than these points are for the caller
        a, t = _left(x, s, BLOCK_Q, BLOCK_P), _right(t, BLOCK_P, BLOCK_T)
        sums = tl.dot(a, t, input_precision="tf32", max_num_imprecise_acc=4 * BLOCK_P)
    return sums


@triton.jit
def count_targets(n_targets, b, T):
    """Targets of image b that count."""
    if n_targets is None:
        return T
    return tl.minimum(tl.maximum(tl.load(n_targets + b), 0), T).to(tl.int32)


@triton.jit(do_not_specialize=SIZES)
def range_sums(
    embed,  # [N, Q, C]
    features,  # [B, S, C]
    masks,  # [B, T, H, W] by its strides, uint8
    points,  # [N, P, 2], of the precision of the sums
    pixels,  # [N, G * range_tiles, 4, BLOCK_P]
    weights,  # [N, G * range_tiles, 4, BLOCK_P]
    n_targets,  # [B] or None
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
    C: tl.constexpr,
    PATH: tl.constexpr,  # "half", "single" or "double"
    PRECISION: tl.constexpr,  # of the product of float32 features and embeddings
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    exact: tl.constexpr = points.dtype.element_ty
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    pid = tl.program_id(0).to(tl.int64)
    tile_t = (pid % tiles_t).to(tl.int32)
    tile_q = (pid // tiles_t % tiles_q).to(tl.int32)
    part = pid // tiles_t // tiles_q  # over [N, G]
    n = part // ranges
    b = n // R
    count = count_targets(n_targets, b, T)
    if tile_t * BLOCK_T >= count:
        return

    q = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    j = tl.arange(0, BLOCK_P)
    corner = tl.arange(0, 4)[:, None] * BLOCK_P + j[None, :]
    if PATH == "double":
        order = j
    else:  # the columns of x as `_left` takes them
        order = j // 8 * 8 + j % 4 * 2 + j // 4 % 2
    embed += n * Q * C
    features += b * S * C
    points += n * P * 2
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
    if PATH == "half":
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
            pairs += _sum_over_points(x, s, m, BLOCK_Q, BLOCK_P, BLOCK_T)

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
            m_next = _targets(mask, counts, points + p * 2, there, H, W, y_stride, x_stride, exact)
            target += tl.sum(m_next, 0)
        pairs += _sum_over_points(x, s, m, BLOCK_Q, BLOCK_P, BLOCK_T)
    else:
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
                if PATH == "double":
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
            m = _targets(mask, counts, points + p * 2, p < P, H, W, y_stride, x_stride, exact)
            target += tl.sum(m, 0)
            pairs += _sum_over_points(x, s, m, BLOCK_Q, BLOCK_P, BLOCK_T)

    row = tl.arange(0, 2 * BLOCK_Q)  # of x, then of s
    r = tile_q * BLOCK_Q + row % BLOCK_Q
    pair = pair_sums + ((part * 2 + row // BLOCK_Q) * Q + r)[:, None] * T + t[None, :]
    tl.store(pair, pairs, (r < Q)[:, None] & counts[None, :])
    if tile_t == 0:
        query = query_sums + part * 2 * Q + q
        softplus = positive + tl.sum(tl.log(factors) + LOG2, 1)
        tl.store(query, softplus, q < Q)
        tl.store(query + Q, sigmoid, q < Q)
    if tile_q == 0:
        tl.store(target_sums + part * T + t, target, counts)
