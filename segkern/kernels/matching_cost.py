"""The cost of matching every query with every target, in Triton.

Letters: B image, R prediction, N = B R problems, Q query, K class, C channel, h w feature map, S =
h w pixels, T target, H W mask, P point, G ranges of points.

1. `channels_last` (matching_inputs.py): the features as [B, S, C], so that a corner of a point is
   one run of memory; left out where they lie so already.
2. `feature_corners` (there too): pixels and weights of the points, found once for all channels and
   tiles.
3. `half_sums` (matching_half.py) or `plain_sums` (matching_plain.py): a program takes a range of
   points of one problem, up to 128 queries and 32 targets, and leaves the sums over its points; x,
   sigmoid(x) and the targets at the points exist for a tile of points at a time. Each tile of
   targets forms x anew: images of more than 32 targets are left to a second launch, of 64 queries
   and 64 targets a program. Targets that do not count cost nothing, nor do points, which lie
   behind those that count.
4. `costs` (matching_total.py): adds the ranges, always in the same order, in float64, and the
   class cost.
"""

import torch
import triton
from torch import Tensor

from ._launch import FUSED, device, on
from .matching_half import half_sums
from .matching_inputs import channels_last, feature_corners
from .matching_plain import plain_sums
from .matching_total import costs

RANGE = 1024  # points of a program, at most; the order of the sums must not depend on the batch

# Queries and targets of a program, and how many targets an image has: more than, at most.
NARROW = (128, 32, 0, 32)  # as many sums a thread as registers hold
WIDE = (64, 64, 32, 2**31 - 1)
# (kind of device, path): points of a tile, warps, stages.
# Chosen by arithmetic, not yet measured. half: embeddings of 128 queries (64 KB at 256 channels)
# and three tiles of 4 x 16 rows of features (32 KB each) in shared memory, a program a
# multiprocessor; 4 x 8 rows where the registers of 16 points spill. single: 8 logits a thread, for
# the same reason.
TABLE = {
    ("99 KB", "half"): (8, 8, 3),
    ("99 KB", "single"): (16, 8, 2),
    ("163 KB", "half"): (8, 8, 3),
    ("163 KB", "single"): (16, 8, 2),
    ("227 KB", "half"): (16, 8, 3),
    ("227 KB", "single"): (16, 8, 2),
    ("227 KB, 10.x", "half"): (8, 8, 3),
    ("227 KB, 10.x", "single"): (16, 8, 2),
}
DOUBLE = (16, 4, 1)  # by plain sums of 16 queries and targets, for checks


def _rows(features: Tensor) -> Tensor:
    """features [B, C, h, w] in channels-last memory: itself, or a copy."""
    B, C, h, w = features.shape
    if features.is_contiguous(memory_format=torch.channels_last) or features.numel() == 0:
        return features
    rows = torch.empty((B, h, w, C), dtype=features.dtype, device=features.device)
    block_c = min(64, triton.next_power_of_2(C))
    grid = (B * triton.cdiv(h * w, 64), triton.cdiv(C, block_c))
    dense = features.stride()[2:] == (w, 1)
    channels_last[grid](features, rows, h, w, *features.stride(), C, dense, 64, block_c, **FUSED)
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
    n_points: Tensor | None = None,
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
    n_targets, n_points = (n if n is None else n.contiguous() for n in (n_targets, n_points))
    masks = masks.view(torch.uint8)
    half = mask_embed.dtype == features.dtype and features.element_size() == 2 and 0 < C <= 256
    path = "double" if points.dtype == torch.float64 else "half" if half else "single"
    tuned = DOUBLE if path == "double" else TABLE[device(points).kind, path]
    block_p, warps, stages = tuned
    shapes = [(16, 16, 0, WIDE[3])] if path == "double" else [NARROW, WIDE]
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
        feature_corners[(N * triton.cdiv(tiles, group),)](
            points, pixels, weights, P, tiles, h, w, block_p, group, **FUSED
        )
        sizes = (R, Q, T, P, h * w, H, W, *masks.stride(), ranges, range_tiles)
        counts = n_targets, n_points
        tensors = (mask_embed, rows, masks, points, pixels, weights, *counts, *sums)
        kernel, precision = half_sums, {}
        if path != "half":
            kernel = plain_sums
            precision = {"PRECISION": "tf32" if tf32 and path == "single" else "ieee"}
        for block_q, block_t, above, most in shapes:
            block_q = min(block_q, 64 if Q <= 64 else 128)
            programs = N * ranges * triton.cdiv(Q, block_q) * triton.cdiv(min(T, most), block_t)
            # a grid of none compiles all the same: more targets that come later compile nothing
            kernel[(programs if above < T else 0,)](
                *(*tensors, *sizes, above, most),
                C=C,
                BLOCK_Q=block_q,
                BLOCK_T=block_t,
                BLOCK_P=block_p,
                BLOCK_C=block_c,
                STAGES=stages,
                num_warps=warps,
                **precision,
                **FUSED,
            )
        sizes = (R, Q, T, P, class_logits.shape[3], ranges)
        costs[(N * triton.cdiv(Q, 16) * triton.cdiv(T, 32),)](
            *(class_logits, labels, *counts),
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
