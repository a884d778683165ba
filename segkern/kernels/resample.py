"""Mask logits at the resolution of the result, for the kernels of segment_map.

Letters: B image, Q query, C channel, h w mask logits, H W result, n positions along an axis.

The resizes to the padded input and to the output are linear in each axis. What a position of the
output reads of its axis, two to four taps, stands in a table: `tabulate` makes one for the rows
and one for the columns, in float64, on the device. A tile of output pixels reads its taps through
the L1 cache, where neighbours share them. A tap that weighs nothing names a place that is there,
so that the inner loops need no mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED

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
def sigmoid(x):
    """To rounding at every x: between logits far below 0 a faster exp would decide by its error."""
    low = -tl.abs(x)
    if x.dtype == tl.float64:
        e = tl.exp(low)
    else:
        low = tl.maximum(low, -104.0)  # where exp is 0; in range for what follows
        n = tl.floor(low * 1.44269504 + 0.5)
        r = low - n * 0.693359375  # exact
        r = r + n * 2.12194440e-4
        e = tl.exp2(r * 1.44269504) * tl.exp2(n)
    s = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * s, s)


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
def blend(map, y, x, FIRST_Y: tl.constexpr, FIRST_X: tl.constexpr, TAPS: tl.constexpr):
    """Logits from TAPS x TAPS taps of a map.

    Args:
        map: pointers to maps, which broadcast with the taps.
        y, x: offsets and weights of the rows and of the columns, as `taps` gives them.
        FIRST_Y, FIRST_X: the first of them to use.
    """
    exact: tl.constexpr = y[1][0].dtype
    total = 0.0
    for r in tl.static_range(TAPS):
        row, line = 0.0, map + y[0][FIRST_Y + r]
        for c in tl.static_range(TAPS):
            value = tl.load(line + x[0][FIRST_X + c]).to(exact)
            value = tl.where(value > -FARTHEST, value, -FARTHEST)  # NaN is far outside
            row += x[1][FIRST_X + c] * tl.minimum(value, FARTHEST)
        total += y[1][FIRST_Y + r] * row
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
