"""What the kernels of matching_cost share: targets at points, and sums over points.

Letters as in matching_cost.py.

Sums over points on the matrix units: x = high + low, of 11 bits each, and so the targets, are
exact in tf32 but for the last two bits of low; the sum of all four products is one product over a
fourfold range. The units truncate what they add, so that a tile's sums are added to the others'
outside of them. tf32 alone would be hundreds of times less accurate than float32.
"""

import math

import triton
import triton.language as tl

from .point_corners import find_corners

LOG2 = tl.constexpr(math.log(2))
# arguments that are never specialised
SIZES = ["R", "Q", "T", "P", "K1", "S", "h", "w", "H", "W", "tiles", "ranges", "range_tiles"]
SIZES += ["image_stride", "channel_stride", "target_stride", "y_stride", "x_stride"]
SIZES += ["above", "most"]


@triton.jit
def targets_at(
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
def count_of(numbers, i, most):
    """How many of problem or image i count, of targets or points: the first ones; all if None."""
    if numbers is None:
        count = most
    else:  # a return above would not end a compiled function
        count = tl.minimum(tl.maximum(tl.load(numbers + i), 0), most).to(tl.int32)
    return count


@triton.jit
def part_of(R, Q, T, ranges, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of this program: tile of targets, tile of queries, part [N, G] (int64), problem, image."""
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    pid = tl.program_id(0).to(tl.int64)
    tile_t = (pid % tiles_t).to(tl.int32)
    tile_q = (pid // tiles_t % tiles_q).to(tl.int32)
    part = pid // tiles_t // tiles_q
    n = part // ranges
    return tile_t, tile_q, part, n, n // R


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
def column_order(j):
    """The points of a tile in the order in which `_left` puts the columns of x."""
    return j // 8 * 8 + j % 4 * 2 + j // 4 % 2


@triton.jit
def sum_over_points(x, s, t, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
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
def write_sums(
    sums,  # of x and s with targets, [2 BLOCK_Q, BLOCK_T]; of max(x, 0), of s; of targets
    factors,  # [BLOCK_Q, BLOCK_P]: products of half of 1 + exp(-|x|)
    pair_sums,
    query_sums,
    target_sums,
    part,
    tile_q,
    tile_t,
    counts,  # [BLOCK_T]
    Q,
    T,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Leaves the sums of a part; those of queries and of targets once for all tiles of others."""
    pairs, positive, sigmoid, target = sums
    q = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
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
