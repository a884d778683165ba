"""Sine position embedding and pixel centres: they depend on the sizes of the feature maps alone.

Letters: C channel, L level, S pixels of all levels, h w size of a level.

Both are kept (`runtime.constants`): computed once for each set of arguments.
"""

import math

import torch
from torch import Tensor

from ..runtime.constants import constant


@constant
def sine_position(
    shapes: tuple[tuple[int, int], ...], channels: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Sine embedding of the pixel centres of all levels.

    The first half of the channels encodes y, the second x; within a half, sine and cosine
    alternate with wavelengths from 2 pi to 2 pi * 10000. Coordinates are the row or column counted
    from 1, divided by the level's size and times 2 pi.

    Args:
        shapes: (h, w) of each level.
        channels: C, a multiple of 4.
        device: device of the result.
        dtype: dtype of the result; computed in float32 at least.

    Returns:
        [S, C], levels one after the other, rows before columns. Shared: do not write to it.

    Source: DETR (Carion et al., ECCV 2020), as in Mask2Former (Cheng et al., CVPR 2022).
    """
    half = channels // 2
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    pair = torch.arange(half // 2, device=device, dtype=exact)
    wavelength = 10000.0 ** (2 * pair / half)  # [C/4]

    def encode(n: int) -> Tensor:  # [n, C/2]
        at = torch.arange(1, n + 1, device=device, dtype=exact)
        # by its last value: n + 1e-6 would be a symbol in a graph, which torch.export cannot save
        at = at / (at[-1:] + 1e-6) * (2 * math.pi)
        angle = at[:, None] / wavelength
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)

    levels = []
    for h, w in shapes:
        y = encode(h)[:, None].expand(h, w, half)
        x = encode(w)[None].expand(h, w, half)
        levels.append(torch.cat((y, x), -1).flatten(0, 1))
    return torch.cat(levels).to(dtype)


@constant
def pixel_centres(
    shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Centres of the pixels of all levels, x then y, as fractions of the level's size.

    Args:
        shapes: (h, w) of each level.
        device: device of the result.
        dtype: float32 or float64.

    Returns:
        [1, S, 1, 2] in (0, 1), levels one after the other, rows before columns. Shared: do not
        write to it.
    """
    levels = []
    for h, w in shapes:
        y = (torch.arange(h, device=device, dtype=dtype) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=dtype) + 0.5) / w
        levels.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), -1).flatten(0, 1))
    return torch.cat(levels)[None, :, None]
