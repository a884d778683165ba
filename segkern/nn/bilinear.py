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
