"""The backward kernel of masked_attn: gradients of a chunk of keys, and its part of the queries'.

A program owns the gradients of its keys. It keeps those of the queries of its slots in registers;
where there are more slots than these hold, the next launch goes over the keys again and adds. (A
loop over these groups in the kernel costs registers: what does not change is kept, and spilled.)
Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import triton
import triton.language as tl

from .attn_tiles import (
    SIZES,
    base,
    closed_rows,
    count,
    factors,
    load,
    lowest,
    open_keys,
    slots_of,
    store,
)


@triton.jit
def _many(open, row, Q, S):
    """Which queries exist and attend to more than one key."""
    n = tl.load(open + row, mask=row < Q, other=1)
    return tl.where(n == 0, S, n) > 1


@triton.jit
def _clear(
    written,
    first,
    tiles,
    wanted,
    more,
    S,
    H,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Zeros for tiles of keys that no query of the first group wants."""
    zero = tl.zeros((KEYS, CHANNELS), written[0].dtype.element_ty)
    for t in range(tiles):
        if (wanted >> t & 1) == 0:
            key = (first + t).to(tl.int64) * KEYS + tl.arange(0, KEYS)
            for i in tl.static_range(2):
                store(written[i], key, H * D, key < S, zero, D, CHANNELS)
                if more:
                    store(written[2 + i], key, H * D, key < S, zero, D, CHANNELS)


@triton.jit
def _differentiate(
    rows,  # queries of one or two tiles of slots, each [ROWS]
    tensors,  # (q, grad, out), (k, v) of the head; bits, open of the image; norm, grad_q
    written,  # gradients of keys and of values, and what rounding left of each, of the head
    strides,  # of a row of q, k, v
    factors,  # as `factors` gives them
    chunk,  # first tile of keys; those that any row wants, a bit each; groups before? after?
    sizes,  # Q, S, H, scale
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of the tiles of keys that any row wants, and of the rows."""
    queries, keys_values, bits, open, norm, grad_q = tensors
    q, grad, out = queries
    k, v = keys_values
    inner, outer = factors
    first, wanted, again, more = chunk
    Q, S, H, scale = sizes
    exact: tl.constexpr = norm.dtype.element_ty
    value: tl.constexpr = q.dtype.element_ty
    TILES: tl.constexpr = len(rows)
    ROWS: tl.constexpr = rows[0].shape[0]
    slots, dqs = (), ()
    for r in tl.static_range(TILES):
        row = rows[r]
        # a lone key weighs 1 whatever its score, which has no gradient: its query is 0 here
        many = _many(open, row, Q, S)
        query = load(q, row, strides[0] // UNIT * UNIT, many, D, CHANNELS)
        up = load(grad, row, H * D, row < Q, D, CHANNELS)
        o = load(out, row, H * D, row < Q, D, CHANNELS)
        top = tl.load(norm + row * 2, mask=many, other=0.0)
        inverse = tl.load(norm + row * 2 + 1, mask=many, other=1.0)
        if value != exact:
            top -= tl.log2(inverse)
        mean = tl.sum(up.to(exact) * o, 1)
        slots += ((closed_rows(open, row, Q), query, up, top, inverse, mean),)
        dqs += (tl.zeros((ROWS, CHANNELS), exact),)
    for _ in tl.range(0, count(wanted), num_stages=STAGES):
        tile = first + lowest(wanted)
        wanted &= wanted - 1
        key = tile * KEYS + tl.arange(0, KEYS)
        keys = load(k, key, strides[1] // UNIT * UNIT, key < S, D, CHANNELS)
        values = load(v, key, strides[2] // UNIT * UNIT, key < S, D, CHANNELS)
        dk = tl.zeros((KEYS, CHANNELS), exact)
        dv = tl.zeros((KEYS, CHANNELS), exact)
        for r in tl.static_range(TILES):
            closed, query, up, top, inverse, mean = slots[r]
            pair = open_keys(bits, rows[r], closed, tile, Q, S, KEYS)
            x = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=exact)
            p = tl.exp2((x * inner - top[:, None]) * outer)
            if value == exact:
                p *= inverse[:, None]
            p = tl.where(pair, p, 0.0)
            dp = tl.dot(up, tl.trans(values), input_precision="ieee", out_dtype=exact)
            dv = tl.dot(tl.trans(p.to(value)), up, dv, input_precision="ieee", out_dtype=exact)
            ds = (p * (dp - mean[:, None])).to(value)
            dk = tl.dot(tl.trans(ds), query, dk, input_precision="ieee", out_dtype=exact)
            dq = tl.dot(ds, keys, dqs[r], input_precision="ieee", out_dtype=exact)
            dqs = dqs[:r] + (dq,) + dqs[r + 1 :]
        dk *= tl.full((), scale, exact)
        given = key < S
        if again:
            dk += load(written[0], key, H * D, given, D, CHANNELS)
            dv += load(written[1], key, H * D, given, D, CHANNELS)
            if value != exact:
                dk += load(written[2], key, H * D, given, D, CHANNELS)
                dv += load(written[3], key, H * D, given, D, CHANNELS)
        store(written[0], key, H * D, given, dk, D, CHANNELS)
        store(written[1], key, H * D, given, dv, D, CHANNELS)
        if more:
            dk -= dk.to(value).to(exact)
            dv -= dv.to(value).to(exact)
            store(written[2], key, H * D, given, dk, D, CHANNELS)
            store(written[3], key, H * D, given, dv, D, CHANNELS)
    for r in tl.static_range(TILES):
        # wanted is 0 here, which the compiler does not know: it keeps no places during the loop
        row = rows[r] + wanted
        many = _many(open, row, Q, S)
        dq = tl.where(many[:, None], dqs[r], 0.0)
        store(grad_q, row, H * D, row < Q, dq, D, CHANNELS)


@triton.jit(do_not_specialize=[*SIZES, "group"])
def backward(
    q,  # [B, Q, H, D]
    k,  # [B, S, H, D]
    v,  # [B, S, H, D]
    bits,  # [B, Q, W] int32, contiguous
    open,  # [B, Q] int32, contiguous
    grad,  # [B, Q, H, D], contiguous
    out,  # [B, Q, H, D], contiguous
    norm,  # [B, H, Q, 2], contiguous
    grad_q,  # [B, splits, Q, H, D], contiguous, for add
    grads,  # of k and v, [B, S, H, D], contiguous
    rests,  # [B, S, H, D]: what rounding left of each, until the last group is added
    scale: tl.float64,
    Q,
    S,
    H,
    group,  # of slots
    splits,
    tiles,
    q_strides,  # of an image, a row, a head
    k_strides,
    v_strides,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,  # divides all strides
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    MANY: tl.constexpr,  # there is more than one group
):
    program = tl.program_id(0)
    h = (program % H).to(tl.int64)
    chunk = (program // H).to(tl.int64)
    b, first = chunk // splits, (chunk % splits).to(tl.int32) * tiles
    exact: tl.constexpr = norm.dtype.element_ty
    value: tl.constexpr = q.dtype.element_ty
    bits += b * Q * tl.cdiv(S, 32)
    open += b * Q
    head = b * Q * H * D + h * D
    line = b * S * H * D + h * D
    queries = base(q, b, h, q_strides, UNIT), grad + head, out + head
    keys = base(k, b, h, k_strides, UNIT), base(v, b, h, v_strides, UNIT)
    norm += (b * H + h) * Q * 2
    grad_q += chunk * Q * H * D + h * D
    tensors = queries, keys, bits, open, norm, grad_q
    written = grads[0] + line, grads[1] + line, rests[0] + line, rests[1] + line
    strides = q_strides[1], k_strides[1], v_strides[1]
    scales = factors(scale, exact, value == exact)
    sizes = Q, S, H, scale
    tiles = tl.minimum(tiles, tl.cdiv(S, KEYS) - first)
    start = group * TILES * ROWS
    rows, wanted, used = slots_of(bits, open, first, tiles, start, Q, S, ROWS, TILES, KEYS)
    again = group > 0 if MANY else False
    more = used > TILES * ROWS if MANY and value != exact else False
    if group == 0:
        _clear(written, first, tiles, wanted, more, S, H, D, CHANNELS, KEYS)
    part = first, wanted, again, more
    if TILES == 2 and used <= ROWS:
        _differentiate(
            *((rows[0],), tensors, written, strides, scales, part, sizes),
            *(D, CHANNELS, UNIT, KEYS, STAGES),
        )
        none = tl.zeros((ROWS, CHANNELS), exact)
        store(grad_q, rows[1], H * D, rows[1] < Q, none, D, CHANNELS)
    else:
        _differentiate(
            *(rows, tensors, written, strides, scales, part, sizes),
            *(D, CHANNELS, UNIT, KEYS, STAGES),
        )
