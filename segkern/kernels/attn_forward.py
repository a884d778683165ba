"""The forward kernel of masked_attn: a chunk of the keys of a head, for tiles of slots.

Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import triton
import triton.language as tl

from .attn_tiles import LOWEST, SIZES, base, factors, load, open_keys, slots_of, store
from .sigmoid import reciprocal


@triton.jit(do_not_specialize=SIZES)
def forward(
    q,  # [B, Q, H, D]
    k,  # [B, S, H, D]
    v,  # [B, S, H, D]
    bits,  # [B, Q, W] int32, contiguous
    open,  # [B, Q] int32, contiguous
    plan,  # [B, splits, 2 Q + 1] int32
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
    value: tl.constexpr = q.dtype.element_ty
    inner, outer = factors(scale, exact, value == exact)
    q = base(q, b, h, q_strides, UNIT)
    k = base(k, b, h, k_strides, UNIT)
    v = base(v, b, h, v_strides, UNIT)
    bits += b * Q * tl.cdiv(S, 32)
    slots, sums = (), ()
    union = 0
    for r in tl.static_range(TILES):
        row, n, wanted = slots_of(
            plan + chunk * (2 * Q + 1), open + b * Q, (group * TILES + r) * ROWS, Q, ROWS
        )
        query = load(q, row, q_strides[1] // UNIT * UNIT, row < Q, D, CHANNELS)
        slots += ((row, n, wanted, query),)
        top = tl.full((ROWS,), LOWEST, exact)
        total, acc = tl.zeros((ROWS,), exact), tl.zeros((ROWS, CHANNELS), exact)
        sums += ((top, total, acc),)
        union |= wanted
    tiles = tl.where(union == 0, 0, tl.minimum(tiles, tl.cdiv(S, KEYS) - first))
    for t in tl.range(0, tiles, num_stages=STAGES):
        key = (first + t).to(tl.int64) * KEYS + tl.arange(0, KEYS)
        real = key < tl.where((union >> t & 1) != 0, S, 0)
        keys = load(k, key, k_strides[1] // UNIT * UNIT, real, D, CHANNELS)
        values = load(v, key, v_strides[1] // UNIT * UNIT, real, D, CHANNELS)
        for r in tl.static_range(TILES):
            row, n, wanted, query = slots[r]
            if (wanted >> t & 1) != 0:
                top, total, acc = sums[r]
                pair = open_keys(bits, row, n, first + t, Q, S, KEYS)
                x = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=exact)
                x = tl.where(pair, x, float("-inf"))
                most = tl.maximum(top, tl.max(x, 1) * inner)
                p = tl.exp2((x * inner - most[:, None]) * outer)
                old = tl.exp2((top - most) * outer)
                total = total * old + tl.sum(p, 1)
                acc *= old[:, None]
                acc = tl.dot(p.to(value), values, acc, input_precision="ieee", out_dtype=exact)
                sums = sums[:r] + ((most, total, acc),) + sums[r + 1 :]
    out += chunk * Q * H * D + h * D
    norm += (chunk * H + h) * Q * 2
    for r in tl.static_range(TILES):
        row = slots[r][0]
        top, total, acc = sums[r]
        factor = tl.where(splits == 1, reciprocal(total), 1.0)
        given = (row < Q) & (tl.where(splits == 1, 1.0, total) != 0)  # join omits the others
        store(out, row, H * D, given, acc * factor[:, None], D, CHANNELS)
        tl.store(norm + row * 2, top, mask=row < Q)
        tl.store(norm + row * 2 + 1, tl.where(splits == 1, factor, total), mask=row < Q)
