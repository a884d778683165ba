"""The kernel that makes costs of the sums over points, and of the class logits.

Letters as in matching_cost.py.
"""

import triton
import triton.language as tl

from .matching_parts import SIZES, count_of
from .sigmoid import exp_negative, reciprocal

BOUND = tl.constexpr(1e8)  # ops.matching_cost.BOUND: stands for a cost that is not finite


@triton.jit(do_not_specialize=SIZES)
def costs(
    class_logits,  # [N, Q, K1]
    labels,  # [B, T]
    n_targets,  # [B] or None
    n_points,  # [N] or None
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
    counts = t < count_of(n_targets, b, T)
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
    bce = (softplus[:, None] - logit_target) / tl.maximum(count_of(n_points, n, P), 1)
    dice = 1 - (2 * sigmoid_target + 1) / (sigmoid[:, None] + target[None, :] + 1)
    total_cost = mask_weight * bce + dice_weight * dice - class_weight * score
    finite = tl.abs(total_cost) < float("inf")
    total_cost = tl.minimum(tl.maximum(total_cost, -BOUND), BOUND)
    total_cost = tl.where(finite, total_cost, BOUND)
    place = cost + (n * Q + q[:, None]) * T + t[None, :]
    inside = (q < Q)[:, None] & (t < T)[None, :]
    tl.store(place, tl.where(counts[None, :], total_cost, 0.0).to(exact), inside)
