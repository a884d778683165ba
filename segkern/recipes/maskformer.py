"""Recipes of MaskFormer: functions that return a `TrainConfig`."""

from pathlib import Path

from ..models import MaskFormerConfig
from ..models.maskformer.config import BACKBONES
from .own_objects import own_objects


def maskformer(
    root: str | Path,
    task: str | None = None,
    init: str | Path | None = None,
    preset: str | None = None,
):
    """MaskFormer on one's own pictures with objects: AdamW, a rate and a decay of 1e-4, a tenth of
    the rate in the backbone, gradients clipped at 0.01, large-scale jitter to 1024 pixels, 50
    passes in batches of 16, at least 1,000 steps.

    Models for small images, as the preset "tiny" is, get views of their size and the rates of the
    digits recipe, with which they train in minutes on a CPU.

    Args:
        root: folder of a data set, in one of the formats that `data.find_format` knows and that
            have objects or maps of classes.
        task: "instance", "panoptic" or "semantic", where the folder holds several; None takes
            what it holds, panoptic first.
        init: model to start from, as `TrainConfig.init`, whose sizes the model then has; None
            starts from the backbone's ImageNet weights, which takes far more pictures.
        preset: without init, "tiny" or a backbone of `MaskFormerConfig.preset`; None takes
            swin_tiny.

    Returns:
        a `TrainConfig`, whose model has the names of the data's classes.

    Raises:
        ValueError: no data set is found, it holds no objects or nothing for the task, no such
            preset, or init is no MaskFormer.
    """
    paper = {"batch_size": 16, "schedule": "steps", "lr": 1e-4, "weight_decay": 1e-4}
    return own_objects(
        "maskformer", MaskFormerConfig, tuple(BACKBONES), root, task, init, preset, paper
    )
