"""From pictures to segments.

Letters: B image, Q query, K class, H W output size, h w size of the mask logits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..io.images import prepare, read_image, target_size
from ..models.segmenter.model import Segmenter
from ..ops.segment_map import TASKS as TASKS
from ..ops.segment_map import check_options
from ..runtime.cuda_graphs import replayed
from ..structures.segmentation import Segmentation
from .postprocess import postprocess, semantic
from .sliding_window import at_scales, label_map, window_and_stride


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
