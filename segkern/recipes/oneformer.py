"""Recipes of OneFormer: functions that return a `TrainConfig`."""

import warnings
from dataclasses import replace
from pathlib import Path

from ..models import OneFormerConfig
from ..models.oneformer.config import BACKBONES
from .own_objects import digit_scenes, own_objects


def digits_oneformer(level: str = "mixed", size: tuple[int, int] = (64, 64)):
    """A small OneFormer on scenes of handwritten digits, whose one training learns the three
    tasks: minutes on two CPU cores.

    Args:
        level: "easy", "hard" or "mixed".
        size: height and width of a scene.

    Returns:
        a `TrainConfig`. Not the paper's: Muon for the matrices, with which it knows the digits
        after half as many steps, and half of the samples asked for instances, which else get a
        third of the steps of a model of their own.
    """
    settings = {"optimizer": "muon", "momentum": 0.95, "task_shares": (1.0, 2.0, 1.0)}
    return digit_scenes(OneFormerConfig.tiny, level, "panoptic", size, steps=1800, **settings)


def oneformer(
    root: str | Path,
    task: str | None = None,
    init: str | Path | None = None,
    preset: str | None = None,
):
    """The paper's recipe on one's own pictures with objects: AdamW, large-scale jitter to 1024
    pixels, 50 passes in batches of 16, at least 1,000 steps; the task of a picture is drawn each
    time.

    Models for small images, as the preset "tiny" is, get views of their size and the rates of the
    digits recipe, with which they train in minutes on a CPU.

    Args:
        root: folder of a data set, in one of the formats that `data.find_format` knows and that
            have objects.
        task: what the folder's annotations are of, "panoptic" or "instance", where it holds
            several; None takes panoptic first. The model learns all tasks from either.
        init: model to start from, as `TrainConfig.init`, whose sizes the model then has; of words
            whose tokens are not known here its folder's vocabulary says them. None starts from the
            backbone's ImageNet weights, which takes far more pictures.
        preset: without init, "tiny" or a backbone of `OneFormerConfig.preset`; None takes
            swin_tiny.

    Returns:
        a `TrainConfig`, whose model has the names of the data's classes and the tokens of their
        sentences. Without init, classes of words whose tokens are not known give a warning, and
        the model reads words by a scheme of its own.

    Raises:
        ValueError: no data set is found, it holds no objects or nothing for the task, no such
            preset, init is no OneFormer, or it comes without the vocabulary that is needed.
    """
    paper = {"batch_size": 16, "schedule": "steps"}
    config = own_objects(
        "oneformer", OneFormerConfig, tuple(BACKBONES), root, task, init, preset, paper
    )
    config.model = _reading(replace(config.model, prompts=()), init)
    return config


def _reading(model: OneFormerConfig, init: str | Path | None) -> OneFormerConfig:
    """The same with the tokens of the sentences of its classes."""
    try:
        return model.with_prompts()
    except ValueError as error:
        if init is not None:
            try:
                return model.with_prompts(tokenizer=init)
            except ValueError:
                raise error from None
        warnings.warn(
            f"oneformer: {error}; this model, which starts from scratch, reads words by a scheme "
            "of its own (model.tokens = words)",
            stacklevel=3,
        )
        return replace(model, tokens="words").with_prompts()
