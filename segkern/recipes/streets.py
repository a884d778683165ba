"""Recipes of small models on scenes of streets: the comparison of Seq2Seg's paper in minutes.

All have the same batches, steps and optimizer, so that what differs is the model.
"""

from ..data import StreetsConfig
from ..data.streets import CLASSES
from ..models import SegmenterConfig, Seq2SegConfig, UNetConfig
from ..structures.labels import IMAGENET_MEAN, IMAGENET_STD
from ..training.config import TrainConfig

_SIZE = (128, 256)  # the paper's crops of Cityscapes
_NAMES = dict(enumerate(CLASSES))


def _streets(model) -> TrainConfig:
    """AdamW, which all of them bear from scratch."""
    return TrainConfig(
        steps=1200,
        batch_size=4,
        lr=1e-3,
        backbone_lr_factor=1.0,
        schedule="cosine",
        warmup=100,
        clip=1.0,
        evaluate_every=400,
        data=StreetsConfig(size=_SIZE),
        model=model,
    )


def streets_unet():
    """A U-Net of 16 channels.

    Returns:
        a `TrainConfig`.
    """
    return _streets(UNetConfig(len(_NAMES), image_size=_SIZE, channels=16, id2label=_NAMES))


def streets_seq2seg(skip: bool = True):
    """A Seq2Seg with the paper's six layers and patches of 16, a third as wide.

    Args:
        skip: the pixels come from the states of all layers, not from the last alone.

    Returns:
        a `TrainConfig`.
    """
    model = Seq2SegConfig(
        len(_NAMES),
        image_size=_SIZE,
        hidden_size=256,
        num_attention_heads=8,
        intermediate_size=1024,
        dropout=0.0,
        skip=skip,
        local_start=True,
        id2label=_NAMES,
    )
    return _streets(model)


def streets_seq2seg_no_skip():
    """`streets_seq2seg` without skip."""
    return streets_seq2seg(skip=False)


def streets_segmenter():
    """A Segmenter with a linear decoder, whose logits have the stride of its patches.

    Returns:
        a `TrainConfig`.
    """
    model = SegmenterConfig(
        len(_NAMES),
        _SIZE,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=8,
        drop_path_rate=0.0,
        decoder="linear",
        decoder_layers=1,
        local_start=True,
        id2label=_NAMES,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return _streets(model)
