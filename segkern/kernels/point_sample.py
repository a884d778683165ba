"""The launchers of point_sample and of its gradient, which is formed in one of two ways.

Letters: B image, C channel, h w map size, P point.

A program owns a tile of points and many channels: offsets and weights of a point are found once
for all of them. Where the channels are dense (channels-last memory) its threads lie along them
and load 16 bytes each, else along the points; maps are read in place either way.
The gradient's fast way adds to a float32 (float64) map with atomics. The deterministic one sorts
the points by the cell of the grid of pixel centres that they lie in: a pixel is a corner of four
cells and adds up their points, cell by cell in the points' order, and is written once. That
sorts P keys where a sort of all contributions has 4 P, and a program looks at its own points only.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, on
from .point_collect import collect, find_cells
from .point_gather import gather, gather_rows
from .point_scatter import scatter

# Chosen by arithmetic, not yet measured, for all architectures.
THREADS = 128  # of a program; a point or pixel each, where the threads lie along those
CHANNELS = 32  # that share a point's corners, which then cost less than a tenth of the reads
FILL = 1024  # programs at least, if need be of fewer channels: eight a multiprocessor
LINE = 128  # bytes of channels-last memory at a time
POINTS = 32  # that read a line each; a thread has eight loads of 16 bytes in flight
COLLECTED = 8  # channels that share a search of the deterministic gradient


def _share(B: int, C: int, tiles: int) -> tuple[int, int]:
    """Groups of channels, and the channels of one."""
    groups = min(C, max(triton.cdiv(C, CHANNELS), triton.cdiv(FILL, B * tiles)))
    channels = triton.cdiv(C, groups)
    return triton.cdiv(C, channels), channels


def point_sample(features: Tensor, points: Tensor) -> Tensor:
    """As `segkern::point_sample`."""
    (B, C, h, w), P = features.shape, points.shape[1]
    floating = features.is_floating_point()
    out = features.new_empty((B, C, P), dtype=features.dtype if floating else torch.float32)
    if out.numel() == 0:
        return out
    features = features.view(torch.uint8) if features.dtype == torch.bool else features
    strides, size = features.stride(), features.element_size()
    points = points.contiguous()
    with on(features):
        if strides[1] == 1 and C >= 16:
            block = min(LINE // size, 64, triton.next_power_of_2(C))
            unit = math.gcd(16 // size, C, strides[0], *strides[2:])
            tiles, groups = triton.cdiv(P, POINTS), triton.cdiv(C, block)
            gather_rows[(B * tiles * groups,)](
                features,
                points,
                out,
                *(C, P, h, w, tiles, groups),
                *(strides[0], *strides[2:]),
                unit,
                block,
                POINTS,
                num_warps=THREADS // 32,
                **FUSED,
            )
        else:
            tiles = triton.cdiv(P, THREADS)
            groups, channels = _share(B, C, tiles)
            gather[(B * tiles * groups,)](
                features,
                points,
                out,
                *(C, P, h, w, tiles, groups, channels),
                *strides,
                THREADS,
                num_warps=THREADS // 32,
                **FUSED,
            )
    return out


def point_sample_backward(
    grad: Tensor, points: Tensor, h: int, w: int, deterministic: bool
) -> Tensor:
    """As `segkern::point_sample_backward`."""
    B, C, P = grad.shape
    points = points.contiguous()
    if deterministic and P:
        return _sorted_backward(grad, points, h, w)
    exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = grad.new_zeros((B, C, h, w), dtype=exact)
    if out.numel() and P:
        tiles = triton.cdiv(P, THREADS)
        groups, channels = _share(B, C, tiles)
        with on(grad):
            scatter[(B * tiles * groups,)](
                grad,
                points,
                out,
                *(C, P, h, w, tiles, groups, channels),
                *grad.stride(),
                THREADS,
                num_warps=THREADS // 32,
                **FUSED,
            )
    return out.to(grad.dtype)


def _sorted_backward(grad: Tensor, points: Tensor, h: int, w: int) -> Tensor:
    (B, C, P), device = grad.shape, grad.device
    exact = tl.float64 if grad.dtype == torch.float64 else tl.float32
    out = grad.new_empty((B, C, h, w))
    if out.numel() == 0:
        return out
    cells = torch.empty((B, P), dtype=torch.int64, device=device)
    block = min(COLLECTED, triton.next_power_of_2(C))
    options = {"num_warps": THREADS // 32, **FUSED}
    with on(grad):
        tiles = triton.cdiv(P, THREADS)
        find_cells[(B * tiles,)](points, cells, P, h, w, tiles, exact, THREADS, **options)
        in_cells, order = cells.flatten().sort(stable=True)
        count = torch.arange(B * ((h + 1) * (w + 1) + 1), device=device)
        starts = torch.searchsorted(in_cells, count)
        tiles, groups = triton.cdiv(h * w, THREADS), triton.cdiv(C, block)
        collect[(B * tiles * groups,)](
            grad,
            points,
            order,
            starts,
            out,
            *(C, P, h, w, tiles, groups),
            *grad.stride(),
            block,
            THREADS,
            exact,
            **options,
        )
    return out
