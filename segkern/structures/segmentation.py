"""Results: the segments found in an image, their map, masks and boxes, as picture and JSON.

Letters: K class, H W size of the image, n instance, m map of bits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import scipy
import torch
from PIL import Image
from torch import Tensor

from ..io.atomic_files import write_json
from ..io.images import read_pixels
from ..io.overlay import drawable_suffix, overlay, save_picture
from ..io.rle import encode, encode_bits
from ..ops.mask_bits import unpack_bits
from . import conversions


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
        out = self.bits.new_empty((len(self), self.bits.shape[1], self.width), dtype=torch.bool)
        for mask, packed in zip(out, self):  # one by one: no copy of all of them beside the result
            mask.copy_(packed)
        return out

    def boxes(self) -> np.ndarray:
        """[n, 4] int64: `Segmentation.boxes`, from the bits."""
        bits = self.bits.cpu().numpy()
        rows = bits.any(2)
        columns = np.bitwise_or.reduce(bits, 1).view(np.uint8)
        columns = np.unpackbits(columns, axis=1, count=self.width, bitorder="little")
        (top, bottom), (left, right) = _ends(rows), _ends(columns)
        return np.stack((left, top, right, bottom), 1)[self.slots]

    def encoded(self) -> list[dict]:
        """The masks as COCO RLE; those of one query are encoded once."""
        codes = encode_bits(self.bits.cpu().numpy(), self.width)
        return [codes[slot] for slot in self.slots]


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
        image: the picture, [3, H, W] uint8 or floating in [0, 1]; `segment` puts it here.
    """

    task: str
    segmentation: Tensor
    segments: list[Segment]
    names: dict[int, str] | None = None
    masks: Masks | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    image: Tensor | None = field(default=None, repr=False)

    @property
    def boxes(self) -> Tensor:
        """[n, 4] int64: left, top, right and bottom edge of each of `segments` in pixels.

        The right and bottom edge lie behind the last pixel: a box is right - left pixels wide. A
        segment without pixels has zeros.
        """
        return torch.from_numpy(self._boxes()).to(self.segmentation.device)

    def plot(self, image=None) -> Image.Image:
        """The picture with its segments in colour over grey, contours, names and scores.

        Args:
            image: in place of the result's own: a path, PIL image, array or tensor.

        Returns:
            an RGB image of the picture's size; of a multiple, where its short side is below 384.

        Raises:
            ValueError: the result has no image, and none is given; or of another size.
        """
        image = self.image if image is None else image
        if image is None:
            raise ValueError("plot: image must be given for a result that holds none")
        return overlay(read_pixels(image), self)

    def save(self, path: str | Path) -> None:
        """Writes what `to_json` returns for ".json", what `plot` draws for a picture's suffix.

        The file is whole or not there.

        Raises:
            ValueError: another suffix, or a picture of a result without image.
            OSError: it cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            write_json(path, self.to_json())
        elif drawable_suffix(path.suffix):
            save_picture(path, self.plot())
        else:
            raise ValueError(
                f"save: path must end with .json or as a picture does (.png, .jpg), got {path}"
            )

    def summary(self) -> str:
        """What was found, in a line: "2 person, 1 sky", or "sky 60 %, road 40 %" for semantic;
        "" for nothing."""
        if self.task == "semantic":
            share = 100 / max(1, self.segmentation.numel())
            parts = sorted(self.segments, key=lambda s: -s.area)
            return ", ".join(f"{self.name(s.label_id)} {share * s.area:.0f} %" for s in parts)
        count = Counter(self.name(s.label_id) for s in self.segments)
        return ", ".join(f"{n} {name}" for name, n in count.most_common())

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
        else:
            codes = self.masks.encoded()
        segments = [
            {
                "id": s.id,
                "label_id": s.label_id,
                "label": self.name(s.label_id),
                "score": None if s.score is None else round(s.score, 6),
                "isthing": s.isthing,
                "area": s.area,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": code,
            }
            for s, code, (x0, y0, x1, y1) in zip(self.segments, codes, self._boxes().tolist())
        ]
        return {"task": self.task, "size": list(self.segmentation.shape), "segments": segments}

    def to_supervision(self):
        """The segments as supervision's `Detections`, for its annotators, metrics and trackers.

        Returns:
            `supervision.Detections` of n segments: xyxy [n, 4] float32, the right and bottom edge
            behind the last pixel as in `boxes` (supervision's "exclusive" convention); mask
            [n, H, W] bool; confidence [n] float32, None for semantic; class_id [n]; and names in
            data["class_name"].

        Raises:
            ImportError: the package supervision is not installed.
        """
        return conversions.supervision_detections(self)

    def to_coco(
        self,
        image_id: int = 1,
        category_ids: Mapping[int, int] | Sequence[int] | None = None,
        kind: Literal["annotations", "results"] = "annotations",
        first_id: int = 1,
    ) -> list[dict]:
        """The segments as COCO writes them, masks as run-length codes with their counts as text.

        Args:
            image_id: of the picture in the COCO file.
            category_ids: of each label the id of its category in the COCO file; None: the labels
                themselves, from 0.
            kind: "annotations" are what a COCO file lists, with id, area, bbox and iscrowd;
                "results" are what `pycocotools`' `COCO.loadRes` and its evaluation read, with
                score and without bbox, from which they would take the area.
            first_id: annotations: the first of their ids, which count up.

        Returns:
            a dict for each segment; annotations leave out segments without a pixel.

        Raises:
            TypeError: an id that is no integer.
            ValueError: another kind, results of a semantic result, which has no scores, or a label
                that `category_ids` lacks.
        """
        if kind == "results":
            return conversions.coco_results(self, image_id, category_ids)
        if kind == "annotations":
            return conversions.coco_annotations(self, image_id, category_ids, first_id)
        raise ValueError(f'to_coco: kind must be "annotations" or "results", got {kind!r}')

    def to_panoptic_png(
        self, category_ids: Mapping[int, int] | Sequence[int] | None = None
    ) -> tuple[Image.Image, list[dict]]:
        """The map as COCO's panoptic format has it.

        Args:
            category_ids: as in `to_coco`.

        Returns:
            an RGB image whose pixels hold ids, red + 256 green + 65536 blue, 0 for void; and
            `segments_info`: id, category_id, area, bbox [x, y, width, height], iscrowd. Each class
            of a semantic result is one segment, whose id is its label + 1. Of instances that
            overlap, the best-scored has the pixel, and areas and boxes are of what is seen.

        Raises:
            TypeError: a category that is no integer.
            ValueError: a label that `category_ids` lacks.
        """
        return conversions.panoptic_png(self, category_ids)

    def _boxes(self) -> np.ndarray:
        if self.masks is not None:
            return self.masks.boxes()
        # of id 0, 1, ...; it takes 0 for nothing
        found = scipy.ndimage.find_objects(self.segmentation.cpu().numpy() + 1)
        boxes = np.zeros((len(self.segments), 4), np.int64)
        for box, s in zip(boxes, self.segments):
            if s.id < len(found) and found[s.id] is not None:
                rows, columns = found[s.id]
                box[:] = columns.start, rows.start, columns.stop, rows.stop
        return boxes


def _ends(hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row [n, size]: the first place that is not 0, and 1 + the last; zeros for none."""
    some = hit.any(1)
    first, last = hit.argmax(1), hit.shape[1] - hit[:, ::-1].argmax(1)
    return first * some, last * some
