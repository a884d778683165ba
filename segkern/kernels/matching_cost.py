"""The cost of matching every query with every target, in Triton.

Letters: B image, R prediction, N = B R problems, Q query, K class, C channel, h w feature map, S =
h w pixels, T target, H W mask, P point, G ranges of points.

1. `_channels_last`: the features as [B, S, C], so that a corner of a point is one run of memory;
   skipped where they lie so already.
2. `_range_sums`: a program takes a range of points of one problem, all its queries (a tile of 64
   or 128) and a tile of targets, and leaves the sums over its points. A tile of points at a time:
   features at the corners, logits x by a product with the embeddings that stay in shared memory,
   sigmoid and softplus, masks at the corners (in place), then sum x t and sum s t by two more
   products. Nothing but the sums is written.
3. `_costs`: adds the ranges in a fixed order in float64, and the class cost.

Sampling commutes with the product even corner by corner: x = sum_k w_k (e . f_k). With features of
16 bits the product is of the raw corners, so that every term is exact in float32 and the gathered
rows go to shared memory as they are; four products of 16 bits replace one that would need its
operand split in three to be as accurate. float32 features are interpolated first.
sum softplus(x) = sum max(x, 0) + log prod (1 + exp(-|x|)): one logarithm for up to 64 points.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import architecture, on

BOUND = tl.constexpr(1e8)  # ops.matching_cost.BOUND: stands for a cost that is not finite
RANGE = 1024  # points of a program, at most; the order of the sums must not depend on the batch
SIZES = ["R", "Q", "T", "P", "K1", "S", "h", "w", "H", "W", "tiles", "ranges", "range_tiles"]
SIZES += ["image_stride", "channel_stride", "target_stride", "y_stride", "x_stride"]

# (architecture, path): queries of a program at most, points of a tile, warps, stages
TABLE = {
    (80, "half"): (128, 8, 8, 3),
    (80, "single"): (128, 16, 8, 2),
    (90, "half"): (128, 16, 8, 3),
    (90, "single"): (128, 16, 8, 2),
    (100, "half"): (128, 8, 8, 3),
    (100, "single"): (128, 16, 8, 2),
}
DOUBLE = (16, 16, 4, 1)


@triton.jit(do_not_specialize=SIZES)
def _channels_last(
    planar,  # [B, C, h, w] by its strides
    rows,  # [B, S, C]
    h,
    w,
    image_stride,
    channel_stride,
    y_stride,
    x_stride,
    C: tl.constexpr,
    DENSE: tl.constexpr,  # the rows of a plane follow each other
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    S = h * w
    tiles = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    s = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    planes = planar + b * image_stride + c.to(tl.int64) * channel_stride
    there = (s < S)[:, None] & (c < C)[None, :]
    if DENSE:  # a warp reads neighbours
        tile = tl.load(planes[None, :] + s[:, None], there)
    else:
        pixel = (s // w).to(tl.int64) * y_stride + (s % w).to(tl.int64) * x_stride
        tile = tl.load(planes[None, :] + pixel[:, None], there)
    place = rows + (b * S + s) * C
    tl.store(place[:, None] + c[None, :], tile, there)


@triton.jit
def _origin(points, p, inside, width, height):
    """Around points [.]: left column, top row, shares of the right and lower side, inside."""
    x = tl.load(points + 2 * p, inside, 0.0) * width - 0.5
    y = tl.load(points + 2 * p + 1, inside, 0.0) * height - 0.5
    inside &= (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, inside


@triton.jit
def _corner(left, top, fx, fy, inside, width, height, K: tl.constexpr):
    """Corner K of 0 to 3: its column, row, weight, and whether it is on the map."""
    if K % 2 == 0:
        column, across = left, 1 - fx
        inside &= column >= 0
    else:
        column, across = left + 1, fx
        inside &= column < width
    if K // 2 == 0:
        row, down = top, 1 - fy
        inside &= row >= 0
    else:
        row, down = top + 1, fy
        inside &= row < height
    return column, row, tl.where(inside, across * down, 0.0), inside


@triton.jit(do_not_specialize=SIZES)
def _feature_corners(
    points,  # [N, P, 2]
    pixels,  # [N, tiles, 4, BLOCK_P] int32, -1 outside
    weights,  # [N, tiles, 4, BLOCK_P]
    P,
    tiles,
    h,
    w,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    programs = tl.cdiv(tiles, TILES)
    n = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs * TILES + tl.arange(0, TILES)[:, None]
    j = tl.arange(0, BLOCK_P)[None, :]
    p = tile * BLOCK_P + j
    left, top, fx, fy, inside = _origin(points + n * P * 2, p, p < P, w, h)
    place = (n * tiles + tile) * (4 * BLOCK_P) + j
    for k in tl.static_range(4):
        column, row, weight, read = _corner(left, top, fx, fy, inside, w, h, k)
        at = place + k * BLOCK_P
        tl.store(pixels + at, tl.where(read, row * w + column, -1), tile < tiles)
        tl.store(weights + at, weight, tile < tiles)


@triton.jit
def _targets(
    mask,  # [BLOCK_T] pointers to masks [H, W] by their strides
    counts,  # [BLOCK_T]
    points,  # [P, 2] of one problem
    p,  # [BLOCK_P]
    last,
    H,
    W,
    y_stride,
    x_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """t [BLOCK_P, BLOCK_T]: the masks at points p; 0 where a target does not count."""
    left, top, fx, fy, inside = _origin(points, p, p < last, W, H)
    t = tl.zeros([BLOCK_P, BLOCK_T], fx.dtype)
    for k in tl.static_range(4):
        column, row, weight, read = _corner(left, top, fx, fy, inside, W, H, k)
        place = row.to(tl.int64) * y_stride + column.to(tl.int64) * x_stride
        read = read[:, None] & counts[None, :]
        t += weight[:, None] * tl.load(mask[None, :] + place[:, None], read, 0).to(fx.dtype)
    return t


@triton.jit
def _sigmoid(x):
    """sigmoid(x), and 1 + exp(-|x|), whose logarithm is softplus(x) - max(x, 0)."""
    small = tl.exp(-tl.abs(x))
    factor = 1 + small
    s = 1 / factor
    return tl.where(x < 0, small * s, s), factor


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
def _sum_over_points(
    x, s, t, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr
):
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
def _count(n_targets, b, T):
    """Targets of image b that count."""
    if n_targets is None:
        return T
    return tl.minimum(tl.maximum(tl.load(n_targets + b), 0), T).to(tl.int32)


@triton.jit(do_not_specialize=SIZES)
def _range_sums(
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
    image_stride,
    target_stride,
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
    count = _count(n_targets, b, T)
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
    factors = tl.full([BLOCK_Q, BLOCK_P], 1.0, exact)
    positive = tl.zeros([BLOCK_Q], exact)
    sigmoid = tl.zeros([BLOCK_Q], exact)
    target = tl.zeros([BLOCK_T], exact)
    if PATH == "half":
        # Three tiles are under way: the product of one runs on the matrix units while the
        # logits of the one before are worked on; the sums over points of a third end it.
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
            s, factor = _sigmoid(x)
            factors *= factor
            sigmoid += tl.sum(s, 1)

            near = tile * BLOCK_P + j < tiles * BLOCK_P
            weight = tl.load(weights + tile * (4 * BLOCK_P) + corner, near[None, :], 0.0)
            p = begin + tile * BLOCK_P + order
            last = tl.minimum(P, begin + tiles * BLOCK_P)
            m_next = _targets(
                mask, counts, points, p, last, H, W, y_stride, x_stride, BLOCK_P, BLOCK_T
            )
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
            s, factor = _sigmoid(x)
            factors *= factor
            positive += tl.sum(tl.maximum(x, 0.0), 1)
            sigmoid += tl.sum(s, 1)
            m = _targets(
                mask,
                counts,
                points,
                p + order,
                P,
                H,
                W,
                y_stride,
                x_stride,
                BLOCK_P,
                BLOCK_T,
            )
            target += tl.sum(m, 0)
            pairs += _sum_over_points(x, s, m, BLOCK_Q, BLOCK_P, BLOCK_T)

    row = tl.arange(0, 2 * BLOCK_Q)  # of x, then of s
    r = tile_q * BLOCK_Q + row % BLOCK_Q
    pair = pair_sums + ((part * 2 + row // BLOCK_Q) * Q + r)[:, None] * T + t[None, :]
    tl.store(pair, pairs, (r < Q)[:, None] & counts[None, :])
    if tile_t == 0:
        query = query_sums + part * 2 * Q + q
        tl.store(query, positive + tl.sum(tl.log(factors), 1), q < Q)
        tl.store(query + Q, sigmoid, q < Q)
    if tile_q == 0:
        tl.store(target_sums + part * T + t, target, counts)


@triton.jit(do_not_specialize=SIZES)
def _costs(
    class_logits,  # [N, Q, K1]
    labels,  # [B, T]
    n_targets,  # [B] or None
    pair_sums,  # [N, G, 2, Q, T]
    query_sums,  # [N, G, 2, Q]
    target_sums,  # [N, G, T]
    cost,  # [N, Q, T]
    R,
    Q,
    T,
    P,
    K1,
    ranges,
    class_weight: tl.float64,
    mask_weight: tl.float64,
    dice_weight: tl.float64,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    exact: tl.constexpr = cost.dtype.element_ty
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    pid = tl.program_id(0).to(tl.int64)
    n = pid // tiles_t // tiles_q
    b = n // R
    q = (pid // tiles_t % tiles_q).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    t = (pid % tiles_t).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    counts = t < _count(n_targets, b, T)
    there = (q < Q)[:, None] & counts[None, :]

    # the highest logit first: a run of -inf must not spoil the sum
    line = class_logits + (n * Q + q) * K1
    top = tl.full([BLOCK_Q], float("-inf"), exact)
    for first in range(0, K1, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (q < Q)[:, None] & (k < K1)[None, :]
        x = tl.load(line[:, None] + k[None, :], inside, float("-inf")).to(exact)
        top = tl.maximum(top, tl.max(x, 1))
    total = tl.zeros([BLOCK_Q], exact)
    for first in range(0, K1, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (q < Q)[:, None] & (k < K1)[None, :]
        x = tl.load(line[:, None] + k[None, :], inside, float("-inf")).to(exact)
        total += tl.sum(tl.exp(x - top[:, None]), 1)
    label = tl.load(labels + b * T + t, counts, 0)
    label = tl.minimum(tl.maximum(label, 0), K1 - 1)
    chosen = tl.load(line[:, None] + label[None, :], there, 0.0).to(exact)
    score = tl.exp(chosen - top[:, None]) / total[:, None]

    logit_target = tl.zeros([BLOCK_Q, BLOCK_T], tl.float64)
    sigmoid_target = tl.zeros([BLOCK_Q, BLOCK_T], tl.float64)
    softplus = tl.zeros([BLOCK_Q], tl.float64)
    sigmoid = tl.zeros([BLOCK_Q], tl.float64)
    target = tl.zeros([BLOCK_T], tl.float64)
    for g in range(ranges):
        part = n * ranges + g
        pair = pair_sums + part * 2 * Q * T + q[:, None].to(tl.int64) * T + t[None, :]
        logit_target += tl.load(pair, there, 0.0)
        sigmoid_target += tl.load(pair + Q.to(tl.int64) * T, there, 0.0)
        softplus += tl.load(query_sums + part * 2 * Q + q, q < Q, 0.0)
        sigmoid += tl.load(query_sums + part * 2 * Q + Q + q, q < Q, 0.0)
        target += tl.load(target_sums + part * T + t, counts, 0.0)
    bce = (softplus[:, None] - logit_target) / P
    dice = 1 - (2 * sigmoid_target + 1) / (sigmoid[:, None] + target[None, :] + 1)
    total_cost = mask_weight * bce + dice_weight * dice - class_weight * score
    finite = tl.abs(total_cost) < float("inf")
    total_cost = tl.minimum(tl.maximum(total_cost, -BOUND), BOUND)
    total_cost = tl.where(finite, total_cost, BOUND)
    place = cost + (n * Q + q[:, None]) * T + t[None, :]
    inside = (q < Q)[:, None] & (t < T)[None, :]
    tl.store(place, tl.where(counts[None, :], total_cost, 0.0).to(exact), inside)


def _rows(features: Tensor) -> Tensor:
    """features [B, C, h, w] in channels-last memory: itself, or a copy."""
    B, C, h, w = features.shape
    if features.is_contiguous(memory_format=torch.channels_last) or features.numel() == 0:
        return features
    rows = torch.empty((B, h, w, C), dtype=features.dtype, device=features.device)
    block_c = min(64, triton.next_power_of_2(C))
    grid = (B * triton.cdiv(h * w, 64), triton.cdiv(C, block_c))
    dense = features.stride()[2:] == (w, 1)
    _channels_last[grid](features, rows, h, w, *features.stride(), C, dense, 64, block_c)
    return rows


def matching_cost(
    class_logits: Tensor,
    mask_embed: Tensor,
    features: Tensor,
    labels: Tensor,
    masks: Tensor,
    points: Tensor,
    n_targets: Tensor | None,
    class_weight: float,
    mask_weight: float,
    dice_weight: float,
) -> Tensor:
    """Launches the kernels; arguments and result as the raw op's."""
    (B, R, Q, C), T, P = mask_embed.shape, labels.shape[1], points.shape[2]
    (h, w), (H, W), N = features.shape[2:], masks.shape[2:], B * R
    new = {"dtype": points.dtype, "device": points.device}
    cost = torch.empty((B, R, Q, T), **new)
    if cost.numel() == 0:
        return cost
    class_logits, mask_embed, labels, points = (
        t.contiguous() for t in (class_logits, mask_embed, labels, points)
    )
    n_targets = None if n_targets is None else n_targets.contiguous()
    masks = masks.view(torch.uint8)
    half = mask_embed.dtype == features.dtype and features.element_size() == 2 and 0 < C <= 256
    path = "double" if points.dtype == torch.float64 else "half" if half else "single"
    tuned = DOUBLE if path == "double" else TABLE[architecture(points), path]
    block_q, block_p, warps, stages = tuned
    block_t = 16 if path == "double" else min(64, max(16, triton.next_power_of_2(T)))
    if block_t == 64 or Q <= 64:  # the sums of 64 x 64 pairs fill the registers
        block_q = min(block_q, 64)
    block_c = max(16, triton.next_power_of_2(C)) if path == "half" else 16
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    ranges = triton.cdiv(P, RANGE)
    range_tiles = triton.cdiv(P, ranges * block_p)
    tiles, group = ranges * range_tiles, 256 // block_p
    sums = (
        torch.empty((N, ranges, 2, Q, T), **new),
        torch.empty((N, ranges, 2, Q), **new),
        torch.empty((N, ranges, T), **new),
    )
    weights = torch.empty((N, tiles, 4, block_p), **new)
    pixels = torch.empty_like(weights, dtype=torch.int32)
    with on(points):
        rows = _rows(features)
        _feature_corners[(N * triton.cdiv(tiles, group),)](
            points, pixels, weights, P, tiles, h, w, block_p, group
        )
        sizes = (R, Q, T, P, h * w, H, W, *masks.stride(), ranges, range_tiles)
        _range_sums[(N * ranges * triton.cdiv(Q, block_q) * triton.cdiv(T, block_t),)](
            *(mask_embed, rows, masks, points, pixels, weights, n_targets),
            *sums,
            *sizes,
            C=C,
            PATH=path,
            PRECISION="tf32" if tf32 and path == "single" else "ieee",
            BLOCK_Q=block_q,
            BLOCK_T=block_t,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            STAGES=stages,
            num_warps=warps,
        )
        sizes = (R, Q, T, P, class_logits.shape[3], ranges)
        _costs[(N * triton.cdiv(Q, 16) * triton.cdiv(T, 32),)](
            *(class_logits, labels, n_targets),
            *sums,
            cost,
            *sizes,
            *(class_weight, mask_weight, dice_weight),
            BLOCK_Q=16,
            BLOCK_T=32,
            BLOCK_K=64,
        )
    return cost
