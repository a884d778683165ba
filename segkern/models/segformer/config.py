"""The settings of SegFormer, and the presets of its paper."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...ops._checks import expect_integer
from ...structures.labels import DATASETS, IMAGENET_MEAN, IMAGENET_STD, Labels
from ...structures.logits import PixelLogits
from ...structures.processing import Processing
from ...structures.settings import InputConfig
from .. import manners

# channels and depths of the encoders, and width of the head
SIZES = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3), 768),
}
# crops of training, and window and stride of prediction where it has windows
_VIEWS = {"ade20k": (512, None, None), "cityscapes": (1024, 1024, 768)}
_STAGES = (
    *("hidden_sizes", "depths", "num_attention_heads", "sr_ratios", "mlp_ratios"),
    *("patch_sizes", "strides"),
)


@dataclass
class SegFormerConfig:
    """Everything that shapes a `SegFormer`. Names are those of Hugging Face where it has them.

    Attributes:
        num_labels: K, at least 1; training needs 2.
        hidden_sizes: channels of the four stages, multiples of their heads.
        depths: blocks of each stage.
        num_attention_heads: of each stage.
        sr_ratios: side of the squares of tokens that become one key, of each stage.
        mlp_ratios: width of the feed-forward networks over the channels, of each stage.
        patch_sizes: side of the patches of each stage, odd and above the stride: they overlap.
        strides: from one patch to the next, of each stage.
        decoder_hidden_size: width of the head.
        layer_norm_eps: of the norms of blocks and stages: 1e-5 in transformers, 1e-6 in the
            original code. Those of patches and keys have 1e-5 in both.
        drop_path_rate: rate of dropped residual branches of the encoder's last block, in [0, 1).
        classifier_dropout_prob: rate of channels that the head drops before its classifier.
        backbone: an encoder that was trained on ImageNet, as `SegFormer.load_encoder` takes it;
            None for none.
        backbone_pretrained: start the encoder from its weights (downloads them).
        image_size: (H, W) of training crops.
        window_size: side in pixels of the windows that large images are cut into; None takes
            images whole.
        window_stride: pixels from one window to the next; None for window_size.
        shortest_edge: pixels, to which an image's short side is resized for prediction; None for
            the short side of image_size.
        longest_edge: pixels, the most that the long side may get; None for 4 shortest_edge.
        id2label: name of each label.
        image_mean: of the pixels in [0, 1], red, green, blue; or of as many channels as the
            pictures have, which is then what the first convolution takes.
        image_std: likewise.
        do_reduce_labels: maps of labels on disk begin with 1, as ADE20K's do; kept for Hugging
            Face's processor alone, as data formats here know it themselves.
        processing: what else a checkpoint's preprocessor_config.json says (`Processing`); with a
            size of its own the edges must be None.
    """

    to_dict, to_json_string = manners.to_dict, manners.to_json_string
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses"]  # read by transformers' Trainer
    kind: ClassVar[str] = "segformer"
    tasks: ClassVar[tuple[str, ...]] = ("semantic",)
    logits: ClassVar[type] = PixelLogits

    num_labels: int = 150
    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_attention_heads: tuple[int, ...] = (1, 2, 5, 8)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    decoder_hidden_size: int = 256
    layer_norm_eps: float = 1e-5
    drop_path_rate: float = 0.1
    classifier_dropout_prob: float = 0.1
    backbone: str | None = None
    backbone_pretrained: bool = False
    image_size: tuple[int, int] = (512, 512)
    window_size: int | None = None
    window_stride: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    id2label: dict[int, str] | None = None
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    do_reduce_labels: bool = False
    processing: Processing = field(default_factory=Processing)

    def __post_init__(self):
        self.processing = Processing.of(self.processing)
        for name in (*_STAGES, "image_size"):
            values, count = tuple(getattr(self, name)), 2 if name == "image_size" else 4
            setattr(self, name, values)
            if len(values) != count:
                raise ValueError(
                    f"SegFormerConfig: {name} must have {count} numbers, got {values}"
                )
            for value in values:
                expect_integer(f"SegFormerConfig: {name}", value)
        followers = ("window_size", "window_stride", "shortest_edge", "longest_edge")
        for name in (
            *("num_labels", "decoder_hidden_size"),
            *(name for name in followers if getattr(self, name) is not None),
        ):
            expect_integer(f"SegFormerConfig: {name}", getattr(self, name))
        if any(c % h for c, h in zip(self.hidden_sizes, self.num_attention_heads)):
            raise ValueError(
                "SegFormerConfig: num_attention_heads must divide hidden_sizes "
                f"{self.hidden_sizes}, got {self.num_attention_heads}"
            )
        if any(p % 2 == 0 or p <= s for p, s in zip(self.patch_sizes, self.strides)):
            raise ValueError(
                f"SegFormerConfig: patch_sizes must be odd and above strides {self.strides}, "
                f"got {self.patch_sizes}"
            )
        for name in ("drop_path_rate", "classifier_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"SegFormerConfig: {name} must be in [0, 1), got {getattr(self, name)}"
                )
        if not self.layer_norm_eps > 0:
            raise ValueError(
                f"SegFormerConfig: layer_norm_eps must be above 0, got {self.layer_norm_eps}"
            )
        if self.window_size is None and self.window_stride is not None:
            raise ValueError(
                "SegFormerConfig: window_stride must be None without window_size, "
                f"got {self.window_stride}"
            )
        if self.window_size is not None and self.input.stride > self.window_size:
            raise ValueError(
                f"SegFormerConfig: window_stride must be <= window_size ({self.window_size}), "
                f"got {self.window_stride}"
            )
        if self.backbone_pretrained and not self.backbone:
            raise ValueError(
                "SegFormerConfig: backbone must name an encoder with backbone_pretrained, such as "
                f"nvidia/mit-b0, got {self.backbone!r}"
            )
        _ = self.input  # checks its own

    @property
    def labels(self) -> Labels:
        """Without instances: all are stuff."""
        return Labels(self.id2label, tuple(range(self.num_labels)))

    @property
    def input(self) -> InputConfig:
        """How images are taken: resized between the edges, whole or in windows. Their sides need
        only be multiples of a cell of the logits."""
        more = self.processing
        shortest, longest = self.shortest_edge, self.longest_edge
        if more.size is None and more.max_size is None:
            shortest = shortest or min(self.image_size)
            longest = longest or (4 * shortest if more.multiple is None else None)
        return more.input(
            InputConfig(
                self.image_mean,
                self.image_std,
                shortest,
                longest,
                self.strides[0],
                self.window_size,
                self.window_stride or self.window_size,
                self.image_size,
            )
        )

    @property
    def size_divisor(self) -> int:
        """Sides of a batch are padded to a multiple of it."""
        return self.strides[0]

    @classmethod
    def preset(cls, name: str, dataset: str = "ade20k"):
        """The models of the paper.

        Args:
            name: "b0" to "b5".
            dataset: "ade20k", whose images are taken whole and resized to 512 pixels (640 for b5),
                or "cityscapes", whose images are cut into windows of 1024 pixels.

        Returns:
            A `SegFormerConfig`; its `backbone` names NVIDIA's encoder, which is not loaded unless
            `backbone_pretrained` is set.

        Raises:
            ValueError: no such model or data set.
        """
        if name not in SIZES or dataset not in _VIEWS:
            raise ValueError(
                f"SegFormerConfig.preset: name must be one of {', '.join(SIZES)}, dataset one of "
                f"{', '.join(_VIEWS)}, got {name!r}, {dataset!r}"
            )
        hidden_sizes, depths, width = SIZES[name]
        facts, (crop, window, stride) = DATASETS[dataset], _VIEWS[dataset]
        crop = 640 if (name, dataset) == ("b5", "ade20k") else crop
        return cls(
            num_labels=facts.labels["semantic"],
            hidden_sizes=hidden_sizes,
            depths=depths,
            decoder_hidden_size=width,
            backbone=f"nvidia/mit-{name}",
            image_size=(crop, crop),
            window_size=window,
            window_stride=stride,
            shortest_edge=crop,
            longest_edge=2048,
            do_reduce_labels=dataset == "ade20k",
        )

    @classmethod
    def tiny(cls, num_labels: int):
        """A model for images of about 64 x 64 pixels that trains on a laptop: logits at half the
        image's size.

        Args:
            num_labels: K.

        Returns:
            A `SegFormerConfig`.
        """
        return cls(
            num_labels=num_labels,
            hidden_sizes=(32, 48, 64, 96),
            depths=(1, 1, 1, 1),
            num_attention_heads=(1, 2, 2, 4),
            sr_ratios=(8, 4, 2, 1),
            mlp_ratios=(2, 2, 2, 2),
            patch_sizes=(3, 3, 3, 3),
            strides=(2, 2, 2, 2),
            decoder_hidden_size=64,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
            image_size=(64, 64),
            longest_edge=128,
        )
