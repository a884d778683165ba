"""Recipes of Segmenter: functions that return a `TrainConfig`."""

from dataclasses import replace
from pathlib import Path

from ..data import DigitsConfig
from ..models import SegmenterConfig, open_model
from ..structures.labels import DATASETS, IMAGENET_MEAN, IMAGENET_STD
from ..training.config import TrainConfig
from .own_data import maps_of_classes

# crop, epochs, batch, rate, window stride of Segmenter's paper
_SEGMENTER = {
    "ade20k": (512, 64, 8, 1e-3, 512),
    "pascal_context": (480, 256, 16, 1e-3, 320),
    "cityscapes": (768, 216, 8, 1e-2, 512),
}
_SEGMENTER["plain"] = _SEGMENTER["ade20k"]  # one's own images


def digits_segmenter(
    level: str = "easy", size: tuple[int, int] = (64, 64), decoder: str = "linear"
):
    """A small Segmenter on scenes of handwritten digits: minutes on two CPU cores.

    Args:
        level: "easy", "hard" or "mixed".
        size: height and width of a scene, multiples of 4.
        decoder: "linear", or "mask", which takes some more steps here.

    Returns:
        a `TrainConfig`. Muon, not the paper's SGD, and attention that starts local: the encoder
        is not pretrained (bench/README.md: what else was tried).
    """
    names = [str(k) for k in range(10)] + ["background"]
    model = SegmenterConfig(
        num_labels=len(names),
        image_size=size,
        patch_size=4,
        embed_dim=128,
        depth=3,
        num_heads=8,
        drop_path_rate=0.0,
        decoder=decoder,
        decoder_layers=1,
        decoder_dropout=0.0,
        local_start=True,
        id2label=dict(enumerate(names)),
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return TrainConfig(
        steps=2400,
        batch_size=2,
        lr=2e-3,
        backbone_lr_factor=1.0,
        optimizer="muon",
        momentum=0.95,
        schedule="cosine",
        warmup=100,
        clip=1.0,
        evaluate_every=1200,
        data=DigitsConfig(size=size, level=level, task="semantic"),
        model=model,
    )


def segmenter(
    preset: str | None = None,
    dataset: str = "ade20k",
    pretrained: bool = True,
    root: str | Path | None = None,
    init: str | Path | None = None,
):
    """The recipes of Segmenter's paper: SGD with momentum and a polynomial schedule.

    Args:
        preset: as `SegmenterConfig.preset` takes it; None takes the model of `init`, or
            Seg-S-Mask/16.
        dataset: "ade20k", "pascal_context" or "cityscapes"; "plain", one's own images, has
            ADE20K's settings.
        pretrained: start the encoder from timm's ImageNet weights, as the paper does.
        root: folder of the images (data.FolderConfig), in the layout of that name; of "plain" also
            shards. The model gets
            the names of its classes, and of "plain" their number. None: set `config.data.root`
            before training, or give `train` a `dataset`.
        init: model to start from, as `TrainConfig.init`.

    Returns:
        a `TrainConfig`.

    Raises:
        ValueError: no such model or data set, timm has no weights of it, there is no file of the
            classes' names, or init is no Segmenter.
    """
    if dataset not in _SEGMENTER:
        raise ValueError(
            f"segmenter: dataset must be one of {', '.join(_SEGMENTER)}, got {dataset!r}"
        )
    crop, epochs, batch, lr, stride = _SEGMENTER[dataset]
    facts = DATASETS["ade20k" if dataset == "plain" else dataset]
    labels, images = facts.labels["semantic"], facts.images
    named = dataset in ("cityscapes", "pascal_context")  # by the layout, without a file
    data, names = maps_of_classes(root, dataset, named)
    if names and dataset == "plain":
        labels = len(names)
    config = _model(init, labels) if init is not None and preset is None else None
    if config is None:
        preset = preset or "Seg-S-Mask/16"
        config = SegmenterConfig.preset(preset, labels)
        if dataset not in ("ade20k", "plain"):  # the preset's, where L has 640
            config.image_size, config.window_stride = (crop, crop), stride
            config.shortest_edge = {"pascal_context": 520, "cityscapes": 1024}[dataset]
        if dataset == "cityscapes":
            config.longest_edge = 2048
        config.backbone_pretrained = pretrained
        if dataset == "cityscapes" and preset.startswith("Seg-L"):
            config.decoder_layers = 1
    config = replace(config, id2label=dict(enumerate(names)) if names else None)
    return TrainConfig(
        output=Path("runs/segmenter"),
        init=init,
        steps=epochs * (images // batch),
        batch_size=batch,
        lr=lr,
        min_lr=1e-5,
        backbone_lr_factor=1.0,
        optimizer="sgd",
        momentum=0.9,
        weight_decay=0.0,
        schedule="poly",
        warmup=0,
        clip=0.0,
        checkpoint_every=images // batch,
        data=data,
        model=config,
    )


def _model(init: str | Path, labels: int) -> SegmenterConfig:
    """The config of the model to start from, for so many labels."""
    config = open_model(init).config
    if not isinstance(config, SegmenterConfig):
        raise ValueError(f"segmenter: init must be a segmenter, got a {config.kind}")
    return replace(config, num_labels=labels, id2label=None)
