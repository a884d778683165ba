"""The corners and weights of points on a map, for the kernels that sample at points.

Letters: B image, h w map size, P point.
"""

import triton
import triton.language as tl


@triton.jit
def find_corners(point, mask, h, w, exact: tl.constexpr):
    """Where points lie on the grid of pixel centres.

    Args:
        point: pointers to x, which y follows.
        mask: points that are there; the others have no corner inside.
        exact: dtype of the computation.

    Returns:
        y and x (int64) of the corner of lower indices, -1 to h - 1 and w - 1, and the weights of
        the corners (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1): 0 for a corner outside.
    """
    x, y = tl.load(point, mask=mask, other=-2.0), tl.load(point + 1, mask=mask, other=-2.0)
    # fused in every kernel: one that rounded otherwise would find another cell
    x = tl.fma(x.to(exact), tl.cast(w, exact), -0.5)
    y = tl.fma(y.to(exact), tl.cast(h, exact), -0.5)
    x = tl.where((x > -1) & (x < w), x, -1.0)  # -1: no corner inside; also for NaN
    y = tl.where((y > -1) & (y < h), y, -1.0)
    x0, y0 = tl.floor(x), tl.floor(y)
    left, right = tl.where(x0 >= 0, x0 + 1 - x, 0.0), tl.where(x0 < w - 1, x - x0, 0.0)
    top, bottom = tl.where(y0 >= 0, y0 + 1 - y, 0.0), tl.where(y0 < h - 1, y - y0, 0.0)
    weights = (left * top, right * top, left * bottom, right * bottom)
    return y0.to(tl.int64), x0.to(tl.int64), weights


@triton.jit
def place_of(points, P, h, w, tiles, groups, BLOCK_P: tl.constexpr, exact: tl.constexpr):
    """Of this program: image, group of channels, points [BLOCK_P], their corners and weights."""
    program = tl.program_id(0)
    p = (program % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (program // tiles // groups).to(tl.int64)
    y, x, weights = find_corners(points + (image * P + p) * 2, p < P, h, w, exact)
    return image, program // tiles % groups, p, y, x, weights
