"""The launchers of group_norm and of its gradients.

Letters: B image, h w map, N = h w pixels, C channels, G groups of D channels, H W size of the
coarser map.

A program takes a chunk of the pixels of an image, a tile after another, and up to 256 channels of
them, which lie beside each other: a thread loads 16 bytes. The moments are Welford's in each
thread and joined by Chan's formula in the order of the chunks, so that nothing cancels however
far the values lie from 0. The gradient's sums go the same way, and each value of the coarser map
collects its gradient from the pixels that took of it: no atomics, the same bits each run.
A backward with a ReLU tells from x, which it reads in any case, what the ReLU let pass.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, device, on
from .group_norm_backward import apply_back, join_sums, of_up, sums
from .group_norm_forward import apply, join, moments

# Chosen by arithmetic, not yet measured, for all architectures: 16 values of a map and up to twice
# as many sums a thread, so that two to four programs of 8 warps fit on a multiprocessor.
VALUES = 4096  # of a tile; half as many in float64
CHANNELS = 256  # of a program
PROGRAMS = 4  # a multiprocessor at least, if there are so many tiles
LINE = 1024  # of what is joined at a time
OPTIONS = {"num_warps": 8, "num_stages": 1, **FUSED}


def _rows(map: Tensor) -> tuple[Tensor, int]:
    """A map [B, h, w, C] whose images are dense and a whole number of pixels apart, copied if it
    is not, and that number."""
    _, h, w, C = map.shape
    image, *inner = map.stride()
    if inner != [w * C, C, 1] or image % C:
        map, image = map.contiguous(), h * w * C
    return map, image // C


def _tile(x: Tensor) -> tuple[int, int]:
    """BLOCK_N and BLOCK_C."""
    channels = min(CHANNELS, triton.next_power_of_2(x.shape[3]))
    return VALUES * 4 // max(x.element_size(), 4) // channels, channels


def _chunks(x: Tensor) -> tuple[int, int, int]:
    """Programs for all chunks of a map, chunks of an image, and tiles of a chunk."""
    B, h, w, C = x.shape
    BLOCK_N, BLOCK_C = _tile(x)
    total, blocks = triton.cdiv(h * w, BLOCK_N), triton.cdiv(C, BLOCK_C)
    tiles = triton.cdiv(B * total * blocks, PROGRAMS * device(x).multiprocessors)
    tiles = min(tiles, total)
    chunks = triton.cdiv(total, tiles)
    return B * chunks * blocks, chunks, tiles


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    relu: bool,
    up: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::group_norm`."""
    (B, h, w, C), D = x.shape, x.shape[3] // groups
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, inverse = (torch.empty((B, groups), dtype=exact, device=x.device) for _ in range(2))
    if out.numel() == 0:
        return out, mean, inverse
    x, pixels = _rows(x)
    (programs, *chunks), tile = _chunks(x), _tile(x)
    sizes = h * w, *chunks
    H, W, up_pixels = 1, 1, 0
    if up is not None:
        H, W = up.shape[1:3]
        up, up_pixels = _rows(up)
    weight, bias = weight.contiguous(), bias.contiguous()
    with on(x):
        parts = torch.empty((B, chunks[0], 2, C), dtype=exact, device=x.device)
        moments[(programs,)](x, parts, *sizes, pixels, C, *tile, **OPTIONS)
        join[(B * groups,)](parts, mean, inverse, eps, *sizes, C, D, tile[0], LINE, **FUSED)
        apply[(programs,)](
            *(x, weight, bias, mean, inverse, up, out),
            *(H / h, W / w, *sizes, pixels, w, H, W, up_pixels),
            *(C, D, relu, *tile),
            **OPTIONS,
        )
    return out, mean, inverse


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    groups: int,
    relu: bool,
    up: list[int] | None,
    up_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `segkern::group_norm_backward`."""
    (B, h, w, C), D, exact = x.shape, x.shape[3] // groups, mean.dtype
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    others = [torch.empty((C,), dtype=t.dtype, device=x.device) for t in (weight, bias)]
    size = (0,) if up is None else (B, *up, C)
    coarse = torch.empty(size, dtype=up_dtype or x.dtype, device=x.device)
    if B == 0:
        return of_x, *(t.zero_() for t in others), coarse
    (x, pixels), (grad, grad_pixels) = _rows(x), _rows(grad)
    (programs, *chunks), tile = _chunks(x), _tile(x)
    sizes = h * w, *chunks
    weight, bias = weight.contiguous(), bias.contiguous()
    tensors = grad, x, weight, bias, mean, inverse
    constants = *sizes, pixels, grad_pixels, C, D, relu, *tile
    block = triton.next_power_of_2(D)
    with on(x):
        parts = torch.empty((B, chunks[0], 2, C), dtype=exact, device=x.device)
        means = torch.empty((B, 2, groups), dtype=exact, device=x.device)
        sums[(programs,)](*tensors, parts, *constants, **OPTIONS)
        join_sums[(groups,)](
            *(parts, weight, means, *others),
            *(B, h * w, chunks[0], C, D, block, max(1, LINE // block)),
            **FUSED,
        )
        apply_back[(programs,)](*tensors, means, of_x, *constants, **OPTIONS)
        if up is not None:
            ratios = up[0] / h, up[1] / w
            rows, columns = (math.ceil(2 / ratio) + 2 for ratio in ratios)
            across = triton.cdiv(up[1], tile[0]) * triton.cdiv(C, tile[1])
            of_up[(B * up[0] * across,)](
                *(grad, coarse, *ratios, h, w, *up, rows, columns, grad_pixels),
                *(C, tl.float64 if exact == torch.float64 else tl.float32, *tile),
                **OPTIONS,
                maxnreg=96,  # else it spills a word in float32
            )
    return of_x, *others, coarse
