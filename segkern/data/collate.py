"""Packs samples of a data set into a batch.

Letters: B image, H W size of the batch, h w size of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures.labels import void_in
from ..structures.targets import Targets, fresh
from .sample import IdMaps, Sample


@dataclass
class Batch:
    """Images and what the model is to find in them.

    Attributes:
        pixel_values: [B, C, H, W] float32, normalised, zero-padded to the right and below.
        targets: of the same images.
        unread: why pictures could not be read, of each for which another one stands.
    """

    pixel_values: Tensor
    targets: Targets
    unread: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return replace(
            self,
            pixel_values=self.pixel_values.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


def collate(
    samples: Sequence[Sample],
    num_labels: int | None = None,
    divisor: int = 32,
    num_queries: int | None = None,
    void: Literal["background", "ignore"] = "background",
) -> Batch:
    """Packs samples into a batch.

    Args:
        samples: with pixel_values [3, h, w] float, masks [n, h, w], labels [n], id, and, all or
            none, semantic [h, w], as arrays or tensors; n may be 0. Segments that are marked
            as a crowd are left out.
        num_labels: K; None leaves the labels' upper bound unchecked.
        divisor: H and W are multiples of it.
        num_queries: of the model; more targets in a sample give a warning.
        void: what pixels are that do not count in `semantic`, or that belong to a segment marked
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
    if whole := [name for name, s in zip(ids, samples) if "pixel_values" not in s]:
        raise ValueError(
            f"collate: samples must have pixel_values, got those of sample {whole[0]} without: "
            "give its data set views"
        )
    images = [torch.as_tensor(s["pixel_values"]) for s in samples]
    segments = [_segments(s) for s in samples]
    masks = [x for x, _ in segments]
    size = tuple(-(-max(x.shape[i] for x in images) // divisor) * divisor for i in (1, 2))
    for name, image, mask in zip(ids, images, masks):
        if mask.shape[1:] != image.shape[1:]:
            raise ValueError(
                f"collate: masks of sample {name} must be [n, {image.shape[1]}, "
                f"{image.shape[2]}], the size of its image, got {list(mask.shape)}"
            )
    for name, image, sample in zip(ids, images, samples):
        # a sum is quick, and finite where all are; where it is not it may only have overflown
        if not (sample.get("finite") or image.sum().isfinite() or image.isfinite().all()):
            raise ValueError(
                f"collate: pixels of sample {name} must be finite, got NaN or infinity"
            )
    pixels = _together(images, size)
    labels = [x for _, x in segments]
    try:
        targets = Targets.from_lists(
            [x if isinstance(x, IdMaps) else _pad(x, size) for x in masks],
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
        maps = [_pad(x, size, void_in(x)) for x in maps]
        targets = targets._replace(semantic=torch.cat(maps))
    if all("task" in s for s in samples):
        targets = targets._replace(task=torch.tensor([s["task"] for s in samples]))
    return Batch(pixels, targets, [s["unread"] for s in samples if "unread" in s])


def _together(images: list[Tensor], size: tuple[int, int]) -> Tensor:
    """[B, C, *size]: images with zeros to the right and below, or the array that they are already
    the rows of."""
    first, n = images[0], images[0].numel()
    if first.shape[1:] == size and all(
        x.shape == first.shape
        and x.is_contiguous()
        and x.data_ptr() == first.data_ptr() + i * n * x.element_size()
        and x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for i, x in enumerate(images)
    ):
        return first.as_strided((len(images), *first.shape), (n, *first.stride()))
    pixels = fresh(len(images), len(first), *size, sent=True)
    for target, x in zip(pixels, images):
        _, h, w = x.shape
        target[:, :h, :w], target[:, h:], target[:, :h, w:] = x, 0, 0
    return pixels


def _segments(sample: Sample) -> tuple[Tensor | IdMaps, Tensor]:
    """Masks [n, h, w] and labels [n] of a sample, without crowds, of which nobody knows the
    number."""
    masks, labels = sample["masks"], torch.as_tensor(sample["labels"])
    crowd = _crowd(sample)
    if crowd.any():
        masks = masks.chosen(~crowd) if isinstance(masks, IdMaps) else masks[~crowd]
        labels = labels[torch.from_numpy(~crowd)]
    return masks if isinstance(masks, IdMaps) else torch.as_tensor(masks), labels


def _void(sample: Sample) -> Tensor:
    """[h, w] bool: nobody knows whose these pixels are."""
    masks, crowd = sample["masks"], _crowd(sample)
    void = np.zeros(masks.shape[1:], bool)
    if "semantic" in sample:
        semantic = np.asarray(sample["semantic"])
        void |= semantic == void_in(semantic)
    if crowd.any():
        void |= np.asarray(masks.chosen(crowd) if isinstance(masks, IdMaps) else masks[crowd]).any(
            0
        )
    return torch.from_numpy(void)


def _crowd(sample: Sample) -> np.ndarray:
    """[n] bool."""
    return np.asarray(sample.get("crowd", np.zeros(len(sample["labels"]))), bool)


def _pad(x: Tensor, size: tuple[int, int], value: int = 0) -> Tensor:
    """[c, h, w] -> [c, *size] with `value` to the right and below."""
    if x.shape[1:] == size:
        return x
    return F.pad(x, (0, size[1] - x.shape[2], 0, size[0] - x.shape[1]), value=value)
