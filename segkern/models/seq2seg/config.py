"""The settings of Seq2Seg, and the presets of its paper."""

from dataclasses import dataclass
from typing import ClassVar

from ...structures.labels import IMAGENET_MEAN, IMAGENET_STD
from .. import manners, two_heads

MASKS = ("linear", "attention", "fine")


@dataclass
class Seq2SegConfig:
    """Everything that shapes a `Seq2Seg` and its loss.

    Attributes:
        num_labels: K, at least 1; "no object" is not counted.
        task_head: "semantic" for class logits of pixels, "instance" for objects with a mask each.
        image_size: (H, W) of training images, for which position embeddings are stored; multiples
            of patch_size.
        patch_size: p, in pixels.
        hidden_size: D.
        num_hidden_layers: blocks of the encoder.
        num_attention_heads: that divide D.
        intermediate_size: width of the feed-forward networks.
        dropout: probability in the encoder, in [0, 1).
        skip: semantic: the pixels come from the sum of the states of all layers, the embeddings'
            too, and not from the last alone.
        local_start: start with positions of waves and attention to the patches around each
            (nn.vit.start_locally), which learns much sooner; queries with those of places that are
            spread over the image (start_at_places).
        num_queries: instance: Q; None for 6. None for semantic.
        mask: instance: "linear", a layer from the query's state to a mask of the whole image;
            "attention", how much the query asks for each patch, a mask of stride p; "fine", the
            query's embedding times features of stride 4 that are made of the patches' states.
        mask_size: (h, w) of the linear layer's masks.
        mask_channels: instance: of the features of "fine".
        class_from: instance: "query", a query's class comes from its state alone; "mask", from the
            states of the patches under its own mask, too.
        class_weight: weight of the class loss and cost.
        mask_weight: weight of the masks' focal loss and cost; 0 for none.
        dice_weight: weight of the masks' dice loss and cost.
        no_object_weight: weight of "no object" in the class loss.
        true_mask_weight: instance, with class_from "mask": weight of a further loss in training,
            of the classes that patches under the true masks give, whatever masks the queries have;
            0 for none.
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
    kind: ClassVar[str] = "seq2seg"
    default_queries: ClassVar[int] = 6
    match_stride: ClassVar[int] = 1  # over that of the masks, which is large already

    num_labels: int = 19
    task_head: str = "semantic"
    image_size: tuple[int, int] = (128, 256)
    patch_size: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    dropout: float = 0.1
    skip: bool = True
    local_start: bool = False
    num_queries: int | None = None
    mask: str = "linear"
    mask_size: tuple[int, int] = (16, 16)
    mask_channels: int = 64
    class_from: str = "query"
    class_weight: float = 0.1
    mask_weight: float = 0.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.5
    true_mask_weight: float = 0.0
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
        two_heads.check_settings(
            self,
            "patch_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
            "mask_channels",
        )
        self.mask_size = tuple(self.mask_size)
        if len(self.mask_size) != 2 or min(self.mask_size) < 1:
            raise ValueError(
                "Seq2SegConfig: mask_size must be a height and width of at least 1, "
                f"got {self.mask_size}"
            )
        if self.mask not in MASKS:
            raise ValueError(
                f"Seq2SegConfig: mask must be one of {', '.join(MASKS)}, got {self.mask!r}"
            )
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ValueError(
                f"Seq2SegConfig: hidden_size must be a multiple of num_attention_heads ({heads}), "
                f"got {self.hidden_size}"
            )
        if self.local_start and self.hidden_size // heads < 8:
            raise ValueError(
                "Seq2SegConfig: hidden_size must be at least 8 a head with local_start, "
                f"got {self.hidden_size} for {heads} heads"
            )
        if self.task_head == "instance" and self.mask == "fine" and self.patch_size % 4:
            raise ValueError(
                "Seq2SegConfig: patch_size must be a multiple of 4 with mask='fine', "
                f"got {self.patch_size}"
            )

    @property
    def size_divisor(self) -> int:
        """Sides of a batch are padded to a multiple of it."""
        return self.patch_size

    @classmethod
    def preset(cls, name: str, num_labels: int | None = None):
        """The models of the paper.

        Args:
            name: "semantic" (Cityscapes at 128 x 256), "semantic-no-skip", or "instance" (digits
                at 64 x 64).
            num_labels: K; None for 19, of "instance" 10.

        Returns:
            A `Seq2SegConfig`.

        Raises:
            ValueError: no such model.
        """
        if name in ("semantic", "semantic-no-skip"):
            return cls(num_labels or 19, skip=name == "semantic")
        if name == "instance":
            return cls(
                num_labels or 10,
                "instance",
                image_size=(64, 64),
                patch_size=8,
                hidden_size=512,
                num_hidden_layers=4,
                num_attention_heads=8,
                intermediate_size=2048,
            )
        raise ValueError(
            "Seq2SegConfig.preset: name must be semantic, semantic-no-skip or instance, "
            f"got {name!r}"
        )

    @classmethod
    def tiny(cls, num_labels: int, task_head: str = "instance"):
        """A model for images of about 64 x 64 pixels that trains on a laptop.

        Args:
            num_labels: K.
            task_head: "semantic" or "instance".

        Returns:
            A `Seq2SegConfig`.
        """
        return cls(
            num_labels,
            task_head,
            image_size=(64, 64),
            patch_size=8 if task_head == "instance" else 4,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=8,
            intermediate_size=512,
            dropout=0.0,
            local_start=True,
            mask="fine",
            class_weight=1.0,
        )
