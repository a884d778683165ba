"""The kernel of point_sample's gradient that adds with atomics, in no fixed order.

Letters as in point_sample.py.
"""

import triton
import triton.language as tl

from .point_corners import place_of


@triton.jit
def _add(corner, weight, g):
    tl.atomic_add(corner, g * weight, mask=weight != 0, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        *("C", "P", "h", "w", "tiles", "groups", "channels"),
        *("image_stride", "channel_stride", "point_stride"),
    ]
)
def scatter(
    grad,  # [B, C, P]
    points,  # [B, P, 2], contiguous
    out,  # [B, C, h, w], contiguous, zeros; float32 or float64
    C,
    P,
    h,
    w,
    tiles,  # of BLOCK_P points
    groups,  # of channels
    channels,  # of a group
    image_stride: tl.int64,  # of the gradient
    channel_stride: tl.int64,
    point_stride: tl.int64,
    BLOCK_P: tl.constexpr,
):
    exact: tl.constexpr = out.dtype.element_ty
    image, group, p, y, x, weights = place_of(points, P, h, w, tiles, groups, BLOCK_P, exact)
    size = tl.cast(h, tl.int64) * w
    grad += image * image_stride
    out += image * C * size
    place = y * w + x
    for c in tl.range(group * channels, tl.minimum((group + 1) * channels, C)):
        channel = tl.cast(c, tl.int64)
        from_ = grad + channel * channel_stride + p * point_stride
        g = tl.load(from_, mask=p < P, other=0.0).to(exact)
        corner = out + channel * size + place
        _add(corner, weights[0], g)
        _add(corner + 1, weights[1], g)
        _add(corner + w, weights[2], g)
        _add(corner + w + 1, weights[3], g)
