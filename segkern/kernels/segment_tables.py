"""Tables of what each output row and column of segment_map reads, and the frame of a call.

Letters: B image, Q query, C channel, h w mask logits, H W result, n positions along an axis.

The model resized an image to its input and padded it; the result undoes both. A position of the
result lies between two positions of the resized image, and each of these between two mask logits:
two to four taps. `tabulate` makes the table of an axis in float64, on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED
from .segment_taps import SIZES

CHUNKS = 8  # of embeddings' products: features in the precision of the sums exist for one only


@triton.jit
def _resized(i, size, out):
    """Position i of a line of `size` resized to `out`: between places a and b, b's share."""
    place = tl.maximum((2 * i + 1) * size - out, 0)  # in units of 1 / (2 out)
    a = place // (2 * out)
    share = (place % (2 * out)).to(tl.float64) / (2 * out).to(tl.float64)
    return a, tl.minimum(a + 1, size - 1), share


@triton.jit(do_not_specialize=SIZES)
def _tabulate(
    place,  # [TAPS, n] int32
    weight,  # [TAPS, n], or [6, n]
    source,
    padded,
    image,
    n,
    TAPS: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there, wide = i < n, n.to(tl.int64)
    a, b, share = _resized(i, image.to(tl.int64), wide)
    p0, p1, u = _resized(a, source.to(tl.int64), padded.to(tl.int64))
    p2, p3, v = _resized(b, source.to(tl.int64), padded.to(tl.int64))
    first, second = 1 - share, share
    if SCORES:  # the two positions apart
        tl.store(weight + 4 * wide + i, first, there)
        tl.store(weight + 5 * wide + i, second, there)
        first, second = 1.0, 1.0
    w0, w1, w2, w3 = first * (1 - u), first * u, second * (1 - v), second * v
    if TAPS == 4:
        tl.store(place + i, p0, there)
        tl.store(place + wide + i, p1, there)
        tl.store(place + 2 * wide + i, p2, there)
        tl.store(place + 3 * wide + i, p3, there)
        tl.store(weight + i, w0, there)
        tl.store(weight + wide + i, w1, there)
        tl.store(weight + 2 * wide + i, w2, there)
        tl.store(weight + 3 * wide + i, w3, there)
    else:  # all lie in the TAPS places from the first on
        for t in tl.static_range(TAPS):
            at = p0 + t
            total = tl.where(p0 == at, w0, 0.0) + tl.where(p1 == at, w1, 0.0)
            total += tl.where(p2 == at, w2, 0.0) + tl.where(p3 == at, w3, 0.0)
            tl.store(place + t * wide + i, tl.minimum(at, source - 1), there)
            tl.store(weight + t * wide + i, total, there)


def tabulate(
    source: int, padded: int, image: int, output: int, n_taps: int, scores: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Places and weights of every output position along one axis.

    Args:
        source, padded, image, output: the axis' size in mask logits, padded input, image, result.
        n_taps: as `count_taps` says; 4 for `scores`.
        scores: taps of two positions in the image, and (weights 4 and 5) their shares.
        like: says the weights' dtype and the device.

    Returns:
        [n_taps, output] int32; [n_taps, output], or [6, output] for `scores`.
    """
    place = torch.empty((n_taps, output), dtype=torch.int32, device=like.device)
    weight = torch.empty((6 if scores else n_taps, output), dtype=like.dtype, device=like.device)
    _tabulate[(triton.cdiv(output, 128),)](
        *(place, weight, source, padded, image, output),
        *(n_taps, scores, 128),
        num_warps=4,
        **FUSED,
    )
    return place, weight


def count_taps(source: int, padded: int, image: int, output: int) -> int:
    """Places next to each other that hold all taps of any position; 4 where they lie apart."""
    if image == output or source == padded:
        return 2
    return 3 if source <= padded else 4


def mask_logits(masks: Tensor, features: Tensor | None, exact: torch.dtype) -> Tensor:
    """Mask logits [B, Q, h, w]: as they are, or the product of embeddings and features.

    Offsets within a map fit into 32 bits.
    """
    h, w = (masks if features is None else features).shape[2:]
    if h * w >= 2**31:
        raise ValueError(f"segment_map: mask logits of {h} x {w} pixels are too large")
    if features is None:
        span = (h - 1) * masks.stride(2) + (w - 1) * masks.stride(3)
        return masks if span < 2**31 else masks.contiguous()
    out = masks.new_empty((*masks.shape[:2], h, w), dtype=exact)
    embed, step = masks.to(exact), triton.cdiv(h, CHUNKS)
    for y in range(0, h, step):
        part = features[:, :, y : y + step].to(exact).flatten(2)
        rows = out[:, :, y : y + step]
        rows.copy_((embed @ part).view(rows.shape))
    return out


class Frame:
    """What the kernels of one call share: tables of both axes, tiles, programs, strides."""

    def __init__(self, masks, features, sizes, exact, tile, most_programs, scores=False):
        padded, image, self.size = sizes[:2], sizes[2:4], sizes[4:]
        if min(sizes) < 1 or image[0] > padded[0] or image[1] > padded[1]:
            raise RuntimeError(
                "segment_map: sizes must be positive, the image within the padded input"
            )
        self.masks = mask_logits(masks, features, exact)
        axes = list(zip(self.masks.shape[2:], padded, image, self.size))
        self.scores = scores and image != self.size
        self.taps = 4 if self.scores else max(count_taps(*axis) for axis in axes)
        like = masks.new_empty(0, dtype=exact)
        self.tables = [t for axis in axes for t in tabulate(*axis, self.taps, self.scores, like)]
        tiles_x = triton.cdiv(self.size[1], tile[1])
        tiles = triton.cdiv(self.size[0], tile[0]) * tiles_x
        self.programs = min(tiles, most_programs)
        self.tiles = tiles, tiles_x, self.programs
