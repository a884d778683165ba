"""What both kernels of window_attn share: the tokens of a window, and the weights of its keys.

Letters as in window_attn.py.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
BLOCKED = tl.constexpr(-100.0)  # ops.window_attn.BLOCKED: where two tokens are no neighbours
LOWEST = tl.constexpr(-3.0e38)  # a maximum of nothing; finite, so that it minus itself is 0
PART = tl.constexpr(32)  # channels of a product, which Swin's heads have
# arguments that are never specialised
SIZES = ["h", "w", "H", "shift", "rows", "columns", "N", "run"]


@triton.jit
def places(window, h, w, shift, rows, columns, s, W: tl.constexpr):
    """What lies at places s [BLOCK] of a window.

    Args:
        window: its number; in image, row and column of windows.
        shift: how far the padded map was rolled up and left.
        rows, columns: of windows.

    Returns:
        token [BLOCK] (where it lies in [h, w] of its image), whether there is such a place,
        whether it is a token of the map and not padding, and its region: 1 and 2 for what the roll
        brought from the left and from the top.
    """
    at = window % (rows * columns)
    top, left = at // columns, at % columns
    y, x = s // W, s % W
    # bits, few registers: what the roll brings if the window is a last one, and whether it is
    brought = tl.where(y >= W - shift, 2, 0) + tl.where(x >= W - shift, 1, 0)
    last = tl.where(top == rows - 1, 2, 0) + tl.where(left == columns - 1, 1, 0)
    y, x = y + top * W + shift, x + left * W + shift  # below twice the padded map
    y, x = tl.where(y >= rows * W, y - rows * W, y), tl.where(x >= columns * W, x - columns * W, x)
    there = s < W * W
    return y * w + x, there, there & (y < h) & (x < w), brought & last


@triton.jit
def _rows(token, real, stride, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets of the rows of tokens, [BLOCK, CHANNELS], and which of their values exist."""
    d = tl.arange(0, CHANNELS)
    mask = real[:, None]
    if D < CHANNELS:
        mask = mask & (d < D)[None, :]
    return (token.to(tl.int64) * stride)[:, None] + d[None, :], mask


@triton.jit
def load(x, token, real, stride, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows of D channels, [BLOCK, CHANNELS]; zeros where there is nothing."""
    place, mask = _rows(token, real, stride, D, CHANNELS)
    return tl.load(x + place, mask=mask, other=0.0)


@triton.jit
def store(to, token, real, stride, x, D: tl.constexpr, CHANNELS: tl.constexpr):
    place, mask = _rows(token, real, stride, D, CHANNELS)
    tl.store(to + place, x, mask=mask)


@triton.jit
def load_projected(x, x_bias, token, there, real, stride, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows of q, k or v with their bias, which is all that a padded token has."""
    d = tl.arange(0, CHANNELS)
    row = load(x, token, real, stride, D, CHANNELS)
    added = tl.load(x_bias + d, mask=d < D, other=0.0)
    return tl.where(there[:, None], row.to(added.dtype) + added[None, :], 0.0).to(row.dtype)


@triton.jit
def load_bias(bias, i, j, S: tl.constexpr):
    """The bias of queries at places i and keys at places j; -inf where there is no key."""
    inside = (i < S)[:, None] & (j < S)[None, :]
    x = tl.load(bias + i[:, None] * S + j[None, :], mask=inside, other=0.0)
    return tl.where((j < S)[None, :], x, float("-inf"))


@triton.jit
def product(x, y, exact: tl.constexpr):
    """x y^T of rows of channels.

    What no matrix unit multiplies, a thread multiplies from registers: all channels of its rows of
    x and of y, which of a wide head are more than it has. Parts of the channels are then factors
    of products of their own, side by side, and these are added up.
    """
    CHANNELS: tl.constexpr = x.shape[1]
    if CHANNELS > PART and x.dtype.primitive_bitwidth >= 32:
        x = tl.reshape(x, (x.shape[0], CHANNELS // PART, PART)).permute(1, 0, 2)
        y = tl.reshape(y, (y.shape[0], CHANNELS // PART, PART)).permute(1, 2, 0)
        return tl.sum(tl.dot(x, y, input_precision="ieee", out_dtype=exact), 0)
    else:
        return tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=exact)


@triton.jit
def scores(q, k, bias, region_q, region_k, scale):
    """What the softmax is taken of, [queries, keys], in the bias's precision."""
    exact: tl.constexpr = bias.dtype
    x = product(q, k, exact)
    x = x * tl.full((), scale, exact) + bias
    return x + tl.where(region_q[:, None] != region_k[None, :], BLOCKED, 0.0)


@triton.jit
def weights(x, most):
    """Of scores the weights, not yet divided by their sum."""
    return tl.exp2((x - most) * LOG2E)
