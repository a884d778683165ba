r"""The loss of models that score whole masks: predictions matched to targets, focal and dice loss.

Letters: B image, R prediction, Q query, T target slot, K class, M channels and h w size of the
features, H W size of the target masks.

    x = mask logits, s = sigmoid(x), t = target mask, u = -x inside of the mask and x outside,
    a = 1/4 inside and 3/4 outside
    focal = mean over pixels of  a sigmoid(u)^2 softplus(u)
    dice  = 1 - (2 sum s t + 1) / (sum s + sum t + 1)

    cost         focal + dice of all pairs on the maps' pixels, the masks brought there by their
                 nearest pixels, less the probability of the class                 [B, R, Q, T]
    assignment   the cheapest one-to-one assignment of targets to queries
    class loss   weighted cross entropy of all queries, "no object" where none is assigned
    mask losses  focal and dice of the assigned pairs on the masks' pixels, the logits resized
                 bilinearly, over the number of targets (`Targets.normalizer`)
    loss         weighted sum over losses and predictions

Neither the logits of all queries nor the resized ones of the assigned are ever whole: both are
formed a band of rows at a time, and backward forms the band again. As in `criterion`, nothing is
read back by the host, padded slots weigh zero, and so do void pixels (`Targets.void`).
Source: MaskFormer (Cheng et al., NeurIPS 2021), section 3; focal loss: Lin et al., ICCV 2017.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import linear_assignment, unpack_bits
from ..ops._bands import rows_at_once
from ..ops._checks import exact_dtype
from ..ops.matching_cost import BOUND
from ..structures.targets import Targets
from .bilinear import add_resized_back, resized_rows
from .criterion import active_slots, class_loss, class_weights, matched_logits, normalizer


class FullMaskCriterion(nn.Module):
    """Focal, dice and class loss of whole masks, after matching by the same three.

    Args:
        num_labels: K.
        class_weight, focal_weight, dice_weight: of the three losses, and of a pair's three costs;
            one of 0 is left out, of the losses that are returned too.
        no_object_weight: of "no object" in the class loss, where a label weighs 1.
        class_cost: weight of the class in matching, where it is not `class_weight`.
    """

    def __init__(
        self,
        num_labels: int,
        class_weight: float = 1.0,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object_weight: float = 0.1,
        class_cost: float | None = None,
    ):
        super().__init__()
        self.weights = {
            "loss_cross_entropy": class_weight,
            "loss_mask": focal_weight,
            "loss_dice": dice_weight,
        }
        self.costs = (
            class_weight if class_cost is None else class_cost,
            focal_weight,
            dice_weight,
        )
        self.register_buffer("empty_weight", class_weights(num_labels, no_object_weight))

    def forward(
        self,
        class_logits: Tensor,  # [B, R, Q, K + 1]
        masks: Tensor,  # [B, R, Q, M], or [B, R, Q, h, w]
        features: Tensor | None,  # [B, M, h, w]
        targets: Targets,
        coarse: Tensor | None = None,  # [B, M, h', w']
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Matches and scores.

        Args:
            class_logits: [B, R, Q, K + 1] floating; the last class is "no object".
            masks: [B, R, Q, M] floating, embeddings, whose product with the features are the mask
                logits; or, without features, mask logits [B, R, Q, h, w].
            features: [B, M, h, w] floating or None.
            targets: of the same B images, on the same device.
            coarse: features of another size by which pairs are matched; None takes `features`.

        Returns:
            The loss [], and unweighted "loss_cross_entropy", "loss_mask" (focal), "loss_dice",
            each [R], the last prediction at the end; float32 (float64 for float64 logits).
        """
        assigned = self.match(class_logits, masks, features if coarse is None else coarse, targets)
        query_of_target, target_of_query = assigned
        active = active_slots(query_of_target, targets)  # [B, R, T]
        logits = matched_logits(query_of_target, masks, features)  # [B, R, T, h, w]
        losses, (_, focal, dice) = {}, self.weights.values()
        if self.weights["loss_cross_entropy"]:
            losses["loss_cross_entropy"] = class_loss(
                class_logits, target_of_query, targets, self.empty_weight
            )
        each = mask_losses(logits, targets.masks, targets.void, bool(focal), bool(dice))
        for name, value in zip(("loss_mask", "loss_dice"), each):
            if value is not None:
                total = normalizer(targets).to(value.dtype)
                losses[name] = value.where(active, 0).sum((0, 2)) / total
        return sum(self.weights[name] * value.sum() for name, value in losses.items()), losses

    @torch.no_grad()
    def match(
        self, class_logits: Tensor, masks: Tensor, features: Tensor | None, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """The assignment of least cost; arguments as in `forward`.

        Returns:
            The query of each target [B, R, T] and the target of each query [B, R, Q], int64, -1
            where there is none.
        """
        with torch.autocast(masks.device.type, enabled=False):
            cost = self._cost(class_logits, masks, features, targets)
        n_targets = targets.count[:, None].expand(cost.shape[:2])
        return linear_assignment(cost, n_targets, check=False)

    def _cost(
        self, class_logits: Tensor, masks: Tensor, features: Tensor | None, targets: Targets
    ) -> Tensor:
        """[B, R, Q, T], finite; padded slots hold anything finite."""
        to_class, to_focal, to_dice = self.costs
        cost = masks.new_zeros((), dtype=exact_dtype(masks))
        if to_class:
            scores = class_logits.to(cost.dtype).softmax(-1)
            labels = targets.labels.clamp(0, scores.shape[3] - 1)[:, None, None]
            cost = cost - to_class * scores.gather(3, labels.expand(*scores.shape[:3], -1))
        if to_focal or to_dice:
            focal, dice = mask_costs(masks, features, targets, bool(to_focal), bool(to_dice))
            cost = cost + to_focal * focal + to_dice * dice
        cost = cost.expand(*class_logits.shape[:3], targets.labels.shape[1])
        return cost.nan_to_num(BOUND, BOUND, BOUND).clamp(-BOUND, BOUND)


def mask_costs(
    masks: Tensor, features: Tensor | None, targets: Targets, focal: bool, dice: bool
) -> tuple[Tensor | float, Tensor | float]:
    """Focal and dice loss of all pairs, by two products with the targets in bands of rows.

    Args:
        masks, features, targets: as in `FullMaskCriterion.forward`.
        focal, dice: whether it is wanted; else it is 0.

    Returns:
        each [B, R, Q, T] float32 (float64).
    """
    h, w = (masks if features is None else features).shape[-2:]
    (B, R, Q), exact = masks.shape[:3], exact_dtype(masks)
    truth = F.interpolate(targets.masks, (h, w), mode="nearest")  # [B, T, h, w]
    counts = torch.ones_like(truth[:, :1])
    if targets.void is not None:
        void = unpack_bits(targets.void, targets.masks.shape[3])[:, None].byte()
        counts = 1 - F.interpolate(void, (h, w), mode="nearest")
        truth = truth * counts
    total, overlap, size = (
        masks.new_zeros(B, R * Q, n, dtype=exact) for n in (len(truth[0]), len(truth[0]), 1)
    )
    for rows in _bands(masks, h, B * R * Q * w):
        x = _rows_of_logits(masks, features, rows).to(exact)  # [B, R Q, r w]
        t, c = (v[:, :, rows.start : rows.stop].flatten(2).mT.to(exact) for v in (truth, counts))
        s = x.sigmoid()
        if dice:
            overlap += s @ t
            size += s @ c
        if focal:
            outside = F.softplus(x)
            inside = (outside - x).mul_((1 - s).square_()).mul_(0.25)
            outside.mul_(s.square_()).mul_(0.75)
            total += outside @ c
            total += inside.sub_(outside) @ t
    pixels = counts.sum((2, 3), dtype=exact)[..., None].clamp(min=1)  # [B, 1, 1]
    area = truth.sum((2, 3), dtype=exact)[:, None]  # [B, 1, T]
    costs = total / pixels, 1 - (2 * overlap + 1) / (size + area + 1)
    return tuple(cost.unflatten(1, (-1, Q)) for cost in costs)


def _rows_of_logits(masks: Tensor, features: Tensor | None, rows: range) -> Tensor:
    """Logits [B, R Q, r w] of some rows of the maps."""
    maps = (masks if features is None else features)[..., rows.start : rows.stop, :].flatten(-2)
    return maps.flatten(1, 2) if features is None else masks.flatten(1, 2).to(maps.dtype) @ maps


def mask_losses(
    logits: Tensor, masks: Tensor, void: Tensor | None, focal: bool = True, dice: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Focal and dice loss of each pair of mask logits, resized, and target mask.

    Args:
        logits: [B, R, T, h, w] floating.
        masks: [B, T, H, W] uint8, of 0 and 1.
        void: [B, H, ceil(W / 32)] int32, the pixels that do not count, as in `Targets`, or None.
        focal, dice: whether it is wanted.

    Returns:
        the focal loss and the dice loss, [B, R, T] float32 (float64) each; None where not wanted.
        Without pixels that count the focal loss is 0, and so is the dice loss.
    """
    if not (focal or dice):
        return None, None
    pixels = None if void is None else unpack_bits(void, masks.shape[3])  # [B, H, W]
    with torch.autocast(logits.device.type, enabled=False):
        losses = _MaskLosses.apply(logits, masks, pixels, focal)
    return losses[0] if focal else None, losses[1] if dice else None


class _MaskLosses(torch.autograd.Function):
    """Focal and dice loss [B, R, T]; backward forms each band again."""

    @staticmethod
    def forward(ctx, logits, masks, void, with_focal):
        maps = logits.detach().to(exact_dtype(logits))
        t = masks if void is None else masks.masked_fill(void[:, None], 0)
        area = t.sum((2, 3))[:, None].to(maps.dtype)  # [B, 1, T]
        pixels = masks.new_full((len(masks),), masks.shape[2] * masks.shape[3], dtype=torch.int64)
        if void is not None:
            pixels = pixels - void.sum((1, 2))
        pixels = pixels.clamp(min=1).to(maps.dtype)[:, None, None]
        focal, wrong, signed = (maps.new_zeros(maps.shape[:3]) for _ in range(3))
        for _, u, sign in _bands_of_errors(maps, masks, void):
            q = u.sigmoid()  # how wrong a pixel is: 1 - s inside of the mask, s outside
            wrong += q.sum((3, 4))
            signed += (q * sign).sum((3, 4))
            if with_focal:
                loss = F.softplus(u).mul_(q.square_()).mul_(0.5 + 0.25 * sign)
                focal += loss.sum((3, 4))
        missed = (wrong - signed) / 2  # of the sum of q, what is inside of the mask
        top, bottom = 2 * (area - missed) + 1, 2 * area + signed + 1
        ctx.save_for_backward(logits, masks, void, top, bottom, pixels)
        ctx.with_focal = with_focal
        return focal / pixels, 1 - top / bottom

    @staticmethod
    @once_differentiable
    def backward(ctx, to_focal, to_dice):
        logits, masks, void, top, bottom, pixels = ctx.saved_tensors
        maps = logits.detach().to(exact_dtype(logits))
        grad = torch.zeros_like(maps).flatten(1, 2)
        to_focal = (to_focal / pixels)[..., None, None]
        to_sum = (to_dice * top / bottom**2)[..., None, None]  # of s everywhere
        to_overlap = (to_dice / bottom)[..., None, None]  # of -2 s inside of the mask
        for rows, u, sign in _bands_of_errors(maps, masks, void):
            q = u.sigmoid()
            right = 1 - q
            slope = right * (to_sum - to_overlap + sign * to_overlap)
            if ctx.with_focal:
                error = F.softplus(u).mul_(right).mul_(2).add_(q).mul_(q)
                slope += error.mul_(0.5 * sign + 0.25).mul_(to_focal)
            slope.mul_(q)
            add_resized_back(grad, slope.flatten(1, 2), rows, masks.shape[2:])
        return grad.view_as(maps).to(logits.dtype), None, None, None


def _bands_of_errors(
    maps: Tensor, masks: Tensor, void: Tensor | None
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Of some rows of the masks their range, u [B, R, T, r, W] and -1 inside of a mask, 1 outside
    [B, 1, T, r, W]; u is the resized logits times that, and -inf, no error at all, at void pixels.
    """
    (B, R, T), (H, W) = maps.shape[:3], masks.shape[2:]
    flat = maps.flatten(1, 2)
    for rows in _bands(maps, H, B * R * T * W):
        sign = 1 - 2 * masks[:, None, :, rows.start : rows.stop].to(maps.dtype)
        u = resized_rows(flat, rows, (H, W)).unflatten(1, (R, T)) * sign
        if void is not None:
            u.masked_fill_(void[:, None, None, rows.start : rows.stop], -torch.inf)
        yield rows, u, sign


def _bands(like: Tensor, height: int, values: int) -> Iterator[range]:
    """Ranges of rows that are formed together, each row of so many values."""
    step = rows_at_once(like, values)
    return (range(top, min(top + step, height)) for top in range(0, height, step))
