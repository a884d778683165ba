"""The settings of MaskFormer, and the presets of its paper."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import ClassVar

from ...structures.labels import DATASETS, IMAGENET_MEAN, IMAGENET_STD, Labels
from ...structures.logits import QueryLogits
from ...structures.processing import Processing
from ...structures.settings import InputConfig
from .. import manners
from ..mask2former.config import BACKBONES as _BACKBONES

_DATASETS = ("coco", "ade20k", "cityscapes")
_HOME = {"panoptic": "coco", "instance": "coco", "semantic": "ade20k"}
BACKBONES = {name: v for name, v in _BACKBONES.items() if name != "swin_base_in21k"}


@dataclass
class MaskFormerConfig:
    """Everything that shapes a `MaskFormer` and its loss.

    Attributes:
        num_labels: K, at least 1; "no object" is not counted.
        backbone: "swin_tiny", "swin_small", "swin_base", "swin_large", "resnet_digits", or any
            timm model with four feature maps.
        backbone_pretrained: start from timm's ImageNet weights, which are downloaded; those of
            swin_base and swin_large are of ImageNet-22k.
        backbone_options: further arguments of the backbone, such as Swin's depths.
        drop_path_rate: rate of dropped residual branches of the last block, in [0, 1).
        num_queries: Q.
        hidden_dim: channels of the query decoder, a multiple of 4 and of `num_attention_heads`.
        fpn_feature_size: channels of the pixel decoder, a multiple of 32.
        mask_feature_size: M.
        decoder_layers: layers of the query decoder.
        num_attention_heads: heads of the query decoder.
        dim_feedforward: width of the query decoder's feed-forward networks.
        dropout: in the query decoder, in [0, 1].
        use_auxiliary_loss: whether the prediction after every layer of the query decoder is
            trained, as in the paper, or the last alone.
        cross_entropy_weight, mask_weight, dice_weight: of the class, focal and dice loss. In
            matching a class weighs 1, the others as here.
        no_object_weight: of "no object" in the class loss, where a label weighs 1.
        id2label: names of the labels.
        stuff: labels that have no instances; () where all are things.
        image_mean: of each channel, on the scale from 0 to 1; as many as the pictures have.
        image_std: likewise.
        shortest_edge: pixels, to which an image's short side is resized for prediction; None where
            `processing` has another size.
        longest_edge: pixels, the most that the long side may get; None for no limit.
        size_divisor: sides of a batch are padded to a multiple of it.
        processing: what else a checkpoint's preprocessor_config.json says (`Processing`).
    """

    to_dict, to_json_string = manners.to_dict, manners.to_json_string
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses"]  # read by transformers' Trainer
    kind: ClassVar[str] = "maskformer"
    tasks: ClassVar[tuple[str, ...]] = ("panoptic", "instance", "semantic")
    logits: ClassVar[type] = QueryLogits

    num_labels: int = 133
    backbone: str = "swin_tiny"
    backbone_pretrained: bool = False
    backbone_options: dict = field(default_factory=dict)
    drop_path_rate: float = 0.0
    num_queries: int = 100
    hidden_dim: int = 256
    fpn_feature_size: int = 256
    mask_feature_size: int = 256
    decoder_layers: int = 6
    num_attention_heads: int = 8
    dim_feedforward: int = 2048
    dropout: float = 0.1
    use_auxiliary_loss: bool = True
    cross_entropy_weight: float = 1.0
    mask_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    id2label: dict[int, str] | None = None
    stuff: tuple[int, ...] = ()
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    shortest_edge: int | None = 800
    longest_edge: int | None = 1333
    size_divisor: int = 32
    processing: Processing = field(default_factory=Processing)

    def __post_init__(self):
        self.processing = Processing.of(self.processing)
        positive = (
            "num_labels num_queries hidden_dim fpn_feature_size mask_feature_size decoder_layers "
            "num_attention_heads dim_feedforward size_divisor"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(
                    f"MaskFormerConfig: {name} must be >= 1, got {getattr(self, name)}"
                )
        if self.hidden_dim % 4 or self.hidden_dim % self.num_attention_heads:
            raise ValueError(
                "MaskFormerConfig: hidden_dim must be a multiple of 4 and of "
                f"num_attention_heads ({self.num_attention_heads}), got {self.hidden_dim}"
            )
        if self.fpn_feature_size % 32:
            raise ValueError(
                "MaskFormerConfig: fpn_feature_size must be a multiple of 32, "
                f"got {self.fpn_feature_size}"
            )
        for name in ("dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"MaskFormerConfig: {name} must be in [0, 1], got {getattr(self, name)}"
                )
        for name in ("cross_entropy_weight", "mask_weight", "dice_weight", "no_object_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"MaskFormerConfig: {name} must be >= 0, got {getattr(self, name)}"
                )
        _ = self.input  # checks its own

    @property
    def labels(self) -> Labels:
        """Names, and which are stuff."""
        return Labels(self.id2label, tuple(self.stuff))

    @property
    def input(self) -> InputConfig:
        """How images are taken: whole, resized between the edges or as `processing` says."""
        return self.processing.input(
            InputConfig(
                self.image_mean,
                self.image_std,
                self.shortest_edge,
                self.longest_edge,
                self.size_divisor,
            )
        )

    @classmethod
    def preset(cls, backbone: str, task: str = "panoptic", dataset: str | None = None):
        """The configurations of the paper.

        Args:
            backbone: "resnet50", "resnet101", "swin_tiny", "swin_small", "swin_base" or
                "swin_large".
            task: "panoptic", "instance" or "semantic".
            dataset: "coco", "ade20k" or "cityscapes"; None for COCO, or ADE20K where the task is
                semantic.

        Returns:
            A `MaskFormerConfig`.

        Raises:
            ValueError: no such preset.
        """
        dataset = dataset or _HOME.get(task)
        known = [f"{name}/{t}" for name in _DATASETS for t in DATASETS[name].labels]
        if backbone not in BACKBONES or f"{dataset}/{task}" not in known:
            raise ValueError(
                f"MaskFormerConfig.preset: backbone must be one of {', '.join(BACKBONES)}, "
                f"dataset and task one of {', '.join(known)}, got {backbone}, {dataset}/{task}"
            )
        facts = DATASETS[dataset]
        shortest, longest = facts.edges
        if dataset == "ade20k" and backbone in ("swin_base", "swin_large"):
            shortest, longest = 640, 2560
        return cls(
            num_labels=facts.labels[task],
            stuff=facts.stuff if task == "panoptic" else (),
            shortest_edge=shortest,
            longest_edge=longest,
            **deepcopy(BACKBONES[backbone]),
        )

    @classmethod
    def tiny(cls, num_labels: int):
        """A model for images of about 64 x 64 pixels that trains on a laptop, with masks at half
        the image's size.

        Args:
            num_labels: K.

        Returns:
            A `MaskFormerConfig`.
        """
        return cls(
            num_labels=num_labels,
            backbone="resnet_digits",
            num_queries=8,
            hidden_dim=64,
            fpn_feature_size=64,
            mask_feature_size=64,
            decoder_layers=3,
            dim_feedforward=256,
            dropout=0.0,
            shortest_edge=64,
            longest_edge=128,
            size_divisor=16,
        )
