"""From the logits of queries to segments, and from pictures to segments.

Letters: B image, Q query, K class, C channel, H W output size, h w size of the mask logits.

What a result holds is said by `ops.segment_map`, which makes the maps: the rules are those of the
original Mask2Former code. Here they become one `Segmentation` an image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .graphs import replayed
from .images import prepare, read_image, target_size
from .models.segmenter import Segmenter
from .ops import segment_map
from .ops._checks import expect
from .ops.segment_map import TASKS as TASKS
from .ops.segment_map import SegmentMap, check_options
from .results import Masks, Segment, Segmentation
from .windows import at_scales, label_map, window_and_stride


def postprocess(
    class_logits: Tensor,  # [B, Q, K + 1]
    mask_logits: Tensor | tuple[Tensor, Tensor],  # [B, Q, h, w], or [B, Q, C] and [B, C, h, w]
    task: str,
    padded_size: tuple[int, int],
    image_sizes: Sequence[tuple[int, int]],
    output_sizes: Sequence[tuple[int, int]],
    stuff: Sequence[int] = (),
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    top_k: int = 100,
    resize: str = "masks",
    return_scores: bool = False,
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
        object_mask_threshold: panoptic: queries must score more than this, in [0, 1].
        overlap_threshold: panoptic: a query must win this share of its own mask, in [0, 1].
        top_k: instance: pairs of query and class to return.
        resize: "masks" takes the mask logits to the output size; "scores", semantic only, takes
            the summed class scores there, as the original does where it does semantic alone.
        return_scores: semantic: the class scores of every pixel, too: K H W floats.

    Returns:
        B results, computed in float32 (float64 for float64 logits), on the logits' device.

    Raises:
        TypeError, ValueError: wrong dtype, shape, size, name or range, or class logits not finite.
    """
    sizes = {}
    pair = isinstance(mask_logits, (tuple, list))
    masks, features = mask_logits if pair else (mask_logits, None)
    expect("postprocess", "class_logits", class_logits, "B Q K+1", "float", sizes)
    expect("postprocess", "mask_logits", masks, "B Q C" if pair else "B Q h w", "float", sizes)
    check_options(task, object_mask_threshold, overlap_threshold, top_k, resize, return_scores)
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
            object_mask_threshold,
            overlap_threshold,
            top_k,
            resize,
            return_scores,
        )
        for b, (image, output) in enumerate(zip(image_sizes, output_sizes))
    ]
    return [_result(found, task, stuff) for found in maps]


def segment(
    model: nn.Module,
    images,
    task: str = "panoptic",
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    top_k: int = 100,
    resize: str = "masks",
    return_scores: bool = False,
    batch_size: int = 4,
    window: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    cuda_graphs: bool = True,
) -> Segmentation | list[Segmentation]:
    """Finds the segments of pictures.

    Images are resized as the model's config says, and each is padded only to a multiple of
    `size_divisor`; those that then have one size go together. So a result does not depend on the
    other images.

    Args:
        model: a `Mask2Former`, or a `Segmenter` where the task is semantic, in whatever mode; the
            mode stays.
        images: one image or a list, each a path, a PIL image, an array [H, W] or [H, W, C] or a
            tensor [H, W] or [C, H, W]; uint8, or uint16, or floating in [0, 1]; C is 1 to 4 (grey,
            alpha last; what is transparent shows white).
        task, object_mask_threshold, overlap_threshold, top_k, resize, return_scores: as in
            `postprocess`.
        batch_size: images of one size that go through the model together.
        window, stride: of a Segmenter, in pixels; None takes the config's.
        scales: of a Segmenter: sizes of the image to average over; 1 is the config's.
        flip: of a Segmenter: average over the mirror images, too.
        cuda_graphs: on a GPU, run the model from a CUDA graph for sizes that come again and again
            (`graphs.replayed`); False runs it eagerly and frees the graphs.

    Returns:
        one `Segmentation` for one image, a list for a list, at the images' own sizes.

    Raises:
        TypeError, ValueError: no image, NaN pixels, or an option out of range; a list's image is
            named by its place.
    """
    check_options(task, object_mask_threshold, overlap_threshold, top_k, resize, return_scores)
    check_views(model, window, stride, scales, flip)
    one, config = not isinstance(images, (list, tuple)), model.config
    pictures = [
        read_image(x, "image" if one else f"image {i}")
        for i, x in enumerate([images] if one else images)
    ]
    outputs = [tuple(x.shape[1:]) for x in pictures]
    if isinstance(model, Segmenter):
        if task != "semantic":
            raise ValueError(f"segment: task must be 'semantic' for a Segmenter, got {task!r}")
        options = window, stride, flip, return_scores, cuda_graphs
        results = [_by_windows(model, x, scales, *options) for x in pictures]
        return results[0] if one else results
    inputs = [target_size(size, config.shortest_edge, config.longest_edge) for size in outputs]

    def read(i: int) -> Tensor:
        return prepare(pictures[i], config)

    results = [None] * len(inputs)
    batches = logits(model, inputs, read, batch_size, cuda_graphs)
    for places, class_logits, mask_logits, padded in batches:
        found = postprocess(
            class_logits,
            mask_logits,
            task,
            padded,
            [inputs[i] for i in places],
            [outputs[i] for i in places],
            stuff=config.stuff,
            object_mask_threshold=object_mask_threshold,
            overlap_threshold=overlap_threshold,
            top_k=top_k,
            resize=resize,
            return_scores=return_scores,
        )
        for i, result in zip(places, found):
            result.names = config.id2label
            results[i] = result
    return results[0] if one else results


def check_views(
    model: nn.Module, window: int | None, stride: int | None, scales: Sequence[float], flip: bool
) -> None:
    """Checks the options of `segment` that only a Segmenter has.

    Raises:
        TypeError: window or stride is no integer.
        ValueError: one out of range, or given to another model.
    """
    if isinstance(model, Segmenter):
        window_and_stride(model.config, window, stride)
        if not scales or not all(s > 0 for s in scales):
            raise ValueError(f"segment: scales must be positive, got {tuple(scales)}")
    elif window is not None or stride is not None or tuple(scales) != (1.0,) or flip:
        raise ValueError("segment: window, stride, scales and flip are for a Segmenter")


def logits(
    model: nn.Module,
    sizes: Sequence[tuple[int, int]],
    read: Callable[[int], Tensor],
    batch_size: int = 8,
    cuda_graphs: bool = True,
) -> Iterator[tuple[list[int], Tensor, Tensor, tuple[int, int]]]:
    """Runs the model over prepared images, those of one padded size together.

    Args:
        model: gives `class_queries_logits` and `masks_queries_logits`; has `config.size_divisor`.
        sizes: of each image its height and width.
        read: gives image i, [3, h, w] float, normalised; called when its batch is made.
        batch_size: at most so many images at once.
        cuda_graphs: as in `segment`.

    Yields:
        places in `sizes`, class logits [b, Q, K + 1], mask logits [b, Q, h, w], padded size.
    """
    weight = next(model.parameters())
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        padded = tuple(
            -(-s // model.config.size_divisor) * model.config.size_divisor for s in size
        )
        groups.setdefault(padded, []).append(i)
    for padded, members in groups.items():
        for start in range(0, len(members), batch_size):
            places = members[start : start + batch_size]
            batch = weight.new_zeros((len(places), 3, *padded))
            for row, i in zip(batch, places):
                row[:, : sizes[i][0], : sizes[i][1]] = read(i)
            # no_grad, not inference_mode: constants that the model keeps must serve training too
            with evaluating(model), torch.no_grad():
                found = replayed(_last, model, batch, cuda_graphs)
            del batch, row  # large, and not needed while the caller works on the logits
            yield places, *found, padded


def _last(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits and mask logits of the last prediction."""
    out = model(pixel_values)
    return out.class_queries_logits, out.masks_queries_logits


def _by_windows(model, picture, scales, *options) -> Segmentation:
    """One picture [3, H, W] through a Segmenter at each scale."""
    weight = next(model.parameters())
    images = [x[None].to(weight) for x in at_scales(picture, model.config, scales)]
    size = tuple(picture.shape[1:])
    with evaluating(model), torch.no_grad():
        found = label_map(model, images, size, *options)
    return semantic(*found, model.config.id2label)


def semantic(labels: Tensor, scores: Tensor | None, names: dict | None) -> Segmentation:
    """The result for a map of labels [H, W] int32, and class scores [K, H, W] or None."""
    count = labels.flatten().bincount().tolist()
    segments = [Segment(k, k, None, area, False) for k, area in enumerate(count) if area]
    return Segmentation("semantic", labels, segments, names, scores=scores)


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
