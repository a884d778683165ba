"""A data set of anybody's, whose items are pictures, masks and labels, as one of this library."""

from collections.abc import Sequence

import numpy as np
import torch

from ..io.images import read_pixels
from .pictures import viewed
from .sample import IdMaps, Sample
from .views import InstanceViews


class Wrapped:
    """Item i of a data set as a `Sample`.

    An item that cannot be used gives a warning that says why, and the next one in its place.

    Args:
        dataset: with a length and items (image, masks, labels), or (image, {"masks", "labels"}) as
            torchvision's detection models take them: image as `io.images.read_image` takes it,
            masks [n, H, W] of any type, not 0 inside, labels [n] integers in [0, K).
        classes: name of each label.
        stuff: labels without instances.
        views: for training; None leaves pictures whole.
        seed: other seeds give other views.
        channels: of the pictures.

    Attributes:
        things: labels with instances.
        passes: whether samples differ from pass to pass.

    Raises:
        ValueError: an empty data set, or no class.
    """

    def __init__(
        self,
        dataset,
        classes: Sequence[str],
        stuff: Sequence[int] = (),
        views: InstanceViews | None = None,
        seed: int = 0,
        channels: int = 3,
    ):
        if not len(dataset) or not len(classes):
            raise ValueError(
                "Wrapped: dataset and classes must not be empty, "
                f"got {len(dataset)} items and {len(classes)} names"
            )
        self.dataset, self.views, self.seed, self.channels = dataset, views, seed, channels
        self.classes, self.stuff = list(classes), tuple(stuff)
        self.things = tuple(k for k in range(len(classes)) if k not in self.stuff)
        self.passes = views is not None
        self.told: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        return viewed(self, place)

    def examined(self, index: int) -> tuple[Sample, list[str]]:
        """A whole sample, and what was left out of it and why.

        Raises:
            ValueError: the item is not as it must be; names it.
        """
        name = f"item {index} of {type(self.dataset).__name__}"
        item = self.dataset[index]
        if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], dict):
            item = item[0], item[1].get("masks"), item[1].get("labels")
        if not isinstance(item, (tuple, list)) or len(item) != 3:
            raise ValueError(f"{name}: must be (image, masks, labels), got {type(item).__name__}")
        try:
            image = read_pixels(item[0], name, channels=self.channels)
        except TypeError as error:
            raise ValueError(str(error)) from error
        masks, labels = (_array(x) for x in item[1:])
        size, K = image.shape[:2], len(self.classes)
        if masks.ndim != 3 or masks.shape[1:] != size:
            raise ValueError(
                f"{name}: masks must be [n, {size[0]}, {size[1]}], got {list(masks.shape)}"
            )
        if labels.shape != (len(masks),) or (len(labels) and labels.dtype.kind not in "iu"):
            raise ValueError(
                f"{name}: labels must be {len(masks)} integers, one a mask, "
                f"got {list(labels.shape)} {labels.dtype}"
            )
        labels = labels.astype(np.int64)
        if len(bad := labels[(labels < 0) | (labels >= K)]):
            hint = " (labels count from 0)" if bad.max() == K else ""
            raise ValueError(f"{name}: labels must be in [0, {K}), got {bad[0]}{hint}")
        found = IdMaps.of_arrays(masks, size)
        seen = found.areas() > 0
        lost = int((~seen).sum())
        sample = {
            "image": image,
            "masks": found.chosen(seen),
            "labels": labels[seen],
            "crowd": np.zeros(len(labels) - lost, bool),
            "id": index,
        }
        faults = [f"{name}: {lost} masks without a pixel are left out"] if lost else []
        return sample, faults


def _array(x) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
