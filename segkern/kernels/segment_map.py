"""The launchers of segment_map: maps of segments from mask logits never stored at their size.

Letters: B image, Q query, K class, h w mask logits, H W result, n slots, N rows of an order.

A program takes tiles of output pixels of one image. Where the tile's window of the mask logits is
small it gives bounds of every query's logits, and with them the list of those that matter:
panoptic, the queries that may win a pixel or whose mask has an edge here; instance, those with a
pixel inside; semantic, the classes that may win. Then, query by query, logits are made in
registers from their taps (segment_taps.py), used and forgotten; semantic keeps their sigmoids
until all classes of a tile are done. Bounds, lists and sigmoids lie in memory of the program's
own, so that it grows with programs and not with pixels. Counts join by integer atomics, whose sum
has no order; sums of sigmoids are a program's own, and are added in the order of programs.
"""

import torch
import triton
from torch import Tensor

from ._launch import FUSED, device, on
from .segment_instance import cover, instance
from .segment_merge import merge, relabel
from .segment_panoptic import panoptic
from .segment_semantic import semantic_tiles
from .segment_tables import Frame

# Chosen by arithmetic, not yet measured, for all architectures: two programs of 8 warps and 128
# registers a thread on a multiprocessor, without spills.
TILE = (16, 32)  # rows, columns: two pixels a thread, up to 32 loads in flight
PRODUCT = (4, 32)  # of a semantic tile
AT_ONCE = 4  # queries whose sigmoids are made together, two a thread
CLASSES = 32  # of a product: 16 sums a thread; more would wait idle where few classes may win
RESIDENT = 2  # programs of a semantic call on a multiprocessor: each keeps 56 KB for 100 queries
STAGES = 2  # 16 queries are on their way while 16 are multiplied; three spill on a B200
PROGRAMS = 2048  # of an image at most: eight rounds of an H200
WORDS = 32  # of 32 pixels, where masks cover a map: four pixels a thread
RUN = 32  # queries whose bounds are found together


def _options(exact: torch.dtype, registers: int = 128) -> dict:
    """Of a launch whose sums have a dtype: in float64 one program a multiprocessor, for want of
    registers. One stage: no gather goes through shared memory."""
    registers = 255 if exact == torch.float64 else registers
    return {"num_warps": 8, "num_stages": 1, "maxnreg": registers, **FUSED}


def segment_map(
    scores: Tensor,
    labels: Tensor,
    stuff: Tensor | None,
    masks: Tensor,
    features: Tensor | None,
    sizes: list[int],
    overlap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::segment_map`."""
    (B, Q), (H, W) = scores.shape, sizes[4:]
    counts = scores.new_zeros((3, B, Q), dtype=torch.int64)
    ids = scores.new_zeros((B, Q), dtype=torch.int32)
    map = scores.new_zeros((B, H, W), dtype=torch.int32)
    if B == 0 or Q == 0:
        return map, ids, counts[0]
    with on(scores):
        f = Frame(masks, features, sizes, scores.dtype, TILE, PROGRAMS)
        numbers = ids.new_empty((2, B, Q))
        panoptic[(B * f.programs,)](
            scores.contiguous(),
            f.masks,
            *f.tables,
            scores.new_empty((B, f.programs, 2, Q)),
            ids.new_empty((B, f.programs, Q)),
            map,
            counts,
            *(Q, H, W, *f.tiles, *f.masks.stride()),
            *(f.taps, *TILE, RUN),
            **_options(scores.dtype),
        )
        stuff = None if stuff is None else stuff.contiguous().view(torch.uint8)
        K = 0 if stuff is None else len(stuff)
        labels = labels.contiguous()
        merge[(B,)](counts, labels, stuff, numbers, ids, overlap, Q, K, 32, **FUSED)
        blocks = triton.cdiv(H * W, 1024)
        relabel[(B * blocks,)](ids, map, Q, H * W, blocks, 1024, **FUSED)
    return map, ids, counts[0]


def segment_map_semantic(
    weights: Tensor,
    masks: Tensor,
    features: Tensor | None,
    sizes: list[int],
    resize_scores: bool,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::segment_map_semantic`."""
    (B, Q, K), (H, W) = weights.shape, sizes[4:]
    map = weights.new_zeros((B, H, W), dtype=torch.int32)
    areas = weights.new_zeros((B, K), dtype=torch.int64)
    scores = weights.new_empty((B, K, H, W) if return_scores else (0,))
    if B == 0 or Q == 0:
        areas[:, :1] = H * W  # the first class everywhere
        return map, areas, scores.zero_()
    with on(weights):
        programs = min(PROGRAMS, triton.cdiv(RESIDENT * device(weights).multiprocessors, B))
        f = Frame(masks, features, sizes, weights.dtype, PRODUCT, programs, resize_scores)
        rows = 16 * triton.cdiv(Q, 16)
        double = weights.dtype == torch.float64
        # 16 taps that differ from pixel to pixel: one program then, for want of registers
        registers = 168 if f.taps == 4 and not f.scores else 128
        semantic_tiles[(B * f.programs,)](
            weights.contiguous(),
            f.masks,
            *f.tables,
            weights.new_empty((B, f.programs, 2 * Q + K)),
            map.new_empty((B, f.programs, K)),
            weights.new_empty((B, f.programs, rows, PRODUCT[0] * PRODUCT[1])),
            map,
            areas,
            scores if return_scores else None,
            *(Q, K, H, W, *f.tiles, *f.masks.stride()),
            *(f.taps, f.scores, *PRODUCT, CLASSES, RUN, AT_ONCE),
            *(("ieee", 1) if double else ("tf32x3", STAGES)),
            **_options(weights.dtype, registers),
        )
    return map, areas, scores


def segment_map_instance(
    queries: Tensor, masks: Tensor, features: Tensor | None, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::segment_map_instance`."""
    (B, n), (H, W), words = queries.shape, sizes[4:], triton.cdiv(sizes[5], 32)
    exact = torch.float64 if masks.dtype == torch.float64 else torch.float32
    bits = queries.new_zeros((B, n, H, words), dtype=torch.int32)
    areas = torch.zeros_like(queries)
    with on(queries):
        f = Frame(masks, features, sizes, exact, TILE, PROGRAMS)
        sums = queries.new_zeros((B, f.programs, n), dtype=torch.float64)
        if areas.numel() and masks.shape[1]:
            instance[(B * f.programs,)](
                queries.contiguous(),
                f.masks,
                *f.tables,
                bits.new_empty((B, f.programs, n)),
                bits,
                areas,
                sums,
                *(masks.shape[1], n, H, W, words, *f.tiles, *f.masks.stride()),
                *(f.taps, *TILE, RUN),
                **_options(exact),
            )
    return bits, areas, sums.sum(1).to(exact)


def segment_map_cover(bits: Tensor, order: Tensor, width: int) -> Tensor:
    """As `segkern::segment_map_cover`."""
    (B, n, H, words), N = bits.shape, order.shape[1]
    map = bits.new_zeros((B, H, width))
    if map.numel() and n and N:
        with on(bits):
            blocks = triton.cdiv(H * words, WORDS)
            cover[(B * blocks,)](
                bits.contiguous(),
                order.contiguous(),
                map,
                *(n, N, H, width, words, blocks, WORDS),
                **_options(torch.int32),
            )
    return map
