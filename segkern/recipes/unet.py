"""Recipes of U-Net: functions that return a `TrainConfig`."""

from dataclasses import replace
from pathlib import Path

from ..data import DigitsConfig
from ..models import UNetConfig
from ..training.config import TrainConfig
from .own_data import on_own_data, start_of

# Adam without decay at a rate that falls to a half and a tenth: the paper's
_PAPER = {
    "batch_size": 24,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "schedule": "thirds",
    "warmup": 0,
    "clip": 0.0,
}
_EPOCHS = 30
_DIGITS = {
    "batch_size": 8,
    "lr": 5e-3,
    "backbone_lr_factor": 1.0,
    "schedule": "cosine",
    "warmup": 50,
    "clip": 1.0,
}


def digits_unet(level: str = "easy", size: tuple[int, int] = (64, 64)):
    """A small Hungarian U-Net that finds handwritten digits: three to four minutes on one core.

    Args:
        level: "easy", "hard" or "mixed".
        size: height and width of a scene, multiples of 16.

    Returns:
        a `TrainConfig`. Not the paper's: 24 output channels, focal loss beside dice, and classes
        from what lies under a channel's mask and under the true masks.
    """
    model = replace(
        UNetConfig.tiny(10, "instance"),
        image_size=size,
        channels=16,
        num_queries=24,
        mask_weight=20.0,
        class_from="mask",
        true_mask_weight=1.0,
    )
    model.id2label = {k: str(k) for k in range(10)}
    return TrainConfig(
        output=Path("runs/digits-unet"),
        steps=1400,
        evaluate_every=700,
        best_metric="class_accuracy",
        threshold=0.5,
        data=DigitsConfig(size=size, level=level, task="instance"),
        model=model,
        **_DIGITS,
    )


def digits_unet_semantic(level: str = "easy", size: tuple[int, int] = (64, 64)):
    """A small U-Net that gives each pixel of scenes of digits a class: five minutes on one core.

    Args:
        level: "easy", "hard" or "mixed".
        size: height and width of a scene, multiples of 16.

    Returns:
        a `TrainConfig`. With 8 channels it learned the background alone.
    """
    names = [str(k) for k in range(10)] + ["background"]
    model = replace(UNetConfig.tiny(11), image_size=size, channels=16)
    model.id2label = dict(enumerate(names))
    return TrainConfig(
        output=Path("runs/digits-unet-semantic"),
        steps=2100,
        evaluate_every=700,
        data=DigitsConfig(size=size, level=level, task="semantic"),
        model=model,
        **(_DIGITS | {"lr": 1e-2}),
    )


def unet(
    root: str | Path,
    layout: str | None = None,
    init: str | Path | None = None,
    preset: str | None = None,
):
    """The paper's recipe on one's own pictures: Adam, 30 passes in batches of 24, at least 1,000
    steps.

    Args:
        root: folder of a data set, with maps of classes for "semantic", else with objects.
        layout: of a folder of maps of classes (`FolderConfig`); None finds the format.
        init: model to start from, as `TrainConfig.init`, whose sizes the model then has.
        preset: without init, a name of `UNetConfig.preset`, or "tiny" or "tiny-hungarian"; None
            takes semantic.

    Returns:
        a `TrainConfig`, whose model has the names of the data's classes.

    Raises:
        ValueError: no such preset, no data set is found, it does not hold what the model trains
            on, or init is no U-Net.
    """
    model = start_of("unet", UNetConfig, init, preset)
    if model is None and preset in ("tiny", "tiny-hungarian"):
        model = UNetConfig.tiny(1, "semantic" if preset == "tiny" else "instance")
    elif model is None:
        model = UNetConfig.preset(preset or "semantic")
    return on_own_data("unet", model, root, layout, init, _EPOCHS, _PAPER)
