"""Philox4x32-10 (Salmon et al., SC 2011) for Triton, and `random_points` drawn with it.

The same bits as csrc/philox.h and as `random_points_reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, on

BLOCK = 512  # points of a program: four a thread


@triton.jit
def random_point(seed, point, target, prediction, sample):
    """The point x, y in [0, 1) of a counter; blocks of one shape, or scalars.

    Args:
        seed: int64, the key.
        point, target, prediction, sample: integers, the counter; taken modulo 2^32.

    Returns:
        x and y, float32, multiples of 2^-24.
    """
    c0, c1 = tl.cast(point, tl.uint32), tl.cast(target, tl.uint32)
    c2, c3 = tl.cast(prediction, tl.uint32), tl.cast(sample, tl.uint32)
    seed = tl.cast(seed, tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    factor0, factor1 = tl.full((), 0xD2511F53, tl.uint32), tl.full((), 0xCD9E8D57, tl.uint32)
    step0, step1 = tl.full((), 0x9E3779B9, tl.uint32), tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(factor0, c0), tl.umulhi(factor1, c2)
        low0, low1 = factor0 * c0, factor1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += step0
        k1 += step1
    # 24 bits are exact in float32
    return (c0 >> 8).to(tl.float32) * 2.0**-24, (c1 >> 8).to(tl.float32) * 2.0**-24


@triton.jit(do_not_specialize=["n", "tiles"])
def draw(
    seed,  # [1] int64
    ids,  # [N, 3] int64: sample, prediction, target
    out,  # [N, n, 2]
    n,
    tiles,  # of the points of an id
    BLOCK: tl.constexpr,
):
    i = (tl.program_id(0) // tiles).to(tl.int64)
    point = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    ids += 3 * i
    sample, prediction, target = tl.load(ids), tl.load(ids + 1), tl.load(ids + 2)
    x, y = random_point(tl.load(seed), point, target, prediction, sample)
    place = out + (i * n + point) * 2
    pair = place[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pair, tl.join(x, y), (point < n)[:, None])


def random_points(seed: Tensor, ids: Tensor, n: int) -> Tensor:
    """As `segkern::random_points`."""
    out = torch.empty((*ids.shape[:-1], n, 2), dtype=torch.float32, device=ids.device)
    if out.numel():
        tiles = triton.cdiv(n, BLOCK)
        programs = out.numel() // (2 * n) * tiles
        with on(ids):
            draw[(programs,)](seed, ids.contiguous(), out, n, tiles, BLOCK, num_warps=4, **FUSED)
    return out
