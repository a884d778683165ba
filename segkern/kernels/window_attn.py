"""The launchers of window_attn, whose programs take one head of a run of windows.

Letters: B image, h w map, H head, D channels a head, C = H D, W window's side, S = W W places of a
window, N windows of all images.

A program keeps the bias of its head in registers, reads the tokens of one window after the other
where they lie, adds the projection's bias to them, and writes results to where the tokens lie:
nothing is padded, rolled, cut or masked in memory. Which tokens are no neighbours is known from
their places. All keys of a window are one block; queries come in blocks of BLOCK_I. Backward forms
the weights anew, keeps the gradient of the bias in registers (or, where a window has several
blocks of queries, in memory of the program's own) and leaves sums over its run, which are added up
in the order of runs: the same bits each run.
"""

import torch
import triton
from torch import Tensor

from ._launch import FUSED, device, on
from .window_backward import backward
from .window_forward import forward

# (bytes of a value, places of a block of keys): queries of a block, warps; forward, then backward.
# Chosen by arithmetic, not yet measured: the largest that spill nothing.
TABLE = {
    (2, 64): ((64, 4), (64, 8)),
    (2, 256): ((64, 8), (16, 8)),
    (4, 64): ((64, 8), (64, 8)),
    (4, 256): ((16, 8), (16, 8)),
    (8, 64): ((16, 8), (16, 8)),
    (8, 256): ((16, 8), (16, 8)),
}
RESIDENT = 4  # programs of a multiprocessor, so that a run is no longer than need be


def _sizes(qkv: Tensor, window: int, backwards: bool):
    """Grid, sizes, constants of a launch, and the number of runs."""
    B, h, w, _, H, D = qkv.shape
    rows, columns = triton.cdiv(h, window), triton.cdiv(w, window)
    N = B * rows * columns
    most = RESIDENT * device(qkv).multiprocessors
    run = triton.cdiv(N, max(1, min(N, most // H)))
    runs = triton.cdiv(N, run)
    block = max(16, triton.next_power_of_2(window * window))
    BLOCK_I, warps = TABLE[qkv.element_size(), 64 if block <= 64 else 256][backwards]
    constants = {
        "W": window,
        "D": D,
        "CHANNELS": max(16, triton.next_power_of_2(D)),
        "BLOCK_I": min(BLOCK_I, block),
        "BLOCK_S": block,
        "num_warps": warps,
        "num_stages": 1,
        "maxnreg": 255,
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
    grid, sizes, constants, _ = _sizes(qkv, window, False)
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
    grid, sizes, constants, runs = _sizes(qkv, window, True)
    qkv = qkv.contiguous()
    grad_qkv = torch.empty_like(qkv)
    exact = {"dtype": bias.dtype, "device": qkv.device}
    qkv_parts = torch.empty((runs, 3, H, D), **exact)
    several = constants["BLOCK_I"] < window * window
    make = torch.zeros if several else torch.empty
    parts = make((runs, *bias.shape), **exact)
    with on(qkv):
        backward[grid](
            *(grad.contiguous(), qkv, qkv_bias.contiguous(), bias.contiguous()),
            *(grad_qkv, qkv_parts, parts),
            *(scale, h, w, H, shift, *sizes),
            **constants,
        )
    return grad_qkv, qkv_parts.sum(0), parts.sum(0)
