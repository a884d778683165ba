"""The instance kernels of segment_map: masks as bits, their areas and scores; masks over a map.

Letters: B image, Q query, h w mask logits, H W result, n slots (instances), N rows of an order.

A program takes tiles of output pixels. Bounds of each mask's logits in a tile tell which masks
have a pixel there; only these are looked at pixel by pixel.
"""

import triton
import triton.language as tl

from .segment_taps import SIZES, blend, extremes, taps
from .sigmoid import sigmoid


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["masks"])
def instance(
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
def cover(
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
