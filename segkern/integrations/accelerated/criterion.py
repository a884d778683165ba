"""The losses of masks of transformers' models, by our matching and our loss kernels.

Letters: B image, R prediction, Q query, T target slot, K class, M channels and h w size of the
features, H W size of the target masks.

`nn.criterion` and `nn.mask_criterion` do the work, without SciPy and without a loop over images.
Random points come from a seed that is drawn from PyTorch's generator once a call, so that
`torch.manual_seed` decides them, as it does in transformers, though they are not the same points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...nn.criterion import Criterion
from ...nn.mask_criterion import FullMaskCriterion
from ...ops.upscale import masks_of
from ...structures.targets import Targets, bucket


class Factors(NamedTuple):
    """The mask logits of R predictions, [Q, h, w] of each, as factors that are not multiplied."""

    embeddings: Tensor  # [B, R, Q, M]
    features: Tensor  # [B, M, h, w]

    def logits(self) -> list[Tensor]:
        """[B, Q, h, w] of each prediction."""
        rows = self.features.movedim(1, 3)
        return [masks_of(e.to(rows.dtype), rows) for e in self.embeddings.unbind(1)]


def packed(
    mask_labels: Sequence[Tensor],  # B of [n_b, H, W]
    class_labels: Sequence[Tensor],  # B of [n_b]
    normalizer: Tensor,  # [] or [1]
    most: int,  # what a mask may hold
) -> Targets | None:
    """The targets as our kernels take them; None where those do not say all that there is.

    That is so for masks of several sizes, which transformers samples each in its own frame for
    matching and padded for the loss, for values that are no integers from 0 to `most`, and for
    masks without a label, which transformers refuses. Empty masks stay, as in transformers.
    """
    if len({m.shape[1:] for m in mask_labels}) != 1:
        return None
    if [len(m) for m in mask_labels] != [len(c) for c in class_labels]:
        return None
    B, T = len(mask_labels), bucket(max(len(m) for m in mask_labels))
    device = mask_labels[0].device
    masks = torch.zeros(B, T, *mask_labels[0].shape[1:], dtype=torch.uint8, device=device)
    labels = torch.zeros(B, T, dtype=torch.int64, device=device)
    count = torch.tensor([len(m) for m in mask_labels], device=device)
    whole = []
    for b, (mask, label) in enumerate(zip(mask_labels, class_labels, strict=True)):
        into = masks[b, : len(mask)]
        into.copy_(mask)
        whole.append(((into == mask) & (into <= most)).all())
        labels[b, : len(label)] = label
    if not torch.stack(whole).all():
        return None
    ids = torch.arange(B, device=device)
    return Targets(labels, masks, count, ids, normalizer=normalizer.reshape(()))


def _named(losses: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
    """Of values [R] those of the last prediction under their names, those of the others under
    names with a number, each a tensor of its own: transformers multiplies them in place. Those of
    masks have the shape and dtype that a division by `total` gives in transformers."""
    out, R = {}, len(losses["loss_mask"])
    for r, end in enumerate([f"_{r}" for r in range(R - 1)] + [""]):
        for name, values in losses.items():
            value = values[r].clone()
            if name != "loss_cross_entropy":
                value = value.to(torch.result_type(value, total)).reshape(total.shape)
            out[name + end] = value
    return out


def point_losses(
    theirs: nn.Module,  # the model's criterion, or one that holds the same numbers
    masks: Factors | Tensor,  # or logits [B, Q, h, w]
    classes: Tensor,  # [B, R, Q, K + 1], of logits [B, Q, K + 1]
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    auxiliary: Sequence[dict[str, Tensor]] | None,
) -> dict[str, Tensor] | None:
    """Mask2Former's losses, unweighted, by transformers' names; None where `packed` is."""
    total = theirs.get_num_masks(class_labels, device=classes.device)
    targets = packed(mask_labels, class_labels, total, most=255)
    if targets is None:
        return None
    own = Criterion(
        classes.shape[-1] - 1,
        *(theirs.matcher.cost_class, theirs.matcher.cost_mask, theirs.matcher.cost_dice),
        num_points=theirs.num_points,
        oversample_ratio=theirs.oversample_ratio,
        importance_sample_ratio=theirs.importance_sample_ratio,
    ).eval()
    own.empty_weight = theirs.empty_weight

    def scored(masks: Factors, classes: Tensor) -> dict[str, Tensor]:
        own.seed = torch.randint(2**63 - 1, (1,), device=classes.device)
        return own(classes, *masks, targets)[1]

    if isinstance(masks, Factors):
        return _named(scored(masks, classes), total)
    found = []
    for part in [*_pairs(auxiliary), (masks, classes)]:
        logits, of_classes = part
        # logits are the product of themselves with a matrix of ones and zeros
        each = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        factors = Factors(each.expand(len(logits), 1, -1, -1), logits)
        found.append(scored(factors, of_classes[:, None]))
    return _named({name: torch.cat([f[name] for f in found]) for name in found[0]}, total)


def whole_mask_losses(
    theirs: nn.Module,
    masks: Tensor,  # [B, Q, h, w]
    classes: Tensor,  # [B, Q, K + 1]
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    auxiliary: Sequence[dict[str, Tensor]] | None,
) -> dict[str, Tensor] | None:
    """MaskFormer's losses, unweighted, by transformers' names; None where `packed` is."""
    costs = theirs.matcher.cost_class, theirs.matcher.cost_mask, theirs.matcher.cost_dice
    total = theirs.get_num_masks(class_labels, device=classes.device)
    targets = packed(mask_labels, class_labels, total, most=1) if all(costs) else None
    if targets is None:
        return None
    own = FullMaskCriterion(classes.shape[-1] - 1, *costs)
    own.empty_weight = theirs.empty_weight
    pairs = [*_pairs(auxiliary), (masks, classes)]
    logits, of_classes = (torch.stack(parts, 1) for parts in zip(*pairs))
    return _named(own(of_classes, logits, None, targets)[1], total)


def _pairs(auxiliary: Sequence[dict[str, Tensor]] | None) -> list[tuple[Tensor, Tensor]]:
    names = "masks_queries_logits", "class_queries_logits"
    return [tuple(part[name] for name in names) for part in auxiliary or ()]
