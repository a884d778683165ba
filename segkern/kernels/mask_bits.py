"""mask_bits in Triton: product, comparison and packing of a tile of keys, in registers.

Letters: B image, Q query, C channel, S key, W = ceil(S / 32) words.

A program owns up to 128 queries of an image and walks over tiles of keys. In 16 bits the queries
stay on the chip and each tile is one product over all channels: the features are read once and
nothing else moves; the next tiles load while one is multiplied and packed. float32 and float64
(no tf32), and more than 256 channels, read panels of channels of both. More than 128 queries are
more programs, side by side: they find the features in the L2 cache. Features are read as they lie:
keys side by side, or channels (a channels-last map), whose number then sets how wide a load is.
`open` is counted in registers, a row of a program, and the programs' counts join by integer
atomics, whose sum has no order. That needs zeros to start from: a memset of B Q words, where
partial counts would need as many launches and memory that is written and read again.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, device, on

HELD = 256  # channels of 128 queries that fit beside the tiles of features
LONGEST = 16  # tiles a program: the queries are a ninth of what it reads, the last wave is short
MORE = 32  # channels of a panel in 16 bits where there are more than HELD

# (kind of device, bytes of a value): queries of a program, keys of a tile, channels of a panel (0:
# all, up to HELD), warps, stages. Chosen by arithmetic, not yet measured: in 16 bits, 128-byte
# rows of keys, and 64 KB of tiles in flight, where latency x bandwidth of a multiprocessor is 26
# KB on an H200 (64-byte rows and 32 KB where there are 99 KB for all); for the others, 32 sums a
# thread, without spills.
TABLE = {
    ("99 KB", 2): (128, 32, 0, 4, 3),
    ("163 KB", 2): (128, 64, 0, 8, 3),
    ("227 KB", 2): (128, 64, 0, 8, 3),
    ("227 KB, 10.x", 2): (128, 64, 0, 8, 4),
    ("99 KB", 4): (128, 64, 16, 8, 3),
    ("163 KB", 4): (128, 64, 16, 8, 3),
    ("227 KB", 4): (128, 64, 16, 8, 3),
    ("227 KB, 10.x", 4): (128, 64, 16, 8, 3),
    ("99 KB", 8): (64, 64, 16, 8, 3),
    ("163 KB", 8): (128, 64, 16, 8, 3),
    ("227 KB", 8): (128, 64, 16, 8, 3),
    ("227 KB, 10.x", 8): (128, 64, 16, 8, 3),
}


@triton.jit
def _panel(
    features,  # [C, S] of one image
    start,  # first channel of the panel
    keys,  # [BLOCK_S] int64
    S,
    stride,
    C: tl.constexpr,
    KEYS_DENSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A panel of channels of some keys, [BLOCK_C, BLOCK_S]; zero beyond C and S."""
    c = start + tl.arange(0, BLOCK_C)
    if KEYS_DENSE:
        place = c.to(tl.int64)[:, None] * stride + keys[None, :]
    else:
        place = c[:, None] + keys[None, :] * stride
    return tl.load(features + place, mask=(c < C)[:, None] & (keys < S)[None, :], other=0.0)


@triton.jit(do_not_specialize=["Q", "S", "row_tiles", "chunks", "tiles", "image_stride", "stride"])
def _mask_bits(
    queries,  # [B, Q, C], contiguous
    features,  # [B, C, S]
    bits,  # [B, Q, W] int32, contiguous
    open,  # [B, Q] int32, contiguous, zeros
    threshold: tl.float64,
    Q,
    S,
    row_tiles,  # of BLOCK_Q queries
    chunks,  # of an image's keys, one a program
    tiles,  # of BLOCK_S keys in a chunk
    image_stride: tl.int64,  # of the features
    stride: tl.int64,  # of the channels where the keys are dense, else of the keys
    C: tl.constexpr,
    KEYS_DENSE: tl.constexpr,  # else the channels are
    UNIT: tl.constexpr,  # divides the features' strides and dense size
    WHOLE: tl.constexpr,  # all channels in one panel
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // row_tiles // chunks).to(tl.int64)
    first = program // row_tiles % chunks * tiles
    q = program % row_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = image * Q + q
    words = tl.cdiv(S, 32)
    if KEYS_DENSE:
        S = S // UNIT * UNIT  # no change: it tells the compiler how wide it may load
    stride = stride // UNIT * UNIT
    features += image * (image_stride // UNIT * UNIT)
    exact = tl.float64 if queries.dtype.element_ty == tl.float64 else tl.float32
    limit = tl.full((1, 1), threshold, exact)
    c, j = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    query = queries + row[:, None] * C + c[None, :]
    real = (q < Q)[:, None]
    if WHOLE:
        held = tl.load(query, mask=real & (c < C)[None, :], other=0.0)
    count = tl.zeros((BLOCK_Q,), tl.int32)
    for tile in tl.range(first, tl.minimum(first + tiles, tl.cdiv(S, BLOCK_S))):
        keys = tl.cast(tile, tl.int64) * BLOCK_S + j
        if WHOLE:
            panel = _panel(features, 0, keys, S, stride, C, KEYS_DENSE, BLOCK_C)
            product = tl.dot(held, panel, input_precision="ieee")
        else:
            product = tl.zeros((BLOCK_Q, BLOCK_S), exact)
            for start in range(0, C, BLOCK_C):
                part = tl.load(query + start, mask=real & (start + c < C)[None, :], other=0.0)
                panel = _panel(features, start, keys, S, stride, C, KEYS_DENSE, BLOCK_C)
                product = tl.dot(part, panel, product, input_precision="ieee", out_dtype=exact)
        hit = ((product >= limit) & (keys < S)[None, :]).to(tl.int32)  # 0 for NaN
        count += tl.sum(hit, 1)
        packed = tl.reshape(hit << (j % 32)[None, :], (BLOCK_Q, BLOCK_S // 32, 32))
        word = tile * (BLOCK_S // 32) + tl.arange(0, BLOCK_S // 32)
        to = bits + row[:, None] * words + word[None, :]
        tl.store(to, tl.sum(packed, 2), mask=real & (word < words)[None, :])
    tl.atomic_add(open + row, count, mask=q < Q, sem="relaxed")


def mask_bits(queries: Tensor, features: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """As `segkern::mask_bits`; features dense in keys or in channels are read in place."""
    (B, Q, C), S = queries.shape, features.shape[2]
    bits = queries.new_empty((B, Q, triton.cdiv(S, 32)), dtype=torch.int32)
    open = queries.new_zeros((B, Q), dtype=torch.int32)
    if bits.numel() == 0:
        return bits, open
    size = queries.element_size()
    kind, fill = device(queries)  # a program a multiprocessor
    BLOCK_Q, BLOCK_S, BLOCK_C, warps, stages = TABLE[kind, size]
    whole = BLOCK_C == 0 and C <= HELD
    if whole:
        BLOCK_C = triton.next_power_of_2(max(C, 16))
    elif BLOCK_C == 0:
        BLOCK_C = MORE
    if 1 not in features.stride()[1:]:
        features = features.contiguous()
    dense = features.stride(2) == 1
    image_stride, stride = features.stride(0), features.stride(1 if dense else 2)
    unit = math.gcd(16 // size, image_stride, stride, S if dense else C)
    row_tiles, total = triton.cdiv(Q, BLOCK_Q), triton.cdiv(S, BLOCK_S)
    tiles = min(LONGEST, triton.cdiv(B * row_tiles * total, fill))
    chunks = triton.cdiv(total, tiles)
    with on(queries):
        _mask_bits[(B * chunks * row_tiles,)](
            queries.contiguous(),
            features,
            bits,
            open,
            threshold,
            Q,
            S,
            row_tiles,
            chunks,
            tiles,
            image_stride,
            stride,
            C,
            dense,
            unit,
            whole,
            BLOCK_Q,
            BLOCK_S,
            BLOCK_C,
            num_warps=warps,
            num_stages=stages,
            **FUSED,
            maxnreg=255,  # one program a multiprocessor: ptxas need not save registers for two
        )
    return bits, open
