"""The kernels of segment_map that number the segments and write their numbers into the map.

Letters: B image, Q query, K class, n pixels of an image.
"""

import triton
import triton.language as tl

from .segment_taps import SIZES


@triton.jit
def _stuff(stuff, label, found, K):
    """Whether segments of these labels are merged."""
    fused = found & (label >= 0) & (label < K)
    if stuff is not None:
        fused &= tl.load(stuff + label, fused, 0) > 0
    return fused


@triton.jit
def _found(counts, q, Q, overlap):
    """Whether queries are segments: they won enough of what their masks cover."""
    areas = tl.load(counts + q, q < Q, 0)
    size = tl.num_programs(0).to(tl.int64) * Q
    won = tl.load(counts + size + q, q < Q, 0).to(tl.float64)
    own = tl.maximum(tl.load(counts + 2 * size + q, q < Q, 0), 1).to(tl.float64)
    return (q < Q) & (areas > 0) & ~(won / own < overlap)


@triton.jit(do_not_specialize=SIZES)
def merge(
    counts,  # [3, B, Q] int64
    labels,  # [B, Q] int64
    stuff,  # [K] uint8; or None, and then K is 0
    numbers,  # [2, B, Q] int32: a segment's first query of its label, and that one's number
    ids,  # [B, Q] int32
    overlap: tl.float64,
    Q,
    K,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * Q
    counts += image * Q
    labels += image * Q
    numbers += image * Q
    ids += image * Q
    last = 0
    for start in tl.range(0, Q, BLOCK):
        q = start + tl.arange(0, BLOCK)
        label = tl.load(labels + q, q < Q, -1)
        found = _found(counts, q, Q, overlap)
        fused = _stuff(stuff, label, found, K)
        first = q
        for other in tl.range(0, start + BLOCK, BLOCK):
            j = other + tl.arange(0, BLOCK)
            theirs = tl.load(labels + j, j < Q, -1)
            theirs_fused = _stuff(stuff, theirs, _found(counts, j, Q, overlap), K)
            same = (label[:, None] == theirs[None, :]) & fused[:, None] & theirs_fused[None, :]
            first = tl.minimum(first, tl.min(tl.where(same, j[None, :], q[:, None]), 1))
        leads = (found & (first == q)).to(tl.int32)
        tl.store(numbers + q, tl.where(found, first, -1), q < Q)
        tl.store(numbers + size + q, last + tl.cumsum(leads, 0), q < Q)
        last += tl.sum(leads)
    tl.debug_barrier()
    for start in tl.range(0, Q, BLOCK):
        q = start + tl.arange(0, BLOCK)
        first = tl.load(numbers + q, q < Q, -1)
        number = tl.load(numbers + size + first, first >= 0, 0)
        tl.store(ids + q, number, q < Q)


@triton.jit(do_not_specialize=SIZES)
def relabel(
    ids,  # [B, Q] int32
    map,  # [B, n] int32: q or ~q, then the id of q or 0
    Q,
    n,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    i = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(map + image * n + i, i < n, -1)
    tl.store(map + image * n + i, tl.load(ids + image * Q + code, code >= 0, 0), i < n)
