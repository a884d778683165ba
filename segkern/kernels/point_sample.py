"""point_sample in Triton, and the scatter of its gradient, two ways.

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

# Chosen by arithmetic, not yet measured, for all architectures.
THREADS = 128  # of a program; a point or pixel each, where the threads lie along those
CHANNELS = 32  # that share a point's corners, which then cost less than a tenth of the reads
FILL = 1024  # programs at least, if need be of fewer channels: eight a multiprocessor
LINE = 128  # bytes of channels-last memory at a time
POINTS = 32  # that read a line each; a thread has eight loads of 16 bytes in flight
COLLECTED = 8  # channels that share a search of the deterministic gradient


@triton.jit
def find_corners(point, mask, h, w, exact: tl.constexpr):
    """Where points lie on the grid of pixel centres.

    Args:
        point: pointers to x, which y follows.
        mask: points that are there; the others have no corner inside.
        exact: dtype of the computation.

    Returns:
        y and x (int64) of the corner of lower indices, -1 to h - 1 and w - 1, and the weights of
        the corners (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1): 0 for a corner outside.
    """
    x, y = tl.load(point, mask=mask, other=-2.0), tl.load(point + 1, mask=mask, other=-2.0)
    # fused in every kernel: one that rounded otherwise would find another cell
    x = tl.fma(x.to(exact), tl.cast(w, exact), -0.5)
    y = tl.fma(y.to(exact), tl.cast(h, exact), -0.5)
    x = tl.where((x > -1) & (x < w), x, -1.0)  # -1: no corner inside; also for NaN
    y = tl.where((y > -1) & (y < h), y, -1.0)
    x0, y0 = tl.floor(x), tl.floor(y)
    left, right = tl.where(x0 >= 0, x0 + 1 - x, 0.0), tl.where(x0 < w - 1, x - x0, 0.0)
    top, bottom = tl.where(y0 >= 0, y0 + 1 - y, 0.0), tl.where(y0 < h - 1, y - y0, 0.0)
    weights = (left * top, right * top, left * bottom, right * bottom)
    return y0.to(tl.int64), x0.to(tl.int64), weights


@triton.jit
def _place(points, P, h, w, tiles, groups, BLOCK_P: tl.constexpr, exact: tl.constexpr):
    """Of this program: image, group of channels, points [BLOCK_P], their corners and weights."""
    program = tl.program_id(0)
    p = (program % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (program // tiles // groups).to(tl.int64)
    y, x, weights = find_corners(points + (image * P + p) * 2, p < P, h, w, exact)
    return image, program // tiles % groups, p, y, x, weights


@triton.jit
def _add_corner(total, corner, weight, real):
    """total + weight * map; what weighs nothing is not read, so that NaN stays where it is."""
    value = tl.load(corner, mask=real & (weight != 0), other=0)
    return tl.fma(value.to(weight.dtype), weight, total)  # rounds alike in both kernels


@triton.jit(
    do_not_specialize=[
        *("C", "P", "h", "w", "tiles", "groups", "channels"),
        *("image_stride", "channel_stride", "row_stride", "pixel_stride"),
    ]
)
def _gather(
    features,  # [B, C, h, w]
    points,  # [B, P, 2], contiguous
    out,  # [B, C, P], contiguous
    C,
    P,
    h,
    w,
    tiles,  # of BLOCK_P points
    groups,  # of channels
    channels,  # of a group
    image_stride: tl.int64,  # of the features
    channel_stride: tl.int64,
    row_stride: tl.int64,
    pixel_stride: tl.int64,
    BLOCK_P: tl.constexpr,
):
    exact: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    image, group, p, y, x, weights = _place(points, P, h, w, tiles, groups, BLOCK_P, exact)
    features += image * image_stride
    out += image * C * P
    place, real = y * row_stride + x * pixel_stride, p < P
    for c in tl.range(group * channels, tl.minimum((group + 1) * channels, C)):
        channel = tl.cast(c, tl.int64)
        corner = features + channel * channel_stride + place
        below = corner + row_stride
        value = _add_corner(0.0, corner, weights[0], real)
        value = _add_corner(value, corner + pixel_stride, weights[1], real)
        value = _add_corner(value, below, weights[2], real)
        value = _add_corner(value, below + pixel_stride, weights[3], real)
        tl.store(out + channel * P + p, value.to(out.dtype.element_ty), mask=real)


@triton.jit(
    do_not_specialize=[
        *("C", "P", "h", "w", "tiles", "groups"),
        *("image_stride", "row_stride", "pixel_stride"),
    ]
)
def _gather_rows(
    features,  # [B, C, h, w], channels dense
    points,  # [B, P, 2], contiguous
    out,  # [B, C, P], contiguous
    C,
    P,
    h,
    w,
    tiles,  # of BLOCK_P points
    groups,  # of BLOCK_C channels
    image_stride: tl.int64,  # of the features
    row_stride: tl.int64,
    pixel_stride: tl.int64,
    UNIT: tl.constexpr,  # divides C and the strides
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    exact: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    image, group, p, y, x, weights = _place(points, P, h, w, tiles, groups, BLOCK_P, exact)
    # no change: it tells the compiler how wide it may load
    row_stride = row_stride // UNIT * UNIT
    pixel_stride = pixel_stride // UNIT * UNIT
    features += image * (image_stride // UNIT * UNIT)
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    real = (c < C // UNIT * UNIT)[:, None]
    corner = features + c[:, None] + (y * row_stride + x * pixel_stride)[None, :]
    below = corner + row_stride
    value = _add_corner(0.0, corner, weights[0][None, :], real)
    value = _add_corner(value, corner + pixel_stride, weights[1][None, :], real)
    value = _add_corner(value, below, weights[2][None, :], real)
    value = _add_corner(value, below + pixel_stride, weights[3][None, :], real)
    to = out + (image * C + c)[:, None] * P + p[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=real & (p < P)[None, :])


@triton.jit
def _add(corner, weight, g):
    tl.atomic_add(corner, g * weight, mask=weight != 0, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        *("C", "P", "h", "w", "tiles", "groups", "channels"),
        *("image_stride", "channel_stride", "point_stride"),
    ]
)
def _scatter(
    grad,  # [B, C, P]
    points,  # [B, P, 2], contiguous
    out,  # [B, C, h, w], contiguous, zeros; float32 or float64
    C,
    P,
    h,
    w,
    tiles,  # of BLOCK_P points
    groups,  # of channels
    channels,  # of a group
    image_stride: tl.int64,  # of the gradient
    channel_stride: tl.int64,
    point_stride: tl.int64,
    BLOCK_P: tl.constexpr,
):
    exact: tl.constexpr = out.dtype.element_ty
    image, group, p, y, x, weights = _place(points, P, h, w, tiles, groups, BLOCK_P, exact)
    size = tl.cast(h, tl.int64) * w
    grad += image * image_stride
    out += image * C * size
    place = y * w + x
    for c in tl.range(group * channels, tl.minimum((group + 1) * channels, C)):
        channel = tl.cast(c, tl.int64)
        from_ = grad + channel * channel_stride + p * point_stride
        g = tl.load(from_, mask=p < P, other=0.0).to(exact)
        corner = out + channel * size + place
        _add(corner, weights[0], g)
        _add(corner + 1, weights[1], g)
        _add(corner + w, weights[2], g)
        _add(corner + w + 1, weights[3], g)


@triton.jit(do_not_specialize=["P", "h", "w", "tiles"])
def _find_cells(
    points,  # [B, P, 2], contiguous
    cells,  # [B, P] int64, contiguous; of each image (h + 1)(w + 1), and one for points outside
    P,
    h,
    w,
    tiles,
    exact: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image, _, p, y, x, weights = _place(points, P, h, w, tiles, 1, BLOCK_P, exact)
    w00, w01, w10, w11 = weights
    outside = (h + 1).to(tl.int64) * (w + 1)
    cell = tl.where(w00 + w01 + w10 + w11 > 0, (y + 1) * (w + 1) + x + 1, outside)
    tl.store(cells + image * P + p, image * (outside + 1) + cell, mask=p < P)


@triton.jit(
    do_not_specialize=[
        *("C", "P", "h", "w", "tiles", "groups"),
        *("image_stride", "channel_stride", "point_stride"),
    ]
)
def _collect(
    grad,  # [B, C, P]
    points,  # [B, P, 2], contiguous
    order,  # [B P] int64: points sorted by cell
    starts,  # [B ((h + 1)(w + 1) + 1)] int64: where the points of a cell start in `order`
    out,  # [B, C, h, w], contiguous
    C,
    P,
    h,
    w,
    tiles,  # of BLOCK_N pixels
    groups,  # of BLOCK_C channels
    image_stride: tl.int64,  # of the gradient
    channel_stride: tl.int64,
    point_stride: tl.int64,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    exact: tl.constexpr,
):
    program = tl.program_id(0)
    pixel = (program % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = program // tiles % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    image = (program // tiles // groups).to(tl.int64)
    size = h.to(tl.int64) * w
    y, x = pixel // w, pixel % w
    starts += image * ((h + 1).to(tl.int64) * (w + 1) + 1)
    grad += image * image_stride
    total = tl.zeros((BLOCK_C, BLOCK_N), exact)
    for corner in tl.static_range(4):
        # the pixel is this corner of the cell
        cell = (y + 1 - corner // 2) * (w + 1) + x + 1 - corner % 2
        at = tl.load(starts + cell, mask=pixel < size, other=0)
        end = tl.load(starts + cell + 1, mask=pixel < size, other=0)
        for _ in tl.range(0, tl.max(end - at)):
            p = tl.load(order + at, mask=at < end, other=0) - image * P
            _, _, weights = find_corners(points + (image * P + p) * 2, at < end, h, w, exact)
            weight = weights[corner]
            place = c.to(tl.int64)[:, None] * channel_stride + p[None, :] * point_stride
            mask = (c < C)[:, None] & (weight != 0)[None, :]
            total += tl.load(grad + place, mask=mask, other=0.0).to(exact) * weight[None, :]
            at += 1
    to = out + (image * C + c)[:, None] * size + pixel[None, :]
    mask = (c < C)[:, None] & (pixel < size)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


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
            _gather_rows[(B * tiles * groups,)](
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
            _gather[(B * tiles * groups,)](
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
            _scatter[(B * tiles * groups,)](
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
        _find_cells[(B * tiles,)](points, cells, P, h, w, tiles, exact, THREADS, **options)
        in_cells, order = cells.flatten().sort(stable=True)
        count = torch.arange(B * ((h + 1) * (w + 1) + 1), device=device)
        starts = torch.searchsorted(in_cells, count)
        tiles, groups = triton.cdiv(h * w, THREADS), triton.cdiv(C, block)
        _collect[(B * tiles * groups,)](
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
