"""The command `segkern evaluate`."""

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from .. import recipes
from ..data import Digits, Streets
from ..data.folder import Layout
from ..evaluation.evaluate import evaluate as run_evaluate
from ..evaluation.optional import import_extra
from ..evaluation.report import table
from ..models import open_model
from ..ops import _library
from ..ops.segment_map import TASKS
from ..recipes.evaluate_run import run_folder, source_of, write_report
from ..runtime.processes import of_group
from ..structures.settings import Options, Views
from .arguments import Model, Task
from .measured import tasks_on


def evaluate(
    model: Annotated[Model, tyro.conf.Positional],
    level: Literal["easy", "hard", "mixed"] | None = None,
    split: Literal["val", "test"] | None = None,
    size: tuple[int, int] | None = None,
    seed: int | None = None,
    scenes: int | None = None,
    tasks: tuple[Task, ...] = TASKS,
    threshold: float | None = None,
    data: str | None = None,
    layout: Layout | None = None,
    max_pixels: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    out: Path | None = None,
    device: str = "auto",
    cuda_graphs: bool = True,
    max_detections: int = 100,
    processes: int = 1,
) -> None:
    """Measure a model on held-out scenes, or images in folders: PQ, SQ, RQ, AP, mIoU.

    A run is measured on the data that it was trained on, unless options name another, and gets a
    report: evaluation/metrics.html, beside the figures in metrics.json.

    Args:
        model: what to measure.
        level: of scenes of digits; not given, the run's, or easy.
        split: of the scenes; not given, test.
        size: height and width of a scene; not given, the run's, or 64 64.
        seed: other seeds give other scenes; not given, the run's, or 0.
        scenes: how many, or how many images; not given, 400 scenes, or all images.
        tasks: what to measure; of a Segmenter and of images in folders semantic alone.
        threshold: least score of a panoptic segment, 0 to 1; not given, the digits recipe's for
            scenes, else 0.8.
        data: folder whose val split is measured on, in place of scenes: COCO, LabelMe, YOLO, maps
            of objects or of classes, shards (or the address of shards).
        layout: of a folder of maps of classes; not given, the format is told from the files.
        max_pixels: width times height that an image in a folder may have; not given, 178,956,970.
        window: side in pixels of a Segmenter's windows; not given, the model's.
        stride: pixels from one window to the next; not given, the model's.
        scales: of a Segmenter: sizes of the images to average over; 1 is the model's.
        flip: of a Segmenter: average over the mirror images, too.
        out: JSON file for the figures; the report is beside it, as .html. Not given, it is
            evaluation/metrics.json of a run, and none of another model.
        device: "cpu", "cuda", or "auto" for cuda where there are kernels for it.
        cuda_graphs: on a GPU run the model from a CUDA graph for sizes that come again and again.
        max_detections: results of a class in an image that AP counts.
        processes: on this machine, which share the images, on GPUs one each; the figures are those
            of one. torchrun starts them on several machines, without this option.
    """
    if out is not None and (out.is_dir() or out.suffix == ".html"):
        raise ValueError(f"evaluate: --out must be a JSON file, got {out}")
    run = run_folder(model)
    # without matplotlib a run that was not asked for its report has its figures alone
    if out is None and run is not None and importlib.util.find_spec("matplotlib"):
        out = run / "evaluation" / "metrics.json"
    if out is not None:
        import_extra("matplotlib")  # missed now, and not after the figures are found
    opened = open_model(model).to(of_group().device(device))
    given = {"size": size, "level": level, "seed": seed, "split": split}
    given = {name: value for name, value in given.items() if value is not None}
    source, title = source_of(model, opened, data, layout, max_pixels, given)
    if isinstance(source, (Digits, Streets)):
        scenes = 400 if scenes is None else scenes
    if tasks == TASKS:
        tasks = tasks_on(opened, source)
    if threshold is None and isinstance(source, Digits) and "panoptic" in tasks:
        threshold = recipes.DIGITS_THRESHOLD
    options, views = Options(threshold), Views(window, stride, scales, flip)
    value = run_evaluate(
        opened,
        source,
        tasks,
        scenes,
        out=out,
        cuda_graphs=cuda_graphs,
        options=options,
        views=views,
        max_detections=max_detections,
    )
    if not of_group().first:
        return
    Console().print(table(value, title))
    if value.get("best_threshold") is not None:
        print("best F1 of objects {mask_f1:.3f}, at score {best_threshold:.2f}".format(**value))
    if out is None:
        return
    measured = value, opened, source, options, views
    page = write_report(out, model, title, *measured, {"versions": _library.info()}, cuda_graphs)
    print(f"written: {out} and {page}")
