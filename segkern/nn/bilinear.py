"""Bilinear resizing as matrices, for work that never holds the resized maps.

Letters: B image, K class, h w size of the maps, r rows of a band.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbours(
    rows: range, size: int, out: int, device: torch.device | None = None
) -> tuple[int, Tensor]:
    """What rows of a bilinear resize from `size` to `out` are made of.

    Returns:
        the first source row, and weights [r, n] of the n source rows from there on, float64 on
        `device`, as align_corners=False has them. Nothing is copied to a device, which could not
        be captured in a CUDA graph.
    """
    first, last = (
        min(max(int((at + 0.5) * (size / out) - 0.5), 0), size - 1) for at in (rows[0], rows[-1])
    )
    at = torch.arange(rows.start, rows.stop, dtype=torch.float64, device=device)
    place = ((at + 0.5) * (size / out) - 0.5).clamp(min=0)
    low = place.floor().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    source = torch.arange(first, min(last + 1, size - 1) + 1, device=device)
    share = (place - low)[:, None]
    weights = (1 - share) * (source == low[:, None]) + share * (source == high[:, None])
    return first, weights


def resize_matrix(n: int, factor: int, length: int, device: torch.device) -> Tensor:
    """The first `length` rows of a bilinear resize from n to factor x n, as a matrix [length, n]
    float64."""
    eye = torch.eye(n, dtype=torch.float64, device=device)
    return resized(eye, factor * n)[:length]


def resized(matrix: Tensor, out: int) -> Tensor:
    """The columns of a matrix [n, m] resized to [out, m], linearly as bilinear resizing does."""
    if len(matrix) == out:
        return matrix
    return F.interpolate(matrix.mT[None], size=out, mode="linear")[0].mT


def widened(maps: Tensor, width: int) -> Tensor:
    """Maps [B, K, r, w] resized bilinearly to [B, K, r, width]."""
    if maps.shape[3] == width:
        return maps
    return F.interpolate(maps, size=(maps.shape[2], width), mode="bilinear")


def resized_rows(maps: Tensor, rows: range, size: tuple[int, int]) -> Tensor:
    """Some rows of resized maps.

    Args:
        maps: [B, K, h, w] floating.
        rows: r of the rows of the resized maps.
        size: (H, W) of the resized maps.

    Returns:
        [B, K, r, W]; do not write to it.
    """
    first, weights = neighbours(rows, maps.shape[2], size[0], maps.device)
    part = maps[:, :, first : first + weights.shape[1]]
    return widened(torch.einsum("rn,bknw->bkrw", weights.to(maps), part), size[1])


def add_resized_back(grad: Tensor, slope: Tensor, rows: range, size: tuple[int, int]) -> None:
    """Adds what a gradient [B, K, r, W] of `resized_rows` gives for its maps to `grad` [B, K, h,
    w], in place."""
    (_, _, h, w), width = grad.shape, size[1]
    if w != width:  # by a product, which a CPU has sooner than PyTorch's backward
        slope = slope @ resized(torch.eye(w, dtype=grad.dtype, device=grad.device), width)
    first, weights = neighbours(rows, h, size[0], grad.device)
    part = slice(first, first + weights.shape[1])
    grad[:, :, part] += torch.einsum("rn,bkrw->bknw", weights.to(grad), slope)
