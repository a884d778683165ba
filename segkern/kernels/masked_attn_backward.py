"""The launcher of masked_attn's gradients; letters and chunks as in masked_attn.py."""

import torch
import triton
from torch import Tensor

from ._launch import FUSED, KINDS, on
from .attn_backward import backward
from .attn_join import add
from .attn_plan import prepare

# as masked_attn.FORWARD; three stages where they spill nothing, for any number of queries
BACKWARD = {
    ("99 KB", 2): {
        32: (64, 1, 32, 8, 3, 1),
        64: (32, 1, 32, 8, 3, 1),
        128: (32, 1, 32, 8, 3, 1),
        256: (16, 1, 32, 8, 1, 1),
    },
    ("163 KB", 2): {
        32: (64, 1, 64, 8, 3, 1),
        64: (32, 1, 32, 4, 3, 2),
        128: (32, 1, 32, 8, 3, 1),
        256: (16, 1, 32, 8, 1, 1),
    },
    ("227 KB", 2): {
        32: (64, 2, 64, 4, 3, 2),
        64: (64, 1, 64, 8, 3, 1),
        128: (32, 1, 32, 8, 3, 1),
        256: (16, 1, 32, 8, 1, 1),
    },
    ("227 KB, 10.x", 2): {
        32: (64, 2, 64, 8, 2, 1),
        64: (64, 1, 64, 8, 2, 1),
        128: (32, 1, 32, 8, 3, 1),
        256: (16, 1, 32, 8, 1, 1),
    },
}
FLOAT32 = {64: (32, 1, 32, 8, 2, 2), 128: (16, 1, 32, 8, 2, 1)}
FLOAT64 = {32: (16, 1, 32, 4, 1, 2), 128: (16, 1, 32, 8, 1, 1)}
# float32, more than 128 channels. 16 rows fit into 99 KB only where they spill, and Triton before
# 3.9 multiplies by no fewer.
FEWER = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9)
WIDE = dict.fromkeys(KINDS, (16, 1, 32, 16, 2, 1))
WIDE["99 KB"] = (8, 1, 32, 8, 2, 1) if FEWER else (16, 1, 32, 16, 1, 1)
BACKWARD |= {(kind, 4): FLOAT32 | {256: WIDE[kind]} for kind in KINDS}
BACKWARD |= {(kind, 8): FLOAT64 for kind in KINDS}


def masked_attn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    open: Tensor,
    out: Tensor,
    norm: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::masked_attn_backward`."""
    (B, Q, H, D), S = q.shape, k.shape[1]
    grads = [torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, k)]
    if norm.numel() == 0:
        return tuple(t.zero_() for t in grads)
    with on(q):
        tensors, (groups, *cut), constants = prepare(BACKWARD, q, k, v, bits, open, scale)
        splits = cut[0]
        parts = torch.empty((B, splits, Q, H * D), dtype=norm.dtype, device=q.device)
        rests = [torch.empty_like(t) for t in grads[1:]] if groups > 1 else grads[1:]
        upper = grad.contiguous(), out.contiguous(), norm.contiguous()
        for group in range(groups):
            backward[(B * splits * H,)](
                *(*tensors, *upper, parts, tuple(grads[1:]), tuple(rests)),
                *(abs(scale), Q, S, H, group, *cut),
                **constants,
                MANY=groups > 1,
            )
        n = Q * H * D
        add[(B * triton.cdiv(n, 128),)](
            parts, grads[0], scale, n, splits, PARTS=16, LINE=128, **FUSED
        )
    return tuple(grads)
