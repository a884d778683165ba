"""From the logits of queries to segments.

Letters: B image, Q query, K class, C channel, H W output size, h w size of the mask logits.

The maps come from `ops.segment_map`, by the rules of the original Mask2Former code; here they
become one `Segmentation` an image.
"""

from collections.abc import Sequence
from dataclasses import astuple

import torch
from torch import Tensor

from ..ops import segment_map
from ..ops._checks import expect
from ..ops.segment_map import SegmentMap, check_options
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
    if not class_logits.isfinite().all():
        raise ValueError("postprocess: class_logits must be finite, got NaN or infinity")
    stuff, is_stuff = frozenset(stuff), None
    if stuff:
        is_stuff = torch.tensor([label in stuff for label in range(k)], device=masks.device)
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
    return [_result(found, task, stuff) for found in maps]


def semantic(labels: Tensor, scores: Tensor | None, names: dict | None) -> Segmentation:
    """The result for a map of labels [H, W] int32, and class scores [K, H, W] or None."""
    count = labels.flatten().bincount().tolist()
    segments = [Segment(k, k, None, area, False) for k, area in enumerate(count) if area]
    return Segmentation("semantic", labels, segments, names, scores=scores)


def _result(found: SegmentMap, task: str, stuff: frozenset[int]) -> Segmentation:
    """The result of one image from rows of classes, queries or pairs."""
    none = torch.zeros_like(found.areas)
    columns = found.ids, found.labels, found.areas, found.scores, found.slots
    # one transfer from the device; doubles hold every count exactly
    table = torch.stack([(none if c is None else c)[0].double() for c in columns], 1).tolist()
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
