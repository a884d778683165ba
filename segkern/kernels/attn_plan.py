"""How a call of masked_attn is cut into chunks of keys, and what both launchers hand over.

Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import functools
import math
from itertools import chain

import triton
from torch import Tensor

from ._launch import FUSED, device


@functools.lru_cache(maxsize=1024)
def _tiles(total: int, programs: int, fill: int) -> int:
    """Tiles a chunk, where a head has `total` and a chunk takes so many programs.

    The time of a program is its tiles, and 8 more to start; that of a second launch is 8.
    """

    def time(tiles):
        chunks = triton.cdiv(total, tiles)
        return triton.cdiv(programs * chunks, fill) * (tiles + 8) + 8 * (chunks > 1)

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
    constants = {
        "D": D,
        "CHANNELS": channels,
        "UNIT": math.gcd(16 // q.element_size(), D, *chain(*strides)),
        "ROWS": ROWS,
        "TILES": TILES,
        "KEYS": KEYS,
        "STAGES": stages,
        "num_warps": warps,
        "maxnreg": min(255, 65536 // (32 * warps * held) // 8 * 8),
        **FUSED,
    }
    sizes = triton.cdiv(Q, ROWS * TILES), splits, tiles, *strides
    return (q, k, v, bits, open), sizes, constants
