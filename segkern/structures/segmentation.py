"""Results: the segments found in an image, their map, their masks, and their JSON.

Letters: K class, H W size of the image, n instance, m map of bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from ..io.rle import encode
from ..ops.mask_bits import unpack_bits


class Segment(NamedTuple):
    """One segment.

    Attributes:
        id: its value in the label map: from 1 for panoptic and instance, the label for semantic.
        label_id: in [0, K).
        score: in [0, 1]; of merged stuff the highest. None for semantic.
        area: pixels.
        isthing: False for labels listed as stuff.
    """

    id: int
    label_id: int
    score: float | None
    area: int
    isthing: bool


class Masks:
    """Masks of one size that may overlap, a bit a pixel; `masks[i]` is [H, W] bool.

    Attributes:
        bits: [m, H, ceil(W / 32)] int32, packed as `ops.mask_bits` packs.
        slots: of each mask its place in `bits`; instances of one query share one.
        width: W.
    """

    def __init__(self, bits: Tensor, slots: Sequence[int], width: int):
        self.bits, self.slots, self.width = bits, list(slots), width

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return Masks(self.bits, self.slots[index], self.width)
        return unpack_bits(self.bits[self.slots[index]], self.width)

    def dense(self) -> Tensor:
        """[n, H, W] bool."""
        return unpack_bits(self.bits[self.slots], self.width)


@dataclass
class Segmentation:
    """The segments of one image.

    Attributes:
        task: "panoptic", "instance" or "semantic".
        segmentation: [H, W] int32: segment ids with 0 for void (panoptic), label ids (semantic),
            or 1 + index of the best-scored instance that covers the pixel, 0 where none does.
        segments: of the map; for instance one for each mask, in their order.
        names: label id to name.
        masks: n `Masks`, instance only; they may overlap and may be empty.
        labels: [n] int64, instance only.
        scores: instance: [n] float, in descending order; semantic: [K, H, W], where asked for.
    """

    task: str
    segmentation: Tensor
    segments: list[Segment]
    names: dict[int, str] | None = None
    masks: Masks | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None

    def above(self, score: float) -> "Segmentation":
        """The instances with at least this score; panoptic and semantic results as they are."""
        if self.task != "instance":
            return self
        n = int((self.scores >= score).sum())  # they are sorted
        seen = torch.where(self.segmentation > n, 0, self.segmentation)
        return replace(
            self,
            segmentation=seen,
            segments=self.segments[:n],
            masks=self.masks[:n],
            labels=self.labels[:n],
            scores=self.scores[:n],
        )

    def name(self, label_id: int) -> str:
        """The label's name, or its number as text."""
        return (self.names or {}).get(label_id, str(label_id))

    def mask(self, index: int) -> Tensor:
        """[H, W] bool: the pixels of `segments[index]`."""
        if self.masks is not None:
            return self.masks[index]
        return self.segmentation == self.segments[index].id

    def to_json(self) -> dict:
        """The segments in plain types.

        Returns:
            task, size [H, W], and segments: id, label_id, label, score, isthing, area, bbox
            [x, y, width, height] and segmentation, a COCO RLE with its counts as text.
        """
        if self.masks is None:
            ids = self.segmentation.cpu().numpy()
            codes = encode(ids, [s.id for s in self.segments])
            found = scipy.ndimage.find_objects(ids + 1)  # of id 0, 1, ...; it takes 0 for nothing
            boxes = [_box(found[s.id]) for s in self.segments]
        else:
            codes, boxes = [], []
            for mask in self.masks:
                mask = mask.byte().cpu().numpy()
                codes += encode(mask, [1])
                boxes.append(_box(next(iter(scipy.ndimage.find_objects(mask)), None)))
        segments = [
            {
                "id": s.id,
                "label_id": s.label_id,
                "label": self.name(s.label_id),
                "score": None if s.score is None else round(s.score, 6),
                "isthing": s.isthing,
                "area": s.area,
                "bbox": box,
                "segmentation": code,
            }
            for s, code, box in zip(self.segments, codes, boxes)
        ]
        return {"task": self.task, "size": list(self.segmentation.shape), "segments": segments}


def _box(found: tuple[slice, slice] | None) -> list[int]:
    """x, y, width and height of a segment's rows and columns; zeros where there are none."""
    if found is None:
        return [0, 0, 0, 0]
    rows, columns = found
    return [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
