"""Void maps for tests, and which points count, pixel by pixel."""

import math

import torch
from torch import Tensor

from segkern.ops import pack_bits, unpack_bits


def random_void(B=2, H=31, W=45, share=0.3, device=None, seed=5) -> Tensor:
    """void [B, H, ceil(W / 32)] int32, blobs over `share` of each image."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B, 1, 6, 6, generator=g, device="cpu")
    height = torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear").flatten(1)
    place = height.argsort(1).argsort(1)  # rank of each pixel
    void = (place < round(share * H * W)).view(B, H, W)
    return pack_bits(void)[0].to(device or torch.get_default_device())


def counts_by_hand(points: Tensor, void: Tensor, W: int) -> Tensor:
    """[B, P] bool of points [B, P, 2] and void [B, H, ceil(W / 32)]."""
    pixels, H = unpack_bits(void, W).cpu(), void.shape[1]
    bad = torch.zeros(points.shape[:2], dtype=torch.bool, device="cpu")
    for b, image in enumerate(points.double().cpu()):
        for p, (x, y) in enumerate(image.tolist()):
            if not (math.isfinite(x) and math.isfinite(y)):
                continue
            left, top = math.floor(x * W - 0.5), math.floor(y * H - 0.5)
            cell = [(i, j) for i in (top, top + 1) for j in (left, left + 1)]
            bad[b, p] = any(pixels[b, i, j] for i, j in cell if 0 <= i < H and 0 <= j < W)
    return ~bad.to(points.device)
