"""What recipes of models of objects share: scenes of digits, and one's own pictures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..data import DigitsConfig
from ..models import ModelConfig
from ..training.config import TrainConfig
from .own_data import SMALL, small_views, start_of, with_objects

_EPOCHS = 50  # of the paper of Mask2Former on COCO
DIGITS = {
    "batch_size": 8,
    "lr": 2e-3,
    "backbone_lr_factor": 1.0,
    "schedule": "cosine",
    "warmup": 50,
    "clip": 1.0,
}

# a query counts from this score on; after so few steps most are right well below the paper's 0.8
DIGITS_THRESHOLD = 0.5


def digit_scenes(
    tiny: Callable[[int], ModelConfig], level: str, task: str, size: tuple[int, int], **settings
) -> TrainConfig:
    """Training of a small model on scenes of handwritten digits.

    Args:
        tiny: its config for a number of labels.
        level: "easy", "hard" or "mixed".
        task: "panoptic", "instance" or "semantic".
        size: height and width of a scene.
        settings: further ones of `TrainConfig`, over `DIGITS`.
    """
    names = [str(k) for k in range(10)] + ["background"] * (task != "instance")
    model = tiny(len(names))
    model.id2label = dict(enumerate(names))
    model.stuff = () if task == "instance" else (10,)
    model.shortest_edge, model.longest_edge = min(size), 2 * max(size)
    return TrainConfig(
        evaluate_every=300,
        threshold=DIGITS_THRESHOLD,
        data=DigitsConfig(size=size, level=level, task=task),
        model=model,
        **(DIGITS | settings),
    )


def own_objects(
    recipe: str,
    kind: type,
    backbones: tuple[str, ...],
    root: str | Path,
    task: str | None,
    init: str | Path | None,
    preset: str | None,
    paper: dict,
) -> TrainConfig:
    """Training on one's own pictures with objects.

    Models for small images get views of their size and the rates of `DIGITS`.

    Args:
        recipe: its name, for messages; the run's folder is called so.
        kind: class of the model's config, with `preset` and `tiny`.
        backbones: that `kind.preset` takes.
        root, task, init, preset: as the recipes take them.
        paper: settings of `TrainConfig` for other models.

    Raises:
        ValueError: no data set is found, it holds no objects or nothing for the task, no such
            preset, or init is of another kind.
    """
    data, pictures = with_objects(recipe, root, task)
    model = replace(
        _model(recipe, kind, backbones, init, preset),
        num_labels=len(pictures.classes),
        id2label=dict(enumerate(pictures.classes)),
        stuff=tuple(pictures.stuff),
    )
    settings = paper
    size = model.input.resized((1024, 1024))
    if min(size) < SMALL:
        data = small_views(data, model.input.padded(size))
        settings = DIGITS
    steps = max(1000, _EPOCHS * len(pictures) // settings["batch_size"])
    return TrainConfig(
        output=Path("runs") / recipe,
        init=init,
        steps=steps,
        checkpoint_every=min(5000, steps // 10),
        evaluate_every=steps // 10,
        data=data,
        model=model,
        **settings,
    )


def _model(
    recipe: str,
    kind: type,
    backbones: tuple[str, ...],
    init: str | Path | None,
    preset: str | None,
) -> ModelConfig:
    """The config whose sizes the model has."""
    if config := start_of(recipe, kind, init, preset):
        return config
    known = ("tiny", *backbones)
    if preset not in (None, *known):
        raise ValueError(f"{recipe}: preset must be one of {', '.join(known)}, got {preset!r}")
    if preset == "tiny":
        return kind.tiny(1)
    return replace(kind.preset(preset or "swin_tiny"), backbone_pretrained=True)
