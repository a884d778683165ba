"""Recipes of EoMT: functions that return a `TrainConfig`."""

from dataclasses import replace
from pathlib import Path

from ..data import DigitsConfig
from ..models import EoMTConfig
from ..models.eomt.config import SIZES
from ..training.config import TrainConfig
from .mask2former import DIGITS_THRESHOLD
from .own_data import SMALL, small_views, start_of, with_objects

_EPOCHS = 12  # the paper's of the large model on COCO
_LEAST = 2000  # steps
_PAPER = {
    "batch_size": 16,
    "backbone_lr_factor": 1.0,
    "backbone_level_decay": 0.8,
    "weight_decay": 0.05,
    "schedule": "poly",
    "clip": 0.01,
}
# rate, steps in which heads and then the encoder warm up
_RATES = {"dinov2": (1e-4, 500, 1000), "dinov3": (2e-4, 2000, 3000)}
_DIGITS = {
    "batch_size": 8,
    "lr": 2e-3,
    "backbone_lr_factor": 1.0,
    "optimizer": "muon",
    "momentum": 0.95,
    "schedule": "cosine",
    "warmup": 100,
    "clip": 1.0,
}


def digits_eomt(level: str = "mixed", task: str = "panoptic", size: int = 64):
    """A small EoMT on scenes of handwritten digits: minutes on two CPU cores.

    Args:
        level: "easy", "hard" or "mixed".
        task: "panoptic", "instance" or "semantic".
        size: side of a scene, a multiple of 4.

    Returns:
        a `TrainConfig`. Muon, not the paper's AdamW, and attention that starts local: the encoder
        is not pretrained.
    """
    names = [str(k) for k in range(10)] + ["background"] * (task != "instance")
    model = replace(
        EoMTConfig.tiny(len(names)),
        image_size=size,
        id2label=dict(enumerate(names)),
        stuff=() if task == "instance" else (10,),
    )
    return TrainConfig(
        steps=1800,
        evaluate_every=600,
        threshold=DIGITS_THRESHOLD,
        data=DigitsConfig(size=(size, size), level=level, task=task),
        model=model,
        **_DIGITS,
    )


def eomt(
    root: str | Path,
    task: str | None = None,
    init: str | Path | None = None,
    preset: str | None = None,
    encoder: str = "dinov2",
):
    """The paper's recipe on one's own pictures with objects: AdamW with a rate that falls from
    block to block, heads that warm up before the encoder, large-scale jitter, masks of attention
    that fade; 12 passes in batches of 16, at least 2,000 steps.

    Models for small images, as the preset "tiny" is, get views of their size and the rates of the
    digits recipe.

    Args:
        root: folder of a data set, in one of the formats that `data.find_format` knows and that
            have objects or maps of classes.
        task: "instance", "panoptic" or "semantic", where the folder holds several; None takes
            what it holds, panoptic first. Semantic models look through windows.
        init: model to start from, as `TrainConfig.init`, whose sizes the model then has; None
            starts from the encoder's weights of timm.
        preset: without init, "tiny" or a size of `EoMTConfig.preset`; None takes large.
        encoder: of the preset, "dinov2" or "dinov3".

    Returns:
        a `TrainConfig`, whose model has the names of the data's classes.

    Raises:
        ValueError: no data set is found, it holds no objects or nothing for the task, no such
            preset, or init is no EoMT.
    """
    data, pictures = with_objects("eomt", root, task)
    model = replace(
        _model(init, preset, encoder, data.task),
        num_labels=len(pictures.classes),
        id2label=dict(enumerate(pictures.classes)),
        stuff=tuple(pictures.stuff),
    )
    steps = max(_LEAST, _EPOCHS * len(pictures) // _PAPER["batch_size"])
    if model.image_size < SMALL:
        data = small_views(data, (model.image_size,) * 2)
        settings = _DIGITS
    else:
        lr, warmup, later = _RATES[model.encoder]
        shorter = {"warmup": min(warmup, steps // 20), "backbone_warmup": min(later, steps // 10)}
        settings = _PAPER | {"lr": lr} | shorter
    return TrainConfig(
        output=Path("runs/eomt"),
        init=init,
        steps=steps,
        checkpoint_every=min(5000, steps // 10),
        evaluate_every=steps // 10,
        data=data,
        model=model,
        **settings,
    )


def _model(init: str | Path | None, preset: str | None, encoder: str, task: str) -> EoMTConfig:
    """The config whose sizes the model has."""
    if config := start_of("eomt", EoMTConfig, init, preset):
        return config
    known = ("tiny", *SIZES)
    if preset not in (None, *known):
        raise ValueError(f"eomt: preset must be one of {', '.join(known)}, got {preset!r}")
    if preset == "tiny":
        return replace(EoMTConfig.tiny(1), windows=task == "semantic")
    config = EoMTConfig.preset(preset or "large", task, encoder=encoder)
    return replace(config, backbone_pretrained=True)
