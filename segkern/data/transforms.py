"""Random views of labelled images for training: resize, crop, mirror, colours.

    resize by a random ratio -> crop in which no class fills too much -> mirror -> colours
    -> normalise -> pad with zeros, whose pixels do not count

Source: the training pipeline of MMSegmentation, which Segmenter (Strudel et al., ICCV 2021) uses.
Differs: saturation blends with the grey image and is not scaled in HSV.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from ..structures.labels import VOID

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

    def __call__(
        self,
        image: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        generator: Generator | None = None,
    ) -> dict:
        """A view.

        Args:
            image: [h, w, 3] uint8.
            labels: [h, w] uint8, 255 where a pixel does not count.
            generator: that the view is drawn from; None takes torch's global one.

        Returns:
            pixel_values [3, H, W] float32 normalised, and semantic [H, W] uint8.
        """
        from torchvision.transforms.v2 import functional as F

        pixels = torch.as_tensor(image).permute(2, 0, 1)
        labels = torch.as_tensor(labels)[None]
        ratio = _uniform(*self.ratios, generator)
        fitted = self._fitted(pixels.shape[1:], ratio)
        pixels = F.resize(pixels, fitted, antialias=True)
        labels = F.resize(labels, fitted, F.InterpolationMode.NEAREST_EXACT)
        place = self._crop(labels, generator)
        pixels, labels = pixels[:, *place], labels[:, *place]
        if _uniform(0, 1, generator) < 0.5:
            pixels, labels = pixels.flip(2), labels.flip(2)
        pixels = self.colours(F.to_dtype(pixels, torch.float32, scale=True), generator)
        pixels = F.normalize(pixels, self.mean, self.std)
        below, right = (n - m for n, m in zip(self.size, pixels.shape[1:]))
        return {
            "pixel_values": torch.nn.functional.pad(pixels, (0, right, 0, below)),
            "semantic": torch.nn.functional.pad(labels, (0, right, 0, below), value=VOID)[0],
        }

    def colours(self, pixels: Tensor, generator: Generator | None = None) -> Tensor:
        """Changes brightness, contrast, saturation and hue, each in half of the views; contrast
        before the last two or after them.

        Args:
            pixels: [3, H, W] floating in [0, 1].
            generator: as above.
        """
        from torchvision.transforms.v2 import functional as F

        changes = [
            lambda x: (x + _uniform(-32 / 255, 32 / 255, generator)).clamp(0, 1),
            lambda x: (x * _uniform(0.5, 1.5, generator)).clamp(0, 1),
            lambda x: F.adjust_saturation(x, _uniform(0.5, 1.5, generator)),
            lambda x: F.adjust_hue(x, _uniform(-0.1, 0.1, generator)),
        ]
        if _uniform(0, 1, generator) < 0.5:
            changes.append(changes.pop(1))
        for change in changes:
            if _uniform(0, 1, generator) < 0.5:
                pixels = change(pixels)
        return pixels

    def _fitted(self, size: Sequence[int], ratio: float) -> list[int]:
        """The size that keeps the image's shape and fits into `ratio` times the scale."""
        factor = min(max(self.scale) * ratio / max(size), min(self.scale) * ratio / min(size))
        return [max(1, round(n * factor)) for n in size]

    def _crop(self, labels: Tensor, generator: Generator | None) -> tuple[slice, slice]:
        """Rows and columns of a crop in which no class fills more than its share, if one is drawn
        within a few tries."""
        for _ in range(_TRIES):
            place = tuple(
                slice(start, start + want)
                for have, want in zip(labels.shape[1:], self.size)
                for start in [int(torch.randint(max(have - want, 0) + 1, (), generator=generator))]
            )
            counts = torch.bincount(labels[0][place].flatten(), minlength=VOID + 1)[:VOID]
            if (counts > 0).sum() > 1 and counts.max() < self.most * counts.sum():
                break
        return place


def _uniform(low: float, high: float, generator: Generator | None) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()
