"""Boundaries of masks, by which boundary AP compares them.

Letters: H W image size.

    boundary = mask without what remains of it after d erosions by a square of 3 x 3 pixels,
    d = 2 % of the image's diagonal, at least 1; beyond the image there is no mask

Source: Boundary IoU (Cheng et al., CVPR 2021), and its code, which rounds d to even at a half.
"""

import math

import numpy as np

DILATION = 0.02


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that lie near its edge: [H, W] bool of [H, W] bool."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return mask
    reach = max(1, round(DILATION * math.hypot(*mask.shape)))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inner = np.pad(mask[box], reach)
    for _ in range(2):  # a square is a run of rows, then one of columns
        inner = np.ascontiguousarray(_runs(inner, 2 * reach + 1).T)
    out = mask.copy()
    out[box] &= ~inner
    return out


def _runs(inside: np.ndarray, length: int) -> np.ndarray:
    """Where this row and the next ones, `length` in all, are inside."""
    done = 1
    while done < length:
        step = min(done, length - done)
        inside = inside[:-step] & inside[step:]
        done += step
    return inside
