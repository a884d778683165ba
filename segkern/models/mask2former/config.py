"""The settings of Mask2Former, and the presets of its paper."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import ClassVar

from ...structures.labels import DATASETS, IMAGENET_MEAN, IMAGENET_STD, Labels
from ...structures.logits import QueryLogits
from ...structures.processing import Processing
from ...structures.settings import InputConfig
from .. import manners

_DATASETS = ("coco", "ade20k", "cityscapes")
_HOME = {"panoptic": "coco", "instance": "coco", "semantic": "ade20k"}
BACKBONES = {  # of the presets
    "resnet50": {"backbone": "resnet50", "backbone_options": {"freeze_norm": True}},
    "resnet101": {"backbone": "resnet101", "backbone_options": {"freeze_norm": True}},
    "swin_tiny": {"backbone": "swin_tiny", "drop_path_rate": 0.3},
    "swin_small": {"backbone": "swin_small", "drop_path_rate": 0.3},
    "swin_base": {"backbone": "swin_base", "drop_path_rate": 0.3},
    "swin_base_in21k": {"backbone": "swin_base", "drop_path_rate": 0.3},
    "swin_large": {"backbone": "swin_large", "drop_path_rate": 0.3},
}


@dataclass
class Mask2FormerConfig:
    """Everything that shapes a `Mask2Former` and its loss.

    Attributes:
        num_labels: K, at least 1; "no object" is not counted.
        backbone: "swin_tiny", "swin_small", "swin_base", "swin_large", "dinat_mini", "dinat_tiny",
            "dinat_small", "dinat_base", "dinat_large", "resnet_digits", or any timm model with
            four feature maps.
        backbone_pretrained: start from timm's ImageNet weights, which are downloaded; those of
            swin_base and swin_large are of ImageNet-22k.
        backbone_options: further arguments of the backbone, such as Swin's depths.
        drop_path_rate: rate of dropped residual branches of the last block, in [0, 1).
        num_queries: Q.
        hidden_dim: channels of the query decoder, a multiple of 32 and of `num_attention_heads`.
        feature_size: channels of the pixel decoder; must equal `hidden_dim`, as in every published
            model.
        mask_feature_size: M.
        encoder_layers: layers of the pixel decoder.
        decoder_layers: layers of the query decoder (Hugging Face counts one more).
        num_attention_heads: heads of both decoders.
        num_points_encoder: places that a head looks at in each level.
        encoder_feedforward_dim: width of the pixel decoder's feed-forward networks.
        dim_feedforward: width of the query decoder's feed-forward networks.
        dropout: probability in both decoders, on the outputs of attention and of the feed-forward
            networks.
        train_num_points: points of a mask in matching and loss.
        oversample_ratio: candidates drawn for each point of the loss, at least 1.
        importance_sample_ratio: share of the points that are the most uncertain candidates, in [0,
            1].
        class_weight: weight of the class loss and cost.
        mask_weight: weight of the masks' cross-entropy loss and cost.
        dice_weight: weight of the masks' dice loss and cost.
        no_object_weight: weight of "no object" in the class loss.
        id2label: name of each label.
        stuff: labels that have no instances.
        image_mean: of the pixels in [0, 1], red, green, blue; or of as many channels as the
            pictures have, which is then what the first convolution takes.
        image_std: likewise.
        shortest_edge: pixels, to which an image's short side is resized for prediction; None where
            `processing` has another size.
        longest_edge: pixels, the most that the long side may get; None for no limit.
        size_divisor: sides of a batch are padded to a multiple of it.
        processing: what else a checkpoint's preprocessor_config.json says (`Processing`).
    """

    to_dict, to_json_string = manners.to_dict, manners.to_json_string
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses"]  # read by transformers' Trainer
    kind: ClassVar[str] = "mask2former"
    tasks: ClassVar[tuple[str, ...]] = ("panoptic", "instance", "semantic")
    logits: ClassVar[type] = QueryLogits

    num_labels: int = 133
    backbone: str = "swin_tiny"
    backbone_pretrained: bool = False
    backbone_options: dict = field(default_factory=dict)
    drop_path_rate: float = 0.0
    num_queries: int = 100
    hidden_dim: int = 256
    feature_size: int = 256
    mask_feature_size: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 9
    num_attention_heads: int = 8
    num_points_encoder: int = 4
    encoder_feedforward_dim: int = 1024
    dim_feedforward: int = 2048
    dropout: float = 0.0
    train_num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
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
            "num_labels num_queries hidden_dim mask_feature_size decoder_layers "
            "num_attention_heads num_points_encoder train_num_points oversample_ratio size_divisor"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Mask2FormerConfig: {name} must be >= 1, got {getattr(self, name)}"
                )
        if self.hidden_dim % 32 or self.hidden_dim % self.num_attention_heads:
            raise ValueError(
                "Mask2FormerConfig: hidden_dim must be a multiple of 32 and of "
                f"num_attention_heads ({self.num_attention_heads}), got {self.hidden_dim}"
            )
        if self.feature_size != self.hidden_dim:
            raise ValueError(
                f"Mask2FormerConfig: feature_size must equal hidden_dim ({self.hidden_dim}), "
                f"got {self.feature_size}"
            )
        for name, top in (("importance_sample_ratio", 1), ("dropout", 1), ("drop_path_rate", 1)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(
                    f"Mask2FormerConfig: {name} must be in [0, {top}], got {getattr(self, name)}"
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
            backbone: "resnet50", "resnet101", "swin_tiny", "swin_small", "swin_base",
                "swin_base_in21k" or "swin_large".
            task: "panoptic", "instance" or "semantic".
            dataset: "coco", "ade20k" or "cityscapes"; None for COCO, or ADE20K where the task is
                semantic.

        Returns:
            A `Mask2FormerConfig`.

        Raises:
            ValueError: no such preset.
        """
        dataset = dataset or _HOME.get(task)
        known = [f"{name}/{t}" for name in _DATASETS for t in DATASETS[name].labels]
        if backbone not in BACKBONES or f"{dataset}/{task}" not in known:
            raise ValueError(
                f"Mask2FormerConfig.preset: backbone must be one of {', '.join(BACKBONES)}, "
                f"dataset and task one of {', '.join(known)}, "
                f"got {backbone}, {dataset}/{task}"
            )
        facts = DATASETS[dataset]
        shortest, longest = facts.edges
        return cls(
            num_labels=facts.labels[task],
            num_queries=200 if backbone == "swin_large" and task != "semantic" else 100,
            stuff=facts.stuff if task == "panoptic" else (),
            shortest_edge=shortest,
            longest_edge=longest,
            **deepcopy(BACKBONES[backbone]),
        )

    @classmethod
    def tiny(cls, num_labels: int):
        """A model for images of about 64 x 64 pixels that trains on a laptop: 0.8 million weights,
        masks at half the image's size.

        Args:
            num_labels: K.

        Returns:
            A `Mask2FormerConfig`.
        """
        return cls(
            num_labels=num_labels,
            backbone="resnet_digits",
            num_queries=8,
            hidden_dim=64,
            feature_size=64,
            mask_feature_size=64,
            encoder_layers=1,
            decoder_layers=3,
            encoder_feedforward_dim=256,
            dim_feedforward=256,
            train_num_points=512,
            class_weight=5.0,
            mask_weight=2.0,
            dice_weight=5.0,
            shortest_edge=64,
            longest_edge=128,
            size_divisor=16,
        )
