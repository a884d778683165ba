"""What the kernels of masked_attn share: rows of tensors, slots of a chunk, bits of a tile.

Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
# arguments that are never specialised
SIZES = ["Q", "S", "H", "splits", "tiles"]
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
def slots_of(
    bits,  # [Q, W] int32, of an image
    open,  # [Q] int32
    first,  # tile of the chunk
    tiles,  # of the chunk
    start,  # first slot asked for
    Q,
    S,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Some slots of a chunk.

    Returns:
        The queries of TILES tiles of slots, a tuple of [ROWS] (Q: none); which tiles of keys any
        of them wants, a bit each; how many of the slots from `start` on are used.
    """
    words: tl.constexpr = KEYS // 32
    W = tl.cdiv(S, 32)
    i = tl.arange(0, 32)
    every = tl.sum((i < tiles).to(tl.int32) << i, 0)
    # as wide as what they meet: narrow ones are moved between threads again and again
    tile = tl.broadcast_to(tl.arange(0, 16)[None, :], (128, 16))
    rows = (tl.full((ROWS,), 0, tl.int32) + Q,) * TILES
    wanted, used = 0, 0
    for block in range(0, Q, 128):
        query = block + tl.arange(0, 128)
        real = query < Q
        line = tl.broadcast_to(query[:, None], (128, 16))
        hit = tl.zeros((128,), tl.int32)
        for some in range(0, tiles, 16):
            x = tl.zeros((128, 16), tl.int32)
            for j in tl.static_range(words):
                word = (first + some + tile) * words + j
                given = (line < Q) & (some + tile < tiles) & (word < W)
                x |= tl.load(bits + (line.to(tl.int64) * W + word), mask=given, other=0)
            hit += tl.sum((x != 0).to(tl.int32) << some + tile, 1)
        hit = tl.where(tl.load(open + query, mask=real, other=1) == 0, every, hit)
        some = (hit != 0).to(tl.int32)
        rank = used + tl.cumsum(some, 0)
        slot = tl.where(some != 0, rank - 1, Q - 1 - (query - rank))  # the others from the end
        slot = tl.where(real, slot - start, -1)
        used += tl.sum(some, 0)
        hit = tl.where((slot >= 0) & (slot < TILES * ROWS), hit, 0)
        wanted |= tl.sum(tl.max(hit[:, None] >> i[None, :] & 1, 0) << i, 0)
        for r in tl.static_range(TILES):
            here = slot[None, :] == (r * ROWS + tl.arange(0, ROWS))[:, None]
            row = rows[r] + tl.sum(tl.where(here, (query - Q)[None, :], 0), 1)
            rows = rows[:r] + (row,) + rows[r + 1 :]
    return rows, wanted, used - start


@triton.jit
def count(tiles):
    """How many bits are set."""
    return tl.sum(tiles >> tl.arange(0, 32) & 1, 0)


@triton.jit
def lowest(tiles):
    """The place of the lowest bit that is set; 2^n is exact in float32, whose exponent is n."""
    bit = (tiles & -tiles).to(tl.uint32, bitcast=True).to(tl.float32)
    return (bit.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def closed_rows(open, row, Q):
    """A word with all bits set for queries without an open key, 0 for the others."""
    return tl.where(tl.load(open + row, mask=row < Q, other=1) == 0, -1, 0)


@triton.jit
def open_keys(bits, row, closed, tile, Q, S, KEYS: tl.constexpr):
    """Which keys of a tile are open to rows of `bits`, [rows, KEYS]; all to those of `closed`."""
    W = tl.cdiv(S, 32)
    j = tl.arange(0, KEYS)
    pair = tl.zeros((1, KEYS), tl.int1)
    for i in tl.static_range(KEYS // 32):
        word = tile * (KEYS // 32) + i
        left = S - 32 * word
        valid = tl.where(left >= 32, -1, (1 << tl.minimum(tl.maximum(left, 0), 31)) - 1)
        real = row < tl.where(left > 0, Q, 0)
        x = tl.load(bits + (row.to(tl.int64) * W + word), mask=real, other=0)[:, None]
        bit = tl.where(j // 32 == i, 1 << (j % 32), 0) & valid
        pair |= ((x | closed[:, None]) & bit[None, :]) != 0
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
