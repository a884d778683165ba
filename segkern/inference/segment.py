"""From pictures to segments, with any model.

Letters: B image, H W size of the result, h w size in the model.

Images go through the model a batch at a time, those of one size together; what becomes of its
logits depends on their form alone: masks of queries are post-processed as factors, without their
maps, class logits of pixels go through windows, scales and mirror images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..io.images import prepare, read_image, shown
from ..models.protocol import SegmentationModel
from ..ops._checks import expect_integer
from ..ops.segment_map import check_options
from ..runtime.cuda_graphs import replayed
from ..runtime.memory import note_size
from ..structures.logits import PixelLogits, QueryLogits
from ..structures.segmentation import Segmentation
from ..structures.settings import InputConfig, Options, Views, one_of
from .postprocess import Found, find_maps, results, semantic
from .query_windows import query_label_maps
from .sliding_window import PIXELS_AT_ONCE, label_maps, predict

FAILURES = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)  # of a picture, not of all


def reason_of(picture: str, error: Exception) -> str:
    """Why a picture has no result, in a line that names it."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return reason if picture in reason else f"{picture}: {reason}"


def segment(
    model: SegmentationModel,
    images,
    task: str | None = None,
    threshold: float | None = None,
    overlap_threshold: float | None = None,
    top_k: int | None = None,
    resize: str = "masks",
    return_scores: bool = False,
    batch_size: int = 4,
    window: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    cuda_graphs: bool = True,
    options: Options | None = None,
    views: Views | None = None,
    max_pixels: int | None = None,
    size: int | tuple[int, int] | dict[str, int] | None = None,
) -> Segmentation | list[Segmentation]:
    """Finds the segments of pictures.

    Images are resized, scaled and normalised as the model's config says, which for a checkpoint
    with a preprocessor_config.json is what that file says. Each is padded only to a multiple of
    the config's divisor; those that then have one size go together. So a result does not depend on
    the other images.

    Args:
        model: such as a `Mask2Former`, in whatever mode; the mode stays, and others may use the
            model meanwhile, or train it.
        images: one image or a list, each a path, a PIL image, an array [H, W] or [H, W, C] or a
            tensor [H, W] or [C, H, W]; uint8, or uint16, or floating in [0, 1]; C is 1 to 4 (grey,
            alpha last; what is transparent shows white).
        task: "panoptic", "instance" or "semantic"; None for the first that the model can do.
        threshold, overlap_threshold, top_k, resize, return_scores: see `Options`.
        batch_size: images of one size that go through the model together.
        window, stride, scales, flip: see `Views`.
        cuda_graphs: on a GPU, run the model from a CUDA graph for sizes that come again and again
            (`cuda_graphs.replayed`); False runs it eagerly and frees the graphs.
        options, views: in place of their settings.
        max_pixels: width times height that a picture in a file may have; None is Pillow's limit of
            178,956,970, which keeps a small file from filling the memory.
        size: pixels to which images are resized, in place of the config's: of the short side, as
            (height, width), whatever an image's shape, or as {"shortest_edge": 800,
            "longest_edge": 1333}. docs/processors.md says at which sizes papers measured.

    Returns:
        one `Segmentation` for one image, a list for a list, at the images' own sizes.

    Raises:
        TypeError, ValueError: no image, NaN pixels, or an option out of range or not for this
            task or model; a list's image is named by its place.
    """
    loose = Options(threshold, overlap_threshold, top_k, resize, return_scores)
    options = one_of("segment", options, loose)
    views = one_of("segment", views, Views(window, stride, scales, flip))
    task = check_one("segment", model, task, options, views)
    expect_integer("segment: batch_size", batch_size)
    one, names = not isinstance(images, (list, tuple)), model.config.labels.names
    pictures = [
        read_image(x, "image" if one else f"image {i}", max_pixels, model.config.input.channels)
        for i, x in enumerate([images] if one else images)
    ]
    settings = model.config.input.sized("segment", size)
    inputs = [Input.of(picture, settings, views) for picture in pictures]
    results = [None] * len(inputs)
    stuff = model.config.labels.stuff
    wanted = {task: options}
    for i, found in find(model, inputs, wanted, views, stuff, batch_size, cuda_graphs):
        results[i] = replace(found[task], names=names, image=shown(pictures[i]))
    return results[0] if one else results


def check(
    caller: str,
    model: SegmentationModel,
    tasks: Sequence[str] | None,
    options: Options,
    views: Views,
) -> tuple[str, ...]:
    """Checks settings before work starts.

    Returns:
        the tasks, each once; those that the model can do where None is given.

    Raises:
        TypeError: no model by `models.protocol`.
        ValueError: an option out of range or read by no task, or a task, an option or views that
            are not for this model.
    """
    config, name = getattr(model, "config", None), type(model).__name__
    lacking = [n for n in ("predict", "inputs") if not hasattr(model, n)]
    lacking += [f"config.{n}" for n in ("tasks", "logits", "input") if not hasattr(config, n)]
    if lacking:
        raise TypeError(
            f"{caller}: model must have what segkern/models/protocol.py says; a {name} has no "
            f"{', '.join(lacking)}"
        )
    if isinstance(tasks, str):
        tasks = (tasks,)
    tasks = tuple(dict.fromkeys(config.tasks if tasks is None else tasks))
    check_options(tasks, *astuple(options))
    for task in tasks:
        if task not in config.tasks:
            known = " or ".join(map(repr, config.tasks))
            raise ValueError(f"{caller}: task must be {known} for a {name}, got {task!r}")
    by_pixels, windows = config.logits is PixelLogits, config.input.window is not None
    if (by_pixels or windows) and options.resize != "masks":
        what = "give class logits of pixels" if by_pixels else "look through windows"
        raise ValueError(
            f"{caller}: resize must be left out for models that {what}, got {options.resize!r}"
        )
    if by_pixels:
        views.of(config.input)
    elif views != Views():
        raise ValueError(
            f"{caller}: window, stride, scales and flip are for models that give class logits of "
            f"pixels, a {name} gives masks"
        )
    return tasks


def check_one(
    caller: str, model: SegmentationModel, task: str | None, options: Options, views: Views
) -> str:
    """As `check` for one task, which it returns: the model's first where None is given."""
    task, *_ = check(caller, model, None if task is None else (task,), options, views)
    check_options((task,), *astuple(options))
    return task


class Input(NamedTuple):
    """An image on its way into a model.

    Attributes:
        sizes: height and width at each scale of the views.
        output: (H, W) of the result.
        read: gives the image at scale number k, [C, h, w] float, normalised; called when its
            batch is made.
    """

    sizes: tuple[tuple[int, int], ...]
    output: tuple[int, int]
    read: Callable[[int], Tensor]

    @classmethod
    def of(
        cls,
        picture: Tensor,
        settings: InputConfig,
        views: Views,
        output: tuple[int, int] | None = None,
    ) -> "Input":
        """A picture [C, H, W], resized as a model takes it; the result has its size if no other
        is given.

        Raises:
            ValueError: the model takes another number of channels.
        """
        if len(picture) != settings.channels:
            raise ValueError(
                f"the picture must have {settings.channels} channels, as the model takes them "
                f"(input.channels), got {len(picture)}"
            )
        own, at = tuple(picture.shape[1:]), [settings.at(scale) for scale in views.scales]
        sizes = tuple(x.resized(own) for x in at)
        return cls(sizes, output or own, lambda k: prepare(picture, at[k]))


def find(
    model: SegmentationModel,
    inputs: Sequence[Input],
    wanted: dict[str, Options],
    views: Views,
    stuff: Sequence[int],
    batch_size: int,
    cuda_graphs: bool,
) -> Iterator[tuple[int, dict[str, Segmentation]]]:
    """Runs the model over images, those of one size together.

    Args:
        model: in whatever mode.
        inputs: the images.
        wanted: tasks and the options of each, checked; views: too.
        stuff: labels without instances.
        batch_size: at most so many images at once.
        cuda_graphs: as in `segment`.

    Yields:
        places in `inputs`, and the result of every task.
    """
    own = getattr(model.config, "options", {})  # what stands for None, by task
    wanted = {task: options.over(own.get(task)) for task, options in wanted.items()}
    windows = _looks_through_windows(model)
    groups: dict[tuple, list[int]] = {}
    for i, one in enumerate(inputs):
        groups.setdefault(size_in_model(model, one), []).append(i)
    for size, members in groups.items():
        note_size(size)
        at_once = batch_size
        if windows:  # large images one by one, as their windows do not go together anyway
            pixels = sum(h * w for h, w in inputs[members[0]].sizes)
            at_once = max(1, min(batch_size, PIXELS_AT_ONCE // pixels))
        for start in range(0, len(members), at_once):
            places = members[start : start + at_once]
            batch = [inputs[i] for i in places]
            if windows:
                found = _by_windows(model, batch, wanted["semantic"], views, cuda_graphs)
            else:
                found = _by_queries(model, batch, wanted, stuff, cuda_graphs)
            yield from zip(places, found)


def size_in_model(model: SegmentationModel, one: Input) -> tuple:
    """What images must share to go through the model together: the size when padded, or the sizes
    at all scales of what is cut into windows."""
    whole = not _looks_through_windows(model)
    return model.config.input.padded(one.sizes[0]) if whole else one.sizes


def _looks_through_windows(model: SegmentationModel) -> bool:
    return model.config.logits is PixelLogits or model.config.input.window is not None


def _by_windows(
    model: SegmentationModel, batch: list[Input], options: Options, views: Views, cuda_graphs: bool
) -> Iterator[dict[str, Segmentation]]:
    weight = next(model.parameters())
    images = [
        torch.stack([one.read(k).to(weight) for one in batch]) for k in range(len(views.scales))
    ]
    sizes = [one.output for one in batch]
    config, rest = model.config, (options.return_scores, cuda_graphs)
    with torch.no_grad():
        if config.logits is PixelLogits:
            found = label_maps(model, images, sizes, views, *rest)
        else:
            found = query_label_maps(model, images[0], sizes, *rest)
    for result in semantic(found, config.num_labels, config.labels.names):
        yield {"semantic": result}


@dataclass(frozen=True)
class _Maps:
    """What becomes of logits before the host reads of it: a function that is known again by its
    value, for CUDA graphs.

    Attributes:
        wanted: tasks with their options.
        padded: size of the model's input.
        sizes, outputs: of each image in that input, and of its result.
        stuff: labels without instances.
    """

    wanted: tuple[tuple[str, Options], ...]
    padded: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, int], ...]
    stuff: tuple[int, ...]

    def __call__(self, logits) -> dict[str, Found]:
        if not isinstance(logits, QueryLogits):
            raise TypeError(
                f"segment: predict must return QueryLogits, got {type(logits).__name__}"
            )
        sizes = self.padded, self.sizes, self.outputs, self.stuff
        return {task: find_maps(*logits, task, *sizes, options) for task, options in self.wanted}

    def repeats(self) -> bool:
        """Whether results are so small that a graph may keep memory for them."""
        pixels = sum(H * W for H, W in self.outputs)
        return pixels <= PIXELS_AT_ONCE and not any(o.return_scores for _, o in self.wanted)


def _by_queries(
    model: SegmentationModel,
    batch: list[Input],
    wanted: dict[str, Options],
    stuff: Sequence[int],
    cuda_graphs: bool,
) -> Iterator[dict[str, Segmentation]]:
    padded = model.config.input.padded(batch[0].sizes[0])
    weight, settings = next(model.parameters()), model.config.input
    pixels = weight.new_empty((len(batch), settings.channels, *padded))
    for channel, value in zip(pixels.unbind(1), settings.padding):
        channel.fill_(value)
    for row, one in zip(pixels, batch):
        (h, w), *_ = one.sizes
        row[:, :h, :w] = one.read(0)
    extra = {task: model.inputs(task, len(batch)) for task in wanted}
    runs = [((task,), inputs) for task, inputs in extra.items()]
    if not any(extra.values()):
        runs = [(tuple(wanted), ())]
    found = {}
    # no_grad, not inference_mode: constants that the model keeps must serve training too
    with torch.no_grad():
        for tasks, inputs in runs:
            maps = _Maps(
                tuple((task, wanted[task]) for task in tasks),
                padded,
                tuple(one.sizes[0] for one in batch),
                tuple(one.output for one in batch),
                tuple(stuff),
            )
            then = maps if maps.repeats() else None
            out = replayed(predict, model, pixels, *inputs, then=then, enabled=cuda_graphs)
            found |= out if then else maps(out)
    del pixels, row  # large, and not needed while the caller works on the results
    yield from results(found, stuff)
