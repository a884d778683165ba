"""Recipes of Seq2Seg: functions that return a `TrainConfig`."""

from dataclasses import replace
from pathlib import Path

from ..data import DigitsConfig
from ..models import Seq2SegConfig
from ..training.config import TrainConfig
from .own_data import on_own_data, start_of

# Adam without decay at a rate that falls to a half and a tenth: the paper's, as are the batches
_PAPER = {"lr": 1e-4, "weight_decay": 0.0, "schedule": "thirds", "warmup": 0, "clip": 0.0}
_BATCH = {"semantic": 24, "instance": 64}
_EPOCHS = 45
_DIGITS = {
    "lr": 2e-3,
    "backbone_lr_factor": 1.0,
    "optimizer": "muon",
    "momentum": 0.95,
    "schedule": "cosine",
    "warmup": 100,
    "clip": 1.0,
}


def digits_seq2seg(level: str = "easy", size: tuple[int, int] = (64, 64)):
    """A small Seq2Seg that finds handwritten digits: three minutes on one core.

    Args:
        level: "easy", "hard" or "mixed".
        size: height and width of a scene, multiples of 8.

    Returns:
        a `TrainConfig`. Not the paper's: classes from the patches under masks, focal loss beside
        dice, Muon and attention that starts local, to learn from a small part of its 720,000
        scenes (docs/seq2seg.md: how far).
    """
    model = replace(
        Seq2SegConfig.tiny(10),
        image_size=size,
        class_from="mask",
        true_mask_weight=1.0,
        mask_weight=20.0,
        no_object_weight=0.1,
    )
    model.id2label = {k: str(k) for k in range(10)}
    return TrainConfig(
        output=Path("runs/digits-seq2seg"),
        steps=1050,
        batch_size=16,
        evaluate_every=525,
        best_metric="class_accuracy",
        threshold=0.5,
        data=DigitsConfig(size=size, level=level, task="instance"),
        model=model,
        **_DIGITS,
    )


def digits_seq2seg_semantic(level: str = "easy", size: tuple[int, int] = (64, 64)):
    """A small Seq2Seg that gives each pixel of scenes of digits a class: two and a half minutes on
    one core.

    Args:
        level: "easy", "hard" or "mixed".
        size: height and width of a scene, multiples of 8.

    Returns:
        a `TrainConfig`. Patches of 8 pixels, a quarter as many as of 4, and a higher rate, as
        each step sees 16 scenes.
    """
    names = [str(k) for k in range(10)] + ["background"]
    model = replace(
        Seq2SegConfig.tiny(11, "semantic"), image_size=size, patch_size=8, num_hidden_layers=3
    )
    model.id2label = dict(enumerate(names))
    return TrainConfig(
        output=Path("runs/digits-seq2seg-semantic"),
        steps=1100,
        batch_size=16,
        evaluate_every=550,
        data=DigitsConfig(size=size, level=level, task="semantic"),
        model=model,
        **(_DIGITS | {"lr": 4e-3}),
    )


def seq2seg(
    root: str | Path,
    layout: str | None = None,
    init: str | Path | None = None,
    preset: str | None = None,
):
    """The paper's recipe on one's own pictures: Adam, 45 passes in batches of 24 (64 of objects),
    at least 1,000 steps.

    Args:
        root: folder of a data set, with maps of classes for "semantic", else with objects.
        layout: of a folder of maps of classes (`FolderConfig`); None finds the format.
        init: model to start from, as `TrainConfig.init`, whose sizes the model then has.
        preset: without init, a name of `Seq2SegConfig.preset`, or "tiny" or "tiny-instance"; None
            takes semantic.

    Returns:
        a `TrainConfig`, whose model has the names of the data's classes.

    Raises:
        ValueError: no such preset, no data set is found, it does not hold what the model trains
            on, or init is no Seq2Seg.
    """
    model = start_of("seq2seg", Seq2SegConfig, init, preset)
    if model is None and preset in ("tiny", "tiny-instance"):
        model = Seq2SegConfig.tiny(1, "semantic" if preset == "tiny" else "instance")
    elif model is None:
        model = Seq2SegConfig.preset(preset or "semantic")
    settings = _PAPER | {"batch_size": _BATCH[model.task_head]}
    return on_own_data("seq2seg", model, root, layout, init, _EPOCHS, settings)
