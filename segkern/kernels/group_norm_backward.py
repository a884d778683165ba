"""The kernels of group_norm's gradients.

Letters, chunks and tiles as in group_norm.py. With g the gradient where a ReLU let it pass and
x' = (x - mean) inverse, a group's gradient of x is

    inverse (weight g - mean(weight g) - x' mean(weight g x'))
"""

import triton
import triton.language as tl

from .group_norm_forward import SIZES, corners_of, load, norm_of, place_of


@triton.jit
def _pair(
    grad,
    x,
    n,
    N,
    image,
    pixels,
    grad_pixels,
    c,
    norm,  # what norm_of gives
    C: tl.constexpr,
    RELU: tl.constexpr,
    exact: tl.constexpr,
):
    """g and x - mean of a tile of pixels."""
    middle, _, scale, shift = norm
    g = load(grad, image * grad_pixels + n, n < N, c, C, exact)
    away = load(x, image * pixels + n, n < N, c, C, exact) - middle[None, :]
    if RELU:  # as the forward kernel made it
        g = tl.where(away * scale[None, :] + shift[None, :] <= 0, 0.0, g)
    return g, away


@triton.jit(do_not_specialize=[*SIZES, "grad_pixels"])
def sums(
    grad,  # [B, N, C], images `grad_pixels` apart
    x,  # [B, N, C], images `pixels` apart
    weight,  # [C]
    bias,  # [C]
    mean,  # [B, G]
    inverse,  # [B, G]
    parts,  # [B, chunks, 2, C]: sums of g and of g x'
    N,
    chunks,
    tiles,
    pixels: tl.int64,
    grad_pixels: tl.int64,
    C: tl.constexpr,
    D: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    exact: tl.constexpr = parts.dtype.element_ty
    image, chunk, first, stop, c = place_of(chunks, tiles, N, C, BLOCK_N, BLOCK_C)
    norm = norm_of(mean, inverse, weight, bias, image, c, C, D)
    plain = tl.zeros((BLOCK_N, BLOCK_C), exact)
    weighted = tl.zeros((BLOCK_N, BLOCK_C), exact)
    for tile in tl.range(first, stop):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        g, away = _pair(grad, x, n, N, image, pixels, grad_pixels, c, norm, C, RELU, exact)
        plain += g
        weighted += g * away
    out = parts + (image * chunks + chunk) * 2 * C + c
    tl.store(out, tl.sum(plain, 0), mask=c < C)
    tl.store(out + C, tl.sum(weighted, 0) * norm[1], mask=c < C)


@triton.jit(do_not_specialize=["B", *SIZES])
def join_sums(
    parts,  # [B, chunks, 2, C]
    weight,  # [C]
    means,  # [B, 2, G]: of weight g and of weight g x'
    of_weight,  # [C]
    of_bias,  # [C]
    B,
    N,
    chunks,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,  # chunks at a time
):
    exact: tl.constexpr = parts.dtype.element_ty
    G: tl.constexpr = C // D
    group = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    c = group * D + d
    gain = tl.load(weight + c, d < D, 0.0).to(exact)
    values = N.to(exact) * D
    all_plain, all_weighted = tl.zeros((BLOCK_D,), exact), tl.zeros((BLOCK_D,), exact)
    for image in range(B):
        plain, weighted = tl.zeros((BLOCK_D,), exact), tl.zeros((BLOCK_D,), exact)
        for start in range(0, chunks, PARTS):
            s = start + tl.arange(0, PARTS)
            place = (tl.cast(image, tl.int64) * chunks + s)[:, None] * 2 * C + c[None, :]
            mask = (s < chunks)[:, None] & (d < D)[None, :]
            plain += tl.sum(tl.load(parts + place, mask, 0.0), 0)
            weighted += tl.sum(tl.load(parts + place + C, mask, 0.0), 0)
        all_plain += plain
        all_weighted += weighted
        to = means + tl.cast(image, tl.int64) * 2 * G + group
        tl.store(to, tl.sum(plain * gain) / values)
        tl.store(to + G, tl.sum(weighted * gain) / values)
    tl.store(of_weight + c, all_weighted, mask=d < D)
    tl.store(of_bias + c, all_plain, mask=d < D)


@triton.jit(do_not_specialize=[*SIZES, "grad_pixels"])
def apply_back(
    grad,  # [B, N, C], images `grad_pixels` apart
    x,  # [B, N, C], images `pixels` apart
    weight,  # [C]
    bias,  # [C]
    mean,  # [B, G]
    inverse,  # [B, G]
    means,  # [B, 2, G]
    out,  # [B, N, C]
    N,
    chunks,
    tiles,
    pixels: tl.int64,
    grad_pixels: tl.int64,
    C: tl.constexpr,
    D: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    exact: tl.constexpr = mean.dtype.element_ty
    G: tl.constexpr = C // D
    image, _, first, stop, c = place_of(chunks, tiles, N, C, BLOCK_N, BLOCK_C)
    norm = norm_of(mean, inverse, weight, bias, image, c, C, D)
    narrow, scale = norm[1], norm[2]
    means += image * 2 * G + c // D
    plain = tl.load(means, c < C, 0.0) * narrow
    weighted = tl.load(means + G, c < C, 0.0) * narrow * narrow
    for tile in tl.range(first, stop):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        g, away = _pair(grad, x, n, N, image, pixels, grad_pixels, c, norm, C, RELU, exact)
        value = scale[None, :] * g - plain[None, :] - weighted[None, :] * away
        to = out + (image * N + n)[:, None] * C + c[None, :]
        tl.store(to, value, mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit
def _share(i, n, k, ratio, size):
    """How much output i of n takes of value k; see corners_of."""
    low, high, share = corners_of(i, ratio, size)
    taken = tl.where(low == k, 1 - share, 0.0) + tl.where(high == k, share, 0.0)
    return tl.where(i < n, taken, 0.0)


@triton.jit
def _first(k, ratio):
    """The first output that may take of value k: the place of the one before is at most k - 1."""
    return tl.maximum(tl.floor((k.to(ratio.dtype) - 0.5) / ratio - 0.5).to(tl.int32), 0)


@triton.jit(do_not_specialize=[*SIZES, "grad_pixels", "rows", "columns"])
def of_up(
    grad,  # [B, h, w, C], images `grad_pixels` apart
    out,  # [B, H, W, C]
    ratio_y: tl.float64,  # H / h
    ratio_x: tl.float64,
    h,
    w,
    H,
    W,
    rows,  # of the gradient that may take of one value
    columns,
    grad_pixels: tl.int64,
    C: tl.constexpr,
    exact: tl.constexpr,
    BLOCK_N: tl.constexpr,  # values of a row
    BLOCK_C: tl.constexpr,
):
    """Each value of the coarser map collects from the pixels that took of it."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(W, BLOCK_N)
    column = program // blocks % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    line = program // blocks // tiles
    row, image = line % H, (line // H).to(tl.int64)
    y_ratio, x_ratio = tl.full((), ratio_y, exact), tl.full((), ratio_x, exact)
    top, left = _first(row, y_ratio), _first(column, x_ratio)
    total = tl.zeros((BLOCK_N, BLOCK_C), exact)
    for i in range(top, tl.minimum(top + rows, h)):
        y = _share(i, h, row, y_ratio, H)
        if y != 0:
            for t in range(columns):
                share = y * _share(left + t, w, column, x_ratio, W)
                pixel = image * grad_pixels + tl.cast(i, tl.int64) * w + left + t
                total += share[:, None] * load(grad, pixel, share != 0, c, C, exact)
    to = out + ((image * H + row) * W + column)[:, None] * C + c[None, :]
    tl.store(to, total, mask=(column < W)[:, None] & (c < C)[None, :])
