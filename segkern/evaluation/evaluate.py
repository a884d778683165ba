"""Evaluates a model on a data set: panoptic quality, mask AP, mIoU, classes that it confuses.

What the figures are is said in panoptic.py, instance.py and semantic.py.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush, nlargest
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from ..inference.segment import Input, check, find
from ..io.atomic_files import writable_folder, write_json
from ..models.protocol import ModelConfig, SegmentationModel
from ..runtime.processes import ALONE, of_group
from ..runtime.shared_work import Together, by_first
from ..structures.segmentation import Segmentation
from ..structures.settings import Options, Views, one_of
from .instance import Instances
from .panoptic import Panoptic
from .semantic import Semantic
from .shares import Shares, as_list, put_together

WORST = 8  # images are named and drawn


def evaluate(
    model: SegmentationModel,
    dataset,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    threshold: float | None = None,
    overlap_threshold: float | None = None,
    top_k: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    out: str | Path | None = None,
    progress: bool = True,
    cuda_graphs: bool = True,
    options: Options | None = None,
    views: Views | None = None,
    max_detections: int = 100,
    size: int | tuple[int, int] | dict[str, int] | None = None,
    shared: bool = True,
) -> dict:
    """Runs the model over a data set and measures the results.

    Where torch.distributed has a group of several processes, all of them call it, each measures
    its share, and all get what one process would get, to the last bit of every figure.

    Args:
        model: such as a `Mask2Former`, with as many labels as the data set has classes; its mode
            stays.
        dataset: samples by index, with a length, `classes` (names) and `stuff` (labels without
            instances; not needed for the semantic task, nor where the model has a list of them),
            or a DataLoader over one that yields lists of samples. A sample is a dict: pixel_values
            [3, h, w] float32 normalised, masks [n, H, W] uint8, labels [n] int64, semantic [H, W]
            integers (labels the model does not have are void). For
            the semantic task alone it may have image [H, W, 3] uint8 in place of the first three,
            which is resized and normalised as the model's config says.
        tasks: any of "panoptic", "instance", "semantic"; None for all that the model can do.
        limit: the first so many images; None for all.
        batch_size, num_workers: of the loader made for a data set.
        threshold, overlap_threshold, top_k: see `Options`; the threshold is for panoptic alone, as
            AP ranks all masks.
        window, stride, scales, flip: see `Views`; other scales than 1 need samples with image.
        out: JSON file for the result.
        progress: show a bar.
        cuda_graphs: as in `segment`.
        options, views: in place of their settings.
        max_detections: instance results of a class in an image that count, the best ones; COCO's
            100. More than that makes None of `top_k` as many, or the model would give no more.
        size: of images, in place of the model's, as `segment` takes it; needs samples with image.
        shared: false lets this process measure all by itself, though it is one of several.

    Returns:
        plain types, None where nothing occurs that could be measured: images, seconds,
        images_per_second, tasks; panoptic: pq, sq, rq, things and stuff (pq, sq, rq each),
        class_accuracy (of the true things, those that some predicted segment matches at IoU > 1/2:
        the share with the right class), dice (of these matches), matched, instances, confusion
        [K + 1][K + 1] (truth by prediction, last: nothing); instance: ap, ap50, ap75, boundary_ap,
        boundary_ap50, instance_confusion (as confusion, of the results with a score of at least
        1/2), thresholds (lists score, precision, recall, f1 at IoU 1/2), best_threshold
        (that of the best F1), mask_f1 (there); semantic: miou, f1, pixel_accuracy, mean_accuracy,
        pixel_confusion [K][K]; classes: a list with each class's figures; worst: the images of the
        least score by the first task, the worst first: image (its index, of a DataLoader the
        sample's id where it has one), score (the meter's `update` says of what), path where it is
        known.

    Raises:
        TypeError: window or stride is no integer.
        ValueError: an option out of range or not for this model, no image, a model with another
            number of labels, samples without what a task or the scales need, or `out` is a folder.
        OSError: `out` cannot be written; found before the model runs.
        Exception: what went wrong in another process.
    """
    processes = of_group() if shared else ALONE
    several = processes.count > 1
    loose = Options(threshold, overlap_threshold, top_k)
    options = one_of("evaluate", options, loose)
    views = one_of("evaluate", views, Views(window, stride, scales, flip))
    tasks = check("evaluate", model, tasks, options, views)
    if options.threshold is not None and "panoptic" not in tasks:
        raise ValueError(
            f"evaluate: threshold must be left out where tasks are {tasks}: it is for panoptic, "
            f"got {options.threshold}"
        )
    if max_detections < 1:
        raise ValueError(f"evaluate: max_detections must be at least 1, got {max_detections}")
    wanted = options_of(tasks, options, max_detections)
    source = _source(dataset, limit)
    total = len(source) if limit is None else min(limit, len(source))
    classes, stuff = check_dataset(source, model.config, tasks)
    if out is not None:
        by_first(processes, lambda: _writable(Path(out)))
    kinds = {
        "panoptic": Panoptic,
        "instance": partial(Instances, most=max_detections),
        "semantic": Semantic,
    }
    meters = {task: kinds[task](len(classes), stuff) for task in tasks}
    worst: list[tuple] = []  # a heap, the best of them on top
    turns: list[int] = []  # of each image measured here the number of its batch
    start = time.perf_counter()
    with Together(processes) as work:
        if several:
            batches = Shares(processes, dataset, total, batch_size, num_workers)
            mine = batches.samples
        else:
            batches, mine = _batches(dataset, total, batch_size, num_workers), total
        with _bar(progress and processes.first) as bar:
            job = bar.add_task("evaluate", total=mine)
            for turn, place, samples in batches:
                if work.failed():
                    break
                for i, results in found(model, samples, wanted, views, stuff, cuda_graphs, size):
                    scores = {
                        task: meters[task].update(x, samples[i]) for task, x in results.items()
                    }
                    index = _index(samples[i], place + i, source is dataset)
                    _remember(worst, scores[tasks[0]], place + i, index, samples[i])
                    turns.append(turn)
                    bar.advance(job)
    if several:
        turns, worst = put_together(processes, meters, turns, worst)

    def figures() -> dict:
        if not turns:
            raise ValueError("evaluate: the data set is empty")
        seconds = time.perf_counter() - start
        value = {
            "images": len(turns),
            "seconds": round(seconds, 3),
            "images_per_second": round(len(turns) / seconds, 2),
            "tasks": list(tasks),
        }
        rows = [
            {"label_id": k, "name": name, "isthing": k not in stuff}
            for k, name in enumerate(classes)
        ]
        for meter in meters.values():
            value |= meter.compute(rows)
        if "instance" in tasks:
            value["max_detections"] = max_detections
        value["classes"] = rows
        value["worst"] = [row for *_, row in nlargest(WORST, worst)]
        absent.extend(row["name"] for row in rows if not row.pop("occurs"))
        if out is not None:
            write_json(out, value)
        return value

    absent: list[str] = []
    value = by_first(processes, figures)
    if absent and (limit is None or limit >= len(source)):
        warnings.warn(
            f"evaluate: {len(absent)} of {len(classes)} classes occur nowhere in the data: "
            f"{some_of(absent)}; the means are those of the others",
            stacklevel=2,
        )
    return value


def _writable(out: Path) -> None:
    """Raises ValueError or OSError where no figures can be written there."""
    if out.is_dir():
        raise ValueError(f"evaluate: out must be a file, got the folder {out}")
    writable_folder(out.parent)


def options_of(tasks: Sequence[str], options: Options, max_detections: int) -> dict[str, Options]:
    """What each task reads of the options; AP ranks all masks, whatever their score, and asks for
    as many as it counts."""
    wanted = {task: Options(**options.of(task)) for task in tasks}
    if "instance" in wanted:
        top_k = options.top_k
        if top_k is None and max_detections > 100:
            top_k = max_detections
        wanted["instance"] = replace(wanted["instance"], threshold=None, top_k=top_k)
    return wanted


def found(
    model: SegmentationModel,
    samples: list[dict],
    wanted: dict[str, Options],
    views: Views,
    stuff: Sequence[int],
    cuda_graphs: bool,
    size: int | tuple[int, int] | dict[str, int] | None = None,
) -> Iterator[tuple[int, dict[str, Segmentation]]]:
    """Places in `samples`, and the result of every task at the size of their targets."""
    inputs = [_input(model, sample, tuple(wanted), views, size) for sample in samples]
    return find(model, inputs, wanted, views, stuff, len(samples), cuda_graphs)


def _index(sample: dict, place: int, in_order: bool) -> int:
    """Of a sample in its data set: a loader of the user's may have an order of its own."""
    known = not in_order and isinstance(sample.get("id"), (int, np.integer))
    return int(sample["id"]) if known else place


def _remember(worst: list, score: float | None, place: int, index: int, sample: dict) -> None:
    """Keeps an image where it is among the worst so far; of equal ones the first."""
    if score is None:
        return
    row = {"image": index, "score": score}
    row |= {"path": str(sample["path"])} if "path" in sample else {}
    heappush(worst, (-score, -place, row))
    if len(worst) > WORST:
        heappop(worst)


def some_of(names: Sequence[str]) -> str:
    """The first five, and that there are more."""
    return ", ".join([*names[:5], *["..."] * (len(names) > 5)])


def check_dataset(
    dataset, config: ModelConfig, tasks: Sequence[str], name: str = "evaluate: dataset"
) -> tuple[list, tuple]:
    """Names of the classes, and labels without instances, of a data set to evaluate on.

    Args:
        name: of the argument, which begins the messages.

    Raises:
        ValueError: it lacks them, or its classes are not as many as the model's labels.
    """
    classes, stuff = getattr(dataset, "classes", None), getattr(dataset, "stuff", None)
    if classes is None:
        raise ValueError(
            f"{name} must have `classes`, the names of its labels, "
            f"got a {type(dataset).__name__} without"
        )
    if len(classes) != config.num_labels:
        raise ValueError(
            f"{name} must have as many classes as the model has labels, {config.num_labels}, "
            f"got {len(classes)}"
        )
    stuff = config.labels.stuff or None if stuff is None else stuff
    if stuff is None and tuple(tasks) != ("semantic",):
        raise ValueError(
            f"{name} must have `stuff`, the labels without instances (an empty tuple "
            f"where all have them), got a {type(dataset).__name__} without"
        )
    return list(classes), tuple(stuff or ())


def _input(
    model: SegmentationModel, sample: dict, tasks: tuple[str, ...], views: Views, size
) -> Input:
    """A sample on its way into the model; the result has the size of its targets.

    Raises:
        ValueError: the sample lacks what a task, the scales or the size need.
    """
    if tasks != ("semantic",) and "masks" not in sample:
        raise ValueError(
            f"evaluate: tasks must be ('semantic',) for samples without masks, got {tasks}"
        )
    plain = views.scales == (1.0,) and size is None
    if "pixel_values" in sample and plain:
        pixels = torch.as_tensor(sample["pixel_values"])
        return Input((tuple(pixels.shape[1:]),), _size(sample), lambda _: pixels)
    if "image" not in sample:
        name, value = ("size", size) if size is not None else ("scales", views.scales)
        rule = "None" if name == "size" else "(1.0,)"
        raise ValueError(f"evaluate: {name} must be {rule} for samples without image, got {value}")
    settings = model.config.input.sized("evaluate", size)
    return Input.of(_picture(sample), settings, views, _size(sample))


def _picture(sample: dict) -> Tensor:
    """[3, H, W] uint8."""
    return torch.as_tensor(sample["image"]).movedim(2, 0)


def _size(sample: dict) -> tuple[int, int]:
    """(H, W) of the targets."""
    return np.shape(sample["masks"])[1:] if "masks" in sample else np.shape(sample["semantic"])


def _source(dataset, limit: int | None):
    """The data set that knows its classes."""
    if limit is not None and limit < 1:
        raise ValueError(f"evaluate: limit must be at least 1, got {limit}")
    return dataset.dataset if isinstance(dataset, DataLoader) else dataset


def _batches(
    dataset, total: int, batch_size: int, num_workers: int
) -> Iterator[tuple[int, int, list[dict]]]:
    """Number of a batch, place of its first sample, and its samples, up to `total` of them."""
    loader = dataset
    if not isinstance(dataset, DataLoader):
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=range(total),
            num_workers=num_workers,
            collate_fn=as_list,
        )
    place = 0
    for turn, samples in enumerate(loader):
        yield turn, place, samples[: total - place]
        place += len(samples)
        if place >= total:
            break


def _bar(visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not visible,
    )
