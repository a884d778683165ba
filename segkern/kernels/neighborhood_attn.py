"""The launchers of neighborhood_attn, whose programs take one head of a run of tiles.

Letters: B image, h w map, H head, D channels a head, K kernel, t dilation, N tiles of all images.

A tile is 8 x 8 places (or fewer) of one group of rows and columns: pixels that lie t apart, an
undilated map of their own. Its queries multiply with the keys of all of them at once, in blocks;
pairs that are too far apart are masked. In backward a kernel takes tiles of queries, another one
tiles of keys, so that each sum is formed by one program: the same bits each run.
"""

import torch
import triton
from torch import Tensor

from ._launch import FUSED, device, on
from .neighborhood_forward import forward
from .neighborhood_keys import of_keys
from .neighborhood_queries import of_queries
from .neighborhood_tiles import ACROSS

# Bytes of a value; then for heads of up to HEADS channels and for wider ones: places of a tile and
# of a block of what it meets, warps, programs a multiprocessor holds. Chosen by arithmetic, not
# yet measured: what spills nothing on any kind of GPU, and so the same for all.
HEADS = (32, 64)  # DiNAT's heads have the first
FORWARD = {
    2: ((64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    4: ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    8: ((16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
BACKWARD = {
    2: ((64, 32, 4, 2), (32, 32, 8, 1), (32, 16, 8, 1)),
    4: ((16, 16, 8, 1), (16, 16, 16, 1), (16, 16, 8, 1)),
    8: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


def _prepare(table: dict, q: Tensor, kernel: list[int], dilation: list[int]):
    """Grid, sizes from `h` to `run`, and constants of a launch."""
    B, h, w, H, D = q.shape
    BLOCK_I, BLOCK_J, warps, held = table[q.element_size()][sum(most < D for most in HEADS)]
    rows = triton.cdiv(triton.cdiv(h, dilation[0]), BLOCK_I // ACROSS.value)
    columns = triton.cdiv(triton.cdiv(w, dilation[1]), ACROSS.value)
    N = B * dilation[0] * dilation[1] * rows * columns
    run = triton.cdiv(N, max(1, min(N, held * device(q).multiprocessors // H)))
    constants = {
        "D": D,
        "CHANNELS": max(16, triton.next_power_of_2(D)),
        "BLOCK_I": BLOCK_I,
        "BLOCK_J": BLOCK_J,
        "num_warps": warps,
        "num_stages": 1,
        "maxnreg": min(255, 2048 // (warps * held) // 8 * 8),
        **FUSED,
    }
    grid = (triton.cdiv(N, run) * H,)
    return grid, (h, w, H, *kernel, *dilation, rows, columns, N, run), constants


def _pixels(t: Tensor) -> tuple[Tensor, int]:
    """t with a pixel's heads and their channels side by side, and heads from pixel to pixel: views
    of one projection to q, k and v stay what they are."""
    _, h, w, _, D = t.shape
    step = t.stride(2)
    if t.stride() != (h * w * step, w * step, step, D, 1) or step % D:
        t = t.contiguous()
    return t, t.stride(2) // D


def neighborhood_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    kernel: list[int],
    dilation: list[int],
    scale: float,
) -> Tensor:
    """As `segkern::neighborhood_attn`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    grid, sizes, constants = _prepare(FORWARD, q, kernel, dilation)
    tensors, steps = zip(*map(_pixels, (q, k, v)))
    with on(q):
        forward[grid](*tensors, bias.contiguous(), out, scale, *sizes, *steps, **constants)
    return out


def neighborhood_attn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    kernel: list[int],
    dilation: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `segkern::neighborhood_attn_backward`."""
    B, h, w, H, _ = q.shape
    grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in "qkv"]
    if q.numel() == 0:
        return *grads, torch.zeros_like(bias)
    grid, sizes, constants = _prepare(BACKWARD, q, kernel, dilation)
    tensors, steps = zip(*map(_pixels, (q, k, v)))
    tensors = (grad.contiguous(), *tensors, bias.contiguous())
    exact, places = {"dtype": bias.dtype, "device": q.device}, B * h * w * H
    shape = grid[0] // H, H, constants["BLOCK_I"], *bias.shape[1:]
    parts, rests = torch.zeros(shape, **exact), torch.empty((3, places), **exact)
    options = (scale, *sizes, *steps, places)
    with on(q):
        of_queries[grid](*tensors, grads[0], parts, rests, *options, **constants)
        of_keys[grid](*tensors, rests, *grads[1:], *options, **constants)
    return *grads, parts.sum((0, 2))
