"""From the logits of queries to segments.

Letters: B image, Q query, K class, C channel, H W output size, h w size of the mask logits.

The maps come from `ops.segment_map`, by the rules of the original Mask2Former code; here they
become one `Segmentation` an image. The host waits for a GPU once, for the table of all segments of
all images and tasks: until then it launches ahead of the model, or has one graph do it.
"""

from collections.abc import Sequence
from dataclasses import astuple
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import segment_map
from ..ops._checks import expect
from ..ops.segment_map import SegmentMap, check_options
from ..runtime.constants import constant
from ..structures.segmentation import Masks, Segment, Segmentation
from ..structures.settings import Options, one_of


def postprocess(
    class_logits: Tensor,  # [B, Q, K + 1]
    mask_logits: Tensor | tuple[Tensor, Tensor],  # [B, Q, h, w], or [B, Q, C] and [B, C, h, w]
    task: str,
    padded_size: tuple[int, int],
    image_sizes: Sequence[tuple[int, int]],
    output_sizes: Sequence[tuple[int, int]],
    stuff: Sequence[int] = (),
    threshold: float | None = None,
    overlap_threshold: float | None = None,
    top_k: int | None = None,
    resize: str = "masks",
    return_scores: bool = False,
    options: Options | None = None,
) -> list[Segmentation]:
    """Segments from logits.

    Args:
        class_logits: [B, Q, K + 1] floating; the last class is "no object".
        mask_logits: [B, Q, h, w] floating, of the padded images; or mask embeddings [B, Q, C] and
            features [B, C, h, w], whose product they are and which then is never stored.
        task: "panoptic", "instance" or "semantic".
        padded_size: height and width of the model's input.
        image_sizes: of each image its height and width in that input, without the padding.
        output_sizes: of each image the height and width of its result.
        stuff: labels without instances: panoptic merges them by class, instance leaves them out.
        threshold, overlap_threshold, top_k, resize, return_scores: see `Options`.
        options: the last five, in place of them.

    Returns:
        B results, computed in float32 (float64 for float64 logits), on the logits' device.

    Raises:
        TypeError, ValueError: wrong dtype, shape, size, name or range, an option that the task
            does not read, or class logits not finite.
    """
    loose = Options(threshold, overlap_threshold, top_k, resize, return_scores)
    options = one_of("postprocess", options, loose)
    sizes = {}
    pair = isinstance(mask_logits, (tuple, list))
    masks, features = mask_logits if pair else (mask_logits, None)
    expect("postprocess", "class_logits", class_logits, "B Q K+1", "float", sizes)
    expect("postprocess", "mask_logits", masks, "B Q C" if pair else "B Q h w", "float", sizes)
    check_options((task,), *astuple(options))
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
    found = find_maps(
        class_logits, masks, features, task, padded_size, image_sizes, output_sizes, stuff, options
    )
    return [result[task] for result in results({task: found}, stuff)]


class Found(NamedTuple):
    """What the device finds for one task, of which the host has read nothing.

    Attributes:
        maps: one an image.
        values: [1 + B N 5] double: whether class logits are finite, then the rows of all images.
    """

    maps: list[SegmentMap]
    values: Tensor


def find_maps(
    class_logits: Tensor,
    masks: Tensor,
    features: Tensor | None,
    task: str,
    padded_size: tuple[int, int],
    image_sizes: Sequence[tuple[int, int]],
    output_sizes: Sequence[tuple[int, int]],
    stuff: Sequence[int],
    options: Options,
) -> Found:
    """The part of `postprocess` that is work of the device, and waits for nothing; arguments as
    there, checked, masks and features apart."""
    is_stuff = None
    if stuff:
        k = class_logits.shape[2] - 1
        is_stuff = _is_stuff(tuple(sorted(set(stuff))), k, masks.device)
    maps = [
        segment_map(
            class_logits[b : b + 1],
            masks[b : b + 1],
            task,
            padded_size,
            image,
            output,
            None if features is None else features[b : b + 1],
            is_stuff,
            **options.of(task),
        )
        for b, (image, output) in enumerate(zip(image_sizes, output_sizes))
    ]
    finite = class_logits.isfinite().all().double().view(1)
    return Found(maps, torch.cat((finite, *(_table(found).flatten() for found in maps))))


def results(found: dict[str, Found], stuff: Sequence[int]) -> list[dict[str, Segmentation]]:
    """Of each image the result of every task, for which the host waits once.

    Raises:
        ValueError: class logits not finite.
    """
    every = [one for one in found.values() if one.maps]
    if not every:
        return []
    values = iter(_on_host(torch.cat([one.values for one in every])))
    stuff, images = frozenset(stuff), [{} for _ in every[0].maps]
    for task, one in found.items():
        if not next(values):
            raise ValueError("postprocess: class_logits must be finite, got NaN or infinity")
        for image, map in zip(images, one.maps, strict=True):
            rows = [list(islice(values, COLUMNS)) for _ in range(map.ids.shape[1])]
            image[task] = _result(map, rows, task, stuff)
    return images


def semantic(
    found: Sequence[tuple[Tensor, Tensor | None]], K: int, names: dict | None
) -> list[Segmentation]:
    """The results for maps of labels [H, W] int32 below K, each with class scores [K, H, W] or
    None, for which the host waits once."""
    counts = iter(_on_host(torch.cat([_areas(labels, K) for labels, _ in found])))
    images = []
    for labels, scores in found:
        areas = enumerate(islice(counts, K))
        segments = [Segment(k, k, None, area, False) for k, area in areas if area]
        images.append(Segmentation("semantic", labels, segments, names, scores=scores))
    return images


def _on_host(values: Tensor) -> list:
    """All that the host reads of a result, which it waits for."""
    return values.tolist()


@constant
def _is_stuff(stuff: tuple[int, ...], classes: int, device: torch.device) -> Tensor:
    """[K] bool, of which nothing is copied from the host."""
    found = torch.zeros(classes, dtype=torch.bool, device=device)
    for label in stuff:
        found[label].fill_(True)
    return found


def _areas(labels: Tensor, classes: int) -> Tensor:
    """Pixels of each class, [K] int64."""
    if not labels.is_cuda:
        return labels.flatten().bincount(minlength=classes)
    return _areas_unread(labels, classes)


def _areas_unread(labels: Tensor, classes: int) -> Tensor:
    """As `_areas`, but the host reads no label, as bincount does to know the largest.

    A row counts by itself first: atomics on one number would wait for each other.
    """
    rows = torch.arange(len(labels), device=labels.device)[:, None] * classes
    place = (labels + rows).flatten()
    counts = torch.zeros(len(labels) * classes, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(0, place, counts.new_ones(()).expand(len(place)))
    return counts.view(len(labels), classes).sum(0)


COLUMNS = 5


def _table(found: SegmentMap) -> Tensor:
    """The rows of one image, [N, COLUMNS]; doubles hold every count exactly."""
    none = torch.zeros_like(found.areas)
    columns = found.ids, found.labels, found.areas, found.scores, found.slots
    return torch.stack([(none if c is None else c)[0].double() for c in columns], 1)


def _result(
    found: SegmentMap, table: list[list[float]], task: str, stuff: frozenset[int]
) -> Segmentation:
    """The result of one image from rows of classes, queries or pairs."""
    segments: list[Segment] = []
    slots = []
    for i, label, area, score, slot in table:
        i, label, area = int(i), int(label), int(area)
        if i < 0:
            continue
        slots.append(int(slot))
        if task == "panoptic" and i <= len(segments):  # more of merged stuff
            s = segments[i - 1]
            segments[i - 1] = s._replace(score=max(s.score, score), area=s.area + area)
        else:
            score = None if task == "semantic" else score
            segments.append(Segment(i, label, score, area, label not in stuff))
    result = Segmentation(task, found.map[0], segments)
    if task == "instance":
        n = len(segments)
        result.masks = Masks(found.bits[0], slots, found.map.shape[2])
        result.labels, result.scores = found.labels[0, :n], found.scores[0, :n]
    elif found.class_scores is not None:
        result.scores = found.class_scores[0]
    return result
