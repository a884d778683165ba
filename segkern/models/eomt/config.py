"""The settings of EoMT, and the presets of its paper."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...ops._checks import expect_integer
from ...structures.labels import DATASETS, IMAGENET_MEAN, IMAGENET_STD, Labels
from ...structures.logits import QueryLogits
from ...structures.processing import Processing
from ...structures.settings import InputConfig
from .. import manners

_TASKS = ("panoptic", "instance", "semantic")
_SIZES = {  # hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, num_blocks
    "small": (384, 12, 6, 1536, 3),
    "base": (768, 12, 12, 3072, 3),
    "large": (1024, 24, 16, 4096, 4),
    "giant": (1536, 40, 24, 4096, 5),
}
SIZES = tuple(_SIZES)  # of the presets
_GATED = ("giant",)
_TIMM = {  # with the weights that the paper starts from
    "dinov2": "vit_{}_patch14_reg4_dinov2.lvd142m",
    "dinov3": "vit_{}_patch16_dinov3.lvd1689m",
}
_HOME = {"panoptic": ("coco", 640), "instance": ("coco", 640), "semantic": ("ade20k", 512)}


@dataclass
class EoMTConfig:
    """Everything that shapes an `EoMT` and its loss.

    Attributes:
        num_labels: K, at least 1; "no object" is not counted.
        encoder: "dinov2", with learned positions, or "dinov3", whose positions turn queries and
            keys.
        backbone: timm's name of an encoder of this shape; None for none.
        backbone_pretrained: start from its weights, which are downloaded.
        local_start: without them, start the first half of the encoder with attention to the
            patches around each and positions of waves (nn.vit.start_locally), which learns much
            sooner; of "dinov2".
        image_size: S, side in pixels of the squares that the encoder takes; a multiple of
            patch_size.
        patch_size: p, in pixels.
        windows: semantic alone: an image's short side is resized to S and it is cut along its
            long side into squares that overlap evenly; else its long side is resized to S and it
            is padded with black to the right and below.
        hidden_size: D, a multiple of num_attention_heads.
        num_hidden_layers: blocks of the encoder.
        num_attention_heads: of a block.
        intermediate_size: hidden channels of the feed-forward networks.
        gated: the feed-forward networks are gated, by silu.
        num_register_tokens: tokens of the encoder that stand for nothing.
        key_bias: keys have a bias.
        layerscale_value: what the scales of the branches start with.
        layer_norm_eps: of the encoder's norms.
        drop_path_rate: share of the samples that skip a branch in training, in [0, 1).
        rope_theta: longest wavelength of DINOv3's positions.
        pos_embed_shift, pos_embed_jitter, pos_embed_rescale: of DINOv3's positions in training
            (nn.dino_vit.Rotary).
        num_queries: Q.
        num_blocks: last blocks of the encoder, through which the queries go.
        num_upscale_blocks: each doubles the resolution of the masks, which begins at 1 / p.
        mask_annealing: in training the masks of attention fade, block after block
            (`EoMT.anneal`); False keeps the buffer `attn_mask_probs` as it is.
        train_num_points: points of a mask in matching and loss.
        oversample_ratio: candidates drawn for each point of the loss, at least 1.
        importance_sample_ratio: share of the points that are the most uncertain candidates, in
            [0, 1].
        class_weight: weight of the class loss and cost.
        mask_weight: weight of the masks' cross-entropy loss and cost.
        dice_weight: weight of the masks' dice loss and cost.
        no_object_weight: weight of "no object" in the class loss.
        id2label: name of each label.
        stuff: labels that have no instances.
        image_mean: of the pixels in [0, 1], red, green, blue; or of as many channels as the
            pictures have, which is then what the first convolution takes.
        image_std: likewise.
        processing: what else a checkpoint's preprocessor_config.json says (`Processing`).
    """

    to_dict, to_json_string = manners.to_dict, manners.to_json_string
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses"]  # read by transformers' Trainer
    kind: ClassVar[str] = "eomt"
    logits: ClassVar[type] = QueryLogits

    num_labels: int = 133
    encoder: str = "dinov2"
    backbone: str | None = None
    backbone_pretrained: bool = False
    local_start: bool = False
    image_size: int = 640
    patch_size: int = 16
    windows: bool = False
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    gated: bool = False
    num_register_tokens: int = 4
    key_bias: bool = True
    layerscale_value: float = 1.0
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    rope_theta: float = 100.0
    pos_embed_shift: float | None = None
    pos_embed_jitter: float | None = None
    pos_embed_rescale: float | None = 2.0
    num_queries: int = 200
    num_blocks: int = 4
    num_upscale_blocks: int = 2
    mask_annealing: bool = True
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
    processing: Processing = field(default_factory=Processing)

    def __post_init__(self):
        self.processing = Processing.of(self.processing)
        positive = (
            "num_labels image_size patch_size hidden_size num_hidden_layers num_attention_heads "
            "intermediate_size num_queries num_blocks train_num_points"
        )
        for name in positive.split():
            expect_integer(f"EoMTConfig: {name}", getattr(self, name))

        def fail(name: str, rule: str):
            raise ValueError(f"EoMTConfig: {name} must be {rule}, got {getattr(self, name)!r}")

        if self.encoder not in _TIMM:
            fail("encoder", "'dinov2' or 'dinov3'")
        if self.image_size % self.patch_size:
            fail("image_size", f"a multiple of patch_size ({self.patch_size})")
        if self.hidden_size % self.num_attention_heads:
            fail("hidden_size", f"a multiple of num_attention_heads ({self.num_attention_heads})")
        if self.encoder == "dinov3" and self.hidden_size // self.num_attention_heads % 4:
            fail("hidden_size", "a multiple of 4 num_attention_heads with dinov3")
        if self.encoder == "dinov2" and not self.key_bias:
            fail("key_bias", "True with dinov2")
        if self.num_blocks > self.num_hidden_layers:
            fail("num_blocks", f"at most num_hidden_layers ({self.num_hidden_layers})")
        for name in ("num_upscale_blocks", "num_register_tokens"):
            if getattr(self, name) < 0:
                fail(name, ">= 0")
        if not self.oversample_ratio >= 1:
            fail("oversample_ratio", ">= 1")
        for name in ("importance_sample_ratio", "drop_path_rate"):
            if not 0 <= getattr(self, name) <= 1:
                fail(name, "in [0, 1]")
        if self.backbone_pretrained and not self.backbone:
            fail("backbone", "a ViT of timm with backbone_pretrained")
        if self.local_start and (
            self.encoder != "dinov2" or self.hidden_size // self.num_attention_heads < 8
        ):
            fail("local_start", "False but for a dinov2 with 8 channels a head or more")
        _ = self.input  # checks its own

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model can do: from windows, whose masks end at their sides, semantic alone."""
        return _TASKS[2:] if self.windows else _TASKS

    @property
    def labels(self) -> Labels:
        """All are stuff where the model is semantic alone."""
        stuff = range(self.num_labels) if self.windows else self.stuff
        return Labels(self.id2label, tuple(stuff))

    @property
    def input(self) -> InputConfig:
        """How images are taken: whole in a square, or in squares along the long side."""
        S, edges = self.image_size, self.processing.size is None
        theirs = self.processing.multiple is not None
        return self.processing.input(
            InputConfig(
                self.image_mean,
                self.image_std,
                shortest_edge=S if edges else None,
                longest_edge=S if edges and not self.windows else None,
                divisor=S,
                window=S if self.windows else None,
                crop=(S, S),
                black=True,
                pad_size=(S, S) if theirs and not self.windows else None,
            )
        )

    @classmethod
    def preset(
        cls,
        size: str,
        task: str = "panoptic",
        dataset: str | None = None,
        image_size: int | None = None,
        encoder: str = "dinov2",
    ):
        """The configurations of the paper.

        Args:
            size: "small", "base", "large" or "giant" (of DINOv2).
            task: "panoptic", "instance" or "semantic".
            dataset: "coco", "ade20k" or "cityscapes"; None for COCO, or ADE20K where the task is
                semantic.
            image_size: S, a multiple of 16; the paper's are 640 and 1280, and for semantic 512
                (ADE20K) and 1024 (Cityscapes). None for the smallest.
            encoder: "dinov2" or "dinov3".

        Returns:
            An `EoMTConfig`.

        Raises:
            ValueError: no such preset.
        """
        home, side = _HOME.get(task, (None, None))
        dataset = dataset or home
        facts = DATASETS.get(dataset)
        known = facts is not None and task in facts.labels and facts.edges is not None
        if (size, encoder) == ("giant", "dinov3") or size not in _SIZES or not known:
            raise ValueError(
                f"EoMTConfig.preset: size must be one of {', '.join(SIZES)} (giant with dinov2), "
                "dataset and task one of coco/panoptic, coco/instance, ade20k/panoptic, "
                "ade20k/instance, ade20k/semantic, cityscapes/panoptic, cityscapes/instance, "
                f"cityscapes/semantic, got {size}, {dataset}/{task} with {encoder}"
            )
        if task == "semantic" and dataset == "cityscapes":
            side = 1024
        D, depth, heads, hidden, blocks = _SIZES[size]
        semantic, v3 = task == "semantic", encoder == "dinov3"
        return cls(
            num_labels=facts.labels[task],
            encoder=encoder,
            backbone=_TIMM.get(encoder, "").format(size) or None,
            image_size=image_size or side,
            windows=semantic,
            hidden_size=D,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=hidden,
            gated=size in _GATED,
            key_bias=not v3,
            layer_norm_eps=1e-5 if v3 else 1e-6,
            num_queries=100 if semantic else 200,
            num_blocks=blocks,
            stuff=facts.stuff if task == "panoptic" else (),
        )

    @classmethod
    def tiny(cls, num_labels: int):
        """A model for images of 64 x 64 pixels that trains on a laptop: masks at half the image's
        size.

        Args:
            num_labels: K.

        Returns:
            An `EoMTConfig`.
        """
        return cls(
            num_labels=num_labels,
            local_start=True,
            image_size=64,
            patch_size=4,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=8,
            intermediate_size=512,
            num_register_tokens=0,
            num_queries=8,
            num_blocks=2,
            num_upscale_blocks=1,
            train_num_points=512,
            class_weight=5.0,
            mask_weight=2.0,
        )
