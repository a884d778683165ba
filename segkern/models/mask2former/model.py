"""Mask2Former: one model for panoptic, instance and semantic segmentation.

Letters: B image, H W image size, h w size of the finest map, R prediction, Q query, T target,
K class, M channels of the mask features.

    maps                           = backbone(image)
    mask features, pixels          = pixel decoder(maps)
    class logits, mask embeddings  = query decoder(pixels, mask features)
    mask logits                    = mask embeddings . mask features

Training never builds the mask logits of all queries: matching samples the mask features at its
points, and the loss builds the logits of the matched queries alone.
Source: Mask2Former (Cheng et al., CVPR 2022). Names of arguments, results and most settings are
those of Hugging Face transformers.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from torch import Tensor, nn

from ...nn.backbones import build_backbone
from ...nn.criterion import Criterion
from ...nn.pixel_decoder import PixelDecoder
from ...nn.query_decoder import QueryDecoder
from ...structures.logits import QueryLogits
from ...structures.roles import Role, parameter_roles
from ...structures.targets import Targets
from .. import manners
from ..query_output import (
    HiddenStates,
    Predictions,
    QueryOutput,
    expect_pixels,
    given_targets,
    maps_of,
    only_last,
    query_output,
)
from . import huggingface, original
from .config import Mask2FormerConfig


class Mask2Former(nn.Module):
    """Backbone, pixel decoder, query decoder and criterion.

    Args:
        config: what to build; weights are random, as the paper initialises them. Those of
            convolutional backbones are channels-last in memory: for FSDP's `fully_shard` first
            call `model.to(memory_format=torch.contiguous_format)`.
    """

    config_class = Mask2FormerConfig
    main_input_name = "pixel_values"
    from_pretrained = classmethod(manners.from_pretrained)
    device, dtype, num_parameters = manners.device, manners.dtype, manners.num_parameters
    class_head = (
        "query_decoder.class_embed.weight",
        "query_decoder.class_embed.bias",
        "criterion.empty_weight",
    )
    deep_supervision = True

    def __init__(self, config: Mask2FormerConfig):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config, config.input.channels)
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels,
            channels=config.hidden_dim,
            mask_channels=config.mask_feature_size,
            layers=config.encoder_layers,
            heads=config.num_attention_heads,
            points=config.num_points_encoder,
            feedforward=config.encoder_feedforward_dim,
            dropout=config.dropout,
        )
        self.query_decoder = QueryDecoder(
            config.num_labels,
            channels=config.hidden_dim,
            mask_channels=config.mask_feature_size,
            queries=config.num_queries,
            layers=config.decoder_layers,
            heads=config.num_attention_heads,
            feedforward=config.dim_feedforward,
            dropout=config.dropout,
        )
        self.criterion = Criterion(
            config.num_labels,
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            no_object_weight=config.no_object_weight,
            num_points=config.train_num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_sample_ratio,
        )

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """For backward keep only the inputs of the backbone's blocks and of the pixel decoder's
        layers, and compute the rest again.

        Args:
            enable: False keeps everything, as at the start.
        """
        self.pixel_decoder.checkpointing = enable
        if hasattr(self.backbone, "set_grad_checkpointing"):  # not for small images
            self.backbone.set_grad_checkpointing(enable)

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """Nothing besides pixels: all tasks share one run."""
        return ()

    def predict(self, pixel_values: Tensor) -> QueryLogits:
        """The last prediction, with the masks as two factors, which inference needs no product of.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, zero-padded to the right and below.

        Returns:
            class logits [B, Q, K + 1], mask embeddings [B, Q, M] and features [B, M, h, w].

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        class_logits, embeddings, mask_features = self.all_predictions(pixel_values, last=True)
        return QueryLogits(class_logits[:, -1], embeddings[:, -1], mask_features)

    def parameter_roles(self) -> dict[str, Role]:
        """Matrices are those of the backbone and of the decoders' layers; Swin's tables of
        position biases do not decay."""
        name = "relative_position_bias_table"
        tables = [p for path, p in self.backbone.named_parameters() if path.endswith(name)]
        decoder = self.query_decoder
        blocks = (self.backbone, self.pixel_decoder.layers, decoder.layers, decoder.mask_embed)
        return parameter_roles(self, self.backbone, blocks, undecayed=tables)

    def all_predictions(
        self, pixel_values: Tensor, last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All predictions, with the masks as two factors.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, zero-padded to the right and below.
            last: only the last prediction, R = 1.

        Returns:
            class logits [B, R, Q, K + 1], mask embeddings [B, R, Q, M] and mask features [B, M, h,
            w]; mask logits are the product of the last two over M.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        return self._predictions(pixel_values, last)[:3]

    def _predictions(self, pixel_values: Tensor, last: bool, hidden: bool = False) -> Predictions:
        """As `all_predictions`; with `hidden` no map is dropped that was computed on the way."""
        expect_pixels(self, pixel_values)
        maps = self.backbone(pixel_values)
        encoder = tuple(maps if hidden else maps[-1:])
        mask_features, pixels, shapes = self.pixel_decoder(maps)
        del maps  # the large ones are not held while queries are decoded
        classes, embeddings, queries = self.query_decoder.run(pixels, shapes, mask_features, last)
        levels = maps_of(pixels, shapes) if hidden else ()
        states = HiddenStates(encoder, levels, queries, mask_features)
        return Predictions(classes, embeddings, mask_features, states)

    def loss(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            targets: of the same B images, on the same device.

        Returns:
            the weighted sum [], and "loss_cross_entropy", "loss_mask" and "loss_dice" of each
            prediction, [R] each, unweighted.
        """
        return self.criterion(*self.all_predictions(pixel_values), targets)

    def forward(
        self,
        pixel_values: Tensor,  # [B, C, H, W]
        mask_labels: Sequence[Tensor] | None = None,  # B of [T_b, *, *]
        class_labels: Sequence[Tensor] | None = None,  # B of [T_b]
        pixel_mask: Tensor | None = None,  # [B, H, W]
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        return_dict: bool | None = None,
        targets: Targets | None = None,
    ) -> QueryOutput | tuple:
        """Predictions, and the loss if there are targets.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, zero-padded to the right and below.
            mask_labels: for each image [T_b, *, *] of any dtype, 1 inside, 0 outside, 255 where a
                pixel has no weight; all of one size, that of the images or another, as both are
                seen at the same points. Together with `class_labels`.
            class_labels: for each image [T_b] integers in [0, K).
            pixel_mask: taken for Hugging Face's sake and not used: padding is not masked in
                Mask2Former.
            output_hidden_states: also give what is computed on the way.
            output_auxiliary_logits: also give the logits of the earlier predictions.
            return_dict: False gives a tuple of what is not None.
            targets: the same as the labels, packed; not together with them.

        Returns:
            A `QueryOutput`.

        Raises:
            TypeError, ValueError: wrong dtype, shape or combination of arguments.
        """
        targets = given_targets(self, pixel_values, mask_labels, class_labels, targets)
        last = only_last(self, targets, output_auxiliary_logits)
        found = self._predictions(pixel_values, last, bool(output_hidden_states))
        return query_output(
            self, found, targets, output_auxiliary_logits, output_hidden_states, return_dict
        )

    @classmethod
    def read_pretrained(
        cls, source: str | Path, num_labels: int | None
    ) -> tuple[dict, dict[str, Tensor]]:
        """Settings and weights of a checkpoint, by the names of the config and of the model.

        Args:
            source: a folder of Hugging Face's format, or a .pkl or .pth file of the original code,
                whose config.yaml is read if it lies beside it.
            num_labels: K of the new task, which then need not be that of the checkpoint.

        Raises:
            ValueError: a file is missing or is not what it should be.
        """
        if original.is_file(source):
            return original.read_file(source)
        return huggingface.read_folder(source, num_labels)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors as transformers reads them.

        Args:
            folder: is made if it is not there.
        """
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        huggingface.write_folder(folder, settings, self.state_dict())

    def save_original(self, path: str | Path) -> None:
        """Writes the model as the original code reads it: the weights in a file, and config.yaml
        beside it.

        Args:
            path: ends in .pkl or .pth; its folder is made if it is not there.

        Raises:
            ValueError: another suffix, or settings that the original code has not.
        """
        settings = asdict(self.config)
        original.write_file(path, settings, self.state_dict())
