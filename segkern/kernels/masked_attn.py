"""The launcher of masked_attn, whose programs take a chunk of the keys of a head.

Letters: B image, Q query, S key, H head, D channel a head, W = ceil(S / 32) words. A chunk is up
to 32 tiles of keys: the work of one program for each head.

Of a chunk, each program puts the queries with an open key in it first (a query without any is open
everywhere), the same for all heads; a slot is a place in this order (`slots_of`, attn_tiles.py).
`forward` (attn_forward.py) reads the tiles that its slots want, one after the other, and joins
each to one or two tiles of slots, whose running maximum, sum and result stay in registers; the
words of the mask come with the keys, some tiles ahead. Slots without an open key in the chunk are
left out. Where a head has several chunks, `join` (attn_join.py) joins their results. `backward`
(attn_backward.py) reads keys and values once as well: it forms the weights again, writes the
gradients of its keys, and keeps its part of those of the queries, which `add` (attn_join.py) adds
up. No atomics, no synchronisation with the host, the same bits each run.

`norm` is (reference point of a row's products q . k, 1 / sum); of the products times log2(e) scale
in 16 bits, where that is one instruction less. A closed key weighs exactly 0, which is multiplied
all the same: what is not finite in its value shows.
"""

import torch
import triton
from torch import Tensor

from ._launch import FUSED, KINDS, on
from .attn_forward import forward
from .attn_join import join
from .attn_plan import prepare

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
        128: (64, 1, 64, 4, 2, 2),
        256: (64, 1, 64, 8, 2, 1),
    },
    ("227 KB, 10.x", 2): {
        32: (64, 2, 64, 4, 3, 2),
        64: (64, 1, 64, 4, 3, 2),
        128: (64, 2, 64, 8, 3, 1),
        256: (64, 1, 64, 8, 2, 1),
    },
}
FLOAT32 = {
    32: (32, 1, 64, 4, 2, 2),
    64: (32, 1, 32, 4, 2, 3),
    128: (16, 1, 32, 8, 2, 2),
    256: (16, 1, 32, 16, 1, 1),
}
FLOAT64 = {32: (16, 1, 32, 4, 1, 3), 128: (16, 1, 32, 8, 1, 1)}
FORWARD |= {(kind, 4): FLOAT32 for kind in KINDS} | {(kind, 8): FLOAT64 for kind in KINDS}


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
        forward[(B * splits * H * groups,)](
            *tensors, parts, stats, abs(scale), Q, S, H, *sizes, **constants
        )
        # no program where there is one part: compiled now, so that no later size compiles
        join[(B * H * triton.cdiv(Q, 4) * (splits > 1),)](
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
