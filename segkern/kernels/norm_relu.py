"""norm_relu in Triton: a norm of known moments, a sum and a ReLU, in registers.

Letters: N pixels of all images, C channels. A program takes tiles of pixels and up to 256
channels, as those of group_norm do; what it reads of the channels is the same for all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, device, on
from .group_norm_forward import load, place_of

# Chosen by arithmetic, not yet measured, for all architectures: as group_norm's.
VALUES = 4096  # of a tile; half as many in float64
CHANNELS = 256  # of a program
PROGRAMS = 4  # a multiprocessor at least, if there are so many tiles
# what is known of eight channels and two norms takes 48 registers
OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": 128, **FUSED}


@triton.jit
def moments_of(mean, variance, eps, c, C: tl.constexpr, exact: tl.constexpr):
    """Of the channels: mean and inverse deviation."""
    middle = tl.load(mean + c, c < C, 0.0).to(exact)
    spread = tl.load(variance + c, c < C, 1.0).to(exact) + tl.full((), eps, exact)
    return middle, 1 / tl.sqrt(spread)


@triton.jit
def _normed(value, mean, variance, weight, bias, eps, c, C: tl.constexpr, exact: tl.constexpr):
    middle, narrow = moments_of(mean, variance, eps, c, C, exact)
    scale = tl.load(weight + c, c < C, 0.0).to(exact) * narrow
    shift = tl.load(bias + c, c < C, 0.0).to(exact)
    return (value - middle[None, :]) * scale[None, :] + shift[None, :]


@triton.jit(do_not_specialize=["N", "chunks", "tiles"])
def _norm_relu(
    x,  # [N, C]
    mean,  # [C], and the three after it
    variance,
    weight,
    bias,
    other,  # [N, C] or None
    other_mean,  # [C] or None, and the three after it
    other_variance,
    other_weight,
    other_bias,
    out,  # [N, C]
    eps: tl.float64,
    other_eps: tl.float64,
    N,
    chunks,
    tiles,
    C: tl.constexpr,
    exact: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, _, first, stop, c = place_of(chunks, tiles, N, C, BLOCK_N, BLOCK_C)
    for tile in tl.range(first, stop):
        n = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        value = load(x, n, n < N, c, C, exact)
        value = _normed(value, mean, variance, weight, bias, eps, c, C, exact)
        if other is not None:
            more = load(other, n, n < N, c, C, exact)
            if other_mean is not None:
                norm = other_mean, other_variance, other_weight, other_bias
                more = _normed(more, norm[0], norm[1], norm[2], norm[3], other_eps, c, C, exact)
            value += more
        value = tl.where(value < 0, 0.0, value)  # NaN stays
        to = out + n[:, None] * C + c[None, :]
        tl.store(to, value, mask=(n < N)[:, None] & (c < C)[None, :])


def rows_of(x: Tensor | None) -> Tensor | None:
    """[B, C, h, w] as [B, h, w, C], copied unless it lies so."""
    return x if x is None else x.permute(0, 2, 3, 1).contiguous()


def cut(x: Tensor):
    """Grid, sizes from N on, and constants of a launch over a map that is not empty."""
    C, N = x.shape[1], x[:, 0].numel()
    BLOCK_C = min(CHANNELS, triton.next_power_of_2(C))
    BLOCK_N = VALUES * 4 // max(x.element_size(), 4) // BLOCK_C
    total, blocks = triton.cdiv(N, BLOCK_N), triton.cdiv(C, BLOCK_C)
    tiles = triton.cdiv(total * blocks, PROGRAMS * device(x).multiprocessors)
    chunks = triton.cdiv(total, tiles)
    exact = tl.float64 if x.dtype == torch.float64 else tl.float32
    return (chunks * blocks,), (N, chunks, tiles), (C, exact, BLOCK_N, BLOCK_C)


def norm_relu(
    x: Tensor,
    norm: list[Tensor],
    eps: float,
    other: Tensor | None,
    other_norm: list[Tensor],
    other_eps: float,
) -> Tensor:
    """As `segkern::norm_relu`."""
    B, C, h, w = x.shape
    out = torch.empty((B, h, w, C), dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        grid, sizes, tile = cut(x)
        with on(x):
            _norm_relu[grid](
                *(rows_of(x), *(t.contiguous() for t in norm)),
                *(rows_of(other), *([t.contiguous() for t in other_norm] or [None] * 4)),
                *(out, eps, other_eps, *sizes, *tile),
                **OPTIONS,
            )
    return out.permute(0, 3, 1, 2)
