"""Recipes of Mask2Former: functions that return a `TrainConfig`."""

from dataclasses import replace
from pathlib import Path

from ..data import DigitsConfig
from ..models import Mask2FormerConfig
from ..models.mask2former.config import BACKBONES
from ..training.config import TrainConfig
from .own_pictures import config_of, small_views, with_objects

_EPOCHS = 50  # the paper's on COCO
_PAPER = {"batch_size": 16, "schedule": "steps"}
_DIGITS = {
    "batch_size": 8,
    "lr": 2e-3,
    "backbone_lr_factor": 1.0,
    "schedule": "cosine",
    "warmup": 50,
    "clip": 1.0,
}
_SMALL = 256  # pixels of the short side, below which a model is for small images

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
        evaluate_every=300,
        threshold=DIGITS_THRESHOLD,
        data=DigitsConfig(size=size, level=level, task=task),
        model=model,
        **_DIGITS,
    )


def mask2former(
    root: str | Path,
    task: str | None = None,
    init: str | Path | None = None,
    preset: str | None = None,
):
    """The paper's recipe on one's own pictures with objects: AdamW, large-scale jitter to 1024
    pixels, 50 passes in batches of 16, at least 1,000 steps.

    Models for small images, as the preset "tiny" is, get views of their size and the rates of the
    digits recipe, with which they train in minutes on a CPU.

    Args:
        root: folder of a data set, in one of the formats that `data.find_format` knows and that
            have objects or maps of classes.
        task: "instance", "panoptic" or "semantic", where the folder holds several; None takes
            what it holds, panoptic first.
        init: model to start from, as `TrainConfig.init`, whose sizes the model then has; None
            starts from the backbone's ImageNet weights, which takes far more pictures.
        preset: without init, "tiny" or a backbone of `Mask2FormerConfig.preset`; None takes
            swin_tiny.

    Returns:
        a `TrainConfig`, whose model has the names of the data's classes.

    Raises:
        ValueError: no data set is found, it holds no objects or nothing for the task, no such
            preset, or init is no Mask2Former.
    """
    data, pictures = with_objects("mask2former", root, task)
    model = replace(
        _model(init, preset),
        num_labels=len(pictures.classes),
        id2label=dict(enumerate(pictures.classes)),
        stuff=tuple(pictures.stuff),
    )
    settings = _PAPER
    if model.shortest_edge < _SMALL:
        data = small_views(data, model.input.padded((model.shortest_edge,) * 2))
        settings = _DIGITS
    steps = max(1000, _EPOCHS * len(pictures) // settings["batch_size"])
    return TrainConfig(
        output=Path("runs/mask2former"),
        init=init,
        steps=steps,
        checkpoint_every=min(5000, steps // 10),
        evaluate_every=steps // 10,
        data=data,
        model=model,
        **settings,
    )


def _model(init: str | Path | None, preset: str | None) -> Mask2FormerConfig:
    """The config whose sizes the model has."""
    if init is not None:
        if preset is not None:
            raise ValueError(
                f"mask2former: preset must be left out where init gives the model, got {preset!r}"
            )
        return config_of("mask2former", init)
    known = ("tiny", *BACKBONES)
    if preset not in (None, *known):
        raise ValueError(f"mask2former: preset must be one of {', '.join(known)}, got {preset!r}")
    if preset == "tiny":
        return Mask2FormerConfig.tiny(1)
    return replace(Mask2FormerConfig.preset(preset or "swin_tiny"), backbone_pretrained=True)
