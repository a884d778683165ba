"""The first kernel of query_layer: what cross attention gave is added, queries, keys, values made.

Letters and tiles as in query_rows.py. A program makes one of the three of a tile, after the rows
themselves, which are made three times: so it waits for two matrices and not for four.
"""

import triton
import triton.language as tl

from .query_rows import ROWS, load_rows, norm, placed, project, store_rows, vector


@triton.jit(do_not_specialize=["R", "Q"])
def project_rows(
    x,  # [R, C], as all tensors contiguous
    attended,  # [R, C]
    position,  # [Q, C]
    weight,  # [C, C] of the cross attention's output
    bias,  # [C]
    scale,  # [C] of the norm
    shift,  # [C]
    query_weight,  # [C, C]
    query_bias,  # [C]
    key_weight,
    key_bias,
    value_weight,
    value_bias,
    out,  # [R, C], rows
    projected,  # [3, R, C], queries, keys, values
    eps,
    R,
    Q,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    part, row = program % 3, program // 3 * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, C)
    total = tl.zeros((ROWS, C), tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_C)
        a = tl.load(attended + row[:, None] * C + c[None, :], mask=(row < R)[:, None], other=0.0)
        w = tl.load(weight + n[:, None] * C + c[None, :])
        total = tl.dot(a, tl.trans(w), total)
    total += load_rows(x, row, R, C).to(tl.float32) + vector(bias, n, C)
    y = norm(total, scale, shift, eps, C).to(x.dtype.element_ty)
    if part == 0:
        store_rows(out, row, R, y, C)
    else:
        query_weight, query_bias = key_weight, key_bias
    if part == 2:
        query_weight, query_bias = value_weight, value_bias
    else:
        y = placed(y, position, row, Q, C)
    to = projected + part * R * C
    project(y, query_weight, query_bias, to, row, R, C, C, C, False, BLOCK_N, STAGES)
