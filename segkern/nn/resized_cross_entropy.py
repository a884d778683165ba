"""Cross entropy of logits that are resized to the labels a band of rows at a time.

Letters: B image, K class, h w size of the logits, H W size of the labels, r rows of a band.

    loss = sum over labelled pixels of (logsumexp_k(z) - z[label]) / n,   z = resize(logits),
    n the number of labelled pixels, at least 1, or what is given for it

The resized logits [B, K, H, W] are formed a band at a time and left again: with the loss of a band
comes its gradient softmax(z) - one_hot(label), which the transposed resize brings back to the
size of the logits. Only that is kept.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops._bands import rows_at_once
from ..structures.labels import void_of
from .bilinear import add_resized_back, resized_rows


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, size, normalizer):
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        maps = logits.detach().to(exact)
        grad, total = torch.zeros_like(maps), maps.new_zeros(())
        counts = labels != void_of(logits.shape[1])
        outside = counts & ((labels < 0) | (labels >= logits.shape[1]))
        # nothing may wait for the device to raise: loss and gradient are NaN, and training stops
        count = counts.sum() if normalizer is None else normalizer
        count = count.to(exact).clamp(min=1).where(~outside.any(), float("nan"))
        for rows in _bands(maps, labels, size):
            z = resized_rows(maps, rows, size)[..., : labels.shape[2]]
            known = counts[:, rows.start : rows.stop]
            truth = labels[:, rows.start : rows.stop].clamp(0, logits.shape[1] - 1)
            index = truth.where(known, 0).unsqueeze(1)
            log_p = z.log_softmax(1)
            total -= log_p.gather(1, index)[:, 0].where(known, 0).sum()
            slope = log_p.exp_()
            slope.scatter_add_(1, index, -torch.ones_like(index, dtype=exact))
            slope *= known.unsqueeze(1)
            if size[1] != labels.shape[2]:
                slope = F.pad(slope, (0, size[1] - labels.shape[2]))
            add_resized_back(grad, slope, rows, size)
        ctx.save_for_backward(grad, count)
        ctx.dtype = logits.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        grad, count = ctx.saved_tensors
        return (grad * (slope / count)).to(ctx.dtype), None, None, None


def _bands(maps: Tensor, labels: Tensor, size: tuple[int, int]) -> Iterator[range]:
    rows = rows_at_once(maps, maps.shape[0] * maps.shape[1] * size[1])
    for top in range(0, labels.shape[1], rows):
        yield range(top, min(top + rows, labels.shape[1]))


def resized_cross_entropy(
    logits: Tensor, labels: Tensor, size: tuple[int, int], normalizer: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of logits that are resized to the labels, which are never whole.

    Args:
        logits: [B, K, h, w] floating.
        labels: [B, H, W] int64 in [0, K), 255 where a pixel does not count; 65535 there for more
            than 255 classes.
        size: of the resized logits; its upper left [H, W] belongs to the labels.
        normalizer: [], number of labelled pixels to divide by, at least 1; None takes those of
            this batch.

    Returns:
        [] float32 (float64); 0 with a gradient of zeros where no pixel counts (torch's cross
        entropy gives NaN), NaN where a label is out of range.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _CrossEntropy.apply(logits, labels, size, normalizer)
