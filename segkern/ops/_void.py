"""Void: pixels of the masks that do not count, and the points that go with them.

A mask is sampled from the four pixels around a point, its cell. The rule of all kernels:

    a point counts unless one of the pixels of its cell is void; one that does not is cut out

So what a mask holds at a void pixel changes nothing, and logits on the grid of the masks get a
gradient of exactly 0 at void pixels. Outside of the mask there is no pixel that could be void.

Letters: B image, H W mask, P point. Cell (y, x), from (-1, -1) to (H - 1, W - 1), has the pixels
(y, x), (y, x + 1), (y + 1, x) and (y + 1, x + 1), as far as they exist.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import expect


def expect_void(op: str, void: Tensor, sizes: dict) -> None:
    """Checks void [B, H, ceil(W / 32)] int32, as `_checks.expect` does, after masks of H W."""
    sizes = sizes | {"ceil(W/32)": -(-sizes["W"] // 32)}
    expect(op, "void", void, "B H ceil(W/32)", "int32", sizes)


def void_cells(void: Tensor, W: int) -> Tensor:
    """The cells that have a void pixel, so that a point needs to look up a single bit.

    Args:
        void: [B, H, ceil(W / 32)] int32, packed as `pack_bits` does.
        W: width of the masks.

    Returns:
        [B, H + 1, ceil((W + 1) / 32)] int32; cell (y, x) is bit x + 1 of row y + 1.
    """
    words = F.pad(void, (1, int(W % 32 == 0)))
    right, left = words[..., 1:], words[..., 1:] << 1 | words[..., :-1] >> 31 & 1
    row = right | left
    return F.pad(row, (0, 0, 0, 1)) | F.pad(row, (0, 0, 1, 0))


def counted(points: Tensor, void: Tensor | None, H: int, W: int) -> Tensor:
    """Which points [B, ..., 2] count: [B, ...] bool, all without void [B, H, ceil(W / 32)]."""
    if void is None:
        return torch.ones_like(points[..., 0], dtype=torch.bool)
    cells = void_cells(void, W)
    x, y = (points[..., 0] * W - 0.5).floor(), (points[..., 1] * H - 0.5).floor()
    inside = (x >= -1) & (x < W) & (y >= -1) & (y < H)  # NaN is nowhere
    x, y = (v.where(inside, -1).long() + 1 for v in (x, y))
    place = y * cells.shape[2] + x // 32
    words = cells.flatten(1).gather(1, place.flatten(1)).view_as(place)
    return (words >> (x % 32).int() & 1 == 0) | ~inside


def cut_void(points: Tensor, void: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Points [B, R, P, 2] with those that count first, in their order, and their number [B, R]."""
    counts = counted(points, void, H, W)
    before = counts.cumsum(-1)
    number = before[..., -1:]
    behind = number + torch.arange(counts.shape[-1], device=points.device) - before
    place = torch.where(counts, before - 1, behind)[..., None].expand_as(points)
    return points.scatter(2, place, points), number.squeeze(-1)
