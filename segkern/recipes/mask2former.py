"""Recipes of Mask2Former: functions that return a `TrainConfig`."""

from pathlib import Path

from ..models import Mask2FormerConfig
from ..models.mask2former.config import BACKBONES
from .own_objects import DIGITS_THRESHOLD as DIGITS_THRESHOLD
from .own_objects import digit_scenes, own_objects


def digits(level: str = "mixed", task: str = "panoptic", size: tuple[int, int] = (64, 64)):
    """A small Mask2Former on scenes of handwritten digits: minutes on two CPU cores.

    Args:
        level: "easy", "hard" or "mixed".
        task: "panoptic", "instance" or "semantic".
        size: height and width of a scene.

    Returns:
        a `TrainConfig`.
    """
    return digit_scenes(Mask2FormerConfig.tiny, level, task, size, steps=1800)


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
    paper = {"batch_size": 16, "schedule": "steps"}
    return own_objects(
        "mask2former", Mask2FormerConfig, tuple(BACKBONES), root, task, init, preset, paper
    )
