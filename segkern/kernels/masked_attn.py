"""masked_attn in Triton: a chunk of the keys of a head, and the queries that it concerns.

Letters: B image, Q query, S key, H head, D channel a head, W = ceil(S / 32) words. A chunk is up
to 32 tiles of keys: the work of one program for each head.

`_plan` puts, for each chunk and for all heads, the queries with an open key in it first (a query
without any is open everywhere), and says in a word which tiles those keys are in. A slot is a
place in this order. `_forward` reads the tiles of a chunk once and gives each to tiles of slots in
turn, whose running maximum, sum and result stay in registers: slots without an open key in it skip
it, and a tile that no slot wants is not loaded. Where a head has several chunks, `_join` joins
their results. `_backward` reads keys and values once as well: it forms the weights again, writes
the gradients of its keys, and keeps its part of those of the queries, which `_add` adds up. No
atomics, no synchronisation with the host, the same bits each run.

`norm` is (reference point of a row's products q . k, 1 / sum); of the products times log2(e) scale
in 16 bits, where that is one instruction less. A closed key weighs exactly 0, which is multiplied
all the same: what is not finite in its value shows.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, KINDS, device, on
from .sigmoid import reciprocal

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-3.0e38)  # a maximum of nothing; finite, so that it minus itself is 0

# (kind of device, bytes of a value), then channels up to: slots of a tile, tiles of slots, keys of
# a tile, warps, stages, programs a multiprocessor holds. Chosen by arithmetic, not yet measured:
# the largest tiles that spill nothing; with 64 slots to 4 warps, 16-bit products are warp group
# instructions (9.0) and all statistics of a row stay in its warp. Products in float32 and float64
# are sums on the ordinary units, which bound them: small tiles of slots leave out most.
AMPERE = {
    32: (64, 2, 64, 4, 3, 2),
    64: (64, 1, 32, 4, 3, 2),
    128: (64, 1, 32, 4, 3, 2),
    256: (64, 1, 32, 8, 2, 1),
}
FORWARD = {
    ("99 KB", 2): AMPERE,
    ("163 KB", 2): AMPERE,
    ("227 KB", 2): {
        32: (64, 2, 64, 4, 3, 3),
        64: (64, 2, 64, 4, 3, 2),
        128: (64, 2, 64, 8, 3, 1),
        256: (64, 1, 64, 8, 2, 1),
    },
    ("227 KB, 10.x", 2): {
        32: (64, 2, 64, 4, 3, 2),
        64: (64, 2, 64, 4, 3, 2),
        128: (64, 2, 64, 8, 3, 1),
        256: (64, 1, 64, 8, 2, 1),
    },
}
FLOAT32 = {32: (32, 1, 64, 4, 2, 2), 64: (32, 1, 32, 4, 2, 4), 128: (16, 1, 32, 8, 2, 2)}
FLOAT64 = {32: (16, 1, 32, 4, 1, 3), 128: (16, 1, 32, 8, 1, 1)}
FORWARD |= {(kind, 4): FLOAT32 for kind in KINDS} | {(kind, 8): FLOAT64 for kind in KINDS}
FORWARD["99 KB", 4] = FLOAT32 | {256: (16, 1, 32, 8, 1, 1)}  # spills, but starts


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


@triton.jit(do_not_specialize=["Q", "S", "splits", "tiles"])
def _plan(
    bits,  # [B, Q, W] int32, contiguous
    open,  # [B, Q] int32, contiguous
    plan,  # [B, splits, 2 Q + 1] int32: queries of the slots; their tiles, a bit each; used slots
    Q,
    S,
    splits,
    tiles,  # of a chunk
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, split = program // splits, program % splits
    plan += program * (2 * Q + 1)
    words: tl.constexpr = KEYS // 32
    w = tl.arange(0, 32 * words)
    word = split * tiles * words + w
    here = (w < tiles * words) & (word < tl.cdiv(S, 32))
    used = 0
    for start in range(0, Q, ROWS):
        row = start + tl.arange(0, ROWS)
        line, real = b * Q + row, row < Q
        place = line[:, None] * tl.cdiv(S, 32) + word[None, :]
        x = tl.load(bits + place, mask=real[:, None] & here[None, :], other=0)
        some = tl.max(tl.reshape((x != 0).to(tl.int32), (ROWS, 32, words)), 2)
        hit = tl.sum(some << tl.arange(0, 32)[None, :], 1)
        hit = tl.where(tl.load(open + line, mask=real, other=1) == 0, -1, hit)
        first = ((hit != 0) & real).to(tl.int32)
        rank = used + tl.cumsum(first, 0)
        slot = tl.where(first != 0, rank - 1, Q - 1 - (row - rank))  # the others from the end
        tl.store(plan + slot, row, mask=real)
        tl.store(plan + Q + slot, hit, mask=real)
        used += tl.sum(first, 0)
    tl.store(plan + 2 * Q, used)


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
def base(x, b, h, image, head, UNIT: tl.constexpr):
    return x + b * (image // UNIT * UNIT) + h * (head // UNIT * UNIT)


@triton.jit(do_not_specialize=["Q", "S", "H", "groups", "splits", "tiles"])
def _forward(
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
    q_image: tl.int64,
    q_row: tl.int64,
    q_head: tl.int64,
    k_image: tl.int64,
    k_row: tl.int64,
    k_head: tl.int64,
    v_image: tl.int64,
    v_row: tl.int64,
    v_head: tl.int64,
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
    q = base(q, b, h, q_image, q_head, UNIT)
    k = base(k, b, h, k_image, k_head, UNIT)
    v = base(v, b, h, v_image, v_head, UNIT)
    bits += b * Q * tl.cdiv(S, 32)
    slots, sums = (), ()
    union = 0
    for r in tl.static_range(TILES):
        row, n, wanted = slots_of(
            plan + chunk * (2 * Q + 1), open + b * Q, (group * TILES + r) * ROWS, Q, ROWS
        )
        query = load(q, row, q_row // UNIT * UNIT, row < Q, D, CHANNELS)
        slots += ((row, n, wanted, query),)
        top = tl.full((ROWS,), LOWEST, exact)
        total, acc = tl.zeros((ROWS,), exact), tl.zeros((ROWS, CHANNELS), exact)
        sums += ((top, total, acc),)
        union |= wanted
    tiles = tl.where(union == 0, 0, tl.minimum(tiles, tl.cdiv(S, KEYS) - first))
    for t in tl.range(0, tiles, num_stages=STAGES):
        key = (first + t).to(tl.int64) * KEYS + tl.arange(0, KEYS)
        real = key < tl.where((union >> t & 1) != 0, S, 0)
        keys = load(k, key, k_row // UNIT * UNIT, real, D, CHANNELS)
        values = load(v, key, v_row // UNIT * UNIT, real, D, CHANNELS)
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
        given = (row < Q) & (tl.where(splits == 1, 1.0, total) != 0)  # _join omits the others
        store(out, row, H * D, given, acc * factor[:, None], D, CHANNELS)
        tl.store(norm + row * 2, top, mask=row < Q)
        tl.store(norm + row * 2 + 1, tl.where(splits == 1, factor, total), mask=row < Q)


@triton.jit(do_not_specialize=["Q", "H", "splits"])
def _join(
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


@functools.lru_cache(maxsize=1024)
def _tiles(total: int, programs: int, fill: int) -> int:
    """Tiles a chunk, where a head has `total` and a chunk takes so many programs.

    The time of a program is its tiles, and 6 more to start; that of a second launch is 8.
    """

    def time(tiles):
        chunks = triton.cdiv(total, tiles)
        return triton.cdiv(programs * chunks, fill) * (tiles + 6) + 8 * (chunks > 1)

    return min(range(1, min(32, total) + 1), key=time)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def prepare(table: dict, q: Tensor, k: Tensor, v: Tensor, bits: Tensor, open: Tensor, scale):
    """What `_forward` and `_backward` share: tensors, sizes from `groups` on, constants."""
    (B, Q, H, D), S = q.shape, k.shape[1]
    (kind, multiprocessors), channels = device(q), max(16, triton.next_power_of_2(D))
    rows = table[kind, q.element_size()]
    most = min((c for c in rows if c >= channels), default=max(rows))
    ROWS, TILES, KEYS, warps, stages, held = rows[most]
    q, k, v = _dense(-q if scale < 0 else q), _dense(k), _dense(v)
    bits, open = bits.contiguous(), open.contiguous()
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    total = triton.cdiv(S, KEYS)
    tiles = _tiles(total, B * H, held * multiprocessors)
    splits = triton.cdiv(total, tiles)
    plan = torch.empty((B, splits, 2 * Q + 1), dtype=torch.int32, device=q.device)
    _plan[(B * splits,)](
        *(bits, open, plan, Q, S, splits, tiles), KEYS=KEYS, ROWS=128, num_warps=8, **FUSED
    )
    constants = {
        "D": D,
        "CHANNELS": channels,
        "UNIT": math.gcd(16 // q.element_size(), D, *strides),
        "ROWS": ROWS,
        "TILES": TILES,
        "KEYS": KEYS,
        "STAGES": stages,
        "num_warps": warps,
        **FUSED,
    }
    sizes = triton.cdiv(Q, ROWS * TILES), splits, tiles, *strides
    return (q, k, v, bits, open, plan), sizes, constants


def masked_attn(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, open: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `segkern::masked_attn`; q, k and v dense in the last dimension are read in place."""
    (B, Q, H, D), S = q.shape, k.shape[1]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty((B, Q, H * D), dtype=exact, device=q.device)
    norm = torch.empty((B, H, Q, 2), dtype=exact, device=q.device)
    if norm.numel() == 0:
        return out, norm
    with on(q):
        tensors, sizes, constants = prepare(FORWARD, q, k, v, bits, open, scale)
        groups, splits = sizes[:2]
        parts, stats = out, norm
        if splits > 1:
            parts = torch.empty((B, splits, Q, H * D), dtype=exact, device=q.device)
            stats = torch.empty((B, splits, H, Q, 2), dtype=exact, device=q.device)
        _forward[(B * splits * H * groups,)](
            *tensors, parts, stats, abs(scale), Q, S, H, *sizes, **constants
        )
        # no program where there is one part: compiled now, so that no later size compiles
        _join[(B * H * triton.cdiv(Q, 4) * (splits > 1),)](
            parts,
            stats,
            out,
            norm,
            abs(scale),
            Q,
            H,
            splits,
            WIDE=q.dtype == exact,
            D=D,
            CHANNELS=constants["CHANNELS"],
            PARTS=16,
            ROWS=4,
            **FUSED,
        )
    return out, norm
