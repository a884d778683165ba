"""The kernels that prepare the inputs of matching_cost: rows of pixels, corners of points.

Letters as in matching_cost.py.
"""

import triton
import triton.language as tl

from .matching_parts import SIZES
from .point_corners import find_corners


@triton.jit(do_not_specialize=SIZES)
def channels_last(
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
def feature_corners(
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
