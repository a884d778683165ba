"""The training loss: all predictions of all images, matched to their targets and scored.

Letters: B image, R prediction, Q query, T target slot, K class, P point,
M channels and h w size of the mask features.

    cost         class + cross-entropy + dice cost of all pairs at P random points  [B, R, Q, T]
    assignment   the cheapest one-to-one assignment of targets to queries
    class loss   weighted cross-entropy of all queries, "no object" where none is assigned
    mask losses  cross-entropy and dice of the assigned pairs, at uncertain points, over the
                 number of targets (`Targets.normalizer`)
    loss         weighted sum over losses and predictions

Two things keep it small: matching samples the mask features and multiplies then, and the loss
builds the logits of assigned queries only. Nothing is read back by the host and no shape depends
on a value, so a step can be captured in a CUDA graph. Padded slots weigh zero, and so do points
by a void pixel (`Targets.void`).
Source: Mask2Former (Cheng et al., CVPR 2022), section 3.3; DETR (Carion et al., ECCV 2020).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import linear_assignment, matching_cost, point_mask_loss, random_points
from ..ops.point_sample import MATCHING
from ..structures.targets import Targets


class _Product(torch.autograd.Function):
    """a b^T of a [B, N, M] and b [B, S, M]; the gradient of b has the layout of b, [B, S, M].

    The gradient of `a @ b.mT` would come as [B, M, S], transposed in memory: what reads it next
    would have to copy a map of all pixels first.
    """

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad @ b, grad.mT @ a


class Criterion(nn.Module):
    """Mask2Former's loss.

    Args:
        num_labels: K.
        class_weight, mask_weight, dice_weight: of the three losses, and of a pair's three costs.
        no_object_weight: of "no object" in the class loss, where a label weighs 1.
        num_points: P, in matching and in the mask losses.
        oversample_ratio: candidates drawn for each point of the mask losses, at least 1.
        importance_sample_ratio: share of the points taken from the most uncertain candidates, in
            [0, 1].
        impl: "kernel", or "reference" for plain PyTorch.
    """

    def __init__(
        self,
        num_labels: int,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        impl: str = "kernel",
    ):
        super().__init__()
        self.weights = (class_weight, mask_weight, dice_weight)
        self.points = (num_points, oversample_ratio, importance_sample_ratio)
        self.impl = impl
        self.register_buffer("empty_weight", class_weights(num_labels, no_object_weight))
        self.register_buffer("seed", torch.zeros(1, dtype=torch.int64))

    def forward(
        self,
        class_logits: Tensor,  # [B, R, Q, K + 1]
        mask_embed: Tensor,  # [B, R, Q, M]
        features: Tensor,  # [B, M, h, w]
        targets: Targets,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Matches and scores.

        In training mode the seed of the random points then advances by one.

        Args:
            class_logits: [B, R, Q, K + 1] floating; the last class is "no object".
            mask_embed: [B, R, Q, M] floating; mask logits are its product with the features.
            features: [B, M, h, w] floating.
            targets: of the same B images, on the same device.

        Returns:
            The loss [], and unweighted "loss_cross_entropy", "loss_mask", "loss_dice", each [R],
            the last prediction at the end; float32 (float64 for float64 logits).
        """
        assigned = self.match(class_logits, mask_embed, features, targets)
        query_of_target, target_of_query = assigned
        active = active_slots(query_of_target, targets)  # [B, R, T]
        loss = class_loss(class_logits, target_of_query, targets, self.empty_weight)
        losses = {"loss_cross_entropy": loss}
        bce, dice = point_mask_loss(
            matched_logits(query_of_target, mask_embed, features),
            targets.masks,
            active,
            targets.ids,
            self.seed,
            *self.points,
            void=targets.void,
            impl=self.impl,
        )
        total = normalizer(targets).to(bce.dtype)
        losses |= {"loss_mask": bce.sum((0, 2)) / total, "loss_dice": dice.sum((0, 2)) / total}
        loss = sum(w * value.sum() for w, value in zip(self.weights, losses.values()))
        if self.training:
            with torch.no_grad():
                self.seed += 1
        return loss, losses

    @torch.no_grad()
    def match(
        self, class_logits: Tensor, mask_embed: Tensor, features: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """The assignment of least cost; arguments as in `forward`.

        Returns:
            The query of each target [B, R, T] and the target of each query [B, R, Q], int64, -1
            where there is none.
        """
        B, R = class_logits.shape[:2]
        prediction = torch.arange(R, device=features.device).expand(B, R)
        ids = torch.stack(
            (targets.ids[:, None].expand(B, R), prediction, torch.full_like(prediction, MATCHING)),
            -1,
        )
        points = random_points(self.seed, ids, self.points[0], self.impl)  # [B, R, P, 2]
        cost = matching_cost(
            class_logits,
            mask_embed,
            features,
            targets.labels,
            targets.masks,
            points,
            targets.count,
            *self.weights,
            void=targets.void,
            impl=self.impl,
        )
        n_targets = targets.count[:, None].expand(B, R)
        return linear_assignment(cost, n_targets, check=False, impl=self.impl)


def class_weights(num_labels: int, no_object_weight: float) -> Tensor:
    """[K + 1]: 1 of each label, then that of "no object"."""
    weights = torch.ones(num_labels + 1)
    weights[-1] = no_object_weight
    return weights


def active_slots(query_of_target: Tensor, targets: Targets) -> Tensor:
    """The slots that hold a target which has found a query, [B, R, T] bool, of the query of each
    target [B, R, T]."""
    slots = torch.arange(query_of_target.shape[2], device=query_of_target.device)
    return (query_of_target >= 0) & (slots < targets.count[:, None, None])


def matched_logits(query_of_target: Tensor, masks: Tensor, features: Tensor | None) -> Tensor:
    """Mask logits of the queries that targets have found, those of any query in other slots.

    Args:
        query_of_target: [B, R, T] int64, -1 where there is none.
        masks: [B, R, Q, M] embeddings; without features mask logits [B, R, Q, h, w].
        features: [B, M, h, w] or None.

    Returns:
        [B, R, T, h, w].
    """
    index = query_of_target.clamp(min=0).view(*query_of_target.shape, *[1] * (masks.ndim - 3))
    chosen = masks.gather(2, index.expand(-1, -1, -1, *masks.shape[3:]))
    if features is None:
        return chosen
    rows = features.flatten(2).transpose(1, 2).to(chosen.dtype)  # [B, h * w, M]
    logits = _Product.apply(chosen.flatten(1, 2), rows)  # [B, R * T, h * w]
    return logits.unflatten(1, chosen.shape[1:3]).unflatten(3, features.shape[2:])


def normalizer(targets: Targets) -> Tensor:
    """[]: number of targets that losses of masks are divided by."""
    if targets.normalizer is not None:
        return targets.normalizer
    return targets.count.sum().clamp(min=1)


def class_loss(
    class_logits: Tensor, target_of_query: Tensor, targets: Targets, empty_weight: Tensor
) -> Tensor:
    """The mean cross entropy over images and queries, each weighted by its class.

    Args:
        class_logits: [B, R, Q, K + 1] floating; the last class is "no object".
        target_of_query: [B, R, Q] int64, -1 where there is none.
        targets: of the same B images.
        empty_weight: [K + 1], as `class_weights` makes it.

    Returns:
        [R] float32 (float64).
    """
    B, R, Q, _ = class_logits.shape
    nothing = class_logits.shape[3] - 1
    label = targets.labels[:, None].expand(B, R, -1).gather(2, target_of_query.clamp(min=0))
    label = label.where(target_of_query >= 0, nothing)  # [B, R, Q]
    exact = torch.promote_types(class_logits.dtype, torch.float32)
    weight = empty_weight.to(exact)
    total = weight[label].sum((0, 2))
    if targets.matched is not None:  # each weighs 1, the other queries as "no object"
        matched = targets.matched.to(exact)
        total = matched + (B * Q - matched) * weight[nothing]
    each = F.cross_entropy(
        class_logits.to(exact).flatten(0, 2), label.flatten(), weight, reduction="none"
    )
    return each.view(B, R, Q).sum((0, 2)) / total
