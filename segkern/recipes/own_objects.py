"""What recipes of models of objects share: scenes of digits, and one's own pictures."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from ..data import (
    Ade20kConfig,
    ClassMapsConfig,
    DigitsConfig,
    FolderConfig,
    ade20k_views,
    build_dataset,
    find_format,
)
from ..models import ModelConfig, open_model
from ..training.config import TrainConfig

_EPOCHS = 50  # of the paper of Mask2Former on COCO
DIGITS = {
    "batch_size": 8,
    "lr": 2e-3,
    "backbone_lr_factor": 1.0,
    "schedule": "cosine",
    "warmup": 50,
    "clip": 1.0,
}
_SMALL = 256  # pixels of the short side, below which a model is for small images
_SMALL_RATIOS = (0.7, 1.4)  # of 64 pixels a tenth would show nothing

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
    data, _ = find_format(root)
    if isinstance(data, FolderConfig):  # maps of classes: a segment each
        data = ClassMapsConfig(data.root, data.layout, data.seed, data.read)
    if task is not None and "task" in {field.name for field in fields(data)}:
        data = replace(data, task=task)
        if isinstance(data, Ade20kConfig):
            data = replace(data, views=ade20k_views(task))
    if "masks" not in data.targets or task not in (None, data.task):
        raise ValueError(
            f"{recipe}: {root} must hold objects{f' for task {task}' if task else ''}, "
            f"got data of kind {data.kind}, {data.task}"
        )
    pictures = build_dataset(data, "train")
    model = replace(
        _model(recipe, kind, backbones, init, preset),
        num_labels=len(pictures.classes),
        id2label=dict(enumerate(pictures.classes)),
        stuff=tuple(pictures.stuff),
    )
    settings = paper
    if model.shortest_edge < _SMALL:
        sides = model.input.padded((model.shortest_edge,) * 2)
        small = {"size": sides, "ratios": _SMALL_RATIOS, "short_sides": ()}
        data = replace(data, views=replace(data.views, **small))
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
    if init is not None:
        if preset is not None:
            raise ValueError(
                f"{recipe}: preset must be left out where init gives the model, got {preset!r}"
            )
        config = open_model(init).config
        if not isinstance(config, kind):
            raise ValueError(f"{recipe}: init must be a {kind.kind}, got a {config.kind}")
        return config
    known = ("tiny", *backbones)
    if preset not in (None, *known):
        raise ValueError(f"{recipe}: preset must be one of {', '.join(known)}, got {preset!r}")
    if preset == "tiny":
        return kind.tiny(1)
    return replace(kind.preset(preset or "swin_tiny"), backbone_pretrained=True)
