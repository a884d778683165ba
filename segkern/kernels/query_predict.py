"""The last kernel of query_layer: the feed-forward network's parts, then what a prediction needs.

Letters and tiles as in query_rows.py, M channels of the mask features. A tile has two programs:
one makes the mask embedding, three products in a row; the other makes the next layer's queries.
"""

import triton
import triton.language as tl

from .query_rows import ROWS, load_rows, norm, placed, project, store_rows, with_parts


@triton.jit(do_not_specialize=["R", "Q", "programs"])
def predict_rows(
    x,  # [R, C], as all tensors contiguous
    parts,  # [P, R, C] float32, of the feed-forward network
    bias,  # [C] of its output
    scale,  # [C] of the norm
    shift,  # [C]
    position,  # [Q, C]
    last_scale,  # [C] of the decoder's norm
    last_shift,  # [C]
    weight1,  # [C, C] of the mask embedding
    bias1,  # [C]
    weight2,  # [C, C]
    bias2,  # [C]
    weight3,  # [M, C]
    bias3,  # [M]
    query_weight,  # [C, C]
    query_bias,  # [C]
    out,  # [R, C], rows
    normed,  # [R, C]
    between,  # [2, R, C], between the products
    embedding,  # [R, M]
    query,  # [R, C]
    eps,
    R,
    Q,
    programs,  # of a tile: 1 makes no queries
    P: tl.constexpr,  # 0 where x are the rows
    M: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // programs * ROWS + tl.arange(0, ROWS)
    y = load_rows(x, row, R, C)
    if P > 0:
        total = with_parts(y, parts, bias, row, R, P, C)
        y = norm(total, scale, shift, eps, C).to(y.dtype)
    steps = 1
    if program % programs == 1:
        y = placed(y, position, row, Q, C)
    else:
        steps = 3
        if P > 0:
            store_rows(out, row, R, y, C)
        y = norm(y.to(tl.float32), last_scale, last_shift, eps, C).to(y.dtype)
        store_rows(normed, row, R, y, C)
    for step in range(steps):  # one code for all products: it takes long to compile
        weight, bias, to, N = query_weight, query_bias, query, C
        if steps == 3:
            weight, bias, to = weight1, bias1, between
            if step == 1:
                weight, bias, to = weight2, bias2, between + R * C
            if step == 2:
                weight, bias, to, N = weight3, bias3, embedding, M
        project(y, weight, bias, to, row, R, C, N, C, step < steps - 1, BLOCK_N, STAGES)
        tl.debug_barrier()  # what other threads of the program have written is read
        y = load_rows(to, row, tl.where(step < steps - 1, R, 0), C)
