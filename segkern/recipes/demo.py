"""The demo: trains a small model on digits, measures it on held-out scenes, draws what it sees."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from PIL import Image

from ..data import Digits, DigitsConfig
from ..evaluation.evaluate import evaluate
from ..evaluation.report import truth
from ..inference.segment import segment
from ..io import plots
from ..io.atomic_files import write_json
from ..io.overlay import save_picture
from ..models import SegmentationModel, open_model
from ..structures.settings import Options
from ..training import checkpoint
from ..training.loop import train
from ..training.state import stored_config
from .mask2former import DIGITS_THRESHOLD, digits


def demo(output: str | Path = "demo", steps: int | None = None, scenes: int = 400) -> dict:
    """Trains, evaluates on scenes of digits that training never saw, and writes the results.

    Writes metrics.json, easy.png and hard.png (input, truth, prediction), curves.png,
    confusion.png, example.png (a scene to try `segkern predict` on) and the run itself: model/,
    checkpoints/, log.jsonl.

    Args:
        output: folder; what an earlier demo left there is replaced.
        steps: of training; None takes the recipe's, at most three minutes on two idle cores.
        scenes: held-out scenes of each level.

    Returns:
        what metrics.json holds. pq, sq and rq are means over the ten digit classes, in [0, 1].

    Raises:
        ValueError: a number below 1, or the folder holds a run that is no demo.
        ImportError: a package that the evaluation or the pictures need is missing.
        OSError: the folder cannot be written to; found before work starts.
        KeyboardInterrupt: Ctrl-C; the last checkpoint is whole.
    """
    if scenes < 1:
        raise ValueError(f"demo: scenes must be >= 1, got {scenes}")
    folder = Path(output)
    config = digits()
    config = replace(
        config, output=folder, overwrite=True, steps=config.steps if steps is None else steps
    )
    _check_packages()
    _check_folder(folder, config.to_dict())
    run = train(config)
    # the best on the val split, which `segkern predict --model FOLDER` opens too
    model = open_model(folder).to(next(run.model.parameters()).device)
    easy = _evaluate(model, folder, "easy", scenes, ("panoptic", "instance", "semantic"))
    hard = _evaluate(model, folder, "hard", scenes, ("panoptic",))
    metrics = {
        **easy["things"],
        "class_accuracy": easy["class_accuracy"],
        "dice": easy["dice"],
        "ap": easy["ap"],
        "miou": easy["miou"],
        "hard": {
            "pq": hard["things"]["pq"],
            "class_accuracy": hard["class_accuracy"],
            "dice": hard["dice"],
        },
        "scenes": scenes,
        "steps": run.steps,
        "train_seconds": round(run.seconds, 1),
        "images_per_second": round(run.images_per_second, 1),
    }
    write_json(folder / "metrics.json", metrics)
    plots.save_curves(folder / "curves.png", folder / "log.jsonl")
    names = [row["name"] for row in easy["classes"]]
    plots.save_confusion(folder / "confusion.png", easy["confusion"], names)
    return metrics


def _check_packages() -> None:
    for name in ("sklearn", "torchmetrics", "pycocotools", "matplotlib"):
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"demo needs {name}: pip install '.[train]' in segkern's folder"
            ) from error


def _check_folder(folder: Path, settings: dict) -> None:
    """A run of the user's own is not replaced: only one with a demo's figures or settings is."""
    if not checkpoint.held(folder) or (folder / "metrics.json").exists():
        return
    stored = stored_config(folder).to_dict()
    if checkpoint.differences(stored, settings, ("output", "steps")):
        raise ValueError(f"demo: {folder} holds a run that is no demo; choose another --output")


def _evaluate(model: SegmentationModel, folder: Path, level: str, scenes: int, tasks) -> dict:
    """Figures of held-out scenes; draws a few to LEVEL.png, the first to example.png."""
    data = Digits(DigitsConfig(level=level), "test")
    options = Options(threshold=DIGITS_THRESHOLD)
    value = evaluate(model, data, tasks, limit=scenes, options=options)
    samples = [data[i] for i in range(6)]
    images = [s["image"] for s in samples]
    found = segment(model, images, options=options)
    rows = [(s["image"], truth(s, data.stuff, data.classes), r) for s, r in zip(samples, found)]
    plots.save_scenes(folder / f"{level}.png", rows, f"Held-out scenes, {level}")
    if level == "easy":
        save_picture(folder / "example.png", Image.fromarray(samples[0]["image"]))
    return value
