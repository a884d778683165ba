"""Random views of labelled images for training: resize, crop, mirror, colours.

    resize by a random ratio -> crop in which no class fills too much -> mirror -> colours
    -> normalise -> pad with zeros, whose pixels do not count

Source: the training pipeline of MMSegmentation, which Segmenter (Strudel et al., ICCV 2021) uses.
Differs: saturation blends with the grey image and is not scaled in HSV.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from ..io.rle import _host
from ..structures.labels import void_in
from ..structures.targets import fresh

_TRIES = 10  # crops drawn before the last one is taken


class SemanticViews:
    """Views of one size from images of any size.

    Args:
        size: (H, W) of the view, in pixels.
        scale: (short, long) sides that an image is fitted into at ratio 1, in pixels.
        ratios: least and largest ratio.
        most: share of a crop's labelled pixels that one class may fill.
        mean, std: of the pixels in [0, 1], red, green, blue.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        ratios: tuple[float, float] = (0.5, 2.0),
        most: float = 0.75,
    ):
        # here, as it takes as long to import as torch, and forked workers inherit it
        import torchvision.transforms.v2  # noqa: F401

        if min(size) < 1 or min(scale) < 1:
            raise ValueError(f"SemanticViews: size and scale must be >= 1, got {size}, {scale}")
        if not 0 < ratios[0] <= ratios[1]:
            raise ValueError(f"SemanticViews: ratios must be 0 < least <= largest, got {ratios}")
        if not 0 < most <= 1:
            raise ValueError(f"SemanticViews: most must be in (0, 1], got {most}")
        self.size, self.scale, self.ratios, self.most = size, scale, ratios, most
        self.mean, self.std = list(mean), list(std)
        self.colours = colours

    def __call__(
        self,
        image: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        generator: Generator | None = None,
    ) -> dict:
        """A view.

        Args:
            image: [h, w, 3] uint8.
            labels: [h, w] uint8, 255 where a pixel does not count; or uint16, 65535 there.
            generator: that the view is drawn from; None takes torch's global one.

        Returns:
            pixel_values [C, H, W] float32 normalised, and semantic [H, W] of the labels' kind.
        """
        image, labels = np.asarray(image), np.asarray(labels)
        ratio = uniform(*self.ratios, generator)
        fitted = self._fitted(image.shape[:2], ratio)
        rows, columns = (nearest(n, to) for n, to in zip(labels.shape, fitted))
        labels = labels.take(rows, axis=0).take(columns, axis=1)
        place = crop(fitted, self.size, generator, labels.__getitem__, self.most)
        labels, mirror = labels[place], uniform(0, 1, generator) < 0.5
        labels = labels[:, ::-1] if mirror else labels
        below, right = (n - m for n, m in zip(self.size, labels.shape))
        look = self.size, self.mean, self.std
        return {
            "pixel_values": pictured(
                image, fitted, place, mirror, *look, lambda x: self.colours(x, generator)
            ),
            "semantic": torch.from_numpy(
                np.pad(labels, ((0, below), (0, right)), constant_values=void_in(labels))
            ),
        }

    def _fitted(self, size: Sequence[int], ratio: float) -> list[int]:
        """The size that keeps the image's shape and fits into `ratio` times the scale."""
        factor = min(max(self.scale) * ratio / max(size), min(self.scale) * ratio / min(size))
        return [max(1, round(n * factor)) for n in size]


def pictured(
    image: np.ndarray,
    fitted: Sequence[int],
    place: tuple[slice, slice],
    mirror: bool,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    change: Callable[[Tensor], Tensor] | None = None,
    out: Tensor | None = None,
    padding: Sequence[float] | None = None,
) -> Tensor:
    """The picture of a view: resized, cropped, mirrored, changed, normalised and padded.

    Where the host's code is built only what the crop shows is computed, in one pass; it gives the
    bytes of torchvision's antialiased resize.

    Args:
        image: [H, W, C] uint8.
        fitted: H and W that it is resized to.
        place: rows and columns of that which stay, as `crop` gives them.
        mirror: swap left and right.
        size, mean, std, out, padding: as of `normalised`.
        change: called with the pixels, [C, h, w] float32 in [0, 1], for others of that kind.

    Returns:
        as `normalised`.
    """
    from torchvision.transforms.v2 import functional as F

    start, stop = ([side.indices(n)[k] for side, n in zip(place, fitted)] for k in (0, 1))
    h, w = (b - a for a, b in zip(start, stop))
    if _host is None:
        pixels = F.resize(torch.from_numpy(image).movedim(2, 0), fitted, antialias=True)[:, *place]
        pixels = pixels.flip(2) if mirror else pixels
    elif change is None:
        out = fresh(image.shape[2], *size) if out is None else out
        by, less = zip(*((1 / (255 * s), m / s) for m, s in zip(mean, std, strict=True)))
        _host.view(image, fitted, start, (h, w), mirror, out.numpy(), by, less)
        return out if padding is None else _padded(out, h, w, padding)
    else:
        pixels = torch.empty(image.shape[2], h, w, dtype=torch.uint8)
        none = [0.0] * len(pixels)
        _host.view(image, fitted, start, (h, w), mirror, pixels.numpy(), none, none)
    if change is not None:
        pixels = change(F.to_dtype(pixels, torch.float32, scale=True))
    return normalised(pixels, mean, std, size, out, padding)


def normalised(
    pixels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int],
    out: Tensor | None = None,
    padding: Sequence[float] | None = None,
) -> Tensor:
    """Normalises a picture and pads it, in one pass.

    Args:
        pixels: [C, h, w] uint8, or floating in [0, 1].
        mean, std: of its channels, in [0, 1].
        size: (H, W), at least h and w.
        out: to write to.
        padding: of each channel; None for 0.

    Returns:
        [C, H, W] float32: (pixels - mean) / std, the padding below and to the right of them.
    """
    out = fresh(len(pixels), *size) if out is None else out
    _, h, w = pixels.shape
    _padded(out, h, w, [0.0] * len(pixels) if padding is None else padding)
    top = 255 if pixels.dtype == torch.uint8 else 1
    for target, source, m, s in zip(out, pixels, mean, std, strict=True):
        # a channel stays in the cache
        target[:h, :w].copy_(source).mul_(1 / (top * s)).sub_(m / s)
    return out


def _padded(out: Tensor, h: int, w: int, padding: Sequence[float]) -> Tensor:
    """The same with a value for each channel below row h and to the right of column w."""
    value = out.new_tensor(padding)[:, None, None]
    out[:, h:], out[:, :h, w:] = value, value
    return out


def nearest(n: int, to: int) -> np.ndarray:
    """Of each of `to` pixels in a row the nearest of n that the row had before it was resized."""
    return ((np.arange(to) + 0.5) * (n / to)).astype(np.int64).clip(max=n - 1)


def crop(
    have: Sequence[int],
    want: Sequence[int],
    generator: Generator | None,
    labels_at: Callable[[tuple[slice, slice]], np.ndarray] | None = None,
    most: float = 1.0,
) -> tuple[slice, slice]:
    """Rows and columns of a random crop.

    Args:
        have: H and W of the picture.
        want: of the crop.
        generator: that it is drawn from; None takes torch's global one.
        labels_at: gives the labels in a crop. It then has two classes or more, none of which fills
            more than its share, if such a crop is drawn within ten tries.
        most: that share of the pixels that count.
    """
    for _ in range(_TRIES):
        place = tuple(
            slice(start, start + m)
            for n, m in zip(have, want)
            for start in [int(torch.randint(max(n - m, 0) + 1, (), generator=generator))]
        )
        if labels_at is None:
            break
        labels = labels_at(place)
        counts = np.bincount(labels.ravel(), minlength=1)[: void_in(labels)]
        if (counts > 0).sum() > 1 and counts.max() < most * counts.sum():
            break
    return place


def colours(pixels: Tensor, generator: Generator | None = None) -> Tensor:
    """Changes brightness, contrast, saturation and hue, each in half of the views; contrast
    before the last two or after them. Other channels than three have no saturation and hue.

    Args:
        pixels: [C, H, W] floating in [0, 1].
        generator: that they are drawn from; None takes torch's global one.
    """
    from torchvision.transforms.v2 import functional as F

    changes = [
        lambda x: (x + uniform(-32 / 255, 32 / 255, generator)).clamp(0, 1),
        lambda x: (x * uniform(0.5, 1.5, generator)).clamp(0, 1),
        lambda x: F.adjust_saturation(x, uniform(0.5, 1.5, generator)),
        lambda x: F.adjust_hue(x, uniform(-0.1, 0.1, generator)),
    ]
    if len(pixels) != 3:
        changes = changes[:2]
    if uniform(0, 1, generator) < 0.5:
        changes.append(changes.pop(1))
    for change in changes:
        if uniform(0, 1, generator) < 0.5:
            pixels = change(pixels)
    return pixels


def uniform(low: float, high: float, generator: Generator | None) -> float:
    """A number between them."""
    return low + (high - low) * torch.rand((), generator=generator).item()
