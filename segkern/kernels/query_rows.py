"""What the kernels of query_layer share: a tile of rows, its norm, its product with a matrix.

Letters: R row (queries of all images), C channels, N outputs, P part. A tile is ROWS rows with all
their channels, which one program holds in registers.

Few rows meet large matrices, so what a program waits for is the weights: they pass through shared
memory in tiles of whole rows of [N, C], as torch.nn.Linear holds them, several on the way at once.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(16)  # of a tile: the fewest that the matrix units take


@triton.jit
def load_rows(x, row, R, C: tl.constexpr):
    """Rows of x [R, C], zero beyond R."""
    place = row[:, None] * C + tl.arange(0, C)[None, :]
    return tl.load(x + place, mask=(row < R)[:, None], other=0.0)


@triton.jit
def store_rows(to, row, R, x, C: tl.constexpr):
    tl.store(to + row[:, None] * C + tl.arange(0, C)[None, :], x, mask=(row < R)[:, None])


@triton.jit
def placed(x, position, row, Q, C: tl.constexpr):
    """x + position [Q, C] of the rows' queries, in x's dtype."""
    place = (row % Q)[:, None] * C + tl.arange(0, C)[None, :]
    return (x.to(tl.float32) + tl.load(position + place).to(tl.float32)).to(x.dtype)


@triton.jit
def vector(x, n, N):
    """Places n of x [N] as a row of float32."""
    return tl.load(x + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm(x, scale, shift, eps, C: tl.constexpr):
    """The layer norm of float32 rows."""
    c = tl.arange(0, C)
    away = x - (tl.sum(x, 1) / C)[:, None]
    factor = 1 / tl.sqrt(tl.sum(away * away, 1) / C + eps)
    return away * factor[:, None] * vector(scale, c, C) + vector(shift, c, C)


@triton.jit
def with_parts(x, parts, bias, row, R, P: tl.constexpr, C: tl.constexpr):
    """x + bias + the sum of parts [P, R, C], four of which are on the way at once, in order."""
    total = x.to(tl.float32) + vector(bias, tl.arange(0, C), C)
    for start in tl.range(0, P, 4):
        for i in tl.static_range(4):
            p = start + i
            part = parts + tl.cast(p, tl.int64) * R * C
            total += load_rows(part, row, tl.where(p < P, R, 0), C)
    return total


@triton.jit
def project(
    x,  # [ROWS, C]
    weight,  # [N, C], a row every `line` values
    bias,  # [N], or None
    to,  # [R, N], contiguous
    row,
    R,
    line: tl.constexpr,
    N,
    C: tl.constexpr,
    relu,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """to = act(x W^T + bias), a tile of W after another."""
    c = tl.arange(0, C)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        w = tl.load(weight + n[:, None] * line + c[None, :], mask=(n < N)[:, None], other=0.0)
        y = tl.dot(x, tl.trans(w))
        if bias is not None:
            y += vector(bias, n, N)
        y = tl.where(relu & (y < 0), 0.0, y)  # NaN stays
        there = (row < R)[:, None] & (n < N)[None, :]
        tl.store(to + row[:, None] * N + n[None, :], y, mask=there)
