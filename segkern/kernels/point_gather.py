"""The kernels of point_sample: threads along the points, or along channels that are dense.

Letters as in point_sample.py.
"""

import triton
import triton.language as tl

from .point_corners import place_of


@triton.jit
def _add_corner(total, corner, weight, real):
    """total + weight * map; what weighs nothing is not read, so that NaN stays where it is."""
    value = tl.load(corner, mask=real & (weight != 0), other=0)
    return tl.fma(value.to(weight.dtype), weight, total)  # rounds alike in both kernels


@triton.jit(
    do_not_specialize=[
        *("C", "P", "h", "w", "tiles", "groups", "channels"),
        *("image_stride", "channel_stride", "row_stride", "pixel_stride"),
    ]
)
def gather(
    features,  # [B, C, h, w]
    points,  # [B, P, 2], contiguous
    out,  # [B, C, P], contiguous
    C,
    P,
    h,
    w,
    tiles,  # of BLOCK_P points
    groups,  # of channels
    channels,  # of a group
    image_stride: tl.int64,  # of the features
    channel_stride: tl.int64,
    row_stride: tl.int64,
    pixel_stride: tl.int64,
    BLOCK_P: tl.constexpr,
):
    exact: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    image, group, p, y, x, weights = place_of(points, P, h, w, tiles, groups, BLOCK_P, exact)
    features += image * image_stride
    out += image * C * P
    place, real = y * row_stride + x * pixel_stride, p < P
    for c in tl.range(group * channels, tl.minimum((group + 1) * channels, C)):
        channel = tl.cast(c, tl.int64)
        corner = features + channel * channel_stride + place
        below = corner + row_stride
        value = _add_corner(0.0, corner, weights[0], real)
        value = _add_corner(value, corner + pixel_stride, weights[1], real)
        value = _add_corner(value, below, weights[2], real)
        value = _add_corner(value, below + pixel_stride, weights[3], real)
        tl.store(out + channel * P + p, value.to(out.dtype.element_ty), mask=real)


@triton.jit(
    do_not_specialize=[
        *("C", "P", "h", "w", "tiles", "groups"),
        *("image_stride", "row_stride", "pixel_stride"),
    ]
)
def gather_rows(
    features,  # [B, C, h, w], channels dense
    points,  # [B, P, 2], contiguous
    out,  # [B, C, P], contiguous
    C,
    P,
    h,
    w,
    tiles,  # of BLOCK_P points
    groups,  # of BLOCK_C channels
    image_stride: tl.int64,  # of the features
    row_stride: tl.int64,
    pixel_stride: tl.int64,
    UNIT: tl.constexpr,  # divides C and the strides
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    exact: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    image, group, p, y, x, weights = place_of(points, P, h, w, tiles, groups, BLOCK_P, exact)
    # no change: it tells the compiler how wide it may load
    row_stride = row_stride // UNIT * UNIT
    pixel_stride = pixel_stride // UNIT * UNIT
    features += image * (image_stride // UNIT * UNIT)
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    real = (c < C // UNIT * UNIT)[:, None]
    corner = features + c[:, None] + (y * row_stride + x * pixel_stride)[None, :]
    below = corner + row_stride
    value = _add_corner(0.0, corner, weights[0][None, :], real)
    value = _add_corner(value, corner + pixel_stride, weights[1][None, :], real)
    value = _add_corner(value, below, weights[2][None, :], real)
    value = _add_corner(value, below + pixel_stride, weights[3][None, :], real)
    to = out + (image * C + c)[:, None] * P + p[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=real & (p < P)[None, :])
