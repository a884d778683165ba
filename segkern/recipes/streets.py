"""Recipes of small models on scenes of streets: the comparison of Seq2Seg's paper in minutes.

At half the paper's size and with patches half as large the transformers have its 8 x 16 patches.
All see the same scenes in the same batches and order; the transformers learn with Muon, without
which they would need far more of them.
"""

from ..data import StreetsConfig
from ..data.streets import CLASSES
from ..models import SegmenterConfig, Seq2SegConfig, UNetConfig
from ..structures.labels import IMAGENET_MEAN, IMAGENET_STD
from ..training.config import TrainConfig

SIZE = (64, 128)
_NAMES = dict(enumerate(CLASSES))
_MUON = {"optimizer": "muon", "momentum": 0.95, "lr": 2e-3}


def streets_unet(size: tuple[int, int] = SIZE):
    """A U-Net of 16 channels, which bears a high rate with AdamW and is slow at a lower one.

    Args:
        size: height and width of a scene, multiples of 16.

    Returns:
        a `TrainConfig`.
    """
    model = UNetConfig(len(_NAMES), image_size=size, channels=16, id2label=_NAMES)
    return _streets(model, size, lr=1e-2)


def streets_seq2seg(size: tuple[int, int] = SIZE, skip: bool = True):
    """A Seq2Seg of the paper's six layers, a quarter as wide.

    Args:
        size: height and width of a scene, multiples of 8.
        skip: the pixels come from the states of all layers, not from the last alone.

    Returns:
        a `TrainConfig`.
    """
    model = Seq2SegConfig(
        len(_NAMES),
        image_size=size,
        patch_size=8,
        hidden_size=192,
        num_attention_heads=6,
        intermediate_size=768,
        dropout=0.0,
        skip=skip,
        local_start=True,
        id2label=_NAMES,
    )
    return _streets(model, size, **_MUON)


def streets_seq2seg_no_skip(size: tuple[int, int] = SIZE):
    """`streets_seq2seg` without skip."""
    return streets_seq2seg(size, skip=False)


def streets_segmenter(size: tuple[int, int] = SIZE):
    """A Segmenter with a linear decoder, whose logits have the stride of its patches.

    Args:
        size: height and width of a scene, multiples of 8.

    Returns:
        a `TrainConfig`.
    """
    model = SegmenterConfig(
        len(_NAMES),
        size,
        patch_size=8,
        embed_dim=192,
        depth=6,
        num_heads=6,
        drop_path_rate=0.0,
        decoder="linear",
        local_start=True,
        id2label=_NAMES,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return _streets(model, size, **_MUON)


def _streets(model, size: tuple[int, int], **changes) -> TrainConfig:
    return TrainConfig(
        steps=900,
        batch_size=8,
        backbone_lr_factor=1.0,
        schedule="cosine",
        warmup=50,
        clip=1.0,
        evaluate_every=300,
        data=StreetsConfig(size=size),
        model=model,
        **changes,
    )
