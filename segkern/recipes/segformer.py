"""Recipes of SegFormer: functions that return a `TrainConfig`."""

from dataclasses import replace
from pathlib import Path

from ..data import DigitsConfig
from ..models import SegFormerConfig, open_model
from ..training.config import TrainConfig
from .own_data import maps_of_classes

_BATCH = {"ade20k": 16, "cityscapes": 8, "plain": 16}  # of the paper; plain: one's own images


def digits_segformer(level: str = "easy", size: tuple[int, int] = (64, 64)):
    """A small SegFormer on scenes of handwritten digits: minutes on two CPU cores.

    Args:
        level: "easy", "hard" or "mixed".
        size: height and width of a scene, multiples of 2, at least 16.

    Returns:
        a `TrainConfig`.
    """
    names = [str(k) for k in range(10)] + ["background"]
    model = replace(
        SegFormerConfig.tiny(len(names)), image_size=size, id2label=dict(enumerate(names))
    )
    return TrainConfig(
        steps=1800,
        batch_size=4,
        lr=2e-3,
        backbone_lr_factor=1.0,
        schedule="cosine",
        warmup=50,
        clip=1.0,
        evaluate_every=900,
        data=DigitsConfig(size=size, level=level, task="semantic"),
        model=model,
    )


def segformer(
    preset: str | None = None,
    dataset: str = "ade20k",
    pretrained: bool = True,
    root: str | Path | None = None,
    init: str | Path | None = None,
):
    """The recipe of SegFormer's paper: AdamW, a short rise of the rate and a straight fall.

    Args:
        preset: "b0" to "b5"; None takes the model of `init`, or b0.
        dataset: "ade20k" or "cityscapes"; "plain", one's own images, has ADE20K's settings.
        pretrained: start the encoder from NVIDIA's ImageNet weights, as the paper does.
        root: folder of the images (data.FolderConfig), in the layout of that name; of "plain" also
            shards. The model gets
            the names of its classes, and of "plain" their number. None: set `config.data.root`
            before training, or give `train` a `dataset`.
        init: model to start from, as `TrainConfig.init`.

    Returns:
        a `TrainConfig`.

    Raises:
        ValueError: no such model or data set, there is no file of the classes' names, or init is
            no SegFormer.
    """
    if dataset not in _BATCH:
        raise ValueError(f"segformer: dataset must be one of {', '.join(_BATCH)}, got {dataset!r}")
    known = SegFormerConfig.preset(preset or "b0", "ade20k" if dataset == "plain" else dataset)
    labels = known.num_labels
    named = dataset == "cityscapes"  # by the layout, without a file
    data, names = maps_of_classes(root, dataset, named)
    if names and dataset == "plain":
        labels = len(names)
    model = known
    if init is not None and preset is None:
        model = open_model(init).config
        if not isinstance(model, SegFormerConfig):
            raise ValueError(f"segformer: init must be a segformer, got a {model.kind}")
    elif init is None:
        model.backbone_pretrained = pretrained
    model = replace(
        model,
        num_labels=labels,
        id2label=dict(enumerate(names)) if names else None,
        do_reduce_labels=dataset == "ade20k",
    )
    return TrainConfig(
        output=Path("runs/segformer"),
        init=init,
        steps=160_000,
        batch_size=_BATCH[dataset],
        lr=6e-4,
        backbone_lr_factor=0.1,
        weight_decay=0.01,
        schedule="poly",
        power=1.0,
        warmup=1500,
        clip=0.0,
        checkpoint_every=4000,
        data=data,
        model=model,
    )
