"""The settings of Segmenter, and the presets of its paper."""

from dataclasses import dataclass
from typing import ClassVar

from ...ops._checks import expect_integer
from ...structures.labels import IMAGENET_MEAN, IMAGENET_STD, Labels
from ...structures.logits import PixelLogits
from ...structures.settings import InputConfig
from .. import manners

# embed_dim, depth, heads of the encoders that the paper names
_ENCODERS = {"T": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
# timm's names by encoder and patch size, or dagger
_BACKBONES = {
    ("T", "16"): "vit_tiny_patch16_384.augreg_in21k_ft_in1k",
    ("S", "16"): "vit_small_patch16_384.augreg_in21k_ft_in1k",
    ("S", "32"): "vit_small_patch32_384.augreg_in21k_ft_in1k",
    ("B", "8"): "vit_base_patch8_224.augreg_in21k_ft_in1k",
    ("B", "16"): "vit_base_patch16_384.augreg_in21k_ft_in1k",
    ("B", "32"): "vit_base_patch32_384.augreg_in21k_ft_in1k",
    ("L", "16"): "vit_large_patch16_384.augreg_in21k_ft_in1k",
    ("L", "32"): "vit_large_patch32_384.orig_in21k_ft_in1k",
    ("T", "†"): "deit_tiny_distilled_patch16_224.fb_in1k",
    ("S", "†"): "deit_small_distilled_patch16_224.fb_in1k",
    ("B", "†"): "deit_base_distilled_patch16_384.fb_in1k",
}
_HALF = (0.5, 0.5, 0.5)


@dataclass
class SegmenterConfig:
    """Everything that shapes a `Segmenter`.

    Attributes:
        num_labels: K, at least 1.
        image_size: (H, W) of training crops, for which position embeddings are stored; multiples
            of patch_size.
        patch_size: p, in pixels.
        embed_dim: D of encoder and decoder; with the mask decoder at least 64, and a multiple of
            its D // 64 attention heads.
        depth: blocks of the encoder.
        num_heads: attention heads of the encoder.
        distilled: the encoder is a DeiT with a distillation token.
        dropout: probability in the encoder.
        drop_path_rate: rate of dropped residual branches of the encoder's last block, in [0, 1).
        decoder: "mask" or "linear".
        decoder_layers: blocks of the mask decoder.
        decoder_dropout: probability in the mask decoder.
        decoder_drop_path_rate: as drop_path_rate, in the mask decoder.
        backbone: timm's name of a ViT or DeiT of the encoder's shape; None for none.
        backbone_pretrained: start the encoder from its weights (downloads them).
        local_start: without them, start it with positions of waves and attention to the patches
            around each, and the mask decoder with blocks that do nothing and classes at right
            angles (nn.vit.start_locally, start_apart), which learns much sooner.
        window_size: side in pixels of the windows that large images are cut into; None for the
            short side of image_size.
        window_stride: pixels from one window to the next; None for window_size.
        shortest_edge: pixels, to which an image's short side is resized for prediction; None for
            the short side of image_size.
        longest_edge: pixels, the most that the long side may get; None for 4 shortest_edge.
        id2label: name of each label.
        image_mean: of the pixels in [0, 1], red, green, blue; or of as many channels as the
            pictures have, which is then what the first convolution takes.
        image_std: likewise.
    """

    to_dict, to_json_string = manners.to_dict, manners.to_json_string
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses"]  # read by transformers' Trainer
    kind: ClassVar[str] = "segmenter"
    tasks: ClassVar[tuple[str, ...]] = ("semantic",)
    logits: ClassVar[type] = PixelLogits

    num_labels: int = 150
    image_size: tuple[int, int] = (512, 512)
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    distilled: bool = False
    dropout: float = 0.0
    drop_path_rate: float = 0.1
    decoder: str = "mask"
    decoder_layers: int = 2
    decoder_dropout: float = 0.1
    decoder_drop_path_rate: float = 0.0
    backbone: str | None = None
    backbone_pretrained: bool = False
    local_start: bool = False
    window_size: int | None = None
    window_stride: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    id2label: dict[int, str] | None = None
    image_mean: tuple[float, ...] = _HALF
    image_std: tuple[float, ...] = _HALF

    def __post_init__(self):
        self.image_size = tuple(self.image_size)
        followers = ("window_size", "window_stride", "shortest_edge", "longest_edge")
        for name in (
            *("num_labels", "patch_size", "embed_dim", "depth", "num_heads", "decoder_layers"),
            *(name for name in followers if getattr(self, name) is not None),
        ):
            expect_integer(f"SegmenterConfig: {name}", getattr(self, name))
        for side in self.image_size:
            expect_integer("SegmenterConfig: image_size", side)
        if len(self.image_size) != 2 or any(n % self.patch_size for n in self.image_size):
            raise ValueError(
                "SegmenterConfig: image_size must be (H, W), multiples of patch_size "
                f"({self.patch_size}), got {self.image_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"SegmenterConfig: embed_dim must be a multiple of num_heads ({self.num_heads}), "
                f"got {self.embed_dim}"
            )
        if self.decoder not in ("mask", "linear"):
            raise ValueError(
                f"SegmenterConfig: decoder must be 'mask' or 'linear', got {self.decoder!r}"
            )
        heads = self.embed_dim // 64
        if self.decoder == "mask" and (heads == 0 or self.embed_dim % heads):
            raise ValueError(
                "SegmenterConfig: embed_dim must be at least 64 and a multiple of the mask "
                f"decoder's heads (embed_dim // 64 = {heads}), got {self.embed_dim}"
            )
        if self.input.stride > self.input.window:
            raise ValueError(
                f"SegmenterConfig: window_stride must be <= window_size ({self.input.window}), "
                f"got {self.window_stride}"
            )
        if self.local_start and self.embed_dim // self.num_heads < 8:
            raise ValueError(
                "SegmenterConfig: embed_dim must be at least 8 a head with local_start, "
                f"got {self.embed_dim} for {self.num_heads} heads"
            )
        if self.backbone_pretrained and not self.backbone:
            raise ValueError(
                "SegmenterConfig: backbone must name a ViT of timm with backbone_pretrained, "
                f"got {self.backbone!r}"
            )

    @property
    def labels(self) -> Labels:
        """Without instances: all are stuff."""
        return Labels(self.id2label, tuple(range(self.num_labels)))

    @property
    def input(self) -> InputConfig:
        """How images are taken: resized between the edges, in windows."""
        short = min(self.image_size)
        edge = self.shortest_edge or short
        window = self.window_size or short
        return InputConfig(
            self.image_mean,
            self.image_std,
            edge,
            self.longest_edge or 4 * edge,
            self.patch_size,
            window,
            self.window_stride or window,
            self.image_size,
        )

    @property
    def size_divisor(self) -> int:
        """Sides of a batch are padded to a multiple of it."""
        return self.patch_size

    @classmethod
    def preset(cls, name: str, num_labels: int = 150):
        """The models of the paper.

        Args:
            name: "Seg-T-Mask/16", "Seg-S/32", "Seg-B†/16", ...: encoder T, S, B or L, with a
                dagger for DeiT's (T, S, B); "-Mask" for the mask transformer, else the linear
                decoder; the patch size 8, 16 or 32.
            num_labels: K.

        Returns:
            A `SegmenterConfig` with the crops and windows of ADE20K: 512 pixels, 640 for L. Its
            `backbone` is None where timm has no weights of that shape; those of Seg-B/8 were
            trained at 224 pixels, where the paper's were at 384.

        Raises:
            ValueError: no such model.
        """
        encoder, _, patch = name.removeprefix("Seg-").rpartition("/")
        encoder, mask = encoder.removesuffix("-Mask"), encoder.endswith("-Mask")
        size, distilled = encoder.removesuffix("†"), encoder.endswith("†")
        known = size in _ENCODERS and patch in ("8", "16", "32") and name.startswith("Seg-")
        if not known or (distilled and (size == "L" or patch != "16")):
            raise ValueError(
                "SegmenterConfig.preset: name must be Seg-{T,S,B,L}{,†}{,-Mask}/{8,16,32}, "
                f"such as Seg-B-Mask/16 (DeiT, †: T, S and B at 16), got {name!r}"
            )
        embed_dim, depth, heads = _ENCODERS[size]
        crop = 640 if size == "L" else 512
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if distilled else (_HALF, _HALF)
        return cls(
            num_labels=num_labels,
            image_size=(crop, crop),
            patch_size=int(patch),
            embed_dim=embed_dim,
            depth=depth,
            num_heads=heads,
            distilled=distilled,
            decoder="mask" if mask else "linear",
            backbone=_BACKBONES.get((size, "†" if distilled else patch)),
            image_mean=mean,
            image_std=std,
        )
