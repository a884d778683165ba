"""SegFormer: semantic segmentation by a pyramid of transformer blocks and a head of linear layers.

Letters: B image, H W image size, h w size of the finest map (H/4 x W/4, rounded up), K class.

    maps   = backbone(image)        MiT: four maps, at strides 4, 8, 16, 32
    logits = head(maps)             [B, K, h, w], resized bilinearly

Inference ends with `resize_argmax`, training with a cross entropy that resizes a band of rows at a
time: logits of the image's own size are never there.
Source: SegFormer (Xie et al., NeurIPS 2021). Names of arguments, results and most settings are
those of Hugging Face transformers.
"""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from ...nn.backbones.mit import MiT
from ...nn.mlp_head import MLPHead
from ...nn.resized_cross_entropy import resized_cross_entropy
from ...ops._checks import expect, expect_labels, got
from ...structures.labels import void_of
from ...structures.logits import PixelLogits
from ...structures.outputs import output, returned
from ...structures.roles import Role, parameter_roles
from ...structures.targets import Targets
from ...weights.state_dicts import misfits
from .. import manners, pixel_output
from . import huggingface, original
from .config import SegFormerConfig


@output
class SegFormerOutput(dict):
    """What `SegFormer.forward` returns.

    Attributes:
        loss: [], mean cross entropy of the labelled pixels; None without labels.
        logits: [B, K, h, w], at a quarter of the image's size.
        hidden_states: the encoder's four maps, finest first, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class SegFormer(nn.Module):
    """Encoder and head.

    Args:
        config: what to build; weights are random, as the original initialises them, but for a
            pretrained backbone. Those of convolutions are channels-last in memory: for FSDP's
            `fully_shard` first call `model.to(memory_format=torch.contiguous_format)`.

    Raises:
        ValueError: the pretrained backbone cannot be had, or does not fit.
    """

    config_class = SegFormerConfig
    main_input_name = "pixel_values"
    from_pretrained = classmethod(manners.from_pretrained)
    device, dtype, num_parameters = manners.device, manners.dtype, manners.num_parameters
    class_head = ("head.classifier.weight", "head.classifier.bias")

    def __init__(self, config: SegFormerConfig):
        super().__init__()
        self.config = config
        self.backbone = MiT(
            config.hidden_sizes,
            config.depths,
            config.num_attention_heads,
            config.sr_ratios,
            config.mlp_ratios,
            config.patch_sizes,
            config.strides,
            config.drop_path_rate,
            config.layer_norm_eps,
            config.input.channels,
        )
        self.head = MLPHead(
            config.hidden_sizes,
            config.decoder_hidden_size,
            config.num_labels,
            config.classifier_dropout_prob,
        )
        if config.backbone_pretrained:
            self.load_encoder(config.backbone)

    def load_encoder(self, source: str | Path) -> None:
        """Takes the encoder's weights from another model, whose head is left.

        Args:
            source: an image classifier or a SegFormer of Hugging Face's format, a folder or a name
                on the hub, such as nvidia/mit-b0; or a .pth file of the original code, such as
                mit_b0.pth.

        Raises:
            ValueError: it cannot be had, or is an encoder of other sizes (names the keys); nothing
                is loaded then.
        """
        if Path(source).suffix == original.SUFFIX:
            settings, weights = original.read_file(source)
        else:
            settings, weights = huggingface.read_folder(source)
        own, start = self.backbone.state_dict(), "backbone."
        weights = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        faults = misfits(weights, own)
        faults += [
            f"{name} {settings[name]} instead of {getattr(self.config, name)}"
            for name in ("num_attention_heads", "strides")
            if tuple(settings[name]) != getattr(self.config, name)
        ]
        if faults:
            raise ValueError(
                f"SegFormer: backbone '{source}' does not fit the encoder; {'; '.join(faults)}"
            )
        self.backbone.load_state_dict(weights)

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Keep only the inputs of the encoder's blocks for backward, and compute the rest again.

        Args:
            enable: False keeps everything, as at the start.
        """
        self.backbone.set_grad_checkpointing(enable)

    def class_logits(self, pixel_values: Tensor) -> Tensor:
        """Class logits of cells of `strides[0]` pixels.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, of any size of which each stage leaves
                at least one key: 29 x 29 in the published models.

        Returns:
            [B, K, h, w].

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        return self.head(self._maps(pixel_values))

    def _maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The encoder's, finest first."""
        shape, config = f"B {self.config.input.channels} H W", self.config
        expect("SegFormer", "pixel_values", pixel_values, shape, "float", {})
        least = max((r - 1) * s + 1 for r, s in zip(config.sr_ratios, self.backbone.strides))
        if min(pixel_values.shape) == 0 or min(pixel_values.shape[2:]) < least:
            raise ValueError(
                f"SegFormer: pixel_values must not be empty, with sides >= {least}, "
                f"got {got(pixel_values)}"
            )
        return self.backbone(pixel_values)

    def forward(
        self,
        pixel_values: Tensor,  # [B, C, H, W]
        labels: Tensor | None = None,  # [B, any, any]
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        normalizer: Tensor | None = None,  # []
    ) -> SegFormerOutput | tuple:
        """Class logits, and the loss if there are labels.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            labels: [B, any, any] int64 in [0, K), 255 where a pixel does not count (65535 of more
                than 255 classes); logits are resized to their size. Out of range is an error on
                the CPU in eager mode; elsewhere, where reading them would synchronise, loss and
                gradients are NaN.
            output_hidden_states: also give the encoder's maps.
            return_dict: False gives a tuple of what is not None.
            normalizer: [], number of labelled pixels that the loss is divided by; None takes those
                of this batch, at least 1.

        Returns:
            A `SegFormerOutput`.

        Raises:
            TypeError, ValueError: wrong dtype or shape, a label out of range, or labels for a
                model of one class.
        """
        maps = self._maps(pixel_values)
        out = SegFormerOutput(logits=self.head(maps))
        if output_hidden_states:
            out.hidden_states = tuple(maps)
        if labels is not None:
            sizes = {"B": len(pixel_values), "device": pixel_values.device}
            expect("SegFormer", "labels", labels, "B H W", "int64", sizes)
            K = self.config.num_labels
            if K == 1:
                raise ValueError(
                    "SegFormer: num_labels must be >= 2 for a loss, got 1: give what is not of "
                    "the class a label of its own"
                )
            expect_labels("SegFormer", labels, K, void_of(K))
            out.loss = resized_cross_entropy(out.logits, labels, labels.shape[1:], normalizer)
        return returned(out, return_dict)

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """Nothing besides pixels."""
        return ()

    def predict(self, pixel_values: Tensor) -> PixelLogits:
        """Class logits of cells of `strides[0]` pixels.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, as `class_logits` takes them.

        Returns:
            maps [B, K, h, w] and the side of a cell, 4 in the published models.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        return PixelLogits(self.class_logits(pixel_values), self.config.strides[0])

    def parameter_roles(self) -> dict[str, Role]:
        """The encoder is the backbone; norms and biases do not decay; matrices are those of the
        encoder's blocks."""
        blocks = [stage.blocks for stage in self.backbone.stages]
        biases = [p for p in self.parameters() if p.ndim == 1]
        return parameter_roles(self, self.backbone, blocks, undecayed=biases)

    def label_map(self, pixel_values: Tensor) -> Tensor:
        """The likeliest class of each pixel, of logits resized to the image's size and never held.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, as `class_logits` takes them.

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
            source: a folder of Hugging Face's format, or a .pth file of the original code.
            num_labels: K of the new task, which then need not be that of the checkpoint.

        Raises:
            ValueError: a file is missing or is not what it should be.
        """
        if Path(source).suffix == original.SUFFIX:
            settings, weights = original.read_file(source)
        else:
            settings, weights = huggingface.read_folder(source)
        if not any(name.startswith("head.") for name in weights):
            raise ValueError(
                f"SegFormer: {source} holds an encoder alone: start from it by backbone="
                f"'{source}', backbone_pretrained=True in a SegFormerConfig, or by "
                "model.load_encoder"
            )
        found = weights.get("head.classifier.bias")
        if found is not None and len(found) != settings["num_labels"]:
            if num_labels is None:
                raise ValueError(
                    f"SegFormer: {source}: config.json names {settings['num_labels']} "
                    f"classes, the weights have {len(found)}; num_labels=... starts the class "
                    "head anew"
                )
            settings |= {"num_labels": len(found), "id2label": None}
        return settings, weights

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, preprocessor_config.json and model.safetensors as transformers reads
        them.

        Args:
            folder: is made if it is not there.
        """
        huggingface.write_folder(folder, asdict(self.config), self.state_dict())

    def save_original(self, path: str | Path) -> None:
        """Writes the model as the original code reads it: weights and names of the classes.

        Args:
            path: ends in .pth; its folder is made if it is not there.

        Raises:
            ValueError: another suffix.
        """
        original.write_file(path, asdict(self.config), self.state_dict())
