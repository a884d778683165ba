"""Segmenter: semantic segmentation by a Vision Transformer.

Letters: B image, H W image size, p patch size, D channels, K class.

    x      = encoder(image padded to multiples of p)             patch embeddings, global from the
    logits = decoder(x): a map of H/p x W/p, resized bilinearly  first layer on

Two decoders: one linear layer, or the mask transformer with an embedding for each class.
Source: Segmenter (Strudel et al., ICCV 2021). Weights have the names of the original code.
Differs: the encoder's unused ImageNet head is not part of the model.
"""

from dataclasses import asdict, fields
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.resized_cross_entropy import resized_cross_entropy
from ...nn.vit import LinearDecoder, MaskTransformer, ViT, start_apart, start_locally
from ...ops._checks import expect, expect_labels, got
from ...structures.labels import void_of
from ...structures.logits import PixelLogits
from ...structures.outputs import Resized, output, returned
from ...structures.roles import Role, parameter_roles
from ...structures.targets import Targets
from ...weights.folders import find_folder
from .. import manners, own_format, pixel_output
from . import original
from .config import SegmenterConfig


@output
class SegmenterOutput(dict):
    """What `Segmenter.forward` returns.

    Attributes:
        loss: [], mean cross entropy of the labelled pixels; None without labels.
        logits: [B, K, H, W]; where there are labels, computed when they are first read.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class Segmenter(nn.Module):
    """Encoder and decoder.

    Args:
        config: what to build; weights are random, as the original initialises them, but for a
            pretrained backbone.

    Raises:
        ValueError: timm has no such backbone or no weights of it, or they do not fit.
    """

    config_class = SegmenterConfig
    main_input_name = "pixel_values"
    from_pretrained = classmethod(manners.from_pretrained)
    device, dtype, num_parameters = manners.device, manners.dtype, manners.num_parameters
    class_head = (
        *("decoder.head.weight", "decoder.head.bias"),  # of the linear decoder
        *("decoder.cls_emb", "decoder.mask_norm.weight", "decoder.mask_norm.bias"),
    )

    def __init__(self, config: SegmenterConfig):
        super().__init__()
        self.config = config
        self.encoder = ViT(
            config.image_size,
            config.patch_size,
            config.embed_dim,
            config.depth,
            config.num_heads,
            config.distilled,
            config.dropout,
            config.drop_path_rate,
            config.input.channels,
        )
        if config.decoder == "linear":
            self.decoder = LinearDecoder(config.embed_dim, config.num_labels)
        else:
            self.decoder = MaskTransformer(
                config.embed_dim,
                config.embed_dim,
                config.num_labels,
                config.decoder_layers,
                config.decoder_dropout,
                config.decoder_drop_path_rate,
            )
        if config.local_start:
            start_locally(self.encoder)
            if config.decoder == "mask":
                start_apart(self.decoder)
        if config.backbone_pretrained:
            self.load_encoder(config.backbone)

    def load_encoder(self, backbone: str | nn.Module) -> None:
        """Takes the encoder's weights from a ViT or DeiT of timm, whose heads are left.

        Position embeddings are resized to the config's image size. timm's LayerNorm has eps 1e-6,
        ours keeps PyTorch's 1e-5, as the original does with the same weights.

        Args:
            backbone: timm's name of a pretrained model, which is downloaded once it is clear that
                it fits; or a model.

        Raises:
            ValueError: no such model or no weights of it, or another architecture (names the
                keys); nothing is loaded then.
        """
        name = backbone if isinstance(backbone, str) else type(backbone).__name__
        encoder = self.encoder
        if isinstance(backbone, str):
            channels = self.config.input.channels
            original.check_fit(original.timm_model(name, False, channels), encoder, name)
            backbone = original.timm_model(name, True, channels)
        original.check_fit(backbone, encoder, name)
        encoder.load_state_dict(original.from_timm(backbone, encoder.grid))

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Keep only the inputs of the encoder's blocks for backward, and compute the rest again.

        Args:
            enable: False keeps everything, as at the start.
        """
        self.encoder.checkpointing = enable

    def patch_logits(self, pixel_values: Tensor) -> Tensor:
        """Class logits of the patches.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, of any size; padded with zeros to the
                right and below to multiples of p.

        Returns:
            [B, K, ceil(H / p), ceil(W / p)].

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        shape = f"B {self.config.input.channels} H W"
        expect("Segmenter", "pixel_values", pixel_values, shape, "float", {})
        if 0 in pixel_values.shape:
            raise ValueError(f"Segmenter: pixel_values must not be empty, got {got(pixel_values)}")
        p = self.config.patch_size
        H, W = pixel_values.shape[2:]
        x = self.encoder(F.pad(pixel_values, (0, -W % p, 0, -H % p)))
        logits = self.decoder(x[:, self.encoder.tokens :])
        return logits.mT.unflatten(2, (-(-H // p), -(-W // p)))

    def forward(
        self,
        pixel_values: Tensor,  # [B, C, H, W]
        labels: Tensor | None = None,  # [B, H, W]
        return_dict: bool | None = None,
        normalizer: Tensor | None = None,  # []
    ) -> SegmenterOutput | tuple:
        """Class logits of every pixel, and the loss if there are labels.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            labels: [B, H, W] int64 in [0, K), 255 where a pixel does not count (65535 of more
                than 255 classes). Out of range is an error on the CPU in eager mode; elsewhere,
                where reading them would synchronise, loss and gradients are NaN.
            return_dict: False gives a tuple of what is not None.
            normalizer: [], number of labelled pixels that the loss is divided by; None takes those
                of this batch, at least 1.

        Returns:
            A `SegmenterOutput`.

        Raises:
            TypeError, ValueError: wrong dtype or shape, or a label out of range.
        """
        p = self.config.patch_size
        patches = self.patch_logits(pixel_values)
        B, _, h, w = patches.shape
        H, W = pixel_values.shape[2:]
        padded, K = (p * h, p * w), self.config.num_labels
        logits, out = Resized(patches, padded, (H, W)), SegmenterOutput()
        if labels is None:
            out.logits = logits.tensor()
        else:
            expect("Segmenter", "labels", labels, "B H W", "int64", {"B": B, "H": H, "W": W})
            expect_labels("Segmenter", labels, K, void_of(K))
            out.logits = logits
            out.loss = resized_cross_entropy(patches, labels, padded, normalizer)
        return returned(out, return_dict)

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """Nothing besides pixels."""
        return ()

    def predict(self, pixel_values: Tensor) -> PixelLogits:
        """Class logits of the patches.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, of any size.

        Returns:
            maps [B, K, ceil(H / p), ceil(W / p)] and p.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        return PixelLogits(self.patch_logits(pixel_values), self.config.patch_size)

    def parameter_roles(self) -> dict[str, Role]:
        """The encoder is the backbone; matrices are those of its and the decoder's blocks."""
        decoder = getattr(self.decoder, "blocks", ())
        return parameter_roles(self, self.encoder, (*self.encoder.blocks, *decoder))

    def label_map(self, pixel_values: Tensor) -> Tensor:
        """The likeliest class of each pixel: `forward(...).logits.argmax(1)` without the logits.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, of any size.

        Returns:
            [B, H, W] int32.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        return pixel_output.label_map(self, pixel_values)

    def loss(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            targets: of the same B images, on the same device, with `semantic`, whose labels are
                checked as `forward` says.

        Returns:
            cross entropy of the labelled pixels over `targets.pixel_normalizer`, [], and the same
            as "loss_cross_entropy", [1].

        Raises:
            ValueError: targets without a map of labels, or a label out of range.
        """
        return pixel_output.labelled_loss(self, pixel_values, targets)

    @classmethod
    def read_pretrained(
        cls, source: str | Path, num_labels: int | None
    ) -> tuple[dict, dict[str, Tensor]]:
        """Settings and weights of a checkpoint, by the names of the config and of the model.

        Args:
            source: a folder of `save_pretrained`, or of checkpoint.pth and variant.yml of the
                original code.
            num_labels: K of the new task, which then need not be that of the checkpoint.

        Raises:
            ValueError: a file is missing or is not what it should be.
        """
        folder = find_folder(source)
        settings, weights = original.read_folder(folder)
        unknown = sorted(settings.keys() - {f.name for f in fields(SegmenterConfig)})
        if unknown:
            raise ValueError(f"Segmenter: {folder} has unknown settings: {', '.join(unknown)}")
        found = original.labels_of(weights)
        labels = settings.get("num_labels", SegmenterConfig.num_labels)
        if found not in (None, labels):
            raise ValueError(
                f"Segmenter: {folder} has weights for {found} labels, its settings say {labels}"
            )
        return settings, weights

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors.

        Args:
            folder: is made if it is not there.
        """
        own_format.save(self, folder)

    def save_original(self, folder: str | Path) -> None:
        """Writes the model as the original code reads it: checkpoint.pth and variant.yml.

        Args:
            folder: is made if it is not there.

        Raises:
            ValueError: settings that the original code has not.
        """
        takes = self.config.input  # the original has no setting that follows another
        settings = asdict(self.config) | {"shortest_edge": takes.shortest_edge}
        settings |= {"window_size": takes.window, "window_stride": takes.stride}
        original.write_folder(folder, settings, self.state_dict())
