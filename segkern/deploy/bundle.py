"""A folder that segments pictures without segkern and without PyTorch: model.onnx, how pictures
become its pixels, the names of its labels, and a predict.py that reads the three."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from ..inference.segment import check_one
from ..io.atomic_files import new_place, write_json
from ..models.protocol import SegmentationModel
from ..ops.segment_map import OVERLAP, THRESHOLD
from ..structures.logits import PixelLogits
from ..structures.settings import Options, Views
from .compare import BOUND
from .export import Exported, export


def bundle(
    model: SegmentationModel,
    folder: str | Path,
    task: str | None = None,
    options: Options | None = None,
    opset: int = 20,
    bound: float = BOUND,
) -> Exported:
    """Writes a model with all that a picture's way through it needs.

    `python FOLDER/predict.py PICTURE ...` needs numpy, pillow and onnxruntime, and gives what
    `segkern predict` gives, up to the rounding of its resizes.

    Args:
        model: as for `export`; for pictures of three channels.
        folder: is made; there is nothing yet, or an empty folder.
        task: "panoptic", "instance" or "semantic"; None is the first that the model can do.
        options: thresholds and `top_k`, which predict.py then uses; None is as in `segkern
            predict`.
        opset, bound: as of `export`.

    Raises:
        ImportError: a package that the export needs is missing.
        OSError: the folder cannot be written to.
        TypeError, ValueError: as of `export`, a model of another number of channels, or a folder
            that is not empty.
    """
    folder = Path(folder)
    given = options or Options()
    task = check_one("export", model, task, given, Views())
    takes = model.config.input
    if takes.channels != 3:
        raise ValueError(
            f"export: a bundle reads pictures of 3 channels, the model takes {takes.channels}"
        )
    with new_place("export: folder", folder) as aside:
        aside.mkdir()
        settings = _settings(model, task, given)
        sides = takes.window is None
        size = None if sides else (takes.window, takes.window)
        if size is not None:
            size = takes.padded(size)
        dynamic = True if sides else "batch"
        how = {"dynamic": dynamic, "grid_sample": True, "opset": opset, "bound": bound}
        made = export(model, aside / "model.onnx", task, size=size, **how)
        names = model.config.labels.names or {}
        write_json(aside / "labels.json", {str(k): v for k, v in names.items()})
        write_json(aside / "preprocessing.json", settings)
        source = Path(__file__).with_name("predict_alone.py")
        shutil.copyfile(source, aside / "predict.py")
    return replace(made, path=folder / "model.onnx")


def _settings(model: SegmentationModel, task: str, options: Options) -> dict:
    """What predict.py reads: the model's input, and the options of the task, none left open."""
    config = model.config
    found = options.over(getattr(config, "options", {}).get(task))
    overlap = found.overlap_threshold
    settings = asdict(config.input)
    del settings["crop"]
    return settings | {
        "form": "pixels" if config.logits is PixelLogits else "queries",
        "task": task,
        "stuff": sorted(config.labels.stuff),
        "threshold": THRESHOLD if found.threshold is None else found.threshold,
        "overlap_threshold": OVERLAP if overlap is None else overlap,
        "top_k": found.top_k or 100,
        "resize": found.resize,
    }
