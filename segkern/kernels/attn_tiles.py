"""What the kernels of masked_attn share: rows of tensors, slots of a chunk, bits of a tile.

Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
# arguments that are never specialised
SIZES = ["Q", "S", "H", "groups", "splits", "tiles"]
LOWEST = tl.constexpr(-3.0e38)  # a maximum of nothing; finite, so that it minus itself is 0


@triton.jit
def _place(line, stride, real, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets of lines of D channels, [lines, CHANNELS], and which of them exist."""
    d = tl.arange(0, CHANNELS)
    mask = real[:, None]
    if D < CHANNELS:
        mask = mask & (d < D)[None, :]
    return line.to(tl.int64)[:, None] * stride + d[None, :], mask


@triton.jit
def load(x, line, stride, real, D: tl.constexpr, CHANNELS: tl.constexpr):
    place, mask = _place(line, stride, real, D, CHANNELS)
    return tl.load(x + place, mask=mask, other=0.0)


@triton.jit
def store(to, line, stride, real, x, D: tl.constexpr, CHANNELS: tl.constexpr):
    place, mask = _place(line, stride, real, D, CHANNELS)
    tl.store(to + place, x, mask=mask)


@triton.jit
def slots_of(plan, open, first, Q, ROWS: tl.constexpr):
    """Slots of a chunk: query (Q: none) and its open keys, [ROWS]; tiles of any, a bit each."""
    slot = first + tl.arange(0, ROWS)
    row = tl.load(plan + slot, mask=slot < Q, other=Q)
    hit = tl.load(plan + Q + slot, mask=slot < Q, other=0)
    i = tl.arange(0, 32)
    tiles = tl.sum(tl.max(hit[:, None] >> i[None, :] & 1, 0) << i, 0)
    return row, tl.load(open + row, mask=row < Q, other=1), tiles


@triton.jit
def open_keys(bits, row, n, tile, Q, S, KEYS: tl.constexpr):
    """Which keys of a tile are open to rows of `bits` with n open keys, [rows, KEYS]."""
    W = tl.cdiv(S, 32)
    j = tl.arange(0, KEYS)
    pair = tl.zeros((1, KEYS), tl.int1)
    for i in tl.static_range(KEYS // 32):
        word = tile * (KEYS // 32) + i
        left = S - 32 * word
        valid = tl.where(left >= 32, -1, (1 << tl.minimum(tl.maximum(left, 0), 31)) - 1)
        real = row < tl.where(left > 0, Q, 0)
        x = tl.load(bits + (row.to(tl.int64) * W + word), mask=real, other=0)
        x = (tl.where(n == 0, -1, x) & valid).to(tl.uint32, bitcast=True)
        bit = tl.where(j // 32 == i, 1 << (j % 32), 0).to(tl.uint32, bitcast=True)
        if i % 2 == 1:
            # LLVM would join more than 16 equal tests of a thread, and pack and unpack the results
            x = x.to(tl.uint64)
        pair |= (x[:, None] & bit[None, :]) != 0
    return pair


@triton.jit
def factors(scale, exact: tl.constexpr, WIDE: tl.constexpr):
    """inner, outer, above 0: a product x of query and key weighs 2^((x inner - top) outer).

    In 16 bits x inner - top is one operation. Else x - top is exactly 0 at the maximum, and a row
    with one open key returns its value as it is.
    """
    c = tl.maximum(tl.full((), scale, exact) * LOG2E, 1e-37)
    one = tl.full((), 1.0, exact)
    if WIDE:
        return one, c
    return c, one


@triton.jit
def base(x, b, h, strides, UNIT: tl.constexpr):
    """Where head h of image b starts; dividing tells the compiler how wide it may load."""
    return x + b * (strides[0] // UNIT * UNIT) + h * (strides[2] // UNIT * UNIT)
