"""What both kernels of window_attn share: the tokens of a window, and the weights of its keys.

Letters as in window_attn.py.
"""

import math

import triton
import triton.language as tl

from .sigmoid import reciprocal

LOG2E = tl.constexpr(math.log2(math.e))
BLOCKED = tl.constexpr(-100.0)  # ops.window_attn.BLOCKED: where two tokens are no neighbours
# arguments that are never specialised
SIZES = ["h", "w", "H", "shift", "rows", "columns", "N", "run"]


@triton.jit
def places(window, h, w, shift, rows, columns, first, W: tl.constexpr, BLOCK: tl.constexpr):
    """Places `first` to `first` + BLOCK of a window.

    Args:
        window: its number; in image, row and column of windows.
        shift: how far the padded map was rolled up and left.
        rows, columns: of windows.

    Returns:
        token [BLOCK] (where it lies in [h, w] of its image), whether there is such a place, whether
        it is a token of the map and not padding, and its region: 1 and 2 for what the roll brought
        from the left and from the top.
    """
    s = first + tl.arange(0, BLOCK)
    at = window % (rows * columns)
    y = at // columns * W + s // W
    x = at % columns * W + s % W
    region = tl.where(y >= rows * W - shift, 2, 0) + tl.where(x >= columns * W - shift, 1, 0)
    y, x = y + shift, x + shift  # below twice the padded map
    y, x = tl.where(y >= rows * W, y - rows * W, y), tl.where(x >= columns * W, x - columns * W, x)
    there = s < W * W
    return y * w + x, there, there & (y < h) & (x < w), region


@triton.jit
def load(x, token, real, stride, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows of D channels, [BLOCK, CHANNELS]; zeros where there is nothing."""
    d = tl.arange(0, CHANNELS)
    mask = real[:, None]
    if D < CHANNELS:
        mask = mask & (d < D)[None, :]
    return tl.load(x + token[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_projected(x, x_bias, token, there, real, stride, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows of q, k or v with their bias, which is all that a padded token has."""
    d = tl.arange(0, CHANNELS)
    row = load(x, token, real, stride, D, CHANNELS)
    added = tl.load(x_bias + d, mask=d < D, other=0.0)
    return tl.where(there[:, None], row.to(added.dtype) + added[None, :], 0.0).to(row.dtype)


@triton.jit
def load_bias(bias, first, S: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_S: tl.constexpr):
    """The bias of queries from `first` on, [BLOCK_I, BLOCK_S]; -inf where there is no key."""
    i, j = first + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_S)
    mask = (i < S)[:, None] & (j < S)[None, :]
    x = tl.load(bias + i[:, None] * S + j[None, :], mask=mask, other=0.0)
    return tl.where((j < S)[None, :], x, float("-inf"))


@triton.jit
def weights_of(q, k, bias, region_q, region_k, scale, exact: tl.constexpr):
    """Weights of keys [BLOCK_I, BLOCK_S], not divided by their sum, and 1 / sum [BLOCK_I]."""
    x = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=exact)
    x = x * tl.full((), scale, exact) + bias
    x += tl.where(region_q[:, None] != region_k[None, :], BLOCKED, 0.0)
    p = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
    return p, reciprocal(tl.sum(p, 1))
