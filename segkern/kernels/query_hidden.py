"""The third kernel of query_layer: some hidden channels of the feed-forward network.

Letters and tiles as in query_rows.py, F hidden channels. A program takes CHUNK of them through
both products; the second is a part of the result, which the next kernel adds up. A tile's programs
each make its rows from the parts of the heads.
"""

import triton
import triton.language as tl

from .query_rows import ROWS, load_rows, norm, store_rows, vector, with_parts


@triton.jit(do_not_specialize=["R"])
def hidden_rows(
    x,  # [R, C], as all tensors contiguous
    heads,  # [H, R, C] float32, the heads' parts of the self attention
    bias,  # [C] of its output
    scale,  # [C] of the norm
    shift,  # [C]
    weight1,  # [F, C]
    bias1,  # [F]
    weight2,  # [C, F]
    out,  # [R, C], rows
    parts,  # [ceil(F / CHUNK), R, C] float32
    eps,
    R,
    H: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunks: tl.constexpr = (F + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    chunk, row = program % chunks, program // chunks * ROWS + tl.arange(0, ROWS)
    f, c = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, C)
    # on its way while the parts are added up
    first = tl.load(weight1 + f[:, None] * C + c[None, :], mask=(f < F)[:, None], other=0.0)
    total = with_parts(load_rows(x, row, R, C), heads, bias, row, R, H, C)
    y = norm(total, scale, shift, eps, C).to(x.dtype.element_ty)
    if chunk == 0:
        store_rows(out, row, R, y, C)
    z = tl.dot(y, tl.trans(first)) + vector(bias1, f, F)
    z = tl.where(z < 0, 0.0, z).to(y.dtype)  # NaN stays
    to = parts + tl.cast(chunk, tl.int64) * R * C
    for start in tl.range(0, C, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        w = tl.load(weight2 + n[:, None] * F + f[None, :], mask=(f < F)[None, :], other=0.0)
        there = (row < R)[:, None]
        tl.store(to + row[:, None] * C + n[None, :], tl.dot(z, tl.trans(w)), mask=there)
