"""The comparison: trains every small model on the same scenes, and puts their figures in a table.

Which models are compared is no list: they are the recipes whose name begins with that of the data.
"""

import csv
import io
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich.console import Console

from ..data import build_dataset
from ..data.streets import CLASSES
from ..evaluation.evaluate import evaluate
from ..evaluation.matched import matched
from ..evaluation.optional import import_extra
from ..evaluation.report import semantic_truth, truth
from ..inference.segment import segment
from ..io import plots
from ..io.atomic_files import atomic, writable_folder, write_json
from ..models import SegmentationModel, open_model
from ..runtime.device import usable_device
from ..structures.logits import QueryLogits
from ..structures.segmentation import Segmentation
from ..structures.settings import Options
from ..training import checkpoint
from ..training.config import TrainConfig
from ..training.loop import train
from . import RECIPES

# of each data set the kinds of held-out scenes, and what is measured on each
LEVELS = {"digits": ("easy", "hard"), "streets": ("streets",)}
FIGURES = {
    "digits": ("class accuracy", "dice loss", "PQ", "mIoU"),
    "streets": ("pixel accuracy", "mIoU"),
}
ROW = "compared.json"  # in the folder of a run: it is finished, and these are its figures
DRAWN = 6  # held-out scenes in the picture
_TIMED = 20  # images, one at a time


def compare(
    output: str | Path = "demo",
    data: str = "digits",
    models: Sequence[str] | None = None,
    steps: int | None = None,
    scenes: int = 400,
    overwrite: bool = False,
) -> list[dict]:
    """Trains, measures and draws the models, one after another.

    Each has a run in OUTPUT/RECIPE. One that is finished is kept as it is, one that was stopped
    goes on, and one that fails is named in the table and does not stop the others. Of the digits
    all see the same mixture of easy and hard scenes, whatever their recipe says.

    Writes DATA.md, DATA.csv, DATA.json (a table) and DATA.png (held-out scenes: input, truth, and
    a column a model) anew after each model.

    Args:
        output: folder.
        data: "digits" or "streets".
        models: names of recipes; None for all of the data.
        steps: of training; None takes each recipe's, which are minutes on two idle cores.
        scenes: held-out scenes of each kind to measure on.
        overwrite: train anew what is finished or begun.

    Returns:
        the rows of the table: figures by the names of their columns, None where a model does not
        give one, or "model" and "error".

    Raises:
        ValueError: no such data or model, or a number below 1.
        ImportError: a package that the evaluation or the pictures need is missing.
        OSError: the folder cannot be written to.
        KeyboardInterrupt: Ctrl-C; the table has the models before, and the run goes on next time.
    """
    known = [name for name in RECIPES if name.split("-")[0] == data and data in LEVELS]
    if not known:
        raise ValueError(f"demo: data must be one of {', '.join(LEVELS)}, got {data!r}")
    names = known if models is None else list(dict.fromkeys(models))
    for name in names:
        if name not in known:
            raise ValueError(f"demo: models must be of {', '.join(known)}, got {name!r}")
    for name, value in (("scenes", scenes), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"demo: {name} must be >= 1, got {value}")
    for package in ("torchmetrics", "matplotlib"):
        import_extra(package)
    folder, tell = writable_folder(output), Console().print
    rows: list[dict] = []
    drawn: dict[str, list[Segmentation]] = {}
    for name in names:
        try:
            config = _config(name, data, folder / name, steps)
            row, kept = _finished(config, name, data, scenes, overwrite)
            drawn[name] = _drawn(config, data)
            tell(f"{name}: {'kept, ' if kept else ''}{row['steps']} steps")
        except Exception as error:  # it is this model's, and the others are still wanted
            text = " ".join(str(error).split())
            row = {"model": name, "error": f"{type(error).__name__}: {text}"}
            tell(f"{name}: failed: {row['error']}", markup=False)
        rows.append(row)
        _write(folder / data, data, rows)
        if drawn:
            _picture(folder / f"{data}.png", data, drawn)
    return rows


def columns(data: str) -> list[str]:
    """The table's columns."""
    many = len(LEVELS[data]) > 1
    figures = [f"{level} {x}" if many else x for level in LEVELS[data] for x in FIGURES[data]]
    if data == "streets":
        figures += [f"IoU {name}" for name in CLASSES]
    return ["model", "parameters", "steps", *figures, "ms a step", "ms an image"]


def markdown(data: str, rows: Sequence[dict]) -> str:
    """The table as Markdown; what failed, and why, is listed beneath."""
    lines = [columns(data), ["---", *["---:"] * (len(columns(data)) - 1)]]
    lines += [[_text(name, row.get(name)) for name in columns(data)] for row in rows]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    failed = [f"- {row['model']} failed: {row['error']}\n" for row in rows if "error" in row]
    return text + "\n" * bool(failed) + "".join(failed)


def _text(name: str, value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if name.startswith("ms ") else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else value


def _config(name: str, data: str, folder: Path, steps: int | None) -> TrainConfig:
    config = RECIPES[name]()
    scenes = replace(config.data, level="mixed") if data == "digits" else config.data
    return replace(config, output=folder, data=scenes, steps=steps or config.steps)


def _finished(
    config: TrainConfig, name: str, data: str, scenes: int, overwrite: bool
) -> tuple[dict, bool]:
    """The row of a model, trained as far as is left to do; and whether nothing was."""
    path = config.output / ROW
    if overwrite:
        path.unlink(missing_ok=True)
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8")), True
    begun = not overwrite and bool(checkpoint.held(config.output))
    if not begun:
        train(replace(config, overwrite=overwrite))
    elif checkpoint.settings(config.output)["step"] < config.steps:
        train(config, resume=config.output)
    state = checkpoint.settings(config.output)
    model = _open(config)
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state["step"],
        **_measured(model, config, data, scenes),
        "ms a step": 1e3 * state["seconds"] / state["step"],
        "ms an image": _milliseconds(model, config),
    }
    write_json(path, row)
    return row, False


def _open(config: TrainConfig) -> SegmentationModel:
    """The best on the val split, or the last where there were no evaluations."""
    return open_model(config.output).to(usable_device(config.device))


def _held_out(config: TrainConfig, data: str, level: str, **changes):
    if data == "digits":
        changes |= {"level": level}
    return build_dataset(replace(config.data, **changes), "test")


def _measured(model: SegmentationModel, config: TrainConfig, data: str, scenes: int) -> dict:
    """Figures of all kinds of held-out scenes by the names of their columns."""
    figures = {}
    # without a class for the background, pixels cannot be told from it
    whole = config.data.task != "instance"
    tasks = [t for t in model.config.tasks if t == "panoptic" or (t == "semantic" and whole)]
    options = Options(config.threshold) if "panoptic" in tasks else None
    for level in LEVELS[data]:
        held_out = _held_out(config, data, level)
        value = evaluate(model, held_out, tasks, limit=scenes, options=options)
        found = {
            "PQ": value["things"]["pq"] if "panoptic" in tasks else None,
            "mIoU": value.get("miou"),
            "pixel accuracy": value.get("pixel_accuracy"),
        }
        if data == "digits" and model.config.logits is QueryLogits:
            objects = matched(model, _held_out(config, data, level, task="instance"), scenes)
            found |= {name.replace("_", " "): x for name, x in objects.items()}
        if data == "streets":
            found |= {f"IoU {row['name']}": row["iou"] for row in value["classes"]}
        prefix = f"{level} " if len(LEVELS[data]) > 1 else ""
        figures |= {prefix + name: x for name, x in found.items()}
    return {name: figures[name] for name in columns(data) if name in figures}


def _milliseconds(model: SegmentationModel, config: TrainConfig) -> float:
    """Of one image, from pixels to segments, median of several."""
    held_out = build_dataset(config.data, "test")
    times = []
    for index in range(_TIMED + 1):
        image = held_out[index]["image"]
        start = time.perf_counter()
        segment(model, image)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[1:])  # the first one warms up


def _shown(config, data: str) -> list[tuple[dict, Segmentation]]:
    """Samples of the held-out scenes that are drawn, as many of each kind, and their truth."""
    shown = []
    for level in LEVELS[data]:
        task = {"task": "panoptic"} if data == "digits" else {}
        held_out = _held_out(config, data, level, **task)
        for sample in (held_out[i] for i in range(DRAWN // len(LEVELS[data]))):
            if data == "digits":
                shown.append((sample, truth(sample, held_out.stuff, held_out.classes)))
            else:
                shown.append((sample, semantic_truth(sample, held_out.classes)))
    return shown


def _drawn(config: TrainConfig, data: str) -> list[Segmentation]:
    """What a model finds in the scenes that are drawn."""
    model = _open(config)
    panoptic = "panoptic" in model.config.tasks
    found = segment(
        model,
        [sample["image"] for sample, _ in _shown(config, data)],
        task="panoptic" if panoptic else "semantic",
        options=Options(config.threshold if panoptic else None),
    )
    stuff = build_dataset(config.data, "test").stuff if data == "digits" else ()
    for result in found:  # what is drawn strongly is as in the truth
        result.segments = [s._replace(isthing=s.label_id not in stuff) for s in result.segments]
    return found


def _picture(path: Path, data: str, drawn: dict[str, list[Segmentation]]) -> None:
    config = _config(next(iter(drawn)), data, path.parent, None)
    shown = _shown(config, data)
    rows = [
        (sample["image"], true, *found) for (sample, true), *found in zip(shown, *drawn.values())
    ]
    plots.save_scenes(path, rows, names=("truth", *drawn))


def _write(path: Path, data: str, rows: list[dict]) -> None:
    """The table as Markdown, CSV and JSON."""
    write_json(path.with_suffix(".json"), rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns(data), "error"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for suffix, content in ((".csv", text.getvalue()), (".md", markdown(data, rows))):
        with atomic(path.with_suffix(suffix)) as temporary:
            temporary.write_text(content, encoding="utf-8")
