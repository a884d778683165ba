"""Random views of pictures with segments for training: resize, crop, mirror, colours.

    resize by a random ratio, or to one of several short sides -> crop of a fixed size, in which no
    class fills too much -> mirror -> colours -> normalise -> pad with zeros

Letters: H W size of the view, h w size of the picture, l map.

Masks go through as maps of ids: the pixels of a view are taken from them, and no mask of the
resized picture is formed.
Source: the large-scale jitter of Copy-Paste (Ghiasi et al., CVPR 2021) as Mask2Former trains on
COCO with it, and the short sides of its ADE20K and Cityscapes recipes.
Differs: pads with the mean colour and not with grey, where the model asks for nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from ..structures.labels import void_in
from .sample import Sample
from .transforms import colours, crop, nearest, pictured, uniform


@dataclass
class ViewConfig:
    """What views are like.

    Attributes:
        size: (H, W) of a view, in pixels.
        ratios: least and largest size of the picture over that of the view.
        short_sides: pixels, to one of which the short side is resized, in place of `ratios`.
        long_side: pixels, the most that the long side gets then.
        flip: share of the views that are mirrored, in [0, 1].
        colours: change brightness, contrast, saturation and hue.
        most: share of a view's labelled pixels that one class may fill, in (0, 1], of samples with
            a map of labels: a crop that has more is drawn again, ten times at most. 1 takes any.
    """

    size: tuple[int, int] = (1024, 1024)
    ratios: tuple[float, float] = (0.1, 2.0)
    short_sides: tuple[int, ...] = ()
    long_side: int = 4096
    flip: float = 0.5
    colours: bool = False
    most: float = 1.0

    def __post_init__(self):
        self.size, self.ratios = tuple(self.size), tuple(self.ratios)
        self.short_sides = tuple(self.short_sides)
        if len(self.size) != 2 or min(*self.size, *self.short_sides, self.long_side) < 1:
            raise ValueError(
                "views: size, short_sides and long_side must be >= 1, "
                f"got {self.size}, {self.short_sides}, {self.long_side}"
            )
        if len(self.ratios) != 2 or not 0 < self.ratios[0] <= self.ratios[1]:
            raise ValueError(f"views: ratios must be 0 < least <= largest, got {self.ratios}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"views: flip must be in [0, 1], got {self.flip}")
        if not 0 < self.most <= 1:
            raise ValueError(f"views: most must be in (0, 1], got {self.most}")


def scaled_sides(side: int) -> tuple[int, ...]:
    """Short sides of 0.5 to 2 times one, in steps of a tenth, as the papers' recipes have them."""
    return tuple(tenths * side // 10 for tenths in range(5, 21))


class InstanceViews:
    """Views of samples, by a generator alone.

    Args:
        config: what they are like.
        mean, std: of the pixels in [0, 1], red, green, blue.
        padding: of each channel, normalised; None for 0, the mean colour.
    """

    def __init__(
        self,
        config: ViewConfig,
        mean: Sequence[float],
        std: Sequence[float],
        padding: Sequence[float] | None = None,
    ):
        # here, as it takes as long to import as torch, and forked workers inherit it
        import torchvision.transforms.v2  # noqa: F401

        self.config, self.mean, self.std = config, list(mean), list(std)
        self.padding = padding
        self.finite = all(math.isfinite(x) for m, s in zip(mean, std) for x in (m / s, 1 / s))

    def __call__(
        self, sample: Sample, generator: Generator | None = None, out: Tensor | None = None
    ) -> Sample:
        """A view.

        Args:
            sample: with image, `IdMaps`, labels and crowd; semantic may lack.
            generator: that it is drawn from; None takes torch's global one.
            out: [3, H, W] float32 that pixel_values are written to; None makes it.

        Returns:
            the sample with pixel_values [3, H, W] float32 in place of image; segments that it does
            not show are left out and counted in `dropped`.
        """
        sample = dict(sample)
        image = sample.pop("image")
        size = image.shape[:2]
        fitted = self._fitted(size, generator)
        rows, columns = (nearest(n, to) for n, to in zip(size, fitted))
        limited = self.config.most < 1 and "semantic" in sample

        def labels_at(place: tuple[slice, slice]) -> np.ndarray:
            return sample["semantic"].take(rows[place[0]], axis=0).take(columns[place[1]], axis=1)

        wanted = labels_at if limited else None
        place = crop(fitted, self.config.size, generator, wanted, self.config.most)
        rows, columns = rows[place[0]], columns[place[1]]
        mirror = uniform(0, 1, generator) < self.config.flip
        columns = columns[::-1] if mirror else columns
        change = (lambda pixels: colours(pixels, generator)) if self.config.colours else None
        look = self.config.size, self.mean, self.std
        pixels = pictured(image, fitted, place, mirror, *look, change, out, self.padding)
        below = self.config.size[0] - len(rows)
        right = self.config.size[1] - len(columns)
        rows = np.pad(rows, (0, below), constant_values=-1)
        columns = np.pad(columns, (0, right), constant_values=-1)
        masks = sample["masks"].taken(rows, columns)
        seen = masks.areas() > 0
        if "semantic" in sample:
            labels = sample["semantic"].take(rows, axis=0).take(columns, axis=1)
            labels[rows < 0], labels[:, columns < 0] = void_in(labels), void_in(labels)
            sample["semantic"] = labels
        return sample | {
            "pixel_values": pixels,
            "finite": self.finite,
            "masks": masks.chosen(seen),
            "labels": sample["labels"][seen],
            "crowd": sample["crowd"][seen],
            "dropped": int((~seen).sum()),
        }

    def _fitted(self, size: Sequence[int], generator: Generator | None) -> list[int]:
        """The size that a picture is resized to, its shape kept."""
        if sides := self.config.short_sides:
            side = sides[int(torch.randint(len(sides), (), generator=generator))]
            factor = min(side / min(size), self.config.long_side / max(size))
        else:
            ratio = uniform(*self.config.ratios, generator)
            factor = ratio * min(want / have for want, have in zip(self.config.size, size))
        return [max(1, round(n * factor)) for n in size]
