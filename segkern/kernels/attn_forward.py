"""The forward kernel of masked_attn: a chunk of the keys of a head, for tiles of slots.

Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import triton
import triton.language as tl

from .attn_tiles import (
    LOWEST,
    SIZES,
    base,
    closed_rows,
    count,
    factors,
    load,
    lowest,
    open_keys,
    slots_of,
    store,
)
from .sigmoid import reciprocal


@triton.jit
def _attend(
    rows,  # queries of one or two tiles of slots, each [ROWS]
    tensors,  # q, (k, v) of the head; bits, open of the image; out, norm of the chunk and head
    strides,  # of a row of q, k, v
    factors,  # as `factors` gives them
    chunk,  # its first tile of keys; those that any row wants, a bit each
    sizes,  # Q, S, H, splits
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Joins tiles of keys to the rows; all of them are multiplied with each, without a branch."""
    q, keys_values, bits, open, out, norm = tensors
    k, v = keys_values
    inner, outer = factors
    first, wanted = chunk
    Q, S, H, splits = sizes
    exact: tl.constexpr = norm.dtype.element_ty
    value: tl.constexpr = q.dtype.element_ty
    TILES: tl.constexpr = len(rows)
    ROWS: tl.constexpr = rows[0].shape[0]
    slots, sums = (), ()
    for r in tl.static_range(TILES):
        row = rows[r]
        query = load(q, row, strides[0] // UNIT * UNIT, row < Q, D, CHANNELS)
        slots += ((closed_rows(open, row, Q), query),)
        top = tl.full((ROWS,), LOWEST, exact)
        total, acc = tl.zeros((ROWS,), exact), tl.zeros((ROWS, CHANNELS), exact)
        sums += ((top, total, acc),)
    for _ in tl.range(0, count(wanted), num_stages=STAGES):
        tile = first + lowest(wanted)
        wanted &= wanted - 1
        key = tile.to(tl.int64) * KEYS + tl.arange(0, KEYS)
        keys = load(k, key, strides[1] // UNIT * UNIT, key < S, D, CHANNELS)
        values = load(v, key, strides[2] // UNIT * UNIT, key < S, D, CHANNELS)
        for r in tl.static_range(TILES):
            closed, query = slots[r]
            top, total, acc = sums[r]
            pair = open_keys(bits, rows[r], closed, tile, Q, S, KEYS)
            x = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=exact)
            x = tl.where(pair, x, float("-inf"))
            most = tl.maximum(top, tl.max(x, 1) * inner)
            p = tl.exp2((x * inner - most[:, None]) * outer)
            old = tl.exp2((top - most) * outer)
            total = total * old + tl.sum(p, 1)
            acc *= old[:, None]
            acc = tl.dot(p.to(value), values, acc, input_precision="ieee", out_dtype=exact)
            sums = sums[:r] + ((most, total, acc),) + sums[r + 1 :]
    for r in tl.static_range(TILES):
        row = rows[r]
        top, total, acc = sums[r]
        factor = tl.where(splits == 1, reciprocal(total), 1.0)
        given = (row < Q) & (tl.where(splits == 1, 1.0, total) != 0)  # join omits the others
        store(out, row, H * D, given, acc * factor[:, None], D, CHANNELS)
        tl.store(norm + row * 2, top, mask=row < Q)
        tl.store(norm + row * 2 + 1, tl.where(splits == 1, factor, total), mask=row < Q)


@triton.jit(do_not_specialize=[*SIZES, "groups"])
def forward(
    q,  # [B, Q, H, D]
    k,  # [B, S, H, D]
    v,  # [B, S, H, D]
    bits,  # [B, Q, W] int32, contiguous
    open,  # [B, Q] int32, contiguous
    out,  # [B, splits, Q, H, D], contiguous
    norm,  # [B, splits, H, Q, 2], contiguous
    scale: tl.float64,
    Q,
    S,
    H,
    groups,  # of slots, one a program
    splits,
    tiles,
    q_strides,  # of an image, a row, a head
    k_strides,
    v_strides,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,  # divides all strides
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    group = program % groups
    h = (program // groups % H).to(tl.int64)
    chunk = (program // groups // H).to(tl.int64)
    b, first = chunk // splits, (chunk % splits).to(tl.int32) * tiles
    exact: tl.constexpr = norm.dtype.element_ty
    bits += b * Q * tl.cdiv(S, 32)
    open += b * Q
    out += chunk * Q * H * D + h * D
    norm += (chunk * H + h) * Q * 2
    tiles = tl.minimum(tiles, tl.cdiv(S, KEYS) - first)
    start = group * TILES * ROWS
    rows, wanted, used = slots_of(bits, open, first, tiles, start, Q, S, ROWS, TILES, KEYS)
    keys = base(k, b, h, k_strides, UNIT), base(v, b, h, v_strides, UNIT)
    tensors = base(q, b, h, q_strides, UNIT), keys, bits, open, out, norm
    strides = q_strides[1], k_strides[1], v_strides[1]
    scales = factors(scale, exact, q.dtype.element_ty == exact)
    part, sizes = (first, wanted), (Q, S, H, splits)
    if TILES == 2 and used <= ROWS:
        lone = (rows[0],)
        _attend(lone, tensors, strides, scales, part, sizes, D, CHANNELS, UNIT, KEYS, STAGES)
        row = rows[1]
        tl.store(norm + row * 2, tl.full((ROWS,), LOWEST, exact), mask=row < Q)
        tl.store(norm + row * 2 + 1, tl.zeros((ROWS,), exact), mask=row < Q)
        # without a key in the only chunk: `open` contradicts the bits
        none = tl.full((ROWS, CHANNELS), float("nan"), exact)
        store(out, row, H * D, row < tl.where(splits == 1, Q, 0), none, D, CHANNELS)
    else:
        _attend(rows, tensors, strides, scales, part, sizes, D, CHANNELS, UNIT, KEYS, STAGES)
