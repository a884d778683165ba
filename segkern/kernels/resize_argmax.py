"""resize_argmax: a program takes a line of output pixels and all classes of it.

Letters: B image, K class, h w size of the maps, H W size of the result.

The rows and columns of the maps that a line reads are those between the first and the last weight
that is not 0. For each of the columns the rows are blended, for a block of classes at a time, and
added to the pixels that read it: sums are in the order of the columns, and in float32 (float64),
as products of matrix units would round the logits before they are compared.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, on

# Chosen by arithmetic, not yet measured: 16 sums a thread
PIXELS, CLASSES, CHUNK = 64, 32, 32
OPTIONS = {"num_warps": 4, "maxnreg": 128, **FUSED}


@triton.jit
def _span(weights, first, count, n, PIXELS: tl.constexpr, CHUNK: tl.constexpr):
    """Of weights [count, n] from line `first` on, the first place in n that is not 0, and the one
    behind the last such."""
    x = first + tl.arange(0, PIXELS)
    low, high = n, n * 0
    for start in range(0, n, CHUNK):
        j = start + tl.arange(0, CHUNK)
        inside = (x < count)[:, None] & (j < n)[None, :]
        some = tl.load(weights + x[:, None].to(tl.int64) * n + j[None, :], inside, 0.0) != 0.0
        low = tl.minimum(low, tl.min(tl.where(some, j[None, :], n)))
        high = tl.maximum(high, tl.max(tl.where(some, j[None, :] + 1, 0)))
    return low, high


@triton.jit(do_not_specialize=["K", "h", "w", "H", "W"])
def _resize_argmax(
    maps,  # [B, K, h, w]
    rows,  # [H, h]
    columns,  # [W, w]
    out,  # [B, H, W]
    K,
    h,
    w,
    H,
    W,
    PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    exact: tl.constexpr = rows.dtype.element_ty
    lines = tl.cdiv(W, PIXELS)
    program = tl.program_id(0).to(tl.int64)
    first = (program % lines * PIXELS).to(tl.int32)
    y, image = program // lines % H, program // lines // H
    top, bottom = _span(rows + y * h, 0, 1, h, 1, CHUNK)
    left, right = _span(columns, first, W, w, PIXELS, CHUNK)
    x = first + tl.arange(0, PIXELS)
    best = tl.full((PIXELS,), float("-inf"), exact)
    label = tl.zeros((PIXELS,), tl.int32)
    for start in range(0, K, CLASSES):
        k = start + tl.arange(0, CLASSES)
        logits = tl.zeros((CLASSES, PIXELS), exact)
        from_map = maps + ((image * K + k) * h) * w
        for j in range(left, right):
            blended = tl.zeros((CLASSES,), exact)
            for i in range(top, bottom):
                value = tl.load(from_map + i * w + j, k < K, 0.0).to(exact)
                blended += tl.load(rows + y * h + i) * value
            share = tl.load(columns + x.to(tl.int64) * w + j, x < W, 0.0)
            logits += blended[:, None] * share[None, :]
        wins = (k < K)[:, None] & (logits == logits)  # NaN never does
        logits = tl.where(wins, logits, float("-inf"))
        highest = tl.max(logits, 0)
        label = tl.where(highest > best, start + tl.argmax(logits, 0).to(tl.int32), label)
        best = tl.maximum(best, highest)
    tl.store(out + (image * H + y) * W + x, label, x < W)


def resize_argmax(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """As `segkern::resize_argmax`."""
    (B, K, h, w), H, W = maps.shape, rows.shape[0], columns.shape[0]
    out = torch.empty((B, H, W), dtype=torch.int32, device=maps.device)
    if out.numel() == 0:
        return out
    with on(maps):
        _resize_argmax[(B * H * triton.cdiv(W, PIXELS),)](
            *(maps.contiguous(), rows.contiguous(), columns.contiguous(), out),
            *(K, h, w, H, W, PIXELS, CLASSES, CHUNK),
            **OPTIONS,
        )
    return out
