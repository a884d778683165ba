"""Packs samples of a data set into a batch.

Letters: B image, H W size of the batch, h w size of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures.labels import VOID
from ..structures.targets import Targets


@dataclass
class Batch:
    """Images and what the model is to find in them.

    Attributes:
        pixel_values: [B, 3, H, W] float32, normalised, zero-padded to the right and below.
        targets: of the same images.
    """

    pixel_values: Tensor
    targets: Targets

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return replace(
            self,
            pixel_values=self.pixel_values.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


def collate(
    samples: Sequence[dict],
    num_labels: int | None = None,
    divisor: int = 32,
    num_queries: int | None = None,
    void: Literal["background", "ignore"] = "background",
) -> Batch:
    """Packs samples into a batch.

    Args:
        samples: dicts with pixel_values [3, h, w] float, masks [n, h, w], labels [n], id, and, all
            or none, semantic [h, w] uint8, as arrays or tensors; n may be 0.
        num_labels: K; None leaves the labels' upper bound unchecked.
        divisor: H and W are multiples of it.
        num_queries: of the model; more targets in a sample give a warning.
        void: what pixels are whose label is 255 in `semantic`, or that belong to a segment marked
            in `crowd` [n] bool: "background" as in the papers' code, which no mask should cover;
            or "ignore": they have no weight in matching and in losses of masks.

    Returns:
        a `Batch` on the CPU.

    Raises:
        ValueError: pixels that are not finite, a label out of range, or masks of another size or
            number than the image or labels; the message names the sample. No such `void`.
    """
    if void not in ("background", "ignore"):
        raise ValueError(f"collate: void must be background or ignore, got {void!r}")
    ids = [int(s["id"]) for s in samples]
    images = [torch.as_tensor(s["pixel_values"]) for s in samples]
    masks = [torch.as_tensor(s["masks"]) for s in samples]
    size = tuple(-(-max(x.shape[i] for x in images) // divisor) * divisor for i in (1, 2))
    for name, image, mask in zip(ids, images, masks):
        if mask.shape[1:] != image.shape[1:]:
            raise ValueError(
                f"collate: masks of sample {name} must be [n, {image.shape[1]}, "
                f"{image.shape[2]}], the size of its image, got {list(mask.shape)}"
            )
    pixels = torch.stack([_pad(x, size) for x in images])
    if not pixels.isfinite().all():
        bad = [name for name, x in zip(ids, images) if not x.isfinite().all()]
        raise ValueError(f"collate: pixels of sample {bad[0]} must be finite, got NaN or infinity")
    labels = [torch.as_tensor(s["labels"]) for s in samples]
    try:
        targets = Targets.from_lists(
            [_pad(x, size) for x in masks],
            labels,
            size,
            num_labels,
            ids,
            num_queries,
            None if void == "background" else [_pad(_void(s)[None], size)[0] for s in samples],
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (images 0 to {len(ids) - 1} are samples {ids})") from error
    if all("semantic" in s for s in samples):
        maps = [torch.as_tensor(s["semantic"])[None] for s in samples]
        targets = targets._replace(semantic=torch.cat([_pad(x, size, VOID) for x in maps]))
    return Batch(pixels, targets)


def _void(sample: dict) -> Tensor:
    """[h, w] bool: nobody knows whose these pixels are."""
    masks = np.asarray(sample["masks"])
    void = np.zeros(masks.shape[1:], bool)
    if "semantic" in sample:
        void |= np.asarray(sample["semantic"]) == VOID
    if "crowd" in sample:
        void |= masks[np.asarray(sample["crowd"], bool)].any(0)
    return torch.from_numpy(void)


def _pad(x: Tensor, size: tuple[int, int], value: int = 0) -> Tensor:
    """[c, h, w] -> [c, *size] with `value` to the right and below."""
    return F.pad(x, (0, size[1] - x.shape[2], 0, size[0] - x.shape[1]), value=value)
