"""From the logits of queries to segments, and from pictures to segments.

Letters: B image, Q query, K class, H W output size, h w size of the mask logits, n instance.

    mask logits -> resized to the padded input -> cropped to the image -> resized to the output
    semantic: argmax_k sum_q softmax(class)[q, k] sigmoid(mask)[q]
    panoptic: each pixel goes to the kept query with the largest score x sigmoid(mask)
    instance: the top-k of all (query, class) pairs; mask = logit > 0

Maps are resized a few queries at a time, so memory grows with H x W, not with Q x H x W.
Source: Mask2Former (Cheng et al., CVPR 2022), inference of the original code.
Differs: instances come sorted by score; top_k is clipped to Q x K.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.ndimage import find_objects
from torch import Tensor, nn

from .images import prepare, read_image
from .ops._checks import expect
from .rle import encode

TASKS = ("panoptic", "instance", "semantic")
_PIXELS_AT_ONCE = 2**23  # of all maps that are resized together: 32 MB in float32


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


@dataclass
class Segmentation:
    """The segments of one image.

    Attributes:
        task: "panoptic", "instance" or "semantic".
        segmentation: [H, W] int32: segment ids with 0 for void (panoptic), label ids (semantic),
            or 1 + index of the best-scored instance that covers the pixel, 0 where none does.
        segments: of the map; for instance one for each mask, in their order.
        names: label id to name.
        masks: [n, H, W] bool, instance only; they may overlap and may be empty.
        labels: [n] int64, instance only.
        scores: [n] float, instance only, in descending order.
    """

    task: str
    segmentation: Tensor
    segments: list[Segment]
    names: dict[int, str] | None = None
    masks: Tensor | None = None
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
            found = find_objects(ids + 1)  # of id 0, 1, ...; it takes 0 for nothing
            boxes = [_box(found[s.id]) for s in self.segments]
        else:
            masks = [mask.byte().cpu().numpy() for mask in self.masks]
            codes = [encode(mask, [1])[0] for mask in masks]
            boxes = [_box(next(iter(find_objects(mask)), None)) for mask in masks]
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


def postprocess(
    class_logits: Tensor,  # [B, Q, K + 1]
    mask_logits: Tensor,  # [B, Q, h, w]
    task: str,
    padded_size: tuple[int, int],
    image_sizes: Sequence[tuple[int, int]],
    output_sizes: Sequence[tuple[int, int]],
    stuff: Sequence[int] = (),
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    top_k: int = 100,
    resize: str = "masks",
) -> list[Segmentation]:
    """Segments from logits.

    Args:
        class_logits: [B, Q, K + 1] floating; the last class is "no object".
        mask_logits: [B, Q, h, w] floating, of the padded images.
        task: "panoptic", "instance" or "semantic".
        padded_size: height and width of the model's input.
        image_sizes: of each image its height and width in that input, without the padding.
        output_sizes: of each image the height and width of its result.
        stuff: labels without instances: panoptic merges them by class, instance leaves them out.
        object_mask_threshold: panoptic: queries must score more than this, in [0, 1].
        overlap_threshold: panoptic: a query must win this share of its own mask, in [0, 1].
        top_k: instance: pairs of query and class to return.
        resize: "masks" takes the mask logits to the output size; "scores", semantic only, takes
            the summed class scores there, as the original does where it does semantic alone.

    Returns:
        B results, computed in float32 (float64 for float64 logits), on the logits' device.

    Raises:
        TypeError, ValueError: wrong dtype, shape, size, name or range, or logits not finite.
    """
    sizes = {}
    expect("postprocess", "class_logits", class_logits, "B Q K+1", "float", sizes)
    expect("postprocess", "mask_logits", mask_logits, "B Q h w", "float", sizes)
    check_options(task, object_mask_threshold, overlap_threshold, top_k)
    if resize not in ("masks", "scores") or (resize == "scores" and task != "semantic"):
        raise ValueError(
            'postprocess: resize must be "masks", or "scores" where task is "semantic", '
            f"got {resize!r} for {task}"
        )
    k = class_logits.shape[2] - 1
    if k < 1 or not all(0 <= label < k for label in stuff):
        raise ValueError(f"postprocess: stuff must be labels in [0, {k}), got {list(stuff)}")
    for name, given in (("image_sizes", image_sizes), ("output_sizes", output_sizes)):
        if len(given) != sizes["B"] or not all(len(s) == 2 and min(s) > 0 for s in given):
            raise ValueError(
                f"postprocess: {name} must be {sizes['B']} pairs of positive height and width, "
                f"got {list(given)}"
            )
    if any(s[0] > padded_size[0] or s[1] > padded_size[1] for s in image_sizes):
        raise ValueError(
            f"postprocess: image_sizes must fit into padded_size {tuple(padded_size)}, "
            f"got {list(image_sizes)}"
        )
    if not class_logits.isfinite().all():
        raise ValueError("postprocess: class_logits must be finite, got NaN or infinity")
    exact = torch.promote_types(class_logits.dtype, torch.float32)
    stuff, results = frozenset(stuff), []
    for classes, masks, image, output in zip(class_logits, mask_logits, image_sizes, output_sizes):
        probabilities, steps = classes.to(exact).softmax(-1), [padded_size, image, output]
        masks = masks.to(exact)
        if task == "semantic":
            result = _semantic(probabilities, masks, steps, stuff, resize)
        elif task == "panoptic":
            thresholds = object_mask_threshold, overlap_threshold
            result = _panoptic(probabilities, masks, steps, stuff, *thresholds)
        else:
            result = _instance(probabilities, masks, steps, stuff, top_k)
        results.append(result)
    return results


def segment(
    model: nn.Module,
    images,
    task: str = "panoptic",
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    top_k: int = 100,
    resize: str = "masks",
    batch_size: int = 4,
) -> Segmentation | list[Segmentation]:
    """Finds the segments of pictures.

    Images are resized as the model's config says, and each is padded only to a multiple of
    `size_divisor`; those that then have one size go together. So a result does not depend on the
    other images.

    Args:
        model: a `Mask2Former`, in whatever mode; the mode stays.
        images: one image or a list, each a path, a PIL image, an array [H, W] or [H, W, C] or a
            tensor [H, W] or [C, H, W]; uint8, or uint16, or floating in [0, 1]; C is 1 to 4 (grey,
            alpha last; what is transparent shows white).
        task, object_mask_threshold, overlap_threshold, top_k, resize: as in `postprocess`.
        batch_size: images of one size that go through the model together.

    Returns:
        one `Segmentation` for one image, a list for a list, at the images' own sizes.

    Raises:
        TypeError, ValueError: no image, NaN pixels, or an option out of range; a list's image is
            named by its place.
    """
    check_options(task, object_mask_threshold, overlap_threshold, top_k)
    one = not isinstance(images, (list, tuple))
    pictures = [
        read_image(x, "image" if one else f"image {i}")
        for i, x in enumerate([images] if one else images)
    ]
    inputs = [prepare(x, model.config) for x in pictures]
    results = [None] * len(inputs)
    for places, class_logits, mask_logits, padded in logits(model, inputs, batch_size):
        found = postprocess(
            class_logits,
            mask_logits,
            task,
            padded,
            [inputs[i].shape[1:] for i in places],
            [pictures[i].shape[1:] for i in places],
            stuff=model.config.stuff,
            object_mask_threshold=object_mask_threshold,
            overlap_threshold=overlap_threshold,
            top_k=top_k,
            resize=resize,
        )
        for i, result in zip(places, found):
            result.names = model.config.id2label
            results[i] = result
    return results[0] if one else results


def logits(
    model: nn.Module, inputs: Sequence[Tensor], batch_size: int = 8
) -> Iterator[tuple[list[int], Tensor, Tensor, tuple[int, int]]]:
    """Runs the model over prepared images, those of one padded size together.

    Args:
        model: gives `class_queries_logits` and `masks_queries_logits`; has `config.size_divisor`.
        inputs: of each image [3, h, w] float, normalised.
        batch_size: at most so many images at once.

    Yields:
        places in `inputs`, class logits [b, Q, K + 1], mask logits [b, Q, h, w], padded size.
    """
    weight = next(model.parameters())
    groups: dict[tuple[int, int], list[int]] = {}
    for i, x in enumerate(inputs):
        padded = tuple(
            -(-s // model.config.size_divisor) * model.config.size_divisor for s in x.shape[1:]
        )
        groups.setdefault(padded, []).append(i)
    for (height, width), members in groups.items():
        for start in range(0, len(members), batch_size):
            places = members[start : start + batch_size]
            batch = weight.new_zeros((len(places), 3, height, width))
            for row, i in zip(batch, places):
                row[:, : inputs[i].shape[1], : inputs[i].shape[2]] = inputs[i]
            # no_grad, not inference_mode: constants that the model keeps must serve training too
            with evaluating(model), torch.no_grad():
                out = model(batch)
            yield places, out.class_queries_logits, out.masks_queries_logits, (height, width)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_options(task: str, object_mask_threshold: float, overlap_threshold: float, top_k: int):
    """Raises ValueError for an unknown task, a threshold outside [0, 1] or a top_k below 1."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    for name, value in (
        ("object_mask_threshold", object_mask_threshold),
        ("overlap_threshold", overlap_threshold),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")


def _semantic(probabilities, masks, steps, stuff, resize) -> Segmentation:
    weights = probabilities[:, :-1].T  # [K, Q]
    *before, output = steps
    size = before[1] if resize == "scores" else output
    scores = weights.new_zeros((len(weights), size[0] * size[1]))
    for part, maps in _resized(masks, before if resize == "scores" else steps):
        scores.addmm_(weights[:, part], maps.sigmoid().flatten(1))
    scores = scores.unflatten(1, tuple(size))
    if size != output:
        scores = _bilinear(scores, output)
    found = scores.argmax(0).int()
    areas = found.flatten().bincount(minlength=len(weights)).tolist()
    segments = [Segment(k, k, None, a, k not in stuff) for k, a in enumerate(areas) if a]
    return Segmentation("semantic", found, segments)


def _panoptic(probabilities, masks, steps, stuff, object_mask_threshold, overlap_threshold):
    scores, labels = probabilities.max(-1)
    nothing = probabilities.shape[1] - 1
    kept = ((labels != nothing) & (scores > object_mask_threshold)).nonzero().flatten()
    scores, labels, n = scores[kept], labels[kept].tolist(), len(kept)
    best = scores.new_full(steps[-1], -1)  # [H, W]
    winner = torch.zeros(steps[-1], dtype=torch.int64, device=scores.device)
    inside = torch.zeros(steps[-1], dtype=torch.bool, device=scores.device)
    own_area = []
    for part, maps in _resized(masks[kept], steps):
        maps = maps.sigmoid()
        half = maps >= 0.5
        own_area += half.sum((1, 2)).tolist()
        value, index = (maps * scores[part, None, None]).max(0)
        better = value > best  # an equal, later query loses, as in one argmax over all
        best = torch.where(better, value, best)
        winner = torch.where(better, index + part.start, winner)
        inside = torch.where(better, half.gather(0, index[None])[0], inside)
    won_area = winner.flatten().bincount(minlength=n).tolist()
    area = winner[inside].bincount(minlength=n).tolist()
    ids, segments, merged = [0] * max(n, 1), [], {}
    for q, (label, score) in enumerate(zip(labels, scores.tolist())):
        # the share counts every pixel won, also those outside the query's own mask
        if not own_area[q] or not area[q] or won_area[q] / own_area[q] < overlap_threshold:
            continue
        if label in merged:
            s = segments[merged[label] - 1]
            segments[s.id - 1] = s._replace(score=max(s.score, score), area=s.area + area[q])
            ids[q] = s.id
            continue
        ids[q] = len(segments) + 1
        if label in stuff:
            merged[label] = ids[q]
        segments.append(Segment(ids[q], label, score, area[q], label not in stuff))
    ids = torch.tensor(ids, dtype=torch.int32, device=scores.device)
    return Segmentation("panoptic", torch.where(inside, ids[winner], 0), segments)


def _instance(probabilities, masks, steps, stuff, top_k) -> Segmentation:
    k = probabilities.shape[1] - 1
    pairs = probabilities[:, :-1].flatten()
    scores, chosen = pairs.topk(min(top_k, len(pairs)))
    queries, labels = chosen // k, chosen % k
    if stuff:
        things = torch.tensor([label not in stuff for label in labels.tolist()], dtype=torch.bool)
        things = things.to(labels.device)
        scores, queries, labels = scores[things], queries[things], labels[things]
    queries, place = queries.unique(return_inverse=True)  # a query may come with several labels
    found = torch.zeros((len(queries), *steps[-1]), dtype=torch.bool, device=scores.device)
    quality = scores.new_zeros(len(queries))
    for part, maps in _resized(masks[queries], steps):
        found[part] = mask = maps > 0
        certainty = (maps.sigmoid() * mask).sum((1, 2))
        quality[part] = certainty / (mask.sum((1, 2), dtype=maps.dtype) + 1e-6)
    scores, order = (scores * quality[place]).sort(descending=True, stable=True)
    labels, found = labels[order], found[place[order]]
    seen = torch.zeros(steps[-1], dtype=torch.int32, device=scores.device)
    if len(found):
        # the first mask that covers a pixel has the best score there
        seen = torch.where(found.any(0), found.byte().argmax(0) + 1, 0).int()
    rows = zip(labels.tolist(), scores.tolist(), found.sum((1, 2)).tolist())
    segments = [Segment(i, label, score, a, True) for i, (label, score, a) in enumerate(rows, 1)]
    return Segmentation("instance", seen, segments, masks=found, labels=labels, scores=scores)


def _resized(masks, steps) -> Iterator[tuple[slice, Tensor]]:
    """Mask logits [Q, h, w] at the output's size, a few queries at a time: slice, [q, H, W]."""
    (height, width), image, *output = steps
    largest = max(height * width, *(h * w for h, w in output), 1)
    count = max(1, _PIXELS_AT_ONCE // largest)
    for start in range(0, len(masks), count):
        part = slice(start, min(start + count, len(masks)))
        maps = _bilinear(masks[part], (height, width))[:, : image[0], : image[1]]
        for size in output:
            maps = _bilinear(maps, size)
        yield part, maps


def _bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, h, w] -> [n, *size]."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def _box(found: tuple[slice, slice] | None) -> list[int]:
    """x, y, width and height of a segment's rows and columns; zeros where there are none."""
    if found is None:
        return [0, 0, 0, 0]
    rows, columns = found
    return [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
