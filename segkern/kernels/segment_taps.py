"""What the kernels of segment_map share: resized mask logits and their bounds, made in registers.

Letters: Q query, h w mask logits, H W result, n positions along an axis.

Resizing is linear in each axis, so a pixel of the result is a weighted sum of two to four rows of
mask logits times two to four columns: its taps. Which ones, and their weights, stands in a table
for each axis (segment_tables.py). Neighbouring pixels share taps, which the L1 cache then serves.
A tap that weighs nothing still names a place inside the map, so that the inner loops need no mask.
"""

import triton
import triton.language as tl

FARTHEST = tl.constexpr(1e30)  # ops.segment_map.FARTHEST: bound of a mask logit's magnitude
# arguments of all kernels of segment_map that are never specialised
SIZES = ["Q", "K", "H", "W", "n", "N", "words", "tiles", "tiles_x", "programs", "blocks"]
SIZES += ["source", "padded", "image", "image_stride", "query_stride", "y_stride", "x_stride"]


@triton.jit
def rounding(n, exact: tl.constexpr):
    """How far rounding can move a sum of n terms, relative to their magnitudes; generous."""
    eps: tl.constexpr = 2.220446049250313e-16 if exact == tl.float64 else 1.1920928955078125e-07
    return tl.cast(n + 16, exact) * (4 * eps)


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
