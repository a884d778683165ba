"""Binary cross entropy of each class of each pixel, against a map of labels.

Letters: B image, K class, h w size of the logits, H W size of the labels, r rows of a band.

    loss = sum over labelled pixels and classes of (log(1 + exp(z)) - z [label = class]) / (n K),
    n the number of labelled pixels, at least 1, or what is given for it

The truth [B, K, H, W] is never formed. With the loss comes its gradient sigmoid(z) - [label =
class], band by band, which alone is kept: the logits are not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops._bands import rows_at_once
from ..structures.labels import void_of


class _BinaryCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, normalizer):
        exact = torch.promote_types(logits.dtype, torch.float32)
        (B, K), (H, W) = logits.shape[:2], labels.shape[1:]
        counts = labels != void_of(K)
        outside = counts & ((labels < 0) | (labels >= K))
        # nothing may wait for the device to raise: loss and gradient are NaN, and training stops
        count = counts.sum() if normalizer is None else normalizer
        count = K * count.to(exact).clamp(min=1).where(~outside.any(), float("nan"))
        grad, total = torch.zeros_like(logits, dtype=exact), count.new_zeros(())
        step = rows_at_once(logits, B * K * W)
        for top in range(0, H, step):
            rows = slice(top, min(top + step, H))
            z = logits.detach()[:, :, rows, :W].to(exact)
            known = counts[:, rows].unsqueeze(1)
            index = labels[:, rows].clamp(0, K - 1).unsqueeze(1).where(known, 0)
            total += (F.softplus(z).sum(1) - z.gather(1, index)[:, 0]).where(known[:, 0], 0).sum()
            slope = z.sigmoid().scatter_add_(1, index, -torch.ones_like(index, dtype=exact))
            grad[:, :, rows, :W] = slope.where(known, 0)
        ctx.save_for_backward(grad, count)
        ctx.dtype = logits.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        grad, count = ctx.saved_tensors
        return (grad * (slope / count)).to(ctx.dtype), None, None


def pixel_bce(logits: Tensor, labels: Tensor, normalizer: Tensor | None = None) -> Tensor:
    """Mean binary cross entropy over the classes of labelled pixels.

    Args:
        logits: [B, K, h, w] floating, h >= H and w >= W: the upper left belongs to the labels.
        labels: [B, H, W] int64 in [0, K), 255 where a pixel does not count; 65535 there for more
            than 255 classes.
        normalizer: [], number of labelled pixels to divide by, at least 1; None takes those of
            this batch.

    Returns:
        [] float32 (float64); 0 with a gradient of zeros where no pixel counts, NaN where a label
        is out of range.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _BinaryCrossEntropy.apply(logits, labels, normalizer)
