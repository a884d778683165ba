"""A model for one task as a function of tensors alone, with named results: what exports trace.

Letters: B image, C channel of it, Q query, K class, N row of a table, h w size of the picture as
the model takes it, m n size of the model's own maps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inference.segment import check_one
from ..models.protocol import SegmentationModel
from ..runtime.modes import evaluated
from ..structures.logits import PixelLogits, QueryLogits
from ..structures.settings import Options, Views
from . import results

INPUT = "pixel_values"
FULL = "full"  # logits at the picture's size
POSTS = (FULL, "semantic", "instance", "panoptic")


class Form(NamedTuple):
    """What a graph gives.

    Attributes:
        task: "panoptic", "instance" or "semantic".
        post: None for logits as the model makes them, "full" for logits at the picture's size, or
            the task, whose result is then part of the graph.
        outputs: names of the results, in their order.
    """

    task: str
    post: str | None
    outputs: tuple[str, ...]


class Graph(nn.Module):
    """A model for one task: pixels in, a fixed tuple of tensors out.

    It takes `pixel_values` [B, C, h, w] floating, normalised as the model's config says: not
    normalised inside, because the zeros of padding must stay zeros. h and w are multiples of
    `config.input.divisor`. Its results by `post` are, in the order of `form.outputs`:

    - None: `class_queries_logits` [B, Q, K + 1] and `masks_queries_logits` [B, Q, m, n] of models
      of queries, `logits` [B, K, m, n] of models of pixels;
    - "full": the same, masks or logits resized to [h, w];
    - "semantic": `labels` [B, h, w] int32 in [0, K);
    - "instance": `masks` [B, N, h, w] bool, `labels` [B, N] int64 and `scores` [B, N], the best
      first; N = min(top_k, Q K), and a row that is none has label -1 and score 0;
    - "panoptic": `ids` [B, h, w] int32, 0 where no segment is, and of each query its `segments`
      [B, Q] int32 (the number in `ids`, which stuff of a label shares; 0 for none), `labels`
      [B, Q] int64, -1 for none, and `scores` [B, Q], 0 for none.

    Results are for the picture as the model takes it, with its padding. Weights and the mode are
    those of the model, seen in evaluation mode.

    Args:
        model: in whatever mode.
        task: what a model that is told its task is asked; None is the first that it can do, or
            `post`, where that is a task.
        post: None, "full", "semantic", "instance" or "panoptic".
        options: thresholds and `top_k` of the result; None takes the model's own, then those of
            `segment`.

    Raises:
        TypeError: no model by `models.protocol`.
        ValueError: a task that the model lacks, a post that is unknown or for another task, or
            options that it does not read.
    """

    def __init__(
        self,
        model: SegmentationModel,
        task: str | None = None,
        post: str | None = None,
        options: Options | None = None,
    ):
        super().__init__()
        if post is not None and post not in POSTS:
            raise ValueError(
                f"export: post must be left out or one of {', '.join(POSTS)}, got {post!r}"
            )
        wanted = post if post not in (None, FULL) else None
        if wanted is not None and task not in (None, wanted):
            raise ValueError(f"export: post must be the task, {task!r}, or 'full', got {post!r}")
        given = options or Options()
        checked = given if wanted is not None else Options()
        task = check_one("export", model, wanted or task, checked, Views())
        if given != Options() and wanted is None:
            raise ValueError(f"export: options are for a task's post, got them with post {post!r}")
        if given.resize != "masks" or given.return_scores:
            raise ValueError("export: resize and return_scores are not for a graph")
        self.model = evaluated(model)
        self.options = given.over(getattr(model.config, "options", {}).get(task))
        self.form = Form(task, post, _names(model, post))
        self.multiples = False  # what no multiple of the divisor has room for is left out

    @property
    def example(self) -> tuple[int, int]:
        """(h, w) of a picture that the model takes, when nothing else is said."""
        return natural_size(self.model)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The results, in the order of `form.outputs`."""
        if self.multiples:
            # of a bare h the size of a map at stride 32 is a floor of floors, and PyTorch takes
            # minutes to see that two such are equal; those of d n are n times a number
            divisor = self.model.config.input.divisor
            for axis in (2, 3):
                side = pixel_values.shape[axis] // divisor * divisor
                pixel_values = pixel_values.narrow(axis, 0, side)
        extra = self.model.inputs(self.form.task, pixel_values.shape[0])
        found = self.model.predict(pixel_values, *extra)
        size = pixel_values.shape[2:]
        if isinstance(found, PixelLogits):
            return self._of_pixels(found, size)
        return self._of_queries(found, size)

    def _of_pixels(self, found: PixelLogits, size: Sequence[int]) -> tuple[Tensor, ...]:
        maps = found.maps
        if self.form.post is None:
            return (maps,)
        if found.stride != 1:
            whole = [n * found.stride for n in maps.shape[2:]]
            maps = F.interpolate(maps, whole, mode="bilinear")
        maps = maps[:, :, : size[0], : size[1]]
        return (maps if self.form.post == FULL else maps.argmax(1).int(),)

    def _of_queries(self, found: QueryLogits, size: Sequence[int]) -> tuple[Tensor, ...]:
        masks = found.masks
        if found.features is not None:  # a product of matrices, which every runtime has
            rows = masks @ found.features.flatten(2)
            masks = rows.unflatten(2, found.features.shape[2:])
        if self.form.post is None:
            return found.classes, masks
        masks = F.interpolate(masks, tuple(size), mode="bilinear")
        if self.form.post == FULL:
            return found.classes, masks
        classes, stuff = found.classes, self.model.config.labels.stuff
        if self.form.post == "semantic":
            return (results.semantic(classes, masks),)
        made = results.instance if self.form.post == "instance" else results.panoptic
        return made(classes, masks, tuple(stuff), self.options)


def _names(model: SegmentationModel, post: str | None) -> tuple[str, ...]:
    if post in (None, FULL):
        if model.config.logits is PixelLogits:
            return ("logits",)
        return ("class_queries_logits", "masks_queries_logits")
    return {
        "semantic": ("labels",),
        "instance": ("masks", "labels", "scores"),
        "panoptic": ("ids", "segments", "labels", "scores"),
    }[post]


def natural_size(model: SegmentationModel) -> tuple[int, int]:
    """(h, w) that pictures of the crop's shape get in a model, padded: what an export is for when
    nothing else is said."""
    settings = model.config.input
    if settings.window is not None:
        return settings.padded((settings.window, settings.window))
    own = settings.crop or settings.size or settings.pad_size
    if own is None:
        edge = settings.shortest_edge or settings.longest_edge or 512
        own = (edge, edge)
    return settings.padded(settings.resized(tuple(own)))


def expect_size(model: SegmentationModel, size: tuple[int, int]) -> None:
    """Raises ValueError where sides are not multiples of the model's divisor: `segment` pads such
    pictures, a graph would take them for pictures of another shape."""
    divisor = model.config.input.divisor
    if len(size) != 2 or any(side < 1 or side % divisor for side in size):
        raise ValueError(
            f"export: size must be (height, width), positive multiples of {divisor} for a "
            f"{type(model).__name__}, got {tuple(size)}"
        )


@torch.no_grad()
def run(graph: Graph, pixel_values: Tensor) -> dict[str, Tensor]:
    """The results by name, on the model's device."""
    return dict(zip(graph.form.outputs, graph(pixel_values), strict=True))
