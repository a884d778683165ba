"""Class scores of large images from the masks of queries in windows.

Letters: Q query, K class, C channel, H W output size, h w size of the image as the model sees it,
s side of a window, m n size of the mask logits of a window.

    scores of a window  = sum_q softmax(class)[q, k] sigmoid(mask logits of q resized to s x s)
    scores of an image  = mean over the windows that cover a pixel, resized to the output

Windows lie along a side as few as cover it, and overlap evenly. A sigmoid stands between the two
resizes, so no matrix holds both, as `sliding_window` has it; but bands of output rows are formed
one after another here, too, and memory grows with K x W, not with K x H x W.
Source: EoMT (Kerssies et al., CVPR 2025), semantic segmentation of the original code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.protocol import SegmentationModel
from ..nn.bilinear import neighbours, resized, widened
from ..ops._bands import rows_at_once
from ..runtime.cuda_graphs import replayed
from ..structures.logits import QueryLogits
from .sliding_window import PIXELS_AT_ONCE, predict, starts


class _Windows(NamedTuple):
    """What a model says of the windows of one image.

    Attributes:
        places: top and left of each window.
        classes: [windows, K, Q], probabilities.
        masks: [windows, Q, m, n], logits.
        matrix: [s, m], which resizes a side of the masks to that of a window.
        size: (h, w).
    """

    places: list[tuple[int, int]]
    classes: Tensor
    masks: Tensor
    matrix: Tensor
    size: tuple[int, int]

    def scores(self, first: int, last: int) -> Tensor:
        """[K, last - first, w] of these rows of the image."""
        total = self.masks.new_zeros(self.classes.shape[1], last - first, self.size[1])
        count = self.masks.new_zeros(last - first, self.size[1])
        side = len(self.matrix)
        for (top, left), classes, masks in zip(self.places, self.classes, self.masks):
            a, b = max(first, top), min(last, top + side)
            if a >= b:
                continue
            rows = torch.einsum("ym,qmn->qyn", self.matrix[a - top : b - top], masks)
            shares = (rows @ self.matrix.mT).sigmoid_()
            place = slice(a - first, b - first), slice(left, left + side)
            total[:, *place] += torch.einsum("kq,qyx->kyx", classes, shares)
            count[place] += 1
        return total / count


def query_label_maps(
    model: SegmentationModel,
    images: Tensor,
    output_sizes: Sequence[tuple[int, int]],
    return_scores: bool = False,
    cuda_graphs: bool = True,
) -> list[tuple[Tensor, Tensor | None]]:
    """The likeliest class of each pixel of images of one size.

    Args:
        model: in whatever mode; its `predict` gives `QueryLogits`, its input has a window.
        images: [B, C, h, w] floating, normalised, no side below the window's.
        output_sizes: (H, W) of each of the B results.
        return_scores: also return the scores.
        cuda_graphs: as in `segment`.

    Returns:
        B times [H, W] int32, and [K, H, W] or None.

    Raises:
        ValueError: images smaller than a window.
    """
    size, s = tuple(images.shape[2:]), model.config.input.window
    if min(size) < s:
        raise ValueError(f"segment: size must give no side below the window's, {s}, got {size}")
    tops, lefts = (starts(side, s, model.config.input.stride) for side in size)
    places = [(top, left) for top in tops for left in lefts]
    crops = [x[:, top : top + s, left : left + s] for x in images for top, left in places]
    at_once, found = max(1, PIXELS_AT_ONCE // s**2), []
    for i in range(0, len(crops), at_once):
        batch = torch.stack(crops[i : i + at_once])
        extra = model.inputs("semantic", len(batch))
        logits = replayed(predict, model, batch, *extra, enabled=cuda_graphs)
        if not isinstance(logits, QueryLogits):
            raise TypeError(
                f"segment: predict must return QueryLogits, got {type(logits).__name__}"
            )
        found.append(_factors(logits))
    classes, masks = (torch.cat(parts) for parts in zip(*found))
    n = len(places)
    return [
        _merged(classes[b * n :][:n], masks[b * n :][:n], places, s, size, output, return_scores)
        for b, output in enumerate(output_sizes)
    ]


def merged(
    logits: QueryLogits,
    places: list[tuple[int, int]],
    window: int,
    size: tuple[int, int],
    output_size: tuple[int, int],
    return_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The likeliest class of each pixel of one image, from what a model said of its windows.

    Args:
        logits: of the windows, in the order of their places.
        places: top and left of each in the image.
        window: their side.
        size: (h, w) of the image.
        output_size: (H, W) of the result.
        return_scores: also return the scores.

    Returns:
        [H, W] int32, and [K, H, W] or None.
    """
    return _merged(*_factors(logits), places, window, size, output_size, return_scores)


def _merged(
    classes: Tensor,
    masks: Tensor,
    places: list[tuple[int, int]],
    window: int,
    size: tuple[int, int],
    output_size: tuple[int, int],
    return_scores: bool,
) -> tuple[Tensor, Tensor | None]:
    """`merged` of what `_factors` gives."""
    eye = torch.eye(masks.shape[2], dtype=torch.float64, device=masks.device)
    matrix = resized(eye, window).to(masks.dtype)
    return _likeliest(_Windows(places, classes, masks, matrix, size), output_size, return_scores)


def _factors(logits: QueryLogits) -> tuple[Tensor, Tensor]:
    """Probabilities [windows, K, Q] and mask logits [windows, Q, m, n], float32 at least."""
    exact = torch.promote_types(logits.classes.dtype, torch.float32)
    masks = logits.masks.to(exact)
    if logits.features is not None:
        masks = torch.einsum("bqc,bcmn->bqmn", masks, logits.features.to(exact))
    return logits.classes.to(exact).softmax(2)[..., :-1].mT, masks


def _likeliest(
    windows: _Windows, output_size: tuple[int, int], return_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """The likeliest class [H, W], and the scores if wanted."""
    (H, W), (h, w), K = output_size, windows.size, windows.classes.shape[1]
    like = windows.masks
    # allocated before the bands, so that they leave no holes in the heap
    labels = like.new_empty(output_size, dtype=torch.int32)
    scores = like.new_empty(K, H, W) if return_scores else None
    step = rows_at_once(like, K * max(W, w))
    for top in range(0, H, step):
        rows = range(top, min(top + step, H))
        first, weights = neighbours(rows, h, H, like.device)
        part = windows.scores(first, first + weights.shape[1])
        part = torch.einsum("yr,krx->kyx", weights.to(like.dtype), part)
        part = widened(part[None], W)[0]
        labels[rows.start : rows.stop] = part.argmax(0)
        if return_scores:
            scores[:, rows.start : rows.stop] = part
    return labels, scores
