"""Pictures in, lists of scores, labels and masks out: what transformers'
pipeline("image-segmentation") returns, from segkern's models and kernels."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..inference.segment import check, segment
from ..io.images import read_image
from ..io.sources import MAX_BYTES, TIMEOUT, open_source
from ..models import open_model
from ..models.protocol import SegmentationModel
from ..ops._checks import expect_integer
from ..runtime.device import usable_device
from ..structures.segmentation import Segmentation
from ..structures.settings import Options, Views

NAME = "image-segmentation"  # what transformers calls every task of this kind


class Found(TypedDict):
    """A segment.

    Attributes:
        score: in [0, 1], of six digits; None for semantic.
        label: the name of its class.
        mask: a PIL image of mode "L" and the picture's size: 255 inside, 0 outside.
    """

    score: float | None
    label: str
    mask: Image.Image


def pipeline(
    model: SegmentationModel | str | Path,
    task: str | None = None,
    batch_size: int = 4,
    device: str | int | torch.device | None = None,
) -> "Pipeline":
    """Makes a function of pictures that returns what transformers' pipeline returns.

    Args:
        model: one of segkern's, in whatever mode, or what `open_model` takes: a name on the hub, a
            folder, a file.
        task: "panoptic", "instance" or "semantic"; None, or transformers' "image-segmentation",
            for the first of these that the model can do. A call may ask for another (`subtask`).
        batch_size: pictures that are held, and those of one size that go through the model,
            together; a result does not depend on it.
        device: to move the model to, as torch names it, a number for that CUDA device, -1 for the
            CPU, or "auto" for cuda where there are kernels for it. None leaves a model where it
            is, and is "auto" for one that is opened.

    Returns:
        a `Pipeline`; call it with pictures.

    Raises:
        TypeError: no model by `models.protocol`, such as one of transformers' own.
        ValueError: the model cannot be opened or cannot do the task, or no such device.
    """
    if isinstance(model, (str, Path)):
        model, device = open_model(model), "auto" if device is None else device
    task = _settled("task", model, None if task == NAME else task)
    expect_integer("pipeline: batch_size", batch_size)
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    if device is not None:
        model.to(usable_device(str(device)))
    return Pipeline(model, task, batch_size)


class Pipeline:
    """Finds the segments of pictures; `pipeline` makes one.

    Attributes:
        model: that it runs.
        task: what it does when a call does not say.
        batch_size: pictures that are held at once.
    """

    def __init__(self, model: SegmentationModel, task: str, batch_size: int):
        self.model, self.task, self.batch_size = model, task, batch_size

    def __call__(
        self,
        inputs,
        subtask: str | None = None,
        threshold: float = 0.9,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.5,
        batch_size: int | None = None,
        timeout: float = TIMEOUT,
        max_bytes: int = MAX_BYTES,
        max_pixels: int | None = None,
    ) -> list[Found] | list[list[Found]] | Iterator[list[Found]]:
        """Segments pictures.

        Names and defaults are those of transformers' pipeline, but for `timeout`, which there is
        endless. Defaults of `segkern.segment`, those of the papers' code, are others (panoptic:
        threshold and overlap 0.8; instance: no threshold). What also differs from transformers:

        - Stuff of a class is one segment, with the highest score of its queries; there it comes
          in as many pieces as the model has found. What is stuff stands in the model's
          `config.labels`; the lists of COCO, Cityscapes and ADE20K are known.
        - Masks are cut at the picture's own size, without padding in them and without a detour
          over 384 x 384 pixels, and a panoptic segment ends where its own mask does.
        - Instances are whole masks, which may overlap, best first; stuff has none. There what
          comes later overwrites what came before.

        Args:
            inputs: a picture, or a list, an iterator or a torch `Dataset` of them. A picture is a
                path; an address (http://, https://); a data URI; the bytes of a file, or a file
                open in binary mode; a PIL image; an array or a tensor as `segment` takes it.
            subtask: in place of the pipeline's task.
            threshold: in [0, 1]: panoptic segments must score more than this, instances at least
                this; semantic does not read it.
            mask_threshold: panoptic: must be 0.5: the kernels end a mask where a pixel is as
                likely inside as outside. The other tasks do not read it, as in transformers.
            overlap_mask_area_threshold: in [0, 1]: a panoptic segment must win this share of its
                own mask; the other tasks do not read it.
            batch_size: in place of the pipeline's.
            timeout: seconds to wait for a server, and that a download may take.
            max_bytes: of a picture that is downloaded.
            max_pixels: width times height of a picture; None is Pillow's limit.

        Returns:
            a list of a `Found` for each segment with pixels; a list of such lists for a list of
            pictures; for an iterator or data set an iterator, which reads on as it is read.

        Raises:
            TypeError, ValueError: no picture, or an argument out of range or not for this model; a
                list's picture is named by its place.
            OSError: an address cannot be fetched.
        """
        task = self.task if subtask is None else _settled("subtask", self.model, subtask)
        size = self.batch_size if batch_size is None else batch_size
        expect_integer("pipeline: batch_size", size)
        options = _options(
            self.model, task, threshold, mask_threshold, overlap_mask_area_threshold
        )

        def read(source, name: str) -> torch.Tensor:
            opened = open_source(source, name, timeout, max_bytes)
            return read_image(opened, name, max_pixels, self.model.config.input.channels)

        def batches(sources: Iterator) -> Iterator[list[Found]]:
            place = 0
            while some := list(islice(sources, size)):
                pictures = [read(x, f"image {place + i}") for i, x in enumerate(some)]
                place += len(some)
                found = segment(self.model, pictures, task, batch_size=size, options=options)
                yield from map(_listed, found)

        if isinstance(inputs, (list, tuple)):
            return list(batches(iter(inputs)))
        if isinstance(inputs, Dataset) and hasattr(inputs, "__len__"):  # whose end may be no error
            return batches(inputs[i] for i in range(len(inputs)))
        if isinstance(inputs, (Iterator, Dataset)) and not hasattr(inputs, "read"):
            return batches(iter(inputs))
        result = segment(self.model, read(inputs, "image"), task, options=options)
        return _listed(result)


def _settled(name: str, model: SegmentationModel, task: str | None) -> str:
    """A task that the model can do: its first where None is given."""
    tasks = check("pipeline", model, None, Options(), Views())
    if task is not None and task not in tasks:
        raise ValueError(
            f"pipeline: {name} must be {' or '.join(map(repr, tasks))} for a "
            f"{type(model).__name__}, got {task!r}"
        )
    return tasks[0] if task is None else task


def _options(
    model: SegmentationModel, task: str, threshold: float, mask_threshold: float, overlap: float
) -> Options:
    """What `segment` shall return, from transformers' settings."""
    for name, value in (
        ("threshold", threshold),
        ("mask_threshold", mask_threshold),
        ("overlap_mask_area_threshold", overlap),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
            raise TypeError(f"pipeline: {name} must be a number, got {value!r}")
        if not 0 <= value <= 1:
            raise ValueError(f"pipeline: {name} must be in [0, 1], got {value}")
    if task == "panoptic":
        if mask_threshold != 0.5:
            raise ValueError(
                "pipeline: mask_threshold must be 0.5 for panoptic, where the kernels end masks, "
                f"got {mask_threshold}"
            )
        return Options(threshold, overlap)
    if task == "instance":  # of as many pairs of query and class as there are queries
        return Options(threshold, top_k=getattr(model.config, "num_queries", None))
    return Options()


def _listed(result: Segmentation) -> list[Found]:
    found = []
    for i, s in enumerate(result.segments):
        if s.area == 0:
            continue
        inside = result.mask(i).cpu().numpy().astype(np.uint8) * 255
        score = None if s.score is None else round(s.score, 6)
        found.append(
            {"score": score, "label": result.name(s.label_id), "mask": Image.fromarray(inside)}
        )
    return found
