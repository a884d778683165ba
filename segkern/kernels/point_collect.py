"""The kernels of point_sample's deterministic gradient: cells of points, and sums by pixel.

Letters as in point_sample.py.
"""

import triton
import triton.language as tl

from .point_corners import find_corners, place_of


@triton.jit(do_not_specialize=["P", "h", "w", "tiles"])
def find_cells(
    points,  # [B, P, 2], contiguous
    cells,  # [B, P] int64, contiguous; of each image (h + 1)(w + 1), and one for points outside
    P,
    h,
    w,
    tiles,
    exact: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image, _, p, y, x, weights = place_of(points, P, h, w, tiles, 1, BLOCK_P, exact)
    w00, w01, w10, w11 = weights
    outside = (h + 1).to(tl.int64) * (w + 1)
    cell = tl.where(w00 + w01 + w10 + w11 > 0, (y + 1) * (w + 1) + x + 1, outside)
    tl.store(cells + image * P + p, image * (outside + 1) + cell, mask=p < P)


@triton.jit(
    do_not_specialize=[
        *("C", "P", "h", "w", "tiles", "groups"),
        *("image_stride", "channel_stride", "point_stride"),
    ]
)
def collect(
    grad,  # [B, C, P]
    points,  # [B, P, 2], contiguous
    order,  # [B P] int64: points sorted by cell
    starts,  # [B ((h + 1)(w + 1) + 1)] int64: where the points of a cell start in `order`
    out,  # [B, C, h, w], contiguous
    C,
    P,
    h,
    w,
    tiles,  # of BLOCK_N pixels
    groups,  # of BLOCK_C channels
    image_stride: tl.int64,  # of the gradient
    channel_stride: tl.int64,
    point_stride: tl.int64,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    exact: tl.constexpr,
):
    program = tl.program_id(0)
    pixel = (program % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = program // tiles % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    image = (program // tiles // groups).to(tl.int64)
    size = h.to(tl.int64) * w
    y, x = pixel // w, pixel % w
    starts += image * ((h + 1).to(tl.int64) * (w + 1) + 1)
    grad += image * image_stride
    total = tl.zeros((BLOCK_C, BLOCK_N), exact)
    for corner in tl.static_range(4):
        # the pixel is this corner of the cell
        cell = (y + 1 - corner // 2) * (w + 1) + x + 1 - corner % 2
        at = tl.load(starts + cell, mask=pixel < size, other=0)
        end = tl.load(starts + cell + 1, mask=pixel < size, other=0)
        for _ in tl.range(0, tl.max(end - at)):
            p = tl.load(order + at, mask=at < end, other=0) - image * P
            _, _, weights = find_corners(points + (image * P + p) * 2, at < end, h, w, exact)
            weight = weights[corner]
            place = c.to(tl.int64)[:, None] * channel_stride + p[None, :] * point_stride
            mask = (c < C)[:, None] & (weight != 0)[None, :]
            total += tl.load(grad + place, mask=mask, other=0.0).to(exact) * weight[None, :]
            at += 1
    to = out + (image * C + c)[:, None] * size + pixel[None, :]
    mask = (c < C)[:, None] & (pixel < size)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)
