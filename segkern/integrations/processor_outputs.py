"""Results in the forms that transformers' image processors return.

Letters: B image, Q query, K class, H W size of a result, h w size of the logits.
"""

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from ..inference.postprocess import postprocess
from ..inference.query_windows import merged
from ..nn.bilinear import resized
from ..ops import resize_argmax
from ..structures.logits import QueryLogits
from ..structures.segmentation import Segmentation
from ..structures.settings import InputConfig, Options


class SemanticOutput(NamedTuple):
    """A semantic result with its scores.

    Attributes:
        segmentation: [H, W] int64 labels.
        segmentation_scores: [K, H, W].
    """

    segmentation: Tensor
    segmentation_scores: Tensor


def expect_logits(outputs, *names: str) -> None:
    """
    Raises:
        ValueError: a model's outputs have no such attribute.
    """
    for name in names:
        if getattr(outputs, name, None) is None:
            raise ValueError(
                f"Processor: outputs must have {name}, got a {type(outputs).__name__} without"
            )


def sizes_of(target_sizes, images: int) -> list[tuple[int, int]] | None:
    """(H, W) of each result.

    Raises:
        ValueError: not as many as images, or no positive integers.
    """
    if target_sizes is None:
        return None
    try:
        sizes = [tuple(map(index, size)) for size in target_sizes]
    except TypeError:
        sizes = []
    if len(sizes) != images or not all(len(size) == 2 and min(size) > 0 for size in sizes):
        raise ValueError(
            f"Processor: target_sizes must be {images} pairs of positive height and width, one "
            f"an image of the outputs, got {target_sizes}"
        )
    return sizes


def found_segments(
    outputs,
    task: str,
    target_sizes: list[tuple[int, int]] | None,
    settings: InputConfig,
    stuff: Sequence[int],
    options: Options,
) -> list[Segmentation]:
    """The segments of a model's outputs.

    What was padded is cut away: how large each image was in the batch follows from its own size,
    which `target_sizes` are as a rule. Where that does not give the shape of the logits, an image
    fills them.

    Args:
        outputs: class_queries_logits [B, Q, K + 1] and masks_queries_logits [B, Q, h, w].
        task: "panoptic", "instance" or "semantic".
        target_sizes: of the results; None is the size of the mask logits.
        settings: how the images were resized and padded.
        stuff: labels without instances.
        options: of the results.
    """
    classes, masks = outputs.class_queries_logits, outputs.masks_queries_logits
    if task == "instance":
        options = Options(options.threshold, top_k=classes.shape[1])
    cells = tuple(masks.shape[2:])
    padded, images = cells, [cells] * len(masks)
    results = target_sizes or images
    if target_sizes:
        sizes = [settings.resized(size) for size in target_sizes]
        ends = [settings.padded(size) for size in sizes]
        most = tuple(max(sides) for sides in zip(*ends))
        cell = max(side / n for side, n in zip(most, cells))
        if all(n - 1 < side / cell + 1e-6 and side / cell <= n for side, n in zip(most, cells)):
            padded, images = most, sizes
    return postprocess(classes, masks, task, padded, images, results, stuff, options=options)


def semantic(found: list[tuple[Tensor, Tensor | None]], scores: bool) -> list:
    """Maps of labels, and with scores `SemanticOutput`s."""
    if scores:
        return [SemanticOutput(labels.long(), values) for labels, values in found]
    return [labels.long() for labels, _ in found]


def pixel_maps(
    logits: Tensor, target_sizes: list[tuple[int, int]] | None, scores: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """The likeliest classes of class logits [B, K, h, w], resized to the results' sizes."""
    found = []
    for b, one in enumerate(logits.detach()):
        size = target_sizes[b] if target_sizes else tuple(one.shape[1:])
        if scores:
            large = torch.nn.functional.interpolate(one[None], size, mode="bilinear")[0]
            found.append((large.argmax(0), large))
            continue
        exact = one if one.dtype == torch.float64 else one.float()
        sides = [
            resized(torch.eye(n, dtype=torch.float64, device=one.device), side).to(exact)
            for n, side in zip(exact.shape[1:], size)
        ]
        found.append((resize_argmax(exact[None], *sides)[0], None))
    return found


def window_maps(
    outputs, target_sizes: list[tuple[int, int]], settings: InputConfig, side: int, scores: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """The likeliest classes of images that were cut into windows along their long side.

    Args:
        outputs: of all windows, with patch_offsets: image, begin and end of each.
        target_sizes: of the images.
        settings: how they were resized.
        side: of the windows.
        scores: with class scores.
    """
    offsets = [[int(x) for x in place] for place in outputs.patch_offsets]
    found = []
    for image, size in enumerate(target_sizes):
        own = [i for i, place in enumerate(offsets) if place[0] == image]
        tall = size[0] > size[1]
        places = [(offsets[i][1], 0) if tall else (0, offsets[i][1]) for i in own]
        logits = QueryLogits(
            outputs.class_queries_logits[own], outputs.masks_queries_logits[own], None
        )
        found.append(merged(logits, places, side, settings.resized(size), size, scores))
    return found


def segments_info(result: Segmentation, first: int, fused: set[int] | None) -> list[dict]:
    """A result's segments, their ids from `first` on; with `was_fused` unless it is None."""
    told = []
    for segment in result.segments:
        row = {"id": segment.id - 1 + first, "label_id": segment.label_id}
        if fused is not None:
            row["was_fused"] = segment.label_id in fused
        told.append(row | {"score": round(segment.score, 6)})
    return told


def instances(
    result: Segmentation, first: int, told: bool, runs: bool = False, maps: bool = False
) -> dict:
    """An instance result without its empty masks.

    Args:
        first: id of the first instance; pixels of none have `first` - 1.
        told: whether rows have was_fused.
        runs: the map as run lengths.
        maps: [n, H, W] float32 in place of the map, where there are instances.
    """
    kept = [i for i, segment in enumerate(result.segments) if segment.area]
    ids = torch.zeros(len(result.segments) + 1, dtype=torch.int32)
    ids[[i + 1 for i in kept]] = torch.arange(1, len(kept) + 1, dtype=torch.int32)
    seen = ids.to(result.segmentation.device)[result.segmentation.long()] + (first - 1)
    segments = [result.segments[i]._replace(id=k + 1) for k, i in enumerate(kept)]
    info = segments_info(Segmentation(result.task, seen, segments), first, set() if told else None)
    if runs:
        seen = run_lengths(seen)
    elif maps and kept:
        seen = torch.stack([result.masks[i] for i in kept]).float()
    return {"segmentation": seen, "segments_info": info}


def run_lengths(ids: Tensor) -> list[list[int]]:
    """Of each id [H, W] in ascending order, row after row: begins of its runs, counted from 1, and
    their lengths, by turns."""
    flat = ids.flatten().cpu()
    told = []
    for value in flat.unique():
        mask = torch.nn.functional.pad((flat == value).int(), (1, 1))
        edges = mask.diff().nonzero()[:, 0] + 1
        begins, ends = edges[::2], edges[1::2]
        told.append(torch.stack((begins, ends - begins), 1).flatten().tolist())
    return told
