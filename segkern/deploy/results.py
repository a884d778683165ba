"""Results of a fixed number of rows from logits, in operations that every runtime has.

They are those of `ops.segment_map` at one size, its padding included; that op reads sizes on the
host and packs masks into bits.

Letters: B image, Q query, K class, N row, h w size of the picture.
"""

import torch
from torch import Tensor

from ..ops.segment_map import FARTHEST, OVERLAP, THRESHOLD, merge_segments
from ..structures.settings import Options


def _clean(masks: Tensor) -> Tensor:
    return masks.nan_to_num(-FARTHEST, FARTHEST, -FARTHEST).clamp(-FARTHEST, FARTHEST)


def _flags(stuff: tuple[int, ...], K: int, like: Tensor) -> Tensor:
    """[K] bool: whether a label has no instances."""
    return torch.tensor([label in stuff for label in range(K)], device=like.device)


def semantic(classes: Tensor, masks: Tensor) -> Tensor:
    """The likeliest class of each pixel.

    Args:
        classes: [B, Q, K + 1] logits.
        masks: [B, Q, h, w] logits.

    Returns:
        [B, h, w] int32.
    """
    weights = classes.softmax(-1)[..., :-1]
    shares = _clean(masks).sigmoid()
    scores = weights.mT @ shares.flatten(2)
    return scores.argmax(1).int().unflatten(1, masks.shape[2:])


def panoptic(
    classes: Tensor, masks: Tensor, stuff: tuple[int, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A map of segments and their table.

    Args:
        classes: [B, Q, K + 1] logits.
        masks: [B, Q, h, w] logits.
        stuff: labels whose segments are one.
        options: `threshold` and `overlap_threshold`.

    Returns:
        ids [B, h, w] int32; of the queries their numbers [B, Q] int32, 0 for none, labels [B, Q]
        int64, -1 for none, and scores [B, Q], 0 for none.
    """
    least = THRESHOLD if options.threshold is None else options.threshold
    overlap = OVERLAP if options.overlap_threshold is None else options.overlap_threshold
    K = classes.shape[2] - 1
    scores, labels = classes.softmax(-1).max(-1)
    kept = (labels < K) & (scores > least)
    x = _clean(masks).flatten(2)  # [B, Q, h w]
    value = torch.where(kept[..., None], scores[..., None] * x.sigmoid(), -1)
    winner = value.argmax(1)  # [B, h w]; of equal ones the first
    inside = (x.gather(1, winner[:, None])[:, 0] >= 0) & kept.any(1)[:, None]
    none = torch.zeros_like(labels)
    own = (x >= 0).sum(2)
    won = none.scatter_add(1, winner, torch.ones_like(winner))
    areas = none.scatter_add(1, winner, inside.long())
    enough = won.double() / own.double() >= overlap  # of an empty mask that wins infinity is
    found = kept & (areas > 0) & enough
    flags = _flags(stuff, K, labels) if stuff else None
    numbers = merge_segments(found, labels, flags)
    ids = torch.where(inside, numbers.gather(1, winner), 0).unflatten(1, masks.shape[2:])
    return ids, numbers, labels.where(found, -1), scores.where(found, 0)


def instance(
    classes: Tensor, masks: Tensor, stuff: tuple[int, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of query and class.

    Args:
        classes: [B, Q, K + 1] logits.
        masks: [B, Q, h, w] logits.
        stuff: labels that are left out.
        options: `threshold` and `top_k`.

    Returns:
        masks [B, N, h, w] bool, labels [B, N] int64 and scores [B, N], the best first; a row that
        is none has an empty mask, label -1 and score 0.
    """
    (_, Q, K), least = classes.shape, options.threshold or 0.0
    K = K - 1
    rows = min(options.top_k or 100, Q * K)
    scores, pairs = classes.softmax(-1)[..., :-1].flatten(1).topk(rows)
    queries, labels = pairs // K, pairs % K
    x = _clean(masks)
    covered = x > 0
    area = covered.sum((2, 3)).to(x.dtype)
    quality = (x.sigmoid() * covered).sum((2, 3)) / (area + 1e-6)  # [B, Q]
    found = torch.ones_like(labels, dtype=torch.bool)
    if stuff:
        found = ~_flags(stuff, K, labels)[labels]
    scores = (scores * quality.gather(1, queries)).where(found, -1)
    order = _descending(scores)
    scores, queries, labels, found = (t.gather(1, order) for t in (scores, queries, labels, found))
    found = found & (scores >= least)
    place = queries[..., None, None].expand(-1, -1, *masks.shape[2:])
    chosen = covered.gather(1, place) & found[..., None, None]
    return chosen, labels.where(found, -1), scores.where(found, 0)


def _descending(scores: Tensor) -> Tensor:
    """Places [B, N] of scores from the highest on, of equal ones the first before: ONNX has no
    sort that is stable."""
    place = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None]
    before = (other > mine) | ((other == mine) & (place < place[:, None]))
    rank = before.sum(2)
    return torch.zeros_like(rank).scatter(1, rank, place.expand_as(rank))
