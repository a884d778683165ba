"""Plain references for the models that classify pixels or find objects: losses from the papers'
formulas, with SciPy's matching."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from segkern.structures.targets import Targets


def targets_of(size, labels=5, counts=(3, 1), semantic=False, seed=0):
    """Two images' masks and labels in lists, packed, and a map of labels with void pixels."""
    g = torch.Generator().manual_seed(seed)
    masks = [(torch.rand(n, *size, generator=g) > 0.6) for n in counts]
    classes = [torch.randint(labels, (n,), generator=g) for n in counts]
    packed = Targets.from_lists(masks, classes, size, labels)
    maps = torch.randint(labels, (len(counts), *size), generator=g)
    maps[:, ::5] = 255
    return masks, classes, packed._replace(semantic=maps.to(torch.uint8)), maps


def semantic_loss(logits, maps):
    """Mean binary cross entropy over labelled pixels and classes, of logits [B, K, H, W]."""
    z, known = logits.movedim(1, -1), maps != 255
    truth = F.one_hot(maps.where(known, 0), logits.shape[1]).to(z.dtype)
    return F.binary_cross_entropy_with_logits(z[known], truth[known])


def instance_loss(classes, masks, coarse, truths, labels, config):
    """The weighted sum, cross entropy and dice loss.

    Args:
        classes: [B, Q, K + 1].
        masks: logits [B, Q, h, w], which are scored.
        coarse: the same or at a larger stride, which are matched.
        truths, labels: of each image [n, H, W] bool and [n].
        config: has the weights.
    """
    nothing = classes.shape[2] - 1
    wanted = torch.full(classes.shape[:2], nothing)
    dice, total = 0, 0
    for b, (truth, label) in enumerate(zip(truths, labels)):
        size = coarse.shape[2:]
        small = F.interpolate(truth[None].byte(), size, mode="nearest")[0].flatten(1)
        s = coarse[b].detach().sigmoid().flatten(1)
        small = small.to(s.dtype)
        pairs = 1 - (2 * s @ small.T + 1) / (s.sum(1)[:, None] + small.sum(1) + 1)
        score = classes[b].detach().softmax(-1)[:, label]
        cost = config.dice_weight * pairs - config.class_weight * score
        for q, t in zip(*linear_sum_assignment(np.asarray(cost))):
            wanted[b, q] = label[t]
            x = F.interpolate(masks[b : b + 1, q : q + 1], truth.shape[1:], mode="bilinear")
            x, y = x.sigmoid(), truth[t].to(x.dtype)
            dice = dice + 1 - (2 * (x * y).sum() + 1) / (x.sum() + y.sum() + 1)
        total += len(label)
    weight = torch.ones(nothing + 1, dtype=classes.dtype)
    weight[-1] = config.no_object_weight
    entropy = F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weight)
    return config.class_weight * entropy + config.dice_weight * dice / total, entropy, dice / total


def shaken(model):
    """The model in float64 with weights that are not where they start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()
