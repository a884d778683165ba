"""Stochastic depth: residual branches that training leaves out at random, image by image.

    y = x + keep branch(x),    keep = 0 with probability p, else 1 / (1 - p), drawn for each image

What is drawn comes from outside of a block, so that a block that runs again in backward
draws nothing. A branch that stays adds x inside its last product.
Letters: B image, C channels, h w map size.
Source: Deep Networks with Stochastic Depth (Huang et al., ECCV 2016).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .recompute import plus


def rates(last: float, depth: int) -> list[float]:
    """The probabilities of `depth` blocks in a row: 0 of the first, `last` of the last, those
    between rise evenly."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def draw(
    rate: float, images: int, device: torch.device, training: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What the two branches of a block are multiplied with, [B, 1, 1, 1], 0 where an image leaves
    the branch out; None where all stay."""
    if not training or rate == 0:
        return None, None
    kept = torch.rand(2, images, 1, 1, 1, device=device) >= rate
    return (kept / (1 - rate)).unbind(0)


def add(
    x: Tensor,  # [B, h, w, C]
    branch: Callable[[Tensor | None], Tensor],  # to [B h w, C], with what it is given added
    keep: Tensor | None,  # [B, 1, 1, 1]
) -> Tensor:  # [B, h, w, C]
    """x + keep branch."""
    flat = x.flatten(0, 2)
    if keep is None:
        return branch(flat).view_as(x)
    out = branch(None)
    out = (out.view(len(x), -1) * keep.view(-1, 1).to(out.dtype)).view_as(out)
    return plus(out, flat).view_as(x)


def left_out(branch: Tensor, rate: float) -> Tensor:
    """A branch [B, ...] in training: 0 for images drawn at random, the others over 1 - rate."""
    if rate == 0:
        return branch
    kept = branch.new_empty(len(branch), *(1,) * (branch.ndim - 1)).bernoulli_(1 - rate)
    return branch * (kept / (1 - rate))
