"""Recipes of Mask2Former: functions that return a `TrainConfig`."""

from dataclasses import fields, replace
from pathlib import Path

from ..data import DigitsConfig, build_dataset, find_format
from ..models import Mask2FormerConfig, open_model
from ..training.config import TrainConfig

_EPOCHS, _BATCH = 50, 16  # the paper's on COCO

# a query counts from this score on; after so few steps most are right well below the paper's 0.8
DIGITS_THRESHOLD = 0.5


def digits(level: str = "mixed", task: str = "panoptic", size: tuple[int, int] = (64, 64)):
    """A small Mask2Former on scenes of handwritten digits: minutes on two CPU cores.

    Args:
        level: "easy", "hard" or "mixed".
        task: "panoptic", "instance" or "semantic".
        size: height and width of a scene.

    Returns:
        a `TrainConfig`.
    """
    names = [str(k) for k in range(10)] + ["background"] * (task != "instance")
    model = Mask2FormerConfig.tiny(len(names))
    model.id2label = dict(enumerate(names))
    model.stuff = () if task == "instance" else (10,)
    model.shortest_edge, model.longest_edge = min(size), 2 * max(size)
    return TrainConfig(
        steps=1800,
        batch_size=8,
        lr=2e-3,
        backbone_lr_factor=1.0,
        schedule="cosine",
        warmup=50,
        clip=1.0,
        evaluate_every=300,
        threshold=DIGITS_THRESHOLD,
        data=DigitsConfig(size=size, level=level, task=task),
        model=model,
    )


def mask2former(
    root: str | Path,
    task: str | None = None,
    init: str | Path | None = None,
    backbone: str = "swin_tiny",
):
    """The paper's recipe on one's own pictures with objects: AdamW, large-scale jitter to 1024
    pixels, 50 passes in batches of 16, at least 1,000 steps.

    Args:
        root: folder of a data set, in one of the formats that `data.find_format` knows and that
            have objects.
        task: "instance" or "panoptic", where the folder holds both; None takes what it holds,
            panoptic first.
        init: model to start from, as `TrainConfig.init`, whose sizes the model then has; None
            starts from random weights, which takes far more pictures.
        backbone: without init, as `Mask2FormerConfig.backbone`.

    Returns:
        a `TrainConfig`, whose model has the names of the data's classes.

    Raises:
        ValueError: no data set is found, it holds no objects or nothing for the task, or init is
            no Mask2Former.
    """
    data, _ = find_format(root)
    if task is not None and "task" in {field.name for field in fields(data)}:
        data = replace(data, task=task)
    if "masks" not in data.targets or task not in (None, data.task):
        raise ValueError(
            f"mask2former: {root} must hold objects{f' for task {task}' if task else ''}, "
            f"got data of kind {data.kind}, {data.task}"
        )
    pictures = build_dataset(data, "train")
    names = {
        "num_labels": len(pictures.classes),
        "id2label": dict(enumerate(pictures.classes)),
        "stuff": tuple(pictures.stuff),
    }
    if init is None:
        model = Mask2FormerConfig(backbone=backbone, drop_path_rate=0.3, **names)
    else:
        model = open_model(init).config
        if not isinstance(model, Mask2FormerConfig):
            raise ValueError(f"mask2former: init must be a mask2former, got a {model.kind}")
        model = replace(model, **names)
    steps = max(1000, _EPOCHS * len(pictures) // _BATCH)
    return TrainConfig(
        output=Path("runs/mask2former"),
        init=init,
        steps=steps,
        batch_size=_BATCH,
        schedule="steps",
        checkpoint_every=min(5000, steps // 10),
        evaluate_every=steps // 10,
        data=data,
        model=model,
    )
