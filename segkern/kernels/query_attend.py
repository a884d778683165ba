"""The second kernel of query_layer: self attention of a tile of queries in one head.

Letters and tiles as in query_rows.py, H head, D channels a head. A head's part of the output
projection follows at once, so that heads need not wait for each other: their parts are added up by
who reads them.
"""

import math

import triton
import triton.language as tl

from .query_rows import ROWS, project

LOG2E = tl.constexpr(math.log2(math.e))
KEYS = tl.constexpr(64)  # of a tile


@triton.jit
def _load(x, line, Q, C: tl.constexpr, D: tl.constexpr):
    place = line[:, None] * C + tl.arange(0, D)[None, :]
    return tl.load(x + place, mask=(line < Q)[:, None], other=0.0)


@triton.jit(do_not_specialize=["B", "Q"])
def attend(
    projected,  # [3, B, Q, H, D], queries, keys, values
    weight,  # [C, C] of the output projection
    parts,  # [H, B, Q, C] float32
    B,
    Q,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, tiles = tl.program_id(0), tl.cdiv(Q, ROWS)
    h, b = program % H, program // H // tiles
    row = program // H % tiles * ROWS + tl.arange(0, ROWS)
    C: tl.constexpr = H * D
    q = projected + b * Q * C + h * D
    k = q + B * Q * C
    v = k + B * Q * C
    query = _load(q, row, Q, C, D)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for start in tl.range(0, Q, KEYS, num_stages=2):
        key = start + tl.arange(0, KEYS)
        x = tl.dot(query, tl.trans(_load(k, key, Q, C, D))) * (LOG2E / D**0.5)
        x = tl.where((key < Q)[None, :], x, float("-inf"))
        most = tl.maximum(top, tl.max(x, 1))
        p, old = tl.exp2(x - most[:, None]), tl.exp2(top - most)
        total = total * old + tl.sum(p, 1)
        acc = tl.dot(p.to(query.dtype), _load(v, key, Q, C, D), acc * old[:, None])
        top = most
    y = (acc / total[:, None]).to(query.dtype)
    to = parts + (h.to(tl.int64) * B + b) * Q * C
    project(y, weight + h * D, None, to, row, Q, C, C, D, False, BLOCK_N, STAGES)
