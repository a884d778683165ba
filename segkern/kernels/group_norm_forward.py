"""The kernels of group_norm that find the moments of the groups and apply them.

Letters, chunks and tiles as in group_norm.py.
"""

import triton
import triton.language as tl

SIZES = ["N", "chunks", "tiles", "pixels", "h", "w", "H", "W", "up_pixels"]


@triton.jit
def place_of(chunks, tiles, N, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's image, chunk, first tile and the one after its last, and channels."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    chunk = program // blocks % chunks
    image = (program // blocks // chunks).to(tl.int64)
    stop = tl.minimum((chunk + 1) * tiles, tl.cdiv(N, BLOCK_N))
    return image, chunk, chunk * tiles, stop, program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def load(map, pixel, real, c, C: tl.constexpr, exact: tl.constexpr):
    """Pixels of a map, [BLOCK_N, BLOCK_C]; zero where they are not real and beyond C."""
    mask = real[:, None] & (c < C)[None, :]
    return tl.load(map + pixel[:, None] * C + c[None, :], mask, 0.0).to(exact)


@triton.jit
def norm_of(mean, inverse, weight, bias, image, c, C: tl.constexpr, D: tl.constexpr):
    """Of the channels: mean, inverse deviation, its product with the weight, and bias."""
    exact: tl.constexpr = mean.dtype.element_ty
    group = image * (C // D) + c // D
    middle = tl.load(mean + group, c < C, 0.0)
    narrow = tl.load(inverse + group, c < C, 0.0)
    scale = narrow * tl.load(weight + c, c < C, 0.0).to(exact)
    return middle, narrow, scale, tl.load(bias + c, c < C, 0.0).to(exact)


@triton.jit
def corners_of(i, ratio, size):
    """Where output i of a bilinear resize reads `size` values, `ratio` times as many as there are
    outputs: the two, and the share of the second."""
    at = tl.maximum((tl.cast(i, ratio.dtype) + 0.5) * ratio - 0.5, 0.0)
    low = tl.minimum(at.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), at - low.to(ratio.dtype)


@triton.jit(do_not_specialize=SIZES)
def moments(
    x,  # [B, N, C], images `pixels` apart
    parts,  # [B, chunks, 2, C]: means, and sums of squares about them
    N,
    chunks,
    tiles,
    pixels: tl.int64,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    exact: tl.constexpr = parts.dtype.element_ty
    image, chunk, first, stop, c = place_of(chunks, tiles, N, C, BLOCK_N, BLOCK_C)
    r = tl.arange(0, BLOCK_N)
    # Welford's sums, one for each place of a tile, so that nothing is exchanged before the end
    mean = tl.zeros((BLOCK_N, BLOCK_C), exact)
    spread = tl.zeros((BLOCK_N, BLOCK_C), exact)
    for tile in tl.range(first, stop):
        n = tile * BLOCK_N + r
        value = load(x, image * pixels + n, n < N, c, C, exact)
        away = tl.where((n < N)[:, None], value - mean, 0.0)
        mean += away * (1.0 / (tile - first + 1).to(exact))
        spread += away * (value - mean)
    last = (stop - 1) * BLOCK_N + r
    seen = (stop - 1 - first + (last < N).to(tl.int32)).to(exact)[:, None]
    count = tl.minimum(N - first * BLOCK_N, tiles * BLOCK_N).to(exact)
    middle = tl.sum(mean * seen, 0) / count
    apart = mean - middle[None, :]
    out = parts + (image * chunks + chunk) * 2 * C + c
    tl.store(out, middle, mask=c < C)
    tl.store(out + C, tl.sum(spread + seen * apart * apart, 0), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def join(
    parts,  # [B, chunks, 2, C]
    mean,  # [B, G]
    inverse,  # [B, G]
    eps: tl.float64,
    N,
    chunks,
    tiles,
    C: tl.constexpr,
    D: tl.constexpr,  # channels of a group
    BLOCK_N: tl.constexpr,
    LINE: tl.constexpr,
):
    exact: tl.constexpr = parts.dtype.element_ty
    G: tl.constexpr = C // D
    program = tl.program_id(0).to(tl.int64)
    parts += program // G * chunks * 2 * C + program % G * D
    origin = tl.load(parts)  # so that the sum of what differs from it rounds little
    total = tl.zeros((LINE,), exact)
    for start in range(0, chunks * D, LINE):
        i = start + tl.arange(0, LINE)
        count = tl.minimum(N - i // D * tiles * BLOCK_N, tiles * BLOCK_N).to(exact)
        middle = tl.load(parts + i // D * 2 * C + i % D, i < chunks * D, origin)
        total += count * (middle - origin)
    values = N.to(exact) * D
    centre = origin + tl.sum(total) / values
    total = tl.zeros((LINE,), exact)
    for start in range(0, chunks * D, LINE):
        i = start + tl.arange(0, LINE)
        count = tl.minimum(N - i // D * tiles * BLOCK_N, tiles * BLOCK_N).to(exact)
        part = parts + i // D * 2 * C + i % D
        apart = tl.load(part, i < chunks * D, centre) - centre
        total += tl.load(part + C, i < chunks * D, 0.0) + count * apart * apart
    variance = tl.sum(total) / values + tl.full((), eps, exact)
    tl.store(mean + program, centre)
    tl.store(inverse + program, 1.0 / tl.sqrt(variance))


@triton.jit(do_not_specialize=SIZES)
def apply(
    x,  # [B, N, C], images `pixels` apart
    weight,  # [C]
    bias,  # [C]
    mean,  # [B, G]
    inverse,  # [B, G]
    up,  # [B, H, W, C], images `up_pixels` apart; or None
    out,  # [B, N, C]
    ratio_y: tl.float64,  # H / h
    ratio_x: tl.float64,
    N,
    chunks,
    tiles,
    pixels: tl.int64,
    w,
    H,
    W,
    up_pixels: tl.int64,
    C: tl.constexpr,
    D: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    exact: tl.constexpr = mean.dtype.element_ty
    image, _, first, stop, c = place_of(chunks, tiles, N, C, BLOCK_N, BLOCK_C)
    middle, _, scale, shift = norm_of(mean, inverse, weight, bias, image, c, C, D)
    for tile in tl.range(first, stop):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        value = load(x, image * pixels + n, n < N, c, C, exact)
        value = (value - middle[None, :]) * scale[None, :] + shift[None, :]
        if up is not None:
            top, bottom, y = corners_of(n // w, tl.full((), ratio_y, exact), H)
            left, right, z = corners_of(n % w, tl.full((), ratio_x, exact), W)
            top, bottom = image * up_pixels + top * W, image * up_pixels + bottom * W
            value += ((1 - y) * (1 - z))[:, None] * load(up, top + left, n < N, c, C, exact)
            value += ((1 - y) * z)[:, None] * load(up, top + right, n < N, c, C, exact)
            value += (y * (1 - z))[:, None] * load(up, bottom + left, n < N, c, C, exact)
            value += (y * z)[:, None] * load(up, bottom + right, n < N, c, C, exact)
        if RELU:
            value = tl.where(value < 0, 0.0, value)  # NaN stays
        to = out + (image * N + n)[:, None] * C + c[None, :]
        tl.store(to, value, mask=(n < N)[:, None] & (c < C)[None, :])
