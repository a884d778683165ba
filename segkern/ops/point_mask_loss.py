r"""Cross-entropy and dice loss of matched masks at uncertain points.

    x_p = point_sample(logits, point p),  t_p = point_sample(mask, point p),  s = sigmoid(x)
    bce  = 1/n sum_p softplus(x_p) - x_p t_p
    dice = 1 - (2 sum_p s_p t_p + 1) / (sum_p s_p + sum_p t_p + 1)

Letters: B image, R prediction, T target slot, h w logit map, H W mask, P point, n of them that
count, at least 1.

The points of a slot (PointRend's): of `int(P * oversample_ratio)` random candidates the
k = `int(importance_sample_ratio * P)` with the smallest |logit|, and P - k random ones more; of
equal |logit| the one drawn first. Points by a void pixel do not count (_void.py): among the
candidates they come last, and those that are taken all the same are cut out.
Loss and gradient are sums over points, so no order is needed: the kernel marks the k candidates,
one bit each, keeps marks, two sums and n, and draws the P points again for the gradient
(`random_points`). No point, sample or float mask is ever stored. On a GPU the masks are packed
into bits first, tiles of 4 x 8 pixels in a word, once for all predictions and both directions.
Bytes: one logit map and about 40 P random reads a slot; on a GPU the masks once and their bits,
an eighth, three times; FLOPs: about 500 P.
Source: PointRend (Kirillov et al., CVPR 2020); Mask2Former (Cheng et al., CVPR 2022), section 3.3.
Differs: points depend on sample, prediction and target alone, not on the place in the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import exact_dtype, expect
from ._void import counted, expect_void, void_cells
from .point_sample import point_sample_reference, random_points_reference


def _counts(num_points: int, oversample_ratio: float, importance_sample_ratio: float):
    important = int(importance_sample_ratio * num_points)
    return int(num_points * oversample_ratio), important, num_points - important


def point_mask_loss_reference(
    mask_logits: Tensor,
    masks: Tensor,
    active: Tensor,
    sample_ids: Tensor,
    seed: Tensor,
    num_points: int = 12544,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    void: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch; arguments as `point_mask_loss`."""
    candidates, important, rest = _counts(num_points, oversample_ratio, importance_sample_ratio)
    B, R, T = active.shape
    exact = exact_dtype(mask_logits)
    slots = (torch.arange(n).to(sample_ids) for n in (R, T))
    index = torch.meshgrid(sample_ids, *slots, indexing="ij")
    points = random_points_reference(seed, torch.stack(index, -1), candidates + rest)
    counts = counted(points.to(exact), void, *masks.shape[2:]).flatten(0, 2)
    points = points.flatten(0, 2).to(exact)  # [N, candidates + rest, 2], N = B R T
    logits = mask_logits.to(exact).where(active[..., None, None], 0).flatten(0, 2)[:, None]
    with torch.no_grad():
        certain = point_sample_reference(logits, points[:, :candidates])[:, 0].abs()
        # those by a void pixel as NaN: they come last
        certain = certain.where(counts[:, :candidates], torch.nan)
        chosen = certain.sort(stable=True).indices[:, :important]
    after = torch.arange(candidates, candidates + rest).to(chosen).expand(len(chosen), -1)
    chosen = torch.cat((chosen, after), 1)  # [N, P]
    points = points.gather(1, chosen[..., None].expand(-1, -1, 2))
    counts = counts.gather(1, chosen)
    x = point_sample_reference(logits, points)[:, 0].where(counts, 0)
    truth = masks[:, None].expand(-1, R, -1, -1, -1).flatten(0, 2)[:, None]
    t = point_sample_reference(truth.to(exact), points)[:, 0].where(counts, 0)
    s, softplus = (v.where(counts, 0) for v in (x.sigmoid(), F.softplus(x)))
    bce = (softplus - x * t).sum(1) / counts.sum(1).clamp(min=1)
    dice = 1 - (2 * (s * t).sum(1) + 1) / (s.sum(1) + t.sum(1) + 1)
    return tuple(loss.view(B, R, T).where(active, 0) for loss in (bce, dice))


def _fake(mask_logits, masks, active, sample_ids, seed, candidates, important, random, cells=None):
    def slot(*more):
        return mask_logits.new_empty((*active.shape, *more), dtype=exact_dtype(mask_logits))

    marks = mask_logits.new_empty((*active.shape, (candidates + 31) // 32), dtype=torch.int32)
    B, T, H, W = masks.shape
    packed = (B, T, -(-H // 4), -(-W // 8)) if mask_logits.is_cuda else (0,)
    return slot(), slot(), slot(3), marks, marks.new_empty(packed)


def _fake_backward(grad_bce, grad_dice, sums, marks, packed, mask_logits, *rest):
    return torch.empty_like(mask_logits, memory_format=torch.contiguous_format)


_ARGUMENTS = (
    "Tensor mask_logits, Tensor masks, Tensor active, Tensor sample_ids, Tensor seed, "
    "int candidates, int important, int random, Tensor? cells=None"
)
_forward = _library.define(
    f"point_mask_loss({_ARGUMENTS}) -> "
    "(Tensor bce, Tensor dice, Tensor sums, Tensor marks, Tensor packed)",
    _fake,
)
_backward = _library.define(
    "point_mask_loss_backward(Tensor grad_bce, Tensor grad_dice, Tensor sums, "
    f"Tensor marks, Tensor packed, {_ARGUMENTS}) -> Tensor",
    _fake_backward,
)


class _PointMaskLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mask_logits, masks, active, sample_ids, seed, counts, cells):
        # the caller may advance the seed in place before the gradient is asked for
        arguments = (mask_logits, masks, active, sample_ids, seed.clone())
        bce, dice, *kept = _forward(*arguments, *counts, cells)
        ctx.save_for_backward(cells, *kept, *arguments)
        ctx.counts = counts
        return bce, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_bce, grad_dice):
        cells, *kept = ctx.saved_tensors
        grad = _backward(grad_bce, grad_dice, *kept, *ctx.counts, cells)
        return grad, None, None, None, None, None, None


def point_mask_loss(
    mask_logits: Tensor,
    masks: Tensor,
    active: Tensor,
    sample_ids: Tensor,
    seed: Tensor,
    num_points: int = 12544,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    void: Tensor | None = None,
    impl: str = "kernel",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice loss of logit maps that are already matched to their targets.

    Args:
        mask_logits: [B, R, T, h, w] floating; map (b, r, t) is prediction r's for target t.
        masks: [B, T, H, W] bool or uint8 (0 and 1).
        active: [B, R, T] bool; other slots give exactly 0 and no gradient, and are not read.
        sample_ids: [B] int64, on which the points depend.
        seed: [1] int64, on which the points depend; see `random_points`.
        num_points: P, at least 1.
        oversample_ratio: candidates for each point, at least 1.
        importance_sample_ratio: share of the points taken from the candidates, in [0, 1].
        void: [B, H, ceil(W / 32)] int32, the pixels that do not count, packed as `pack_bits` does;
            what the masks hold there changes nothing. None: all count.
        impl: "kernel", or "reference" for plain PyTorch.

    Returns:
        bce [B, R, T] and dice [B, R, T], float32 (float64 for float64 logits). Gradients flow to
        `mask_logits` alone, those of the chosen points.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.
    """
    op, sizes = "point_mask_loss", {}
    expect(op, "mask_logits", mask_logits, "B R T h w", "float", sizes)
    expect(op, "masks", masks, "B T H W", "bool or uint8", sizes)
    expect(op, "active", active, "B R T", "bool", sizes)
    expect(op, "sample_ids", sample_ids, "B", "int64", sizes)
    expect(op, "seed", seed, "1", "int64", sizes)
    if void is not None:
        expect_void(op, void, sizes)
    if num_points < 1:
        raise ValueError(f"{op}: num_points must be >= 1, got {num_points}")
    if not oversample_ratio >= 1:
        raise ValueError(f"{op}: oversample_ratio must be >= 1, got {oversample_ratio}")
    if not 0 <= importance_sample_ratio <= 1:
        raise ValueError(
            f"{op}: importance_sample_ratio must be in [0, 1], got {importance_sample_ratio}"
        )
    arguments = (mask_logits, masks, active, sample_ids, seed)
    settings = (num_points, oversample_ratio, importance_sample_ratio)
    if _library.use_kernel(op, impl, mask_logits):
        cells = None if void is None else void_cells(void, masks.shape[3])
        return _library.applied(_PointMaskLoss, *arguments, _counts(*settings), cells)
    return point_mask_loss_reference(*arguments, *settings, void)
