"""Tiles of segment_map: mask logits at the resolution of the result, and the semantic product.

Letters: B image, Q query, K class, C channel, h w mask logits, H W result, n positions along an
axis.

The resizes to the padded input and to the output are linear in each axis. What a position of the
output reads of its axis, two to four taps, stands in a table: `tabulate` makes one for the rows
and one for the columns, in float64, on the device. A tile of output pixels reads its taps through
the L1 cache, where neighbours share them. A tap that weighs nothing names a place that is there,
so that the inner loops need no mask.
The largest and smallest logit that a tile can read bound all of its pixels, unless the result is
so much smaller than the logits that looking would cost more than the pixels do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED
from .sigmoid import sigmoid

FARTHEST = tl.constexpr(1e30)  # ops.segment_map.FARTHEST: bound of a mask logit's magnitude
CHUNKS = 8  # of embeddings' products: features in the precision of the sums exist for one only
SIZES = ["Q", "K", "H", "W", "n", "N", "words", "tiles", "tiles_x", "programs", "blocks"]
SIZES += ["source", "padded", "image", "image_stride", "query_stride", "y_stride", "x_stride"]


@triton.jit
def rounding(n, exact: tl.constexpr):
    """How far rounding can move a sum of n terms, relative to their magnitudes; generous."""
    eps: tl.constexpr = 2.220446049250313e-16 if exact == tl.float64 else 1.1920928955078125e-07
    return tl.cast(n + 16, exact) * (4 * eps)


@triton.jit
def _resized(i, size, out):
    """Position i of a line of `size` resized to `out`: between places a and b, b's share."""
    place = tl.maximum((2 * i + 1) * size - out, 0)  # in units of 1 / (2 out)
    a = place // (2 * out)
    share = (place % (2 * out)).to(tl.float64) / (2 * out).to(tl.float64)
    return a, tl.minimum(a + 1, size - 1), share


@triton.jit(do_not_specialize=SIZES)
def _tabulate(
    place,  # [TAPS, n] int32
    weight,  # [TAPS, n], or [6, n]
    source,
    padded,
    image,
    n,
    TAPS: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there, wide = i < n, n.to(tl.int64)
    a, b, share = _resized(i, image.to(tl.int64), wide)
    p0, p1, u = _resized(a, source.to(tl.int64), padded.to(tl.int64))
    p2, p3, v = _resized(b, source.to(tl.int64), padded.to(tl.int64))
    first, second = 1 - share, share
    if SCORES:  # the two positions apart
        tl.store(weight + 4 * wide + i, first, there)
        tl.store(weight + 5 * wide + i, second, there)
        first, second = 1.0, 1.0
    w0, w1, w2, w3 = first * (1 - u), first * u, second * (1 - v), second * v
    if TAPS == 4:
        tl.store(place + i, p0, there)
        tl.store(place + wide + i, p1, there)
        tl.store(place + 2 * wide + i, p2, there)
        tl.store(place + 3 * wide + i, p3, there)
        tl.store(weight + i, w0, there)
        tl.store(weight + wide + i, w1, there)
        tl.store(weight + 2 * wide + i, w2, there)
        tl.store(weight + 3 * wide + i, w3, there)
    else:  # all lie in the TAPS places from the first on
        for t in tl.static_range(TAPS):
            at = p0 + t
            total = tl.where(p0 == at, w0, 0.0) + tl.where(p1 == at, w1, 0.0)
            total += tl.where(p2 == at, w2, 0.0) + tl.where(p3 == at, w3, 0.0)
            tl.store(place + t * wide + i, tl.minimum(at, source - 1), there)
            tl.store(weight + t * wide + i, total, there)


@triton.jit
def taps(place, weight, i, n, stride, TAPS: tl.constexpr):
    """Offsets (int32) and weights of positions i, four each; zeros beyond n."""
    there = i < n
    p0 = tl.load(place + i, there, 0)
    p1 = tl.load(place + n + i, there, 0)
    w0 = tl.load(weight + i, there, 0.0)
    w1 = tl.load(weight + n + i, there, 0.0)
    p2, w2, p3, w3 = p1, w1, p1, w1  # not read
    if TAPS >= 3:
        p2 = tl.load(place + 2 * n + i, there, 0)
        w2 = tl.load(weight + 2 * n + i, there, 0.0)
    if TAPS == 4:
        p3 = tl.load(place + 3 * n + i, there, 0)
        w3 = tl.load(weight + 3 * n + i, there, 0.0)
    offsets = (
        (p0 * stride).to(tl.int32),
        (p1 * stride).to(tl.int32),
        (p2 * stride).to(tl.int32),
        (p3 * stride).to(tl.int32),
    )
    return offsets, (w0, w1, w2, w3)


@triton.jit
def blend(map, y, x, TAPS: tl.constexpr):
    """Logits from TAPS x TAPS taps of a map.

    Args:
        map: pointers to maps, which broadcast with the taps.
        y, x: offsets and weights of the rows and of the columns, as `taps` gives them.
    """
    exact: tl.constexpr = y[1][0].dtype
    total = 0.0
    for r in tl.static_range(TAPS):
        row, line = 0.0, map + y[0][r]
        for c in tl.static_range(TAPS):
            value = tl.load(line + x[0][c]).to(exact)
            value = tl.where(value > -FARTHEST, value, -FARTHEST)  # NaN is far outside
            row += x[1][c] * tl.minimum(value, FARTHEST)
        total += y[1][r] * row
    return total


@triton.jit
def extremes(
    map,  # [BLOCK_Q] pointers to maps
    place_y,  # [TAPS, H]
    place_x,  # [TAPS, W]
    top,
    left,
    bottom,  # last row and column of the tile
    right,
    H,
    W,
    y_stride,
    x_stride,
    exact: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Bounds of the logits of a tile, [BLOCK_Q]; a window above LIMIT pixels is not looked at."""
    y, x = tl.load(place_y + top), tl.load(place_x + left)
    height = tl.load(place_y + (TAPS - 1) * H + bottom) - y + 1
    width = tl.load(place_x + (TAPS - 1) * W + right) - x + 1
    low = tl.full((BLOCK_Q, 32), FARTHEST, exact)
    high = -low
    if height * width > LIMIT:
        low, high = high, low
    else:
        for start in tl.range(0, height * width, 32):
            i = tl.minimum(start + tl.arange(0, 32), height * width - 1)
            offset = (y + i // width) * y_stride + (x + i % width) * x_stride
            value = tl.load(map[:, None] + offset[None, :]).to(exact)
            value = tl.minimum(tl.where(value > -FARTHEST, value, -FARTHEST), FARTHEST)
            low, high = tl.minimum(low, value), tl.maximum(high, value)
    low, high = tl.min(low, 1), tl.max(high, 1)
    slack = rounding(8, exact)  # the signs stay
    return low - slack * tl.abs(low), high + slack * tl.abs(high)


@triton.jit
def _taps_and_share(place, weight, i, n, stride, second):
    """Of positions i of the output one of two in the image: its two taps, and what it weighs."""
    share = tl.load(weight + (4 + second) * n + i, i < n, 0.0)
    return taps(place + 2 * second * n, weight + 2 * second * n, i, n, stride, 2), share


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["masks"])
def semantic_tiles(
    weights,  # [B, Q, K]
    masks,  # [B, Q, h, w] by its strides
    place_y,  # [TAPS, H]
    weight_y,
    place_x,  # [TAPS, W]
    weight_x,
    bounds,  # [B, programs, 2 Q + K]: sigmoids of a query's bounds; bounds of a class's score
    listed,  # [B, programs, K] int32
    map,  # [B, H, W] int32
    areas,  # [B, K] int64, zeros
    scores,  # [B, K, H, W] or None
    Q,
    K,
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
    SCORES: tl.constexpr,  # scores are resized from image to output, and not the logits
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    exact: tl.constexpr = bounds.dtype.element_ty
    program = tl.program_id(0)
    image, pid = (program // programs).to(tl.int64), program.to(tl.int64)
    bounds += pid * (2 * Q + K)
    listed += pid * K
    weights += image * Q * K
    masks += image * image_stride
    areas += image * K
    j = tl.arange(0, 16)
    p = tl.arange(0, BLOCK_Y * BLOCK_X)
    for tile in tl.range(program % programs, tiles, programs):
        top, left = tile // tiles_x * BLOCK_Y, tile % tiles_x * BLOCK_X
        row, column = top + p // BLOCK_X, left + p % BLOCK_X
        there = (row < H) & (column < W)
        length = K
        if scores is None:
            tl.debug_barrier()  # what the last tile kept is read
            bottom, right = tl.minimum(top + BLOCK_Y, H) - 1, tl.minimum(left + BLOCK_X, W) - 1
            for start in tl.range(0, Q, BLOCK_Q):
                q = start + tl.arange(0, BLOCK_Q)
                low, high = extremes(
                    masks + tl.minimum(q, Q - 1) * query_stride,
                    *(place_y, place_x, top, left, bottom, right, H, W, y_stride, x_stride),
                    *(exact, TAPS, BLOCK_Q, 4 * BLOCK_Y * BLOCK_X),
                )
                tl.store(bounds + q, sigmoid(low), q < Q)
                tl.store(bounds + Q + q, sigmoid(high), q < Q)
            tl.debug_barrier()
            least = tl.zeros((BLOCK_K,), exact)
            for start in tl.range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                low, high = tl.zeros((BLOCK_K,), exact), tl.zeros((BLOCK_K,), exact)
                for begin in tl.range(0, Q, 16):
                    q = begin + j
                    inside = (q < Q)[:, None] & (k < K)[None, :]
                    weight = tl.load(weights + q[:, None] * K + k[None, :], inside, 0.0)
                    a = tl.load(bounds + q, q < Q, 0.0)
                    b = tl.load(bounds + Q + q, q < Q, 0.0)
                    low += tl.sum(a[:, None] * weight, 0)
                    high += tl.sum(b[:, None] * weight, 0)
                tl.store(bounds + 2 * Q + k, high, k < K)
                least = tl.where(low > least, low, least)
            floor = tl.max(least)
            tl.debug_barrier()
            length = 0
            for start in tl.range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                high = tl.load(bounds + 2 * Q + k, k < K, 0.0)
                rival = ((k < K) & ~(high * (1 + rounding(Q, exact)) < floor)).to(tl.int32)
                tl.store(listed + length + tl.cumsum(rival, 0) - 1, k, rival > 0)
                length += tl.sum(rival)
            tl.debug_barrier()

        best = tl.full((BLOCK_Y * BLOCK_X,), -1.0, exact)
        label = tl.zeros((BLOCK_Y * BLOCK_X,), tl.int32)
        if scores is None:
            label += tl.load(listed, length > 0, 0)
        line, point = row[None, :], column[None, :]
        if not SCORES:
            y = taps(place_y, weight_y, line, H, y_stride, TAPS)
            x = taps(place_x, weight_x, point, W, x_stride, TAPS)
        many = length
        if scores is None:
            many = tl.where(length > 1, length, 0)
        for start in tl.range(0, many, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K)
            real, k = (at < length)[:, None], at[:, None]
            if scores is None:
                k = tl.load(listed + at, at < length, 0)[:, None]
            total = tl.zeros((BLOCK_K, BLOCK_Y * BLOCK_X), exact)
            for begin in tl.range(0, Q, 16):
                q = begin + j
                map_q = masks + tl.minimum(q, Q - 1)[:, None] * query_stride
                if SCORES:  # one position after the other: registers
                    value = tl.zeros((16, BLOCK_Y * BLOCK_X), exact)
                    for corner in tl.range(0, 4):
                        y, u = _taps_and_share(place_y, weight_y, line, H, y_stride, corner // 2)
                        x, v = _taps_and_share(place_x, weight_x, point, W, x_stride, corner % 2)
                        value += u * v * sigmoid(blend(map_q, y, x, 2))
                else:
                    value = sigmoid(blend(map_q, y, x, TAPS))
                weight = tl.load(weights + q[None, :] * K + k, real & (q < Q)[None, :], 0.0)
                total = tl.dot(weight, value, total, input_precision="ieee", out_dtype=exact)
            if scores is not None:
                to = scores + (((image * K + k) * H + line) * W + point)
                tl.store(to, total, real & there[None, :])
            total = tl.where(real, total, -1.0)
            most = tl.max(total, 0)
            first = tl.min(tl.where(total == most[None, :], k, K), 0)
            label = tl.where(most > best, first, label)
            best = tl.where(most > best, most, best)
        tl.store(map + (image * H + row) * W + column, label, there)
        for start in tl.range(0, length, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            real = k < length
            if scores is None:
                k = tl.load(listed + k, real, 0)
            hits = (label[None, :] == k[:, None]) & there[None, :] & real[:, None]
            count = tl.sum(hits.to(tl.int32), 1).to(tl.int64)
            tl.atomic_add(areas + k, count, count > 0, sem="relaxed")


def tabulate(
    source: int, padded: int, image: int, output: int, n_taps: int, scores: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Places and weights of every output position along one axis.

    Args:
        source, padded, image, output: the axis' size in mask logits, padded input, image, result.
        n_taps: as `count_taps` says; 4 for `scores`.
        scores: taps of two positions in the image, and (weights 4 and 5) their shares.
        like: says the weights' dtype and the device.

    Returns:
        [n_taps, output] int32; [n_taps, output], or [6, output] for `scores`.
    """
    place = torch.empty((n_taps, output), dtype=torch.int32, device=like.device)
    weight = torch.empty((6 if scores else n_taps, output), dtype=like.dtype, device=like.device)
    _tabulate[(triton.cdiv(output, 128),)](
        *(place, weight, source, padded, image, output),
        *(n_taps, scores, 128),
        num_warps=4,
        **FUSED,
    )
    return place, weight


def count_taps(source: int, padded: int, image: int, output: int) -> int:
    """Places next to each other that hold all taps of any position; 4 where they lie apart."""
    if image == output or source == padded:
        return 2
    return 3 if source <= padded else 4


def mask_logits(masks: Tensor, features: Tensor | None, exact: torch.dtype) -> Tensor:
    """Mask logits [B, Q, h, w]: as they are, or the product of embeddings and features.

    Offsets within a map fit into 32 bits.
    """
    h, w = (masks if features is None else features).shape[2:]
    if h * w >= 2**31:
        raise ValueError(f"segment_map: mask logits of {h} x {w} pixels are too large")
    if features is None:
        span = (h - 1) * masks.stride(2) + (w - 1) * masks.stride(3)
        return masks if span < 2**31 else masks.contiguous()
    out = masks.new_empty((*masks.shape[:2], h, w), dtype=exact)
    embed, step = masks.to(exact), triton.cdiv(h, CHUNKS)
    for y in range(0, h, step):
        part = features[:, :, y : y + step].to(exact).flatten(2)
        rows = out[:, :, y : y + step]
        rows.copy_((embed @ part).view(rows.shape))
    return out


class Frame:
    """What the kernels of one call share: tables of both axes, tiles, programs, strides."""

    def __init__(self, masks, features, sizes, exact, tile, most_programs, scores=False):
        padded, image, self.size = sizes[:2], sizes[2:4], sizes[4:]
        if min(sizes) < 1 or image[0] > padded[0] or image[1] > padded[1]:
            raise RuntimeError(
                "segment_map: sizes must be positive, the image within the padded input"
            )
        self.masks = mask_logits(masks, features, exact)
        axes = list(zip(self.masks.shape[2:], padded, image, self.size))
        self.scores = scores and image != self.size
        self.taps = 4 if self.scores else max(count_taps(*axis) for axis in axes)
        like = masks.new_empty(0, dtype=exact)
        self.tables = [t for axis in axes for t in tabulate(*axis, self.taps, self.scores, like)]
        tiles_x = triton.cdiv(self.size[1], tile[1])
        tiles = triton.cdiv(self.size[0], tile[0]) * tiles_x
        self.programs = min(tiles, most_programs)
        self.tiles = tiles, tiles_x, self.programs
