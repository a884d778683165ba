"""Class probabilities of large images, from windows, scales and mirror images.

Letters: K class, H W output size, p patch size, s window side, h w size of a scaled image.

    logits of a view  = mean over the windows that cover a pixel of resize(patch logits)
    probabilities     = mean over views of softmax_k(resize(logits))

A view is the image at one scale, as it is or mirrored. Windows lie `stride` apart, the last one
at the edge; an image with a side below s is first enlarged until its short side is s. Only patch
logits are kept: every step after them is linear until the softmax, so bands of output rows are
formed one after another, and memory grows with K x W, not with K x H x W.
Source: Segmenter (Strudel et al., ICCV 2021), inference of the original code.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn.bands import band, neighbours, widened
from .ops._checks import expect_integer

_PIXELS_AT_ONCE = 2**21  # of windows that go through the model together
_VALUES_AT_ONCE = 2**22  # of a band of probabilities: 16 MB in float32


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


def probabilities(
    model: nn.Module,
    images: Sequence[Tensor],
    output_size: tuple[int, int],
    window: int,
    stride: int,
    flip: bool = False,
    softmax: bool = True,
) -> Iterator[tuple[range, Tensor]]:
    """Class probabilities of one image, a band of rows after another.

    Args:
        model: a `Segmenter` in eval mode.
        images: the image at each scale, [1, 3, h, w] floating, normalised.
        output_size: (H, W).
        window: s, in pixels.
        stride: pixels from one window to the next, from 1 to s.
        flip: also look at the mirror image of each scale.
        softmax: False leaves it out, which keeps the order of the classes of a single view.

    Yields:
        rows of the output, and their probabilities [K, rows, W] float32.
    """
    views = [
        _View(model, enlarged(image, window), window, stride, mirrored)
        for image in images
        for mirrored in ((False, True) if flip else (False,))
    ]
    H, W = output_size
    step = max(1, _VALUES_AT_ONCE // (W * views[0].maps.shape[1]))
    for top in range(0, H, step):
        rows = range(top, min(top + step, H))
        if not softmax:
            yield rows, views[0].logits(rows, output_size)
            continue
        total = 0
        for view in views:
            total = total + view.logits(rows, output_size).softmax(0)
        yield rows, total / len(views)


def label_map(
    model: nn.Module,
    images: Sequence[Tensor],
    output_size: tuple[int, int],
    window: int | None = None,
    stride: int | None = None,
    flip: bool = False,
    return_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The likeliest class of each pixel of one image; arguments as `probabilities`.

    Args:
        window, stride: as `window_and_stride` takes them.
        return_scores: also return the probabilities.

    Returns:
        [H, W] int32, and [K, H, W] float32 or None.

    Raises:
        TypeError: window or stride is no integer.
        ValueError: window or stride out of range.
    """
    window, stride = window_and_stride(model.config, window, stride)
    views = len(images) * (2 if flip else 1)
    # whole from the start: what bands leave behind would lie between their large blocks, and the
    # heap would grow with K x H x W after all
    found = torch.empty(output_size, dtype=torch.int32, device=images[0].device)
    scores = None
    if return_scores:
        scores = found.new_empty(model.config.num_labels, *output_size, dtype=torch.float32)
    parts = probabilities(
        model, images, output_size, window, stride, flip, softmax=return_scores or views > 1
    )
    for rows, part in parts:
        found[rows.start : rows.stop] = part.argmax(0)
        if return_scores:
            scores[:, rows.start : rows.stop] = part
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
    """The patch logits of the windows of one image, and what becomes of them."""

    def __init__(self, model, image, window, stride, mirrored):
        self.window, self.mirrored = window, mirrored
        self.size = image.shape[2:]
        self.tops, self.lefts = (starts(n, window, stride) for n in self.size)
        image = image.flip(3) if mirrored else image
        crops = [
            image[0, :, y : y + window, x : x + window] for y in self.tops for x in self.lefts
        ]
        at_once = max(1, _PIXELS_AT_ONCE // window**2)
        maps = [
            model.patch_logits(torch.stack(crops[i : i + at_once]))
            for i in range(0, len(crops), at_once)
        ]
        self.maps = torch.cat(maps).float()  # [windows, K, s / p, s / p]
        self.padded = model.config.patch_size * self.maps.shape[3]
        # how many windows cover a row and a column; a pixel's count is their product
        self.counts = [
            sum(_within(n, a, window) for a in first)
            for n, first in zip(self.size, (self.tops, self.lefts))
        ]

    def logits(self, rows: range, output_size: tuple[int, int]) -> Tensor:
        """Logits [K, rows, W] of these rows of the output."""
        if tuple(self.size) == tuple(output_size):
            merged = self._merged(rows.start, rows.stop)
            return merged.flip(2) if self.mirrored else merged
        first, weights = neighbours(rows, self.size[0], output_size[0])
        merged = self._merged(first, first + weights.shape[1])  # [K, n, w]
        merged = torch.einsum("rn,knw->krw", weights.to(merged), merged)
        out = widened(merged[None], output_size[1])[0]
        return out.flip(2) if self.mirrored else out

    def _merged(self, first: int, last: int) -> Tensor:
        """Mean logits [K, last - first, w] of rows of the scaled image, over its windows."""
        s, n = self.window, len(self.lefts)
        total = self.maps.new_zeros(self.maps.shape[1], last - first, self.size[1])
        for i, top in enumerate(self.tops):
            a, b = max(first, top), min(last, top + s)
            if a >= b:
                continue
            maps = self.maps[i * n : (i + 1) * n]
            found = band(maps, range(a - top, b - top), (self.padded, self.padded))
            for j, left in enumerate(self.lefts):
                total[:, a - first : b - first, left : left + s] += found[j, :, :, :s]
        count = torch.outer(self.counts[0][first:last], self.counts[1])
        return total.div_(count.to(total))


def _within(n: int, start: int, length: int) -> Tensor:
    position = torch.arange(n)
    return ((position >= start) & (position < start + length)).float()
