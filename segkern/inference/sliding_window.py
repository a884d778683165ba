"""Class probabilities of large images, from windows, scales and mirror images.

Letters: K class, H W output size, p patch size, s window side, h w size of the patch logits of all
windows of a view, laid side by side.

    logits of a view  = rows maps_k columns^T: the mean over the windows that cover a pixel of
                        resize(patch logits), resized to the output
    probabilities     = mean over views of softmax_k(logits)

A view is the image at one scale, as it is or mirrored. Windows lie `stride` apart, the last one
at the edge; an image with a side below s is first enlarged until its short side is s. Every step
from the patch logits to the softmax is linear and treats rows and columns apart, so two matrices
hold all of them; bands of output rows are formed one after another, and memory grows with K x W,
not with K x H x W. The labels of a single view need no softmax: `resize_argmax` finds them.
Source: Segmenter (Strudel et al., ICCV 2021), inference of the original code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.protocol import SegmentationModel
from ..nn.bilinear import resize_matrix, resized
from ..ops import resize_argmax
from ..ops._bands import rows_at_once
from ..runtime.cuda_graphs import replayed
from ..structures.logits import PixelLogits
from ..structures.settings import Views

PIXELS_AT_ONCE = 2**21  # of windows that go through the model together


def starts(size: int, window: int, stride: int | None) -> list[int]:
    """Where windows begin along a side of `size` >= window: the last one ends with it; without a
    stride as few as cover it, which overlap evenly."""
    if stride is None:
        gaps = -(-size // window) - 1
        return [i * (size - window) // max(gaps, 1) for i in range(gaps + 1)]
    return [*range(0, size - window, stride), size - window]


def enlarged(images: Tensor, window: int) -> Tensor:
    """Images [B, 3, h, w] with their short side resized to `window` where it is smaller."""
    h, w = images.shape[2:]
    if min(h, w) >= window:
        return images
    # the long side is cut to whole pixels, as the original does
    size = (window, int(w / h * window)) if h < w else (int(h / w * window), window)
    return F.interpolate(images, size, mode="bilinear")


def label_maps(
    model: SegmentationModel,
    images: Sequence[Tensor],
    output_sizes: Sequence[tuple[int, int]],
    views: Views = Views(),  # noqa: B008  (frozen)
    return_scores: bool = False,
    cuda_graphs: bool = True,
) -> list[tuple[Tensor, Tensor | None]]:
    """The likeliest class of each pixel of images of one size.

    Args:
        model: in whatever mode; its `predict` gives `PixelLogits`.
        images: the B images at each scale of the views, [B, 3, h, w] floating, normalised.
        output_sizes: (H, W) of each of the B results.
        views: window, stride and mirror images.
        return_scores: also return the probabilities.
        cuda_graphs: as in `segment`.

    Returns:
        B times [H, W] int32, and [K, H, W] float32 or None.

    Raises:
        ValueError: a stride larger than the window.
    """
    window, stride = views.of(model.config.input)
    grids = []
    for x in images:
        x = x if window is None else enlarged(x, window)
        for mirrored in (False, True) if views.flip else (False,):
            grids.append(_predicted(model, x, window, stride, mirrored, cuda_graphs))
    return [
        _likeliest([grid.view(b, size) for grid in grids], size, return_scores)
        for b, size in enumerate(output_sizes)
    ]


class _View(NamedTuple):
    """Class logits of the windows of one image, side by side, and the way to the result.

    Attributes:
        maps: [K, h, w] float32.
        rows, columns: [H, h] and [W, w] float32.
    """

    maps: Tensor
    rows: Tensor
    columns: Tensor

    def logits(self, rows: slice) -> Tensor:
        """Logits [K, rows, W] of these rows of the output."""
        return torch.einsum("yi,kij->kyj", self.rows[rows], self.maps) @ self.columns.mT


class _Grid(NamedTuple):
    """What a model says of the windows of images of one size.

    Attributes:
        maps: [B, K, h, w] float32, the windows side by side.
        means: of rows and columns, what takes a side of the maps to the side of the images:
            [h_image, h] and [w_image, w] float64.
        mirrored: the images were.
    """

    maps: Tensor
    means: tuple[Tensor, Tensor]
    mirrored: bool

    def view(self, b: int, output_size: tuple[int, int]) -> _View:
        # sums of at most a few terms, rounded once
        rows, columns = (resized(m, n).float() for m, n in zip(self.means, output_size))
        return _View(self.maps[b], rows, columns.flip(0) if self.mirrored else columns)


def _predicted(
    model: SegmentationModel,
    images: Tensor,
    window: int | None,
    stride: int | None,
    mirrored: bool,
    cuda_graphs: bool,
) -> _Grid:
    """Runs the model over the windows of images [B, 3, h, w], or over the images."""
    sides = images.shape[2:] if window is None else (window, window)
    tops, lefts = (starts(n, side, stride or side) for n, side in zip(images.shape[2:], sides))
    images = images.flip(3) if mirrored else images
    crops = [x[:, i : i + sides[0], j : j + sides[1]] for x in images for i in tops for j in lefts]
    padding = [p - n for p, n in zip(model.config.input.padded(sides), sides)]
    at_once = max(1, PIXELS_AT_ONCE // (sides[0] * sides[1]))
    found = []
    for i in range(0, len(crops), at_once):
        batch = F.pad(torch.stack(crops[i : i + at_once]), (0, padding[1], 0, padding[0]))
        extra = model.inputs("semantic", len(batch))
        found.append(replayed(predict, model, batch, *extra, enabled=cuda_graphs))
    if not isinstance(found[0], PixelLogits):
        raise TypeError(f"segment: predict must return PixelLogits, got {type(found[0]).__name__}")
    maps = torch.cat([logits.maps for logits in found]).float()
    cells = maps.shape[2:]
    maps = maps.unflatten(0, (len(images), len(tops), len(lefts)))
    maps = maps.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    ones = (resize_matrix(n, found[0].stride, s, images.device) for n, s in zip(cells, sides))
    means = tuple(map(_mean, ones, (tops, lefts), images.shape[2:]))
    return _Grid(maps, means, mirrored)


def predict(model: SegmentationModel, pixel_values: Tensor, *inputs: Tensor):
    """The model's prediction: one function, so that graphs of one model are found again."""
    return model.predict(pixel_values, *inputs)


def _likeliest(
    views: list[_View], output_size: tuple[int, int], return_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """Of the mean over the views, the likeliest class [H, W], and the probabilities if wanted."""
    if len(views) == 1 and not return_scores:
        (view,) = views
        return resize_argmax(view.maps[None], view.rows, view.columns)[0], None
    # the results are allocated before the bands: blocks freed by a band would otherwise lie
    # between theirs, too small to be used again, and the heap would grow with K x H x W
    maps = views[0].maps
    found = maps.new_empty(output_size, dtype=torch.int32)
    scores = maps.new_empty(len(maps), *output_size) if return_scores else None
    step = rows_at_once(maps, output_size[1] * len(maps))
    for top in range(0, output_size[0], step):
        rows = slice(top, top + step)
        part = sum(view.logits(rows).softmax(0) for view in views) / len(views)
        found[rows] = part.argmax(0)
        if return_scores:
            scores[:, rows] = part
    return found, scores


def _mean(one: Tensor, first: Sequence[int], size: int) -> Tensor:
    """[size, windows x patches]: of the windows that begin at `first`, each of `one`
    [s, patches], the mean over those that cover a pixel."""
    out = one.new_zeros(size, len(first), one.shape[1])
    for i, start in enumerate(first):
        out[start : start + len(one), i] = one
    return (out / out.sum((1, 2), keepdim=True)).flatten(1)
