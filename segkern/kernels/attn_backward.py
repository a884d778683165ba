"""The backward kernel of masked_attn: gradients of a chunk of keys, and its part of the queries'.

A program owns the gradients of its keys. It keeps those of the queries of its slots in registers,
and where there are more slots than these hold, it goes over its keys again for the next group.
Letters, chunks, slots and `norm` as in masked_attn.py.
"""

import triton
import triton.language as tl

from .attn_tiles import SIZES, base, factors, load, open_keys, slots_of, store


@triton.jit(do_not_specialize=SIZES)
def backward(
    q,  # [B, Q, H, D]
    k,  # [B, S, H, D]
    v,  # [B, S, H, D]
    bits,  # [B, Q, W] int32, contiguous
    open,  # [B, Q] int32, contiguous
    plan,  # [B, splits, 2 Q + 1] int32
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
    groups,  # of slots, one after the other
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
):
    program = tl.program_id(0)
    h = (program % H).to(tl.int64)
    chunk = (program // H).to(tl.int64)
    b, first = chunk // splits, (chunk % splits).to(tl.int32) * tiles
    exact: tl.constexpr = norm.dtype.element_ty
    value: tl.constexpr = q.dtype.element_ty
    inner, outer = factors(scale, exact, value == exact)
    q = base(q, b, h, q_strides, UNIT)
    k = base(k, b, h, k_strides, UNIT)
    v = base(v, b, h, v_strides, UNIT)
    bits += b * Q * tl.cdiv(S, 32)
    plan += chunk * (2 * Q + 1)
    used = tl.load(plan + 2 * Q)
    head = b * Q * H * D + h * D
    norm += (b * H + h) * Q * 2
    grad_q += chunk * Q * H * D + h * D
    line = b * S * H * D + h * D
    tiles = tl.minimum(tiles, tl.cdiv(S, KEYS) - first)
    for group in range(groups):
        slots, dqs = (), ()
        union = 0
        more = used > (group + 1) * TILES * ROWS if value != exact else False
        for r in tl.static_range(TILES):
            row, n, wanted = slots_of(plan, open + b * Q, (group * TILES + r) * ROWS, Q, ROWS)
            real = row < Q
            query = load(q, row, q_strides[1] // UNIT * UNIT, real, D, CHANNELS)
            up = load(grad + head, row, H * D, real, D, CHANNELS)
            o = load(out + head, row, H * D, real, D, CHANNELS)
            top = tl.load(norm + row * 2, mask=real, other=0.0)
            inverse = tl.load(norm + row * 2 + 1, mask=real, other=1.0)
            if value != exact:
                top -= tl.log2(inverse)
            # the weight of a lone key is 1 whatever its score: not dp - mean, which rounds
            many = tl.where(tl.where(n == 0, S, n) == 1, 0.0, 1.0).to(exact)
            mean = tl.sum(up.to(exact) * o, 1) * many
            slots += ((row, n, wanted, query, up, top, inverse, many, mean),)
            dqs += (tl.zeros((ROWS, CHANNELS), exact),)
            union |= wanted
        for t in tl.range(0, tl.where((group > 0) & (union == 0), 0, tiles), num_stages=STAGES):
            key = (first + t).to(tl.int64) * KEYS + tl.arange(0, KEYS)
            limit = tl.where((union >> t & 1) != 0, S, 0)
            keys = load(k, key, k_strides[1] // UNIT * UNIT, key < limit, D, CHANNELS)
            values = load(v, key, v_strides[1] // UNIT * UNIT, key < limit, D, CHANNELS)
            dk = tl.zeros((KEYS, CHANNELS), exact)
            dv = tl.zeros((KEYS, CHANNELS), exact)
            for r in tl.static_range(TILES):
                row, n, wanted, query, up, top, inverse, many, mean = slots[r]
                if (wanted >> t & 1) != 0:
                    pair = open_keys(bits, row, n, first + t, Q, S, KEYS)
                    x = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=exact)
                    p = tl.exp2((x * inner - top[:, None]) * outer)
                    if value == exact:
                        p *= inverse[:, None]
                    p = tl.where(pair, p, 0.0)
                    pt = tl.trans(p.to(value))
                    dv = tl.dot(pt, up, dv, input_precision="ieee", out_dtype=exact)
                    dp = tl.dot(up, tl.trans(values), input_precision="ieee", out_dtype=exact)
                    ds = (p * (dp * many[:, None] - mean[:, None])).to(value)
                    dk = tl.dot(tl.trans(ds), query, dk, input_precision="ieee", out_dtype=exact)
                    dq = tl.dot(ds, keys, dqs[r], input_precision="ieee", out_dtype=exact)
                    dqs = dqs[:r] + (dq,) + dqs[r + 1 :]
            dk *= tl.full((), scale, exact)
            given = key < tl.where(group > 0, limit, S)
            if group > 0:
                dk += load(grads[0] + line, key, H * D, given, D, CHANNELS)
                dv += load(grads[1] + line, key, H * D, given, D, CHANNELS)
                if value != exact:
                    dk += load(rests[0] + line, key, H * D, given, D, CHANNELS)
                    dv += load(rests[1] + line, key, H * D, given, D, CHANNELS)
            store(grads[0] + line, key, H * D, given, dk, D, CHANNELS)
            store(grads[1] + line, key, H * D, given, dv, D, CHANNELS)
            if more:
                dk -= dk.to(value).to(exact)
                dv -= dv.to(value).to(exact)
                store(rests[0] + line, key, H * D, given, dk, D, CHANNELS)
                store(rests[1] + line, key, H * D, given, dv, D, CHANNELS)
        for r in tl.static_range(TILES):
            row = slots[r][0]
            store(grad_q, row, H * D, row < Q, dqs[r], D, CHANNELS)
        tl.debug_barrier()  # other threads read what these have written
