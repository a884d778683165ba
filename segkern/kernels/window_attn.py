"""The launchers of window_attn, whose programs take one head of a run of windows.

Letters: B image, h w map, H head, D channels a head, C = H D, W window's side, S = W W places of a
window, N windows of all images.

A program reads the tokens of one window after the other where they lie, adds the projection's bias
to them, and writes results to where the tokens lie: nothing is padded, rolled, cut or masked in
memory. Which tokens are no neighbours is known from their places. Where a window is one block of
queries and keys, up to 8 x 8, the bias of the head and its gradient stay in registers; else the
softmax is online over blocks of keys, and the gradient is added up in memory of the program's own.
Backward forms the weights anew and leaves sums over its run, which are added up in the order of
runs: the same bits each run.
"""

import torch
import triton
from torch import Tensor

from ._launch import FUSED, KINDS, device, on
from .window_backward import backward
from .window_forward import forward

# (kind of device, bytes of a value), then places of a window up to, or WIDE for heads of more than
# 32 channels: queries and keys of a block, warps, programs a multiprocessor holds. Chosen by
# arithmetic, not yet measured: the most programs that spill nothing. In 16 bits a warp takes 16
# queries: 8 warps form 64 rows twice, which they do only where 4 would spill.
SMALL, LARGE, WIDE = 8 * 8, 16 * 16, 0  # LARGE: ops.window_attn.LARGEST
HEAD = 32  # channels of Swin's heads
FORWARD = {
    ("99 KB", 2): {SMALL: (64, 64, 4, 3), LARGE: (64, 32, 4, 3)},
    ("163 KB", 2): {SMALL: (64, 64, 4, 3), LARGE: (64, 32, 4, 3)},
    ("227 KB", 2): {SMALL: (64, 64, 4, 2), LARGE: (64, 32, 4, 3)},
    ("227 KB, 10.x", 2): {SMALL: (64, 64, 4, 2), LARGE: (64, 32, 4, 3)},
}
BACKWARD = {
    ("99 KB", 2): {SMALL: (64, 32, 4, 2), LARGE: (64, 32, 4, 2)},
    ("163 KB", 2): {SMALL: (64, 64, 4, 2), LARGE: (64, 32, 4, 2)},
    ("227 KB", 2): {SMALL: (64, 64, 4, 2), LARGE: (64, 32, 4, 2)},
    ("227 KB, 10.x", 2): {SMALL: (64, 64, 8, 1), LARGE: (64, 32, 4, 2)},
}
FLOAT32 = {SMALL: (64, 64, 8, 1), LARGE: (32, 32, 8, 1)}
FLOAT64 = {SMALL: (32, 32, 8, 1), LARGE: (16, 16, 4, 1), WIDE: (16, 16, 8, 1)}
WIDE_HALF, WIDE_FLOAT32 = ((64, 32, 8, 1), (32, 16, 8, 1)), ((16, 32, 8, 1), (16, 16, 8, 1))
for table, half, single in zip((FORWARD, BACKWARD), WIDE_HALF, WIDE_FLOAT32, strict=True):
    for kind in KINDS:
        table[kind, 2][WIDE] = half
        table[kind, 4] = FLOAT32 | {WIDE: single}
        table[kind, 8] = FLOAT64
BACKWARD["99 KB", 8] = FLOAT64 | {SMALL: (32, 16, 8, 1)}


def _prepare(table: dict, qkv: Tensor, window: int):
    """Grid, sizes from `rows` on, constants of a launch, and the number of runs."""
    B, h, w, _, H, D = qkv.shape
    kind, multiprocessors = device(qkv)
    S, tuned = window * window, table[kind, qkv.element_size()]
    BLOCK_I, BLOCK_J, warps, held = tuned[WIDE if D > HEAD else SMALL if S <= SMALL else LARGE]
    block = max(16, triton.next_power_of_2(S))
    BLOCK_I, BLOCK_J = min(BLOCK_I, block), min(BLOCK_J, block)
    rows, columns = triton.cdiv(h, window), triton.cdiv(w, window)
    N = B * rows * columns
    run = triton.cdiv(N, max(1, min(N, held * multiprocessors // H)))
    runs = triton.cdiv(N, run)
    constants = {
        "W": window,
        "D": D,
        "CHANNELS": max(16, triton.next_power_of_2(D)),
        "BLOCK_I": BLOCK_I,
        "BLOCK_J": BLOCK_J,
        "num_warps": warps,
        "num_stages": 1,
        "maxnreg": min(255, 2048 // (warps * held) // 8 * 8),
        **FUSED,
    }
    return (runs * H,), (rows, columns, N, run), constants, runs


def window_attn(
    qkv: Tensor, qkv_bias: Tensor, bias: Tensor, window: int, shift: int, scale: float
) -> Tensor:
    """As `segkern::window_attn`."""
    B, h, w, _, H, D = qkv.shape
    out = torch.empty((B, h, w, H * D), dtype=qkv.dtype, device=qkv.device)
    if out.numel() == 0:
        return out
    grid, sizes, constants, _ = _prepare(FORWARD, qkv, window)
    with on(qkv):
        forward[grid](
            *(qkv.contiguous(), qkv_bias.contiguous(), bias.contiguous(), out),
            *(scale, h, w, H, shift, *sizes),
            **constants,
        )
    return out


def window_attn_backward(
    grad: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    bias: Tensor,
    window: int,
    shift: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::window_attn_backward`."""
    _, h, w, _, H, D = qkv.shape
    if qkv.numel() == 0:
        return torch.empty_like(qkv), torch.zeros_like(qkv_bias), torch.zeros_like(bias)
    grid, sizes, constants, runs = _prepare(BACKWARD, qkv, window)
    qkv, grad = qkv.contiguous(), grad.contiguous()
    grad_qkv = torch.empty_like(qkv)
    S, exact = window * window, {"dtype": bias.dtype, "device": qkv.device}
    several = [constants[block] < S for block in ("BLOCK_I", "BLOCK_J")]
    q_parts = torch.empty((runs, H, D), **exact)
    parts = (torch.zeros if any(several) else torch.empty)((runs, H, S, S), **exact)
    rests = torch.empty((runs * several[0], H, 2, S, D), **exact)
    with on(qkv):
        backward[grid](
            *(grad, qkv, qkv_bias.contiguous(), bias.contiguous()),
            *(grad_qkv, q_parts, parts, rests),
            *(scale, h, w, H, shift, *sizes),
            **constants,
        )
    # A value's bias moves every result by itself, as weights add up to 1; a key's moves all scores
    # of a query alike, and so no weight.
    grad_v = grad.sum((0, 1, 2), dtype=bias.dtype).view(H, D)
    grad_qkv_bias = torch.stack((q_parts.sum(0), torch.zeros_like(grad_v), grad_v))
    return grad_qkv, grad_qkv_bias, parts.sum(0)
