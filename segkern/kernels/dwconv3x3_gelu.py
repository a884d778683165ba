"""dwconv3x3_gelu: a program takes a tile of pixels and up to 256 channels, which lie beside each
other; what its nine taps read comes from the first cache, but once.

Letters: B image, h w map, N = h w pixels, C channels; filters are [9, C].

The gradient d of the sums is stored once, in the precision of sums, as nine pixels read each value
of it. Those of filters and bias are added up by chunks of pixels and then in the order of the
chunks: no atomics, the same bits each run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, device, on
from .group_norm_forward import load, place_of

# Chosen by arithmetic, not yet measured, for all architectures
VALUES = 4096  # of a tile; half as many in float64
SUMMED = 1024  # of one whose products are added up: ten sums of each
CHANNELS = 256  # of a program
PROGRAMS = 4  # a multiprocessor, that add up products
OPTIONS = {"num_warps": 8, "num_stages": 1, **FUSED}


@triton.jit
def _tap(x, image, n, N, h, w, m, k, c, C: tl.constexpr, exact: tl.constexpr):
    """What tap m, k of pixels n reads, [BLOCK_N, BLOCK_C]; zeros outside."""
    row, column = n // w + m - 1, n % w + k - 1
    inside = (n < N) & (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return load(x, image * N + row * w + column, inside, c, C, exact)


@triton.jit
def _filter(filters, tap, c, C: tl.constexpr, exact: tl.constexpr):
    return tl.load(filters + tap * C + c, c < C, 0.0).to(exact)[None, :]


@triton.jit
def _normal_below(z):
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit(do_not_specialize=["h", "w"])
def _convolve(
    x,  # [B, N, C]
    filters,  # [9, C]
    bias,  # [C]
    out,  # [B, N, C]
    h,
    w,
    BACK: tl.constexpr,  # with turned filters, no bias and no GELU
    C: tl.constexpr,
    exact: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N = h * w
    image, _, tile, _, c = place_of(tl.cdiv(N, BLOCK_N), 1, N, C, BLOCK_N, BLOCK_C)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tl.zeros((BLOCK_N, BLOCK_C), exact)
    for m in tl.static_range(3):
        for k in tl.static_range(3):
            value = _tap(x, image, n, N, h, w, m, k, c, C, exact)
            z += _filter(filters, 8 - 3 * m - k if BACK else 3 * m + k, c, C, exact) * value
    if not BACK:
        z += tl.load(bias + c, c < C, 0.0).to(exact)[None, :]
        z *= _normal_below(z)
    to = out + (image * N + n)[:, None] * C + c[None, :]
    tl.store(to, z, mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit
def _row(x, image, n, N, h, w, m, c, C: tl.constexpr, exact: tl.constexpr):
    """What the three taps of row m read."""
    left = _tap(x, image, n, N, h, w, m, 0, c, C, exact)
    middle = _tap(x, image, n, N, h, w, m, 1, c, C, exact)
    return left, middle, _tap(x, image, n, N, h, w, m, 2, c, C, exact)


@triton.jit
def _filtered(filters, m, row, c, C: tl.constexpr, exact: tl.constexpr):
    z = _filter(filters, 3 * m, c, C, exact) * row[0]
    z += _filter(filters, 3 * m + 1, c, C, exact) * row[1]
    return z + _filter(filters, 3 * m + 2, c, C, exact) * row[2]


@triton.jit
def _store_sums(out, a, b, s, c, C: tl.constexpr):
    tl.store(out + c, tl.sum(a, 0), mask=c < C)
    tl.store(out + C + c, tl.sum(b, 0), mask=c < C)
    tl.store(out + 2 * C + c, tl.sum(s, 0), mask=c < C)


@triton.jit(do_not_specialize=["h", "w", "chunks", "tiles"])
def _of_sums(
    grad,  # [B, N, C]
    x,  # [B, N, C]
    filters,  # [9, C]
    bias,  # [C]
    d,  # [B, N, C]
    parts,  # [B, chunks, 10, C]: what a chunk adds to the gradients of filters and bias
    h,
    w,
    chunks,
    tiles,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    exact: tl.constexpr = d.dtype.element_ty
    N = h * w
    image, chunk, first, stop, c = place_of(chunks, tiles, N, C, BLOCK_N, BLOCK_C)
    shift = tl.load(bias + c, c < C, 0.0).to(exact)[None, :]
    s0 = tl.zeros((BLOCK_N, BLOCK_C), exact)
    s1, s2, s3, s4, s5, s6, s7, s8, plain = s0, s0, s0, s0, s0, s0, s0, s0, s0
    for tile in tl.range(first, stop):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        top = _row(x, image, n, N, h, w, 0, c, C, exact)
        same = _row(x, image, n, N, h, w, 1, c, C, exact)
        below = _row(x, image, n, N, h, w, 2, c, C, exact)
        z = shift + _filtered(filters, 0, top, c, C, exact)
        z += _filtered(filters, 1, same, c, C, exact)
        z += _filtered(filters, 2, below, c, C, exact)
        g = load(grad, image * N + n, n < N, c, C, exact)
        g *= _normal_below(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
        to = d + (image * N + n)[:, None] * C + c[None, :]
        tl.store(to, g, mask=(n < N)[:, None] & (c < C)[None, :])
        s0 += g * top[0]
        s1 += g * top[1]
        s2 += g * top[2]
        s3 += g * same[0]
        s4 += g * same[1]
        s5 += g * same[2]
        s6 += g * below[0]
        s7 += g * below[1]
        s8 += g * below[2]
        plain += g
    out = parts + (image * chunks + chunk) * 10 * C
    _store_sums(out, s0, s1, s2, c, C)
    _store_sums(out + 3 * C, s3, s4, s5, c, C)
    _store_sums(out + 6 * C, s6, s7, s8, c, C)
    tl.store(out + 9 * C + c, tl.sum(plain, 0), mask=c < C)


def _tile(x: Tensor, values: int) -> tuple[int, int]:
    """BLOCK_N and BLOCK_C."""
    channels = min(CHANNELS, triton.next_power_of_2(x.shape[3]))
    return values * 4 // max(x.element_size(), 4) // channels, channels


def _launch(x, filters, bias, out, back):
    (B, h, w, C), tile = x.shape, _tile(x, VALUES)
    exact = tl.float64 if x.dtype == torch.float64 else tl.float32
    grid = (B * triton.cdiv(h * w, tile[0]) * triton.cdiv(C, tile[1]),)
    _convolve[grid](x, filters, bias, out, h, w, back, C, exact, *tile, **OPTIONS)


def dwconv3x3_gelu(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """As `segkern::dwconv3x3_gelu`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        with on(x):
            _launch(x.contiguous(), filters.contiguous(), bias.contiguous(), out, False)
    return out


def dwconv3x3_gelu_backward(
    grad: Tensor, x: Tensor, filters: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::dwconv3x3_gelu_backward`."""
    B, h, w, C = x.shape
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if of_x.numel() == 0:
        return of_x, torch.zeros_like(filters), torch.zeros_like(bias)
    grad, x, filters, bias = (t.contiguous() for t in (grad, x, filters, bias))
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    tile = _tile(x, SUMMED)
    total, blocks = triton.cdiv(h * w, tile[0]), triton.cdiv(C, tile[1])
    programs = PROGRAMS * device(x).multiprocessors
    tiles = min(triton.cdiv(B * total * blocks, programs), total)
    chunks = triton.cdiv(total, tiles)
    d = torch.empty(x.shape, dtype=exact, device=x.device)
    parts = torch.empty((B, chunks, 10, C), dtype=exact, device=x.device)
    with on(x):
        _of_sums[(B * chunks * blocks,)](
            *(grad, x, filters, bias, d, parts, h, w, chunks, tiles, C, *tile), **OPTIONS
        )
        _launch(d, filters, bias, of_x, True)
    sums = parts.sum((0, 1))
    return of_x, sums[:9].to(filters.dtype), sums[9].to(bias.dtype)
