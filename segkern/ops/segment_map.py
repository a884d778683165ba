r"""From the logits of queries to the map of an image at full resolution, without upsampled logits.

    x[q, p]   mask logits, resized to the padded input, cropped to the image, resized to the output
    semantic: map[p] = argmax_k sum_q softmax(class)[q, k] sigmoid(x[q, p])
    panoptic: map[p] = segment of argmax_q score[q] sigmoid(x[q, p]), 0 where that x is below 0;
              score, label = max softmax(class); q counts if label < K and score > threshold; it
              is a segment if it wins enough of the pixels with x >= 0; stuff is merged by label
    instance: the best pairs of query and class; mask = x > 0; score = softmax(class)[q, k] times
              the mean of sigmoid(x) over the mask; map[p] = 1 + the first of them that covers p

Letters: B image, Q query, K class, C channel, h w mask logits, H W output, N row of the result
(class, query or pair), n slot of a mask, 32 pixels a word.

1. The two resizes are linear in each axis: composed, an output pixel reads at most four rows and
   columns of the mask logits (three where they are enlarged). A block of the output needs a small
   window of them, which may be stored, or made from embeddings and features on the spot.
2. Extremes of a window bound the logits of the block. Panoptic: only queries whose upper bound
   reaches the highest lower bound are computed. Instance: blocks of negative logits are empty.
   Semantic: only classes that may win; and on the CPU first without the queries that add too
   little to decide between those, then with them where two classes are closer than they add.
3. Counts come from the same pass. No [Q, H, W] or [K, H, W] tensor is made; masks are kept as
   bits.
Bytes: 4 Q h w read, 4 H W written (instance: Q H W / 8 more); FLOPs: semantic 2 Q K H W at most.

Source: Mask2Former (Cheng et al., CVPR 2022): semantic_inference, panoptic_inference and
instance_inference of the original code.
Differs: a mask logit that is NaN counts as far outside, infinities as far inside or outside;
instances come sorted by score; top_k is clipped to Q K.
"""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._checks import expect, got
from .mask_bits import pack_bits, unpack_bits

TASKS = ("panoptic", "instance", "semantic")
THRESHOLD = 0.8  # of a panoptic segment, if none is given
OVERLAP = 0.8  # likewise, the share of its own mask that it must win
USED = {  # which tasks read an option
    "threshold": ("panoptic", "instance"),
    "overlap_threshold": ("panoptic",),
    "top_k": ("instance",),
    "resize": ("semantic",),
    "return_scores": ("semantic",),
}
FARTHEST = 1e30  # bound of a mask logit's magnitude


class SegmentMap(NamedTuple):
    """What `segment_map` finds. A row is a class (semantic), query (panoptic) or pair (instance).

    Attributes:
        map: [B, H, W] int32: values of `ids`, 0 for void (semantic has none).
        ids: [B, N] int32: a row's value in the map, -1 where it is no segment. Semantic: the
            class. Panoptic: from 1, shared by rows of merged stuff. Instance: from 1, best first.
        labels: [B, N] int64, in [0, K) where the row is a segment.
        areas: [B, N] int64: pixels of the row; of an instance those of its mask.
        scores: [B, N], in [0, 1] where the row is a segment; None for semantic.
        class_scores: [B, K, H, W], semantic and where asked for.
        bits: [B, n, H, ceil(W / 32)] int32, instance: masks packed as `mask_bits` packs.
        slots: [B, N] int64, instance: the row's place in `bits`, -1 where it is no segment.
    """

    map: Tensor
    ids: Tensor
    labels: Tensor
    areas: Tensor
    scores: Tensor | None = None
    class_scores: Tensor | None = None
    bits: Tensor | None = None
    slots: Tensor | None = None


def _mask_logits(masks: Tensor, features: Tensor | None, exact: torch.dtype) -> Tensor:
    x = masks.to(exact)
    if features is not None:
        x = torch.einsum("bqc,bchw->bqhw", x, features.to(exact))
    return x.nan_to_num(-FARTHEST, FARTHEST, -FARTHEST).clamp(-FARTHEST, FARTHEST)


def _bilinear(x: Tensor, size) -> Tensor:
    if x.numel() == 0:
        return x.new_empty((*x.shape[:2], *size))
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _image_logits(x: Tensor, sizes) -> Tensor:
    return _bilinear(x, sizes[:2])[..., : sizes[2], : sizes[3]]


def _counts(index: Tensor, n: int) -> Tensor:
    """[B, n]: how often each of n values occurs in each image of index [B, H, W]."""
    return torch.stack([(index == i).sum((1, 2)) for i in range(n)], 1)


def merge_segments(found: Tensor, labels: Tensor, stuff: Tensor | None) -> Tensor:
    """Numbers segments from 1 in the order of queries; stuff of a label shares a number.

    Args:
        found: [B, Q] bool: is a segment.
        labels: [B, Q] int64.
        stuff: [K] bool or None.

    Returns:
        [B, Q] int32, 0 where not found.
    """
    place = torch.arange(found.shape[1], device=found.device).expand_as(found)
    first = place
    if stuff is not None and found.shape[1]:
        fused = found & stuff[labels.clamp(0, len(stuff) - 1)]
        same = (labels[:, :, None] == labels[:, None, :]) & fused[:, None, :]  # [B, Q, Q]
        first = torch.where(fused, same.int().argmax(2), place)
    numbers = (found & (first == place)).cumsum(1)
    return torch.where(found, numbers.gather(1, first), 0).int()


def panoptic_reference(
    scores: Tensor,
    labels: Tensor,
    stuff: Tensor | None,
    masks: Tensor,
    features: Tensor | None,
    sizes: list[int],
    overlap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of the raw op `segment_map`: map, ids (0 for none) and areas of queries.

    Args:
        scores: [B, Q]; 0 leaves a query out.
        labels: [B, Q] int64.
        stuff: [K] bool or None.
        masks: [B, Q, h, w], or with features [B, C, h, w] embeddings [B, Q, C].
        sizes: height and width of padded input, image and output.
        overlap: least share of its own mask that a query must win.
    """
    Q = scores.shape[1]
    x = _bilinear(_image_logits(_mask_logits(masks, features, scores.dtype), sizes), sizes[4:])
    if Q == 0:
        return x.new_zeros((len(x), *sizes[4:]), dtype=torch.int32), scores.int(), scores.long()
    kept = scores > 0
    value = torch.where(kept[..., None, None], scores[..., None, None] * x.sigmoid(), -1)
    winner = value.argmax(1)  # [B, H, W]; of equal ones the first
    inside = (x.gather(1, winner[:, None])[:, 0] >= 0) & kept.any(1)[:, None, None]
    own, won = (x >= 0).sum((2, 3)), _counts(winner, Q)
    areas = _counts(winner.where(inside, -1), Q)
    share = won.double() / own  # every pixel won counts, those outside the own mask too
    ids = merge_segments(kept & (areas > 0) & (share >= overlap), labels, stuff)
    map = ids.gather(1, winner.flatten(1)).view_as(winner)
    return map.where(inside, 0), ids, areas


def semantic_reference(
    weights: Tensor,
    masks: Tensor,
    features: Tensor | None,
    sizes: list[int],
    resize_scores: bool,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of the raw op `segment_map_semantic`: map, areas of classes, scores.

    Args:
        weights: [B, Q, K]; masks, features, sizes: as in `panoptic_reference`.
        resize_scores: the sums over queries are resized from image to output, not the logits.
        return_scores: the third result is [B, K, H, W], else empty.
    """
    x = _image_logits(_mask_logits(masks, features, weights.dtype), sizes)
    x = x if resize_scores else _bilinear(x, sizes[4:])
    scores = torch.einsum("bqk,bqhw->bkhw", weights, x.sigmoid())
    scores = _bilinear(scores, sizes[4:]) if resize_scores else scores
    map = scores.argmax(1).int()
    areas = _counts(map, weights.shape[2])
    return map, areas, scores if return_scores else scores.new_empty(0)


def instance_reference(
    queries: Tensor, masks: Tensor, features: Tensor | None, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of the raw op `segment_map_instance`.

    Args:
        queries: [B, n] int64, -1 for none; masks, features, sizes: as in `panoptic_reference`.

    Returns:
        bits [B, n, H, ceil(W / 32)] int32 of the masks, their areas [B, n] int64, and the sums of
        sigmoid over them [B, n].
    """
    exact = torch.float64 if masks.dtype == torch.float64 else torch.float32
    x = _mask_logits(masks, features, exact)
    (B, n), (h, w) = queries.shape, x.shape[2:]
    if n == 0:
        words = queries.new_empty((B, 0, sizes[4], (sizes[5] + 31) // 32), dtype=torch.int32)
        return words, queries, x.new_empty(B, 0)
    x = x.gather(1, queries.clamp(min=0)[..., None, None].expand(B, n, h, w))
    x = _bilinear(_image_logits(x, sizes), sizes[4:])
    inside = (x > 0) & (queries >= 0)[..., None, None]
    return pack_bits(inside)[0], inside.sum((2, 3)), (x.sigmoid() * inside).sum((2, 3))


def cover_reference(bits: Tensor, order: Tensor, width: int) -> Tensor:
    """The specification of the raw op `segment_map_cover`.

    Args:
        bits: [B, n, H, ceil(W / 32)] int32.
        order: [B, N] int64: places in `bits`, the best first, -1 for none.

    Returns:
        [B, H, W] int32: 1 + the first place in `order` whose mask covers the pixel, 0 for none.
    """
    masks = unpack_bits(bits, width)
    map = masks.new_zeros((len(masks), *masks.shape[2:]), dtype=torch.int32)
    for i in reversed(range(order.shape[1])):
        for b, slot in enumerate(order[:, i].tolist()):
            if slot >= 0:
                map[b][masks[b, slot]] = i + 1
    return map


def _fake_panoptic(scores, labels, stuff, masks, features, sizes, overlap):
    map = scores.new_empty((len(scores), *sizes[4:]), dtype=torch.int32)
    ids = scores.new_empty(scores.shape, dtype=torch.int32)
    return map, ids, scores.new_empty(scores.shape, dtype=torch.int64)


def _fake_semantic(weights, masks, features, sizes, resize_scores, return_scores):
    (B, _, K), (H, W) = weights.shape, sizes[4:]
    map = weights.new_empty((B, H, W), dtype=torch.int32)
    scores = weights.new_empty((B, K, H, W) if return_scores else (0,))
    return map, weights.new_empty((B, K), dtype=torch.int64), scores


def _fake_instance(queries, masks, features, sizes):
    exact = torch.float64 if masks.dtype == torch.float64 else torch.float32
    bits = (*queries.shape, sizes[4], (sizes[5] + 31) // 32)
    areas, sums = (queries.new_empty(queries.shape, dtype=t) for t in (torch.int64, exact))
    return queries.new_empty(bits, dtype=torch.int32), areas, sums


def _fake_cover(bits, order, width):
    return bits.new_empty((bits.shape[0], bits.shape[2], width))


_panoptic = _library.define(
    "segment_map(Tensor scores, Tensor labels, Tensor? stuff, Tensor masks, Tensor? features, "
    "int[] sizes, float overlap) -> (Tensor, Tensor, Tensor)",
    _fake_panoptic,
    triton="segment_map",
)
_semantic = _library.define(
    "segment_map_semantic(Tensor weights, Tensor masks, Tensor? features, int[] sizes, "
    "bool resize_scores, bool return_scores) -> (Tensor, Tensor, Tensor)",
    _fake_semantic,
    triton="segment_map",
)
_instance = _library.define(
    "segment_map_instance(Tensor queries, Tensor masks, Tensor? features, int[] sizes) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_instance,
    triton="segment_map",
)
_cover = _library.define(
    "segment_map_cover(Tensor bits, Tensor order, int width) -> Tensor",
    _fake_cover,
    triton="segment_map",
)


class _Kernels(NamedTuple):
    panoptic: Callable
    semantic: Callable
    instance: Callable
    cover: Callable


_KERNEL = _Kernels(_panoptic, _semantic, _instance, _cover)
_REFERENCE = _Kernels(panoptic_reference, semantic_reference, instance_reference, cover_reference)


def segment_map(
    class_logits: Tensor,
    masks: Tensor,
    task: str,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    features: Tensor | None = None,
    stuff: Tensor | None = None,
    threshold: float | None = None,
    overlap_threshold: float | None = None,
    top_k: int | None = None,
    resize: str = "masks",
    return_scores: bool = False,
    impl: str = "kernel",
) -> SegmentMap:
    """Maps of segments at the output's size, with the rows that the segments are made of.

    No gradient flows. Computed in float32, in float64 where an input is float64.

    Args:
        class_logits: [B, Q, K+1] floating; the last class is "no object".
        masks: [B, Q, h, w] floating: mask logits of the padded images; or, with `features`,
            [B, Q, C] embeddings whose product with the features they are.
        task: "panoptic", "instance" or "semantic".
        padded_size: height and width of the model's input.
        image_size: of the images in that input, at its top left.
        output_size: of the result.
        features: [B, C, h, w] floating.
        stuff: [K] bool: labels that panoptic merges and instance leaves out; None for none.
        threshold: panoptic: queries must score more than this, in [0, 1]; None is 0.8. Instance:
            pairs must score at least this; None takes all.
        overlap_threshold: panoptic: a query must win this share of its own mask, in [0, 1]; None
            is 0.8.
        top_k: instance: pairs of query and class, at least 1; those that are stuff drop out. None
            is 100.
        resize: "masks" takes the mask logits to the output's size; "scores", semantic only, takes
            the summed class scores there.
        return_scores: semantic: the class scores of every pixel, too.
        impl: "kernel", or "reference" for plain PyTorch.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, size, name or range, or an option that
            the task does not read.
    """
    sizes = _check(class_logits, masks, features, stuff, padded_size, image_size, output_size)
    check_options((task,), threshold, overlap_threshold, top_k, resize, return_scores)
    run = _KERNEL if _library.use_kernel("segment_map", impl, masks) else _REFERENCE
    tensors = [t.detach() for t in (class_logits, masks, features) if t is not None]
    exact = torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32
    maps = [t.to(exact) if exact == torch.float64 else t for t in tensors[1:]]
    maps = (*maps, None)[:2]
    with torch.autocast(masks.device.type, enabled=False):
        probabilities = tensors[0].to(exact).softmax(-1)
        if task == "panoptic":
            least = THRESHOLD if threshold is None else threshold
            overlap = OVERLAP if overlap_threshold is None else overlap_threshold
            return _panoptic_rows(run, probabilities, maps, sizes, stuff, least, overlap)
        probabilities = probabilities[..., :-1]
        if task == "instance":
            top_k = 100 if top_k is None else top_k
            return _instance_rows(run, probabilities, maps, sizes, stuff, threshold or 0, top_k)
        scaled = resize == "scores"
        map, areas, scores = run.semantic(probabilities, *maps, sizes, scaled, return_scores)
        labels = torch.arange(areas.shape[1], device=areas.device).expand_as(areas)
        ids = labels.where(areas > 0, -1).int()
        return SegmentMap(map, ids, labels, areas, None, scores if return_scores else None)


def segment_map_reference(*args, **options) -> SegmentMap:
    """The specification, in plain PyTorch; arguments as `segment_map`."""
    return segment_map(*args, **options, impl="reference")


def check_options(
    tasks: Sequence[str],
    threshold: float | None = None,
    overlap_threshold: float | None = None,
    top_k: int | None = None,
    resize: str = "masks",
    return_scores: bool = False,
) -> None:
    """Raises TypeError or ValueError for an option of `segment_map` that is no number or out of
    range, or is given and read by none of the tasks."""
    for task in tasks or ("",):
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    for name, value in (("threshold", threshold), ("overlap_threshold", overlap_threshold)):
        if value is not None and not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if top_k is not None and not isinstance(top_k, Integral):
        raise TypeError(f"top_k must be an integer, got {top_k!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if resize not in ("masks", "scores"):
        raise ValueError(f'resize must be "masks" or "scores", got {resize!r}')
    values = threshold, overlap_threshold, top_k, resize, return_scores
    for (name, readers), value in zip(USED.items(), values):
        if value not in (None, "masks") and value is not False and not set(readers) & set(tasks):
            raise ValueError(
                f"{name} must be left out where task is {' or '.join(map(repr, tasks))}: it is "
                f"for {' and '.join(readers)}, got {value!r}"
            )


def _check(class_logits, masks, features, stuff, padded, image, output) -> list[int]:
    """Checks tensors and sizes; returns the sizes as the raw ops take them."""
    op, sizes = "segment_map", {}
    expect(op, "class_logits", class_logits, "B Q K+1", "float", sizes)
    if features is None:
        expect(op, "masks", masks, "B Q h w", "float", sizes)
    else:
        expect(op, "masks", masks, "B Q C", "float", sizes)
        expect(op, "features", features, "B C h w", "float", sizes)
    if stuff is not None:
        expect(op, "stuff", stuff, "K", "bool", sizes | {"K": sizes["K+1"] - 1})
    if sizes["K+1"] < 2:
        raise ValueError(f"{op}: class_logits must have K >= 1, got {got(class_logits)}")
    if not (sizes["h"] and sizes["w"]):
        name, maps = ("masks", masks) if features is None else ("features", features)
        raise ValueError(f"{op}: {name} must have h, w >= 1, got {got(maps)}")
    for name, size in (("padded_size", padded), ("image_size", image), ("output_size", output)):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"{op}: {name} must be a height and width >= 1, got {tuple(size)}")
    if image[0] > padded[0] or image[1] > padded[1]:
        raise ValueError(
            f"{op}: image_size must fit into padded_size {tuple(padded)}, got {tuple(image)}"
        )
    return [*padded, *image, *output]


def _panoptic_rows(run, probabilities, maps, sizes, stuff, least_score, overlap) -> SegmentMap:
    scores, labels = probabilities.max(-1)
    kept = (labels < probabilities.shape[2] - 1) & (scores > least_score)
    map, ids, areas = run.panoptic(scores.where(kept, 0), labels, stuff, *maps, sizes, overlap)
    return SegmentMap(map, ids.where(ids > 0, -1), labels, areas, scores)


def _instance_rows(run, probabilities, maps, sizes, stuff, least_score, top_k) -> SegmentMap:
    B, Q, K = probabilities.shape
    scores, pairs = probabilities.flatten(1).topk(min(top_k, Q * K))
    queries, labels = pairs // K, pairs % K
    things = torch.ones_like(labels) if stuff is None else 1 - stuff.long()[labels]
    # a query may come with several labels: its mask is made once, in one of the slots
    used = pairs.new_zeros(B, Q).scatter_add(1, queries, things) > 0
    members = used.int().argsort(dim=1, descending=True, stable=True)[:, : min(top_k, Q)]
    members = members.where(used.gather(1, members), -1)
    slots = (used.cumsum(1) - 1).gather(1, queries)
    bits, areas, sums = run.instance(members, *maps, sizes)
    found, places = things > 0, slots.clamp(min=0)
    areas = areas.gather(1, places)
    quality = sums.gather(1, places) / (areas.to(sums.dtype) + 1e-6)
    scores, order = (scores * quality).where(found, -1).sort(dim=1, descending=True, stable=True)
    found, slots, labels, areas = (t.gather(1, order) for t in (found, slots, labels, areas))
    found = found & (scores >= least_score)
    slots, areas = slots.where(found, -1), areas.where(found, 0)
    map = run.cover(bits, slots, sizes[5])
    ids = torch.arange(1, slots.shape[1] + 1, device=slots.device).where(found, -1).int()
    return SegmentMap(map, ids, labels, areas, scores, None, bits, slots)
