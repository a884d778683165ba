"""The gradients of norm_relu in Triton: those of the values in one pass, with sums for the norms.

Letters and tiles as in norm_relu.py. With g the gradient where the result is above 0, x gets
g weight / sqrt(variance + eps), a bias the sum of g and a weight that of
g (x - mean) / sqrt(variance + eps).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on
from .group_norm_forward import load, place_of
from .norm_relu import OPTIONS, cut, moments_of, rows_of


@triton.jit(do_not_specialize=["N", "chunks", "tiles"])
def _norm_relu_backward(
    grad,  # [N, C]
    result,  # [N, C]
    x,  # [N, C], or None: the norm does not train
    mean,  # [C], and the two after it
    variance,
    weight,
    other,  # likewise
    other_mean,  # [C] or None, and the two after it
    other_variance,
    other_weight,
    of_x,  # [N, C]
    of_other,  # [N, C] or None
    parts,  # [chunks, 3, C]: of g, g (x - mean) / deviation and the same of `other`; or None
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
    _, chunk, first, stop, c = place_of(chunks, tiles, N, C, BLOCK_N, BLOCK_C)
    middle, narrow = moments_of(mean, variance, eps, c, C, exact)
    scale = narrow * tl.load(weight + c, c < C, 0.0).to(exact)
    if other_mean is not None:
        other_middle, other_narrow = moments_of(other_mean, other_variance, other_eps, c, C, exact)
        other_scale = other_narrow * tl.load(other_weight + c, c < C, 0.0).to(exact)
    if parts is not None:
        plain = tl.zeros((BLOCK_N, BLOCK_C), exact)
        weighted = tl.zeros((BLOCK_N, BLOCK_C), exact)
        other_weighted = tl.zeros((BLOCK_N, BLOCK_C), exact)
    for tile in tl.range(first, stop):
        n = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        g = load(grad, n, n < N, c, C, exact)
        g = tl.where(load(result, n, n < N, c, C, exact) <= 0, 0.0, g)  # that of NaN flows
        place = n[:, None] * C + c[None, :]
        mask = (n < N)[:, None] & (c < C)[None, :]
        tl.store(of_x + place, g * scale[None, :], mask=mask)
        if of_other is not None:
            more = g
            if other_mean is not None:
                more = g * other_scale[None, :]
            tl.store(of_other + place, more, mask=mask)
        if parts is not None:
            plain += g
            if x is not None:
                weighted += g * (load(x, n, n < N, c, C, exact) - middle[None, :])
            if other is not None:
                value = load(other, n, n < N, c, C, exact)
                other_weighted += g * (value - other_middle[None, :])
    if parts is not None:
        to = parts + tl.cast(chunk, tl.int64) * 3 * C + c
        tl.store(to, tl.sum(plain, 0), mask=c < C)
        if x is not None:
            tl.store(to + C, tl.sum(weighted, 0) * narrow, mask=c < C)
        if other is not None:
            tl.store(to + 2 * C, tl.sum(other_weighted, 0) * other_narrow, mask=c < C)


def norm_relu_backward(
    grad: Tensor,
    out: Tensor,
    summed: bool,
    x: Tensor | None,
    norm: list[Tensor],
    eps: float,
    other: Tensor | None,
    other_norm: list[Tensor],
    other_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `segkern::norm_relu_backward`."""
    B, C, h, w = out.shape
    exact = torch.float64 if out.dtype == torch.float64 else torch.float32
    of_x, of_other = (
        torch.empty((B, h, w, C) if given else (0,), dtype=out.dtype, device=out.device)
        for given in (True, summed)
    )
    given = x is not None, other is not None
    sums = [torch.empty((2, C) if g else (0,), dtype=exact, device=out.device) for g in given]
    if out.numel() == 0:
        sums = [of_norm.zero_() for of_norm in sums]
    else:
        grid, sizes, tile = cut(out)
        parts = None
        if any(given):
            parts = torch.empty((sizes[1], 3, C), dtype=exact, device=out.device)
        with on(out):
            _norm_relu_backward[grid](
                *(rows_of(grad), rows_of(out)),
                *(rows_of(x), *(t.contiguous() for t in norm[:3])),
                *(rows_of(other), *([t.contiguous() for t in other_norm[:3]] or [None] * 3)),
                *(of_x, of_other if summed else None, parts),
                *(eps, other_eps, *sizes, *tile),
                **OPTIONS | ({"maxnreg": 255} if any(given) else {}),  # three sums of each value
            )
        for i, of_norm in enumerate(sums):
            if given[i]:
                torch.stack((parts[:, 1 + i].sum(0), parts[:, 0].sum(0)), out=of_norm)
    of_x, of_other = (t.permute(0, 3, 1, 2) if t.ndim == 4 else t for t in (of_x, of_other))
    return of_x, of_other, *sums
