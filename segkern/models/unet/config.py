"""The settings of U-Net, and the presets of the paper that it is compared in."""

from dataclasses import dataclass
from typing import ClassVar

from ...structures.labels import IMAGENET_MEAN, IMAGENET_STD
from .. import manners, two_heads


@dataclass
class UNetConfig:
    """Everything that shapes a `UNet` and its loss.

    Attributes:
        num_labels: K, at least 1; "no object" is not counted.
        task_head: "semantic" for class logits of pixels, "instance" for objects with a mask each,
            the Hungarian U-Net.
        image_size: (H, W) of training images, multiples of 2^depth.
        channels: C, of the finest maps; each coarser level has twice as many.
        depth: how many times the maps are halved.
        bert_layers: blocks of BERT's encoder between encoder and decoder; 0 for none.
        num_attention_heads: of these, that divide 2^depth C.
        dropout: probability in them, in [0, 1).
        num_queries: instance: Q, the output channels; None for 100. None for semantic.
        class_from: instance: "query", a channel's class comes from the mean over the coarsest map;
            "mask", from its states under the channel's own mask, too.
        class_weight: weight of the class loss and cost.
        mask_weight: weight of the masks' focal loss and cost; 0 for none.
        dice_weight: weight of the masks' dice loss and cost.
        no_object_weight: weight of "no object" in the class loss.
        true_mask_weight: instance, with class_from "mask": weight of a further loss in training,
            of the classes that the states under the true masks give; 0 for none.
        match_stride: masks are matched at this stride, in pixels.
        shortest_edge: pixels, to which an image's short side is resized for prediction; None for
            the short side of image_size.
        longest_edge: pixels, the most that the long side may get; None for 4 shortest_edge.
        id2label: name of each label.
        stuff: instance: labels that have no instances.
        image_mean: of the pixels in [0, 1], red, green, blue; or of as many channels as the
            pictures have, which is then what the first convolution takes.
        image_std: likewise.
        backbone_pretrained: False: there are no weights to download.
    """

    to_dict, to_json_string = manners.to_dict, manners.to_json_string
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses"]  # read by transformers' Trainer
    kind: ClassVar[str] = "unet"
    default_queries: ClassVar[int] = 100

    num_labels: int = 19
    task_head: str = "semantic"
    image_size: tuple[int, int] = (128, 256)
    channels: int = 32
    depth: int = 4
    bert_layers: int = 0
    num_attention_heads: int = 8
    dropout: float = 0.1
    num_queries: int | None = None
    class_from: str = "query"
    class_weight: float = 1.0
    mask_weight: float = 0.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    true_mask_weight: float = 0.0
    match_stride: int = 4
    shortest_edge: int | None = None
    longest_edge: int | None = None
    id2label: dict[int, str] | None = None
    stuff: tuple[int, ...] = ()
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    backbone_pretrained: bool = False

    tasks = property(two_heads.tasks)
    logits = property(two_heads.logits)
    labels = property(two_heads.labels)
    input = property(two_heads.input_of)

    def __post_init__(self):
        two_heads.check_settings(self, "channels depth num_attention_heads match_stride")
        if not isinstance(self.bert_layers, int) or self.bert_layers < 0:
            raise ValueError(
                f"UNetConfig: bert_layers must be an integer of at least 0, got {self.bert_layers}"
            )
        coarsest = self.channels << self.depth
        if self.bert_layers and coarsest % self.num_attention_heads:
            raise ValueError(
                "UNetConfig: num_attention_heads must divide the channels of the coarsest maps "
                f"({coarsest}), got {self.num_attention_heads}"
            )

    @property
    def size_divisor(self) -> int:
        """Sides of a batch are padded to a multiple of it."""
        return 1 << self.depth

    @classmethod
    def preset(cls, name: str, num_labels: int = 19):
        """The models of the paper, for Cityscapes at 128 x 256.

        Args:
            name: "semantic", "hungarian", or either with "-bert" and a number of transformer
                layers, as "semantic-bert2".
            num_labels: K.

        Returns:
            A `UNetConfig`.

        Raises:
            ValueError: no such model.
        """
        head, bert, layers = name.partition("-bert")
        good = layers.isdecimal() and int(layers) > 0 if bert else True
        if head not in ("semantic", "hungarian") or not good:
            raise ValueError(
                "UNetConfig.preset: name must be semantic or hungarian, or either with -bertN, N "
                f"layers, behind it, got {name!r}"
            )
        kind = "semantic" if head == "semantic" else "instance"
        return cls(num_labels, kind, bert_layers=int(layers or 0))

    @classmethod
    def tiny(cls, num_labels: int, task_head: str = "semantic"):
        """A model for images of about 64 x 64 pixels that trains on a laptop.

        Args:
            num_labels: K.
            task_head: "semantic" or "instance".

        Returns:
            A `UNetConfig`.
        """
        return cls(num_labels, task_head, (64, 64), channels=8, dropout=0.0, num_queries=6)
