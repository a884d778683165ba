"""The cost of matching every query with every target, in Triton.

Letters: B image, R prediction, N = B R problems, Q query, K class, C channel, h w feature map, S =
h w pixels, T target, H W mask, P point, G ranges of points.

1. `_channels_last`: the features as [B, S, C], so that a corner of a point is one run of memory;
   left out where they lie so already.
2. `_feature_corners`: pixels and weights of the points, found once for all channels and tiles.
3. `range_sums` (matching_sums.py): a program takes a range of points of one problem, up to 128
   queries and 32 targets, and leaves the sums over its points; x, sigmoid(x) and the targets at
   the points exist for a tile of points at a time. Targets that do not count cost nothing.
4. `_costs`: adds the ranges, always in the same order, in float64, and the class cost.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, device, on
from .matching_sums import DOUBLE, SIZES, TABLE, count_targets, range_sums
from .point_sample import find_corners
from .sigmoid import exp_negative, reciprocal

BOUND = tl.constexpr(1e8)  # ops.matching_cost.BOUND: stands for a cost that is not finite
RANGE = 1024  # points of a program, at most; the order of the sums must not depend on the batch


@triton.jit(do_not_specialize=SIZES)
def _channels_last(
    planar,  # [B, C, h, w] by its strides
    rows,  # [B, S, C]
    h,
    w,
    image_stride: tl.int64,
    channel_stride: tl.int64,
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
    planes = planar + b * image_stride + c * channel_stride
    there = (s < S)[:, None] & (c < C)[None, :]
    if DENSE:  # a warp reads neighbours
        tile = tl.load(planes[None, :] + s[:, None], there)
    else:
        pixel = (s // w).to(tl.int64) * y_stride + (s % w).to(tl.int64) * x_stride
        tile = tl.load(planes[None, :] + pixel[:, None], there)
    place = rows + (b * S + s) * C
    tl.store(place[:, None] + c[None, :], tile, there)


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
    point = points + (n * P + p) * 2
    y, x, weight = find_corners(point, p < P, h, w, points.dtype.element_ty)
    place = (n * tiles + tile) * (4 * BLOCK_P) + j
    for k in tl.static_range(4):
        pixel = ((y + k // 2) * w + x + k % 2).to(tl.int32)
        tl.store(pixels + place, tl.where(weight[k] != 0, pixel, -1), tile < tiles)
        tl.store(weights + place, weight[k], tile < tiles)
        place += BLOCK_P


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
    counts = t < count_targets(n_targets, b, T)
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
        total += tl.sum(exp_negative(x - top[:, None]), 1)
    label = tl.load(labels + b * T + t, counts, 0)
    label = tl.minimum(tl.maximum(label, 0), K1 - 1)
    chosen = tl.load(line[:, None] + label[None, :], there, 0.0).to(exact)
    score = exp_negative(chosen - top[:, None]) * reciprocal(total)[:, None]

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
    _channels_last[grid](features, rows, h, w, *features.stride(), C, dense, 64, block_c, **FUSED)
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
    if h * w >= 2**31:
        raise ValueError(f"matching_cost: features of {h} x {w} pixels are too large")
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
    tuned = DOUBLE if path == "double" else TABLE[device(points).kind, path]
    block_q, block_p, warps, stages = tuned
    block_q = min(block_q, 64 if Q <= 64 else 128)
    block_t = 16 if path == "double" else 32
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
            points, pixels, weights, P, tiles, h, w, block_p, group, **FUSED
        )
        sizes = (R, Q, T, P, h * w, H, W, *masks.stride(), ranges, range_tiles)
        range_sums[(N * ranges * triton.cdiv(Q, block_q) * triton.cdiv(T, block_t),)](
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
            **FUSED,
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
            BLOCK_K=32,
            **FUSED,
        )
    return cost
