"""The kernels of masked_attn that join what several chunks of a head have left.

Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import triton
import triton.language as tl

from .attn_tiles import LOWEST, factors, store
from .sigmoid import reciprocal


@triton.jit(do_not_specialize=["Q", "H", "splits"])
def join(
    parts,  # [B, splits, Q, H, D]
    stats,  # [B, splits, H, Q, 2]
    out,  # [B, Q, H, D]
    norm,  # [B, H, Q, 2]
    scale: tl.float64,
    Q,
    H,
    splits,
    WIDE: tl.constexpr,  # values in the type of the sums
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,  # at a time
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = tl.cdiv(Q, ROWS)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    h = (program // tiles % H).to(tl.int64)
    b = (program // tiles // H).to(tl.int64)
    d = tl.arange(0, CHANNELS)
    exact: tl.constexpr = norm.dtype.element_ty
    _, outer = factors(scale, exact, WIDE)
    top = tl.full((ROWS,), LOWEST, exact)
    total, acc = tl.zeros((ROWS,), exact), tl.zeros((ROWS, CHANNELS), exact)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        chunk = b * splits + split
        real = (split < splits)[:, None] & (row < Q)[None, :]
        stat = stats + ((chunk * H + h)[:, None] * Q + row[None, :]) * 2
        tops = tl.load(stat, mask=real, other=LOWEST)
        totals = tl.load(stat + 1, mask=real, other=0.0)
        place = (((chunk * Q)[:, None] + row[None, :]) * H + h)[:, :, None] * D + d[None, None, :]
        given = (real & (totals != 0))[:, :, None] & (d < D)[None, None, :]
        part = tl.load(parts + place, mask=given, other=0.0)
        most = tl.maximum(top, tl.max(tops, 0))
        weight = tl.exp2((tops - most[None, :]) * outer)
        old = tl.exp2((top - most) * outer)
        total = total * old + tl.sum(totals * weight, 0)
        acc = acc * old[:, None] + tl.sum(part * weight[:, :, None], 0)
        top = most
    factor = reciprocal(total)
    store(out + b * Q * H * D + h * D, row, H * D, row < Q, acc * factor[:, None], D, CHANNELS)
    norm += (b * H + h) * Q * 2
    tl.store(norm + row * 2, top, mask=row < Q)
    tl.store(norm + row * 2 + 1, factor, mask=row < Q)


@triton.jit(do_not_specialize=["n", "splits"])
def add(
    parts,  # [B, splits, n]
    out,  # [B, n]
    scale: tl.float64,
    n,
    splits,
    PARTS: tl.constexpr,  # at a time
    LINE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lines = tl.cdiv(n, LINE)
    b = program // lines
    i = program % lines * LINE + tl.arange(0, LINE)
    exact: tl.constexpr = parts.dtype.element_ty
    total = tl.zeros((LINE,), exact)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        place = (b * splits + split)[:, None] * n + i[None, :]
        mask = (split < splits)[:, None] & (i < n)[None, :]
        total += tl.sum(tl.load(parts + place, mask=mask, other=0.0), 0)
    tl.store(out + b * n + i, total * tl.full((), scale, exact), mask=i < n)
