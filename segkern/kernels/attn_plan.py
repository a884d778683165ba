"""The plan of a masked_attn call: which queries concern a chunk of keys, and what is launched.

Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import functools
import math
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, device


@triton.jit(do_not_specialize=["Q", "S", "splits", "tiles"])
def plan(
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
    """What `forward` and `backward` share: tensors, sizes from `groups` on, constants."""
    (B, Q, H, D), S = q.shape, k.shape[1]
    (kind, multiprocessors), channels = device(q), max(16, triton.next_power_of_2(D))
    rows = table[kind, q.element_size()]
    most = min((c for c in rows if c >= channels), default=max(rows))
    ROWS, TILES, KEYS, warps, stages, held = rows[most]
    q, k, v = _dense(-q if scale < 0 else q), _dense(k), _dense(v)
    bits, open = bits.contiguous(), open.contiguous()
    strides = [t.stride()[:3] for t in (q, k, v)]
    total = triton.cdiv(S, KEYS)
    tiles = _tiles(total, B * H, held * multiprocessors)
    splits = triton.cdiv(total, tiles)
    slots = torch.empty((B, splits, 2 * Q + 1), dtype=torch.int32, device=q.device)
    plan[(B * splits,)](
        *(bits, open, slots, Q, S, splits, tiles), KEYS=KEYS, ROWS=128, num_warps=8, **FUSED
    )
    constants = {
        "D": D,
        "CHANNELS": channels,
        "UNIT": math.gcd(16 // q.element_size(), D, *chain(*strides)),
        "ROWS": ROWS,
        "TILES": TILES,
        "KEYS": KEYS,
        "STAGES": stages,
        "num_warps": warps,
        **FUSED,
    }
    sizes = triton.cdiv(Q, ROWS * TILES), splits, tiles, *strides
    return (q, k, v, bits, open, slots), sizes, constants
