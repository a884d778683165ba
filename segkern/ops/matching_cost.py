r"""Costs of matching every query with every target, for all predictions of a batch at once.

    x[q, p] = mask_embed[q] . bilinear(features, point p)       s = sigmoid(x)
    t[j, p] = bilinear(masks[j], point p)
    cost[q, j] = - class_weight * softmax(class_logits[q])[labels[j]]
                 + mask_weight * (sum_p softplus(x) - sum_p x t) / n
                 + dice_weight * (1 - (2 sum_p s t + 1) / (sum_p s + sum_p t + 1))

Letters: B image, R prediction, Q query, K class, C channel, h w feature map, T target, H W mask,
P point, n of them that count, at least 1.

Points by a void pixel do not count (_void.py): the sums go over the others. They are cut out
before a kernel runs, which takes a number of points for each prediction.

1. Features at the points (each image's map laid out channel-last once, points in rows of the map);
   bilinear sampling commutes with the product, so no mask logits of whole maps are ever made.
2. x by one product, then sigmoid and the row sums of softplus and sigmoid in one pass.
3. Targets at the points, read from the masks in place; sum x t and sum s t by two products.
4. The cost from these sums; what is not finite becomes `BOUND`.
On a GPU 2 and 3 are one pass, and features of 16 bits are multiplied before they are interpolated.
FLOPs: 2 B R Q P (C + 2 T); bytes: 4 C a point and corner, read once for all queries.

Source: Mask2Former (Cheng et al., CVPR 2022), section 3.3 and its Hungarian matcher.
Differs: softplus(-x) - softplus(x) = -x turns its two products for the cross entropy into one and
a row sum; sums over points in float32 whatever the inputs; costs that are not finite (there the
largest number of the dtype) become 1e8, above every sane cost and far below where the sums of a
solver lose the others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._checks import expect, got
from ._void import counted, cut_void, expect_void
from .point_sample import point_sample_reference

BOUND = 1e8  # of a cost's magnitude; NaN and both infinities become +BOUND


def matching_cost_reference(
    class_logits: Tensor,
    mask_embed: Tensor,
    features: Tensor,
    labels: Tensor,
    masks: Tensor,
    points: Tensor,
    n_targets: Tensor | None = None,
    class_weight: float = 2.0,
    mask_weight: float = 5.0,
    dice_weight: float = 5.0,
    void: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `matching_cost`."""
    exact = _cost_dtype(class_logits, mask_embed, features)
    R, P, T = mask_embed.shape[1], points.shape[2], labels.shape[1]
    counts = counted(points.to(exact), void, *masks.shape[2:])[..., None]  # [B, R, P, 1]
    # [B, R * P, 2]; a point that is NaN is nowhere, like one outside
    places = points.to(exact).flatten(1, 2).nan_to_num(nan=-1.0)
    sampled = point_sample_reference(features.to(exact), places).unflatten(2, (R, P))
    x = mask_embed.to(exact) @ sampled.transpose(1, 2)  # [B, R, Q, P]
    x = x.where(counts.mT, 0)
    t = point_sample_reference(masks.to(exact), places).unflatten(2, (R, P))
    t = t.permute(0, 2, 3, 1).where(counts, 0)  # [B, R, P, T]
    s, softplus = (v.where(counts.mT, 0) for v in (x.sigmoid(), F.softplus(x)))
    bce = (softplus.sum(-1, keepdim=True) - x @ t) / counts.sum(2, keepdim=True).clamp(min=1)
    dice = 1 - (2 * s @ t + 1) / (s.sum(-1, keepdim=True) + t.sum(2).unsqueeze(2) + 1)
    chosen = labels.clamp(0, class_logits.shape[3] - 1)[:, None, None, :]
    scores = class_logits.to(exact).softmax(-1)
    scores = scores.gather(3, chosen.expand(*scores.shape[:3], T))
    cost = mask_weight * bce + dice_weight * dice - class_weight * scores
    cost = cost.nan_to_num(BOUND, BOUND, BOUND).clamp(-BOUND, BOUND)
    if n_targets is None:
        return cost
    padded = torch.arange(T, device=cost.device) >= n_targets[:, None]  # [B, T]
    return cost.masked_fill(padded[:, None, None], 0.0)


def _cost_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def _fake(
    class_logits,
    mask_embed,
    features,
    labels,
    masks,
    points,
    n_targets,
    class_weight,
    mask_weight,
    dice_weight,
    n_points=None,
) -> Tensor:
    return points.new_empty((*mask_embed.shape[:3], labels.shape[1]))


_forward = _library.define(
    "matching_cost(Tensor class_logits, Tensor mask_embed, Tensor features, Tensor labels, "
    "Tensor masks, Tensor points, Tensor? n_targets, float class_weight, float mask_weight, "
    "float dice_weight, Tensor? n_points=None) -> Tensor",
    _fake,
    triton="matching_cost",
)


def matching_cost(
    class_logits: Tensor,
    mask_embed: Tensor,
    features: Tensor,
    labels: Tensor,
    masks: Tensor,
    points: Tensor,
    n_targets: Tensor | None = None,
    class_weight: float = 2.0,
    mask_weight: float = 5.0,
    dice_weight: float = 5.0,
    void: Tensor | None = None,
    impl: str = "kernel",
) -> Tensor:
    """Class, cross entropy and dice cost of every query against every target.

    No gradient flows. Computed in float32, in float64 where class_logits, mask_embed or features
    are float64.

    Args:
        class_logits: [B, R, Q, K+1] floating; the last class is "no object".
        mask_embed: [B, R, Q, C] floating.
        features: [B, C, h, w] floating, shared by the predictions of an image; channels-last
            memory saves a copy.
        labels: [B, T] int64, clamped to the classes there are; anything in padded slots.
        masks: [B, T, H, W] bool or uint8, read as numbers, of any size.
        points: [B, R, P, 2] floating, x then y; 0 and 1 are the outer edges of map and mask.
        n_targets: [B] int64; slots t >= n_targets are padded. None: all T count.
        class_weight, mask_weight, dice_weight: factors of the three costs.
        void: [B, H, ceil(W / 32)] int32, the pixels that do not count, packed as `pack_bits` does;
            what the masks hold there changes nothing. None: all count.
        impl: "kernel", or "reference" for plain PyTorch.

    Returns:
        [B, R, Q, T], float32 (float64). Always finite: NaN and infinities are +1e8, other costs
        within +-1e8. 0 in padded slots.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    op, sizes = "matching_cost", {}
    expect(op, "class_logits", class_logits, "B R Q K+1", "float", sizes)
    expect(op, "mask_embed", mask_embed, "B R Q C", "float", sizes)
    expect(op, "features", features, "B C h w", "float", sizes)
    expect(op, "labels", labels, "B T", "int64", sizes)
    expect(op, "masks", masks, "B T H W", "bool or uint8", sizes)
    expect(op, "points", points, "B R P 2", "float", sizes)
    if n_targets is not None:
        expect(op, "n_targets", n_targets, "B", "int64", sizes)
    if void is not None:
        expect_void(op, void, sizes)
    for name, tensor, letters in (
        ("class_logits", class_logits, ("K+1",)),
        ("features", features, ("h", "w")),
        ("masks", masks, ("H", "W")),
        ("points", points, ("P",)),
    ):
        if not all(sizes[letter] for letter in letters):
            raise ValueError(
                f"{op}: {name} must have {', '.join(letters)} >= 1, got {got(tensor)}"
            )
    class_logits, mask_embed, features = (t.detach() for t in (class_logits, mask_embed, features))
    points = points.detach().to(_cost_dtype(class_logits, mask_embed, features))
    kernel = _library.use_kernel(op, impl, mask_embed)
    weights = class_weight, mask_weight, dice_weight
    with torch.autocast(mask_embed.device.type, enabled=False):
        tensors = class_logits, mask_embed, features, labels, masks
        if not kernel:
            return matching_cost_reference(*tensors, points, n_targets, *weights, void)
        n_points = None
        if void is not None:
            points, n_points = cut_void(points, void, *masks.shape[2:])
        return _forward(*tensors, points, n_targets, *weights, n_points)
