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
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.images import prepare
from ..nn.bilinear import resize_matrix, resized
from ..ops import resize_argmax
from ..ops._checks import expect_integer
from ..runtime.cuda_graphs import replayed

_PIXELS_AT_ONCE = 2**21  # of windows that go through the model together
_VALUES_AT_ONCE = 2**22  # of a band of probabilities: 16 MB in float32


def at_scales(picture: Tensor, config, scales: Sequence[float]) -> list[Tensor]:
    """A picture [3, H, W] at each scale, [3, h, w] float32 normalised; 1 is the config's size."""
    edges = [
        {
            "shortest_edge": max(1, round(s * config.shortest_edge)),
            "longest_edge": max(1, round(s * config.longest_edge)),
        }
        for s in scales
    ]
    return [prepare(picture, replace(config, **edge)) for edge in edges]


def starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of `size` >= window: the last one ends with it."""
    return [*range(0, size - window, stride), size - window]


def enlarged(image: Tensor, window: int) -> Tensor:
    """The image [1, 3, h, w] with its short side resized to `window` where it is smaller."""
    h, w = image.shape[2:]
    if min(h, w) >= window:
        return image
    # the long side is cut to whole pixels, as the original does
    size = (window, int(w / h * window)) if h < w else (int(h / w * window), window)
    return F.interpolate(image, size, mode="bilinear")


def label_map(
    model: nn.Module,
    images: Sequence[Tensor],
    output_size: tuple[int, int],
    window: int | None = None,
    stride: int | None = None,
    flip: bool = False,
    return_scores: bool = False,
    cuda_graphs: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The likeliest class of each pixel of one image.

    Args:
        model: a `Segmenter` in eval mode.
        images: the image at each scale, [1, 3, h, w] floating, normalised.
        output_size: (H, W).
        window, stride: as `window_and_stride` takes them.
        flip: also look at the mirror image of each scale.
        return_scores: also return the probabilities.
        cuda_graphs: as in `infer.segment`.

    Returns:
        [H, W] int32, and [K, H, W] float32 or None.

    Raises:
        TypeError: window or stride is no integer.
        ValueError: window or stride out of range.
    """
    window, stride = window_and_stride(model.config, window, stride)
    views = [
        _View(model, enlarged(image, window), output_size, window, stride, mirrored, cuda_graphs)
        for image in images
        for mirrored in ((False, True) if flip else (False,))
    ]
    if len(views) == 1 and not return_scores:
        view = views[0]
        return resize_argmax(view.maps[None], view.rows, view.columns)[0], None
    # whole from the start: what bands leave behind would lie between their large blocks, and the
    # heap would grow with K x H x W after all
    found = torch.empty(output_size, dtype=torch.int32, device=images[0].device)
    scores = None
    if return_scores:
        scores = found.new_empty(model.config.num_labels, *output_size, dtype=torch.float32)
    step = max(1, _VALUES_AT_ONCE // (output_size[1] * model.config.num_labels))
    for top in range(0, output_size[0], step):
        rows = slice(top, top + step)
        part = sum(view.logits(rows).softmax(0) for view in views) / len(views)
        found[rows] = part.argmax(0)
        if return_scores:
            scores[:, rows] = part
    return found, scores


def window_and_stride(config, window: int | None, stride: int | None) -> tuple[int, int]:
    """Both in pixels; None takes the config's, its stride no further than the window.

    Raises:
        TypeError: no integer.
        ValueError: out of range.
    """
    window = config.window_size if window is None else window
    expect_integer("segment: window", window)
    stride = min(config.window_stride, window) if stride is None else stride
    expect_integer("segment: stride", stride)
    if stride > window:
        raise ValueError(f"segment: stride must be <= window ({window}), got {stride}")
    return window, stride


class _View:
    """The patch logits of the windows of one image, side by side, and the way to the result.

    Attributes:
        maps: [K, h, w] float32.
        rows, columns: [H, h] and [W, w] float32.
    """

    def __init__(self, model, image, output_size, window, stride, mirrored, cuda_graphs):
        tops, lefts = (starts(n, window, stride) for n in image.shape[2:])
        image = image.flip(3) if mirrored else image
        crops = [image[0, :, y : y + window, x : x + window] for y in tops for x in lefts]
        at_once = max(1, _PIXELS_AT_ONCE // window**2)
        maps = [
            replayed(_patches, model, torch.stack(crops[i : i + at_once]), cuda_graphs)
            for i in range(0, len(crops), at_once)
        ]
        maps = torch.cat(maps).float().unflatten(0, (len(tops), len(lefts)))
        self.maps = maps.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        # sums of at most a few terms, rounded once
        one = resize_matrix(maps.shape[3], model.config.patch_size, window, image.device)
        self.rows, self.columns = (
            resized(_mean(one, first, size), out).float()
            for first, size, out in zip((tops, lefts), image.shape[2:], output_size)
        )
        if mirrored:
            self.columns = self.columns.flip(0)

    def logits(self, rows: slice) -> Tensor:
        """Logits [K, rows, W] of these rows of the output."""
        return torch.einsum("yi,kij->kyj", self.rows[rows], self.maps) @ self.columns.mT


def _patches(model: nn.Module, windows: Tensor) -> Tensor:
    return model.patch_logits(windows)


def _mean(one: Tensor, first: Sequence[int], size: int) -> Tensor:
    """[size, windows x patches]: of the windows that begin at `first`, each of `one`
    [s, patches], the mean over those that cover a pixel."""
    out = one.new_zeros(size, len(first), one.shape[1])
    for i, start in enumerate(first):
        out[start : start + len(one), i] = one
    return (out / out.sum((1, 2), keepdim=True)).flatten(1)
