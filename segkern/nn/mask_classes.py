"""Classes of what lies under masks: how much a mask covers each place of a map, the mean of the
map's states there, and the loss of the classes that the true masks give.

Letters: B image, M mask, h w places of a map, N = h w, D channels of their states, K class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures.targets import Targets
from .criterion import normalizer


def cover(
    masks: Tensor, features: Tensor | None, grid: tuple[int, int], stride: int = 1
) -> Tensor:
    """How much each mask covers each place, [B, M, N] in (0, 1): the sigmoid of the mean of its
    logits there.

    Args:
        masks: logits [B, M, *, *], or embeddings [B, M, C], whose products with the features are
            the logits.
        features: [B, C, stride h, stride w]; None with logits.
        grid: (h, w).
        stride: of the places, in pixels of the features.
    """
    if features is None:
        logits = F.interpolate(masks, grid, mode="bilinear").flatten(2)
    else:  # the mean of products with the features is the product with their mean
        logits = masks @ F.avg_pool2d(features, stride).flatten(2)
    return logits.sigmoid()


def true_cover(targets: Targets, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The share of each place [B, T, N] that each true mask has, a mask of any size stretched to
    the map, as the criterion stretches it: pad images and masks alike."""
    return F.interpolate(targets.masks.to(dtype), grid, mode="area").flatten(2)


def mean_under(weights: Tensor, states: Tensor) -> Tensor:
    """The mean state [B, M, D] under masks; of one that covers nothing 0.

    Args:
        weights: of `cover` or `true_cover`, [B, M, N].
        states: [B, N, D].
    """
    return weights @ states / (1 + weights.sum(2, keepdim=True))


def true_class_loss(logits: Tensor, targets: Targets) -> Tensor:
    """[]: the mean cross entropy of class logits [B, T, K + 1] under the true masks."""
    each = F.cross_entropy(logits.mT, targets.labels, reduction="none")  # [B, T]
    slots = torch.arange(each.shape[1], device=each.device)
    return each.where(slots < targets.count[:, None], 0).sum() / normalizer(targets)
