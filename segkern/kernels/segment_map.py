"""segment_map in Triton: maps of segments from mask logits that are never stored at their size.

Letters: B image, Q query, K class, h w mask logits, H W result, n slots, N rows of an order.

A program takes tiles of output pixels of one image. Where the tile's window of the mask logits is
small it gives bounds of every query's logits, and with them the list of those that matter:
panoptic, the queries that may win a pixel or whose mask has an edge here; instance, those with a
pixel inside; semantic, the classes that may win. Then, query by query (semantic: a product over
16 queries), logits are made in registers from their taps (mask_tiles.py), used and forgotten.
Bounds and lists lie in memory of the program's own, so that it grows with programs and not with
pixels. Counts join by integer atomics, whose sum has no order; sums of sigmoids are a program's
own, and are added in the order of programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, on
from .mask_tiles import SIZES, Frame, blend, extremes, rounding, semantic_tiles, taps
from .sigmoid import sigmoid

# Chosen by arithmetic, not yet measured, for all architectures: two programs of 8 warps and 128
# registers a thread on a multiprocessor, without spills.
TILE = (16, 32)  # rows, columns: two pixels a thread, up to 32 loads in flight
PRODUCT = (4, 16)  # of a semantic tile: four logits a thread for each 16 queries
CLASSES = 32  # of a product: 8 sums a thread; more would wait idle where few classes may win
PROGRAMS = 2048  # of an image at most: eight rounds of an H200
WORDS = 32  # of 32 pixels, where masks cover a map: four pixels a thread
RUN = 32  # queries whose bounds are found together
# one stage: no gather goes through shared memory
OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": 128, **FUSED}


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["masks"])
def _panoptic(
    scores,  # [B, Q]
    masks,  # [B, Q, h, w] by its strides
    place_y,  # [TAPS, H]
    weight_y,
    place_x,  # [TAPS, W]
    weight_x,
    bounds,  # [B, programs, 2, Q]
    listed,  # [B, programs, Q] int32
    map,  # [B, H, W] int32: the winner q, or ~q where its logit is below 0
    counts,  # [3, B, Q] int64, zeros: pixels won and inside; won; inside
    Q,
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
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    exact: tl.constexpr = bounds.dtype.element_ty
    program = tl.program_id(0)
    image, pid = (program // programs).to(tl.int64), program.to(tl.int64)
    images = (tl.num_programs(0) // programs).to(tl.int64)
    bounds += pid * 2 * Q
    listed += pid * Q
    scores += image * Q
    masks += image * image_stride
    areas = counts + image * Q
    won = areas + images * Q
    own = won + images * Q
    slack = rounding(1, exact)
    for tile in tl.range(program % programs, tiles, programs):
        tl.debug_barrier()  # what the last tile kept is read
        top, left = tile // tiles_x * BLOCK_Y, tile % tiles_x * BLOCK_X
        bottom, right = tl.minimum(top + BLOCK_Y, H) - 1, tl.minimum(left + BLOCK_X, W) - 1
        pixels = ((bottom - top + 1) * (right - left + 1)).to(tl.int64)

        # the best score is at least `least` everywhere
        least = tl.zeros((BLOCK_Q,), exact)
        for start in tl.range(0, Q, BLOCK_Q):
            q = start + tl.arange(0, BLOCK_Q)
            score = tl.load(scores + q, q < Q, 0.0)
            kept = tl.where(score > 0, 1, 0)  # not NaN
            if tl.max(kept) > 0:
                low, high = extremes(
                    masks + tl.minimum(q, Q - 1) * query_stride,
                    *(place_y, place_x, top, left, bottom, right, H, W, y_stride, x_stride),
                    *(exact, TAPS, BLOCK_Q, 4 * BLOCK_Y * BLOCK_X),
                )
                tl.store(bounds + q, low, q < Q)
                tl.store(bounds + Q + q, high, q < Q)
                floor = score * sigmoid(low) * (1 - slack)
                least = tl.where((kept > 0) & (floor > least), floor, least)
        floor = tl.max(least)
        tl.debug_barrier()

        # a query's code: whether it may win, and whether its mask has an edge in the tile
        length, rivals, first = 0, 0, Q
        for start in tl.range(0, Q, BLOCK_Q):
            q = start + tl.arange(0, BLOCK_Q)
            score = tl.load(scores + q, q < Q, 0.0)
            kept = score > 0
            low = tl.load(bounds + q, kept, 0.0)
            high = tl.load(bounds + Q + q, kept, 0.0)
            rival = (kept & ~(score * sigmoid(high) * (1 + slack) < floor)).to(tl.int32)
            edge = (kept & (low < 0) & (high >= 0)).to(tl.int32)
            tl.atomic_add(own + q, pixels, kept & (low >= 0), sem="relaxed")
            here = rival | edge
            at = length + tl.cumsum(here, 0) - 1
            tl.store(listed + at, q * 4 + rival * 2 + edge, here > 0)
            length += tl.sum(here)
            rivals += tl.sum(rival)
            first = tl.minimum(first, tl.min(tl.where(rival > 0, q, Q)))
        tl.debug_barrier()

        row = (top + tl.arange(0, BLOCK_Y))[:, None]
        column = (left + tl.arange(0, BLOCK_X))[None, :]
        y = taps(place_y, weight_y, row, H, y_stride, TAPS)
        x = taps(place_x, weight_x, column, W, x_stride, TAPS)
        there = (row < H) & (column < W)
        best = tl.full((BLOCK_Y, BLOCK_X), -1.0, exact)
        # a single rival takes the tile, unless some pixels are inside its mask and others not
        inside = tl.load(bounds + first, rivals == 1, -1.0) >= 0
        winner = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32) + tl.where(inside, first, ~first)
        for i in tl.range(0, length):
            code = tl.load(listed + i)
            if (code % 2 > 0) | (rivals > 1):
                q = code // 4
                logit = blend(masks + q * query_stride, y, x, TAPS)
                count = tl.sum(tl.where(there & (logit >= 0), 1, 0))
                tl.atomic_add(own + q, count.to(tl.int64), code % 2 > 0, sem="relaxed")
                value = tl.load(scores + q) * sigmoid(logit)
                better = (value > best) & (code // 2 % 2 > 0)
                winner = tl.where(better, tl.where(logit >= 0, q, ~q), winner)
                best = tl.where(better, value, best)
        tl.store(map + (image * H + row) * W + column, winner, there)
        for i in tl.range(0, length):
            code = tl.load(listed + i)
            if code // 2 % 2 > 0:
                q = code // 4
                found = tl.where(winner == q, 0x10001, tl.where(winner == ~q, 0x10000, 0))
                found = tl.sum(tl.where(there, found, 0))  # won, and below it won and inside
                both = (found % 0x10000).to(tl.int64)
                tl.atomic_add(areas + q, both, both > 0, sem="relaxed")
                tl.atomic_add(won + q, (found // 0x10000).to(tl.int64), found > 0, sem="relaxed")


@triton.jit
def _stuff(stuff, label, found, K):
    """Whether segments of these labels are merged."""
    fused = found & (label >= 0) & (label < K)
    if stuff is not None:
        fused &= tl.load(stuff + label, fused, 0) > 0
    return fused


@triton.jit
def _found(counts, q, Q, overlap):
    areas = tl.load(counts + q, q < Q, 0)
    size = tl.num_programs(0).to(tl.int64) * Q
    won = tl.load(counts + size + q, q < Q, 0).to(tl.float64)
    own = tl.maximum(tl.load(counts + 2 * size + q, q < Q, 0), 1).to(tl.float64)
    return (q < Q) & (areas > 0) & ~(won / own < overlap)


@triton.jit(do_not_specialize=SIZES)
def _merge(
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
def _relabel(
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


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["masks"])
def _instance(
    queries,  # [B, n] int64
    masks,  # [B, Q, h, w] by its strides
    place_y,  # [TAPS, H]
    weight_y,
    place_x,  # [TAPS, W]
    weight_x,
    listed,  # [B, programs, n] int32
    bits,  # [B, n, H, words] int32, zeros
    areas,  # [B, n] int64, zeros
    sums,  # [B, programs, n], zeros
    Q,
    n,
    H,
    W,
    words,
    tiles,
    tiles_x,
    programs,
    image_stride: tl.int64,
    query_stride: tl.int64,
    y_stride,
    x_stride,
    TAPS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    exact: tl.constexpr = weight_x.dtype.element_ty
    program = tl.program_id(0)
    image, pid = (program // programs).to(tl.int64), program.to(tl.int64)
    listed += pid * n
    sums += pid * n
    queries += image * n
    masks += image * image_stride
    areas += image * n
    line, j = tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_X)
    for tile in tl.range(program % programs, tiles, programs):
        tl.debug_barrier()  # what the last tile listed is read
        top, left = tile // tiles_x * BLOCK_Y, tile % tiles_x * BLOCK_X
        bottom, right = tl.minimum(top + BLOCK_Y, H) - 1, tl.minimum(left + BLOCK_X, W) - 1
        length = 0
        for start in tl.range(0, n, BLOCK_Q):
            slot = start + tl.arange(0, BLOCK_Q)
            q = tl.load(queries + slot, slot < n, -1)
            known = (q >= 0) & (q < Q)
            _, high = extremes(
                masks + tl.where(known, q, 0) * query_stride,
                *(place_y, place_x, top, left, bottom, right, H, W, y_stride, x_stride),
                *(exact, TAPS, BLOCK_Q, 4 * BLOCK_Y * BLOCK_X),
            )
            open = (known & (high > 0)).to(tl.int32)
            tl.store(listed + length + tl.cumsum(open, 0) - 1, slot, open > 0)
            length += tl.sum(open)
        tl.debug_barrier()
        row, column = (top + line)[:, None], (left + j)[None, :]
        y = taps(place_y, weight_y, row, H, y_stride, TAPS)
        x = taps(place_x, weight_x, column, W, x_stride, TAPS)
        there = (row < H) & (column < W)
        word = (left // 32 + tl.arange(0, BLOCK_X // 32))[None, :]
        for i in tl.range(0, length):
            slot = tl.load(listed + i).to(tl.int64)
            logit = blend(masks + tl.load(queries + slot) * query_stride, y, x, TAPS)
            hit = (there & (logit > 0)).to(tl.int32)
            count = tl.sum(hit).to(tl.int64)
            total = tl.sum(tl.where(hit > 0, sigmoid(logit), 0.0))
            packed = tl.reshape(hit << (j % 32)[None, :], (BLOCK_Y, BLOCK_X // 32, 32))
            packed = tl.sum(packed, 2)
            to = bits + ((image * n + slot) * H + row) * words + word
            tl.store(to, packed, packed != 0)
            tl.atomic_add(areas + slot, count, count > 0, sem="relaxed")
            # no other program adds here: the order is that of the tiles
            tl.atomic_add(sums + slot, total.to(tl.float64), count > 0, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _cover(
    bits,  # [B, n, H, words] int32
    order,  # [B, N] int64
    map,  # [B, H, W] int32
    n,
    N,
    H,
    W,
    words,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    word = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, 32)
    size = H.to(tl.int64) * words
    covered = tl.zeros((BLOCK, 32), tl.int32)
    for i in tl.range(0, N):
        slot = tl.load(order + image * N + i)
        known = tl.where((slot >= 0) & (slot < n), size, 0)
        packed = tl.load(bits + (image * n + slot) * size + word, word < known, 0)
        hit = (packed[:, None] >> j[None, :]) & 1
        covered = tl.where((covered == 0) & (hit > 0), i + 1, covered)
    column = (word % words * 32)[:, None] + j[None, :]
    to = map + (image * H + word // words)[:, None] * W + column
    tl.store(to, covered, (word < size)[:, None] & (column < W))


def segment_map(
    scores: Tensor,
    labels: Tensor,
    stuff: Tensor | None,
    masks: Tensor,
    features: Tensor | None,
    sizes: list[int],
    overlap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::segment_map`."""
    (B, Q), (H, W) = scores.shape, sizes[4:]
    counts = scores.new_zeros((3, B, Q), dtype=torch.int64)
    ids = scores.new_zeros((B, Q), dtype=torch.int32)
    map = scores.new_zeros((B, H, W), dtype=torch.int32)
    if B == 0 or Q == 0:
        return map, ids, counts[0]
    with on(scores):
        f = Frame(masks, features, sizes, scores.dtype, TILE, PROGRAMS)
        numbers = ids.new_empty((2, B, Q))
        _panoptic[(B * f.programs,)](
            scores.contiguous(),
            f.masks,
            *f.tables,
            scores.new_empty((B, f.programs, 2, Q)),
            ids.new_empty((B, f.programs, Q)),
            map,
            counts,
            *(Q, H, W, *f.tiles, *f.masks.stride()),
            *(f.taps, *TILE, RUN),
            **OPTIONS,
        )
        stuff = None if stuff is None else stuff.contiguous().view(torch.uint8)
        K = 0 if stuff is None else len(stuff)
        labels = labels.contiguous()
        _merge[(B,)](counts, labels, stuff, numbers, ids, overlap, Q, K, 32, **FUSED)
        blocks = triton.cdiv(H * W, 1024)
        _relabel[(B * blocks,)](ids, map, Q, H * W, blocks, 1024, **FUSED)
    return map, ids, counts[0]


def segment_map_semantic(
    weights: Tensor,
    masks: Tensor,
    features: Tensor | None,
    sizes: list[int],
    resize_scores: bool,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::segment_map_semantic`."""
    (B, Q, K), (H, W) = weights.shape, sizes[4:]
    map = weights.new_zeros((B, H, W), dtype=torch.int32)
    areas = weights.new_zeros((B, K), dtype=torch.int64)
    scores = weights.new_empty((B, K, H, W) if return_scores else (0,))
    if B == 0 or Q == 0:
        areas[:, :1] = H * W  # the first class everywhere
        return map, areas, scores.zero_()
    with on(weights):
        f = Frame(masks, features, sizes, weights.dtype, PRODUCT, PROGRAMS, resize_scores)
        semantic_tiles[(B * f.programs,)](
            weights.contiguous(),
            f.masks,
            *f.tables,
            weights.new_empty((B, f.programs, 2 * Q + K)),
            map.new_empty((B, f.programs, K)),
            map,
            areas,
            scores if return_scores else None,
            *(Q, K, H, W, *f.tiles, *f.masks.stride()),
            *(f.taps, f.scores, *PRODUCT, CLASSES, RUN),
            **OPTIONS,
        )
    return map, areas, scores


def segment_map_instance(
    queries: Tensor, masks: Tensor, features: Tensor | None, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::segment_map_instance`."""
    (B, n), (H, W), words = queries.shape, sizes[4:], triton.cdiv(sizes[5], 32)
    exact = torch.float64 if masks.dtype == torch.float64 else torch.float32
    bits = queries.new_zeros((B, n, H, words), dtype=torch.int32)
    areas = torch.zeros_like(queries)
    with on(queries):
        f = Frame(masks, features, sizes, exact, TILE, PROGRAMS)
        sums = queries.new_zeros((B, f.programs, n), dtype=torch.float64)
        if areas.numel() and masks.shape[1]:
            _instance[(B * f.programs,)](
                queries.contiguous(),
                f.masks,
                *f.tables,
                bits.new_empty((B, f.programs, n)),
                bits,
                areas,
                sums,
                *(masks.shape[1], n, H, W, words, *f.tiles, *f.masks.stride()),
                *(f.taps, *TILE, RUN),
                **OPTIONS,
            )
    return bits, areas, sums.sum(1).to(exact)


def segment_map_cover(bits: Tensor, order: Tensor, width: int) -> Tensor:
    """As `segkern::segment_map_cover`."""
    (B, n, H, words), N = bits.shape, order.shape[1]
    map = bits.new_zeros((B, H, width))
    if map.numel() and n and N:
        with on(bits):
            blocks = triton.cdiv(H * words, WORDS)
            _cover[(B * blocks,)](
                bits.contiguous(),
                order.contiguous(),
                map,
                *(n, N, H, width, words, blocks, WORDS),
                **OPTIONS,
            )
    return map
