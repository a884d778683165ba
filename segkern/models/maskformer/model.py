"""MaskFormer: masks with a class each, from a feature pyramid and a DETR decoder.

Letters: B image, H W image size, h w size of the finest map, R prediction, Q query, T target,
K class, M channels of the mask features.

    maps                           = backbone(image)
    mask features                  = pixel decoder(maps)
    class logits, mask embeddings  = query decoder(the coarsest map)
    mask logits                    = mask embeddings . mask features

Training never holds the mask logits of all queries: matching goes over them a band of rows at a
time, and the loss builds those of the matched queries alone.
Source: MaskFormer (Cheng et al., NeurIPS 2021). Names of arguments, results and most settings are
those of Hugging Face transformers. Differs from transformers where the earlier predictions are
trained: they come from normalised states, as the paper's do, and there is none before the first
layer.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ...nn.backbones import build_backbone
from ...nn.detr_decoder import DetrDecoder
from ...nn.fpn_pixel_decoder import FPNPixelDecoder
from ...nn.mask_criterion import FullMaskCriterion
from ...ops._library import is_exported
from ...structures.logits import QueryLogits
from ...structures.outputs import returned
from ...structures.roles import Role, parameter_roles
from ...structures.targets import Targets
from .. import manners
from ..query_output import (
    HiddenStates,
    Predictions,
    QueryOutput,
    add_hidden_states,
    expect_pixels,
    given_targets,
    only_last,
    query_output,
)
from . import huggingface
from .config import MaskFormerConfig


class MaskFormer(nn.Module):
    """Backbone, pixel decoder, query decoder and criterion.

    Args:
        config: what to build; weights are random. Those of convolutional backbones are
            channels-last in memory: for FSDP's `fully_shard` first call
            `model.to(memory_format=torch.contiguous_format)`.
    """

    config_class = MaskFormerConfig
    main_input_name = "pixel_values"
    from_pretrained = classmethod(manners.from_pretrained)
    device, dtype, num_parameters = manners.device, manners.dtype, manners.num_parameters
    class_head = (
        "query_decoder.class_embed.weight",
        "query_decoder.class_embed.bias",
        "criterion.empty_weight",
    )

    def __init__(self, config: MaskFormerConfig):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config, config.input.channels)
        self.pixel_decoder = FPNPixelDecoder(
            self.backbone.channels, config.fpn_feature_size, config.mask_feature_size
        )
        self.query_decoder = DetrDecoder(
            config.num_labels,
            self.backbone.channels[-1],
            channels=config.hidden_dim,
            mask_channels=config.mask_feature_size,
            queries=config.num_queries,
            layers=config.decoder_layers,
            heads=config.num_attention_heads,
            feedforward=config.dim_feedforward,
            dropout=config.dropout,
        )
        self.criterion = FullMaskCriterion(
            config.num_labels,
            class_weight=config.cross_entropy_weight,
            focal_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            no_object_weight=config.no_object_weight,
            class_cost=1.0,
        )

    @property
    def deep_supervision(self) -> bool:
        """Whether every prediction is trained and not the last alone."""
        return self.config.use_auxiliary_loss

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """For backward keep only the inputs of the backbone's blocks and of the pixel decoder's
        levels, and compute the rest again.

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
        """Matrices are those of the backbone and of the query decoder's layers; Swin's tables of
        position biases do not decay."""
        name = "relative_position_bias_table"
        tables = [p for path, p in self.backbone.named_parameters() if path.endswith(name)]
        decoder = self.query_decoder
        blocks = (self.backbone, decoder.layers, decoder.mask_embed)
        return parameter_roles(self, self.backbone, blocks, undecayed=tables)

    def all_predictions(
        self, pixel_values: Tensor, last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prediction after each layer, with the masks as two factors.

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
        classes, embeddings, queries = self.query_decoder.run(maps[-1], last)
        features = self.pixel_decoder(maps)
        states = HiddenStates(encoder, (), queries, features if hidden else None)
        return Predictions(classes, embeddings, features, states)

    def loss(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            targets: of the same B images, on the same device.

        Returns:
            the weighted sum [], and "loss_cross_entropy", "loss_mask" (focal) and "loss_dice" of
            each trained prediction, [R] each, unweighted.
        """
        predictions = self.all_predictions(pixel_values, last=not self.deep_supervision)
        return self.criterion(*predictions, targets)

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
                MaskFormer.
            output_hidden_states: also give what is computed on the way.
            output_auxiliary_logits: also give the logits of the earlier predictions.
            return_dict: False gives a tuple of what is not None.
            targets: the same as the labels, packed; not together with them.

        Returns:
            A `MaskFormerOutput`.

        Raises:
            TypeError, ValueError: wrong dtype, shape or combination of arguments.
        """
        targets = given_targets(self, pixel_values, mask_labels, class_labels, targets)
        asked = output_hidden_states or output_auxiliary_logits
        if asked or targets is not None or not self._composes():
            last = only_last(self, targets, output_auxiliary_logits)
            found = self._predictions(pixel_values, last, bool(output_hidden_states))
            return query_output(
                self, found, targets, output_auxiliary_logits, output_hidden_states, return_dict
            )
        expect_pixels(self, pixel_values)
        maps = self.backbone(pixel_values)
        classes, embeddings, queries = self.query_decoder.run(maps[-1], last=True)
        out = QueryOutput(class_queries_logits=classes[:, -1])
        out.masks_queries_logits = self.pixel_decoder.mask_logits(maps, embeddings[:, -1])
        add_hidden_states(out, HiddenStates((maps[-1],), (), queries), False)
        return returned(out, return_dict)

    def _composes(self) -> bool:
        """Whether mask logits come from composed filters: fewer than the mask features have, not
        in half precision, which would round them, and not in a graph for any number of images, as
        each has filters of its own."""
        weight = self.pixel_decoder.mask_features.weight
        exact = weight.dtype.itemsize >= 4 and not torch.is_autocast_enabled(weight.device.type)
        fewer = self.config.num_queries < len(weight)
        return exact and fewer and not is_exported()

    @classmethod
    def read_pretrained(
        cls, source: str | Path, num_labels: int | None
    ) -> tuple[dict, dict[str, Tensor]]:
        """Settings and weights of a checkpoint, by the names of the config and of the model.

        Args:
            source: a folder of Hugging Face's format.
            num_labels: K of the new task, which then need not be that of the checkpoint.

        Raises:
            ValueError: a file is missing or is not what it should be.
        """
        return huggingface.read_folder(source, num_labels)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors as transformers reads them.

        Args:
            folder: is made if it is not there.
        """
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        huggingface.write_folder(folder, settings, self.state_dict())
