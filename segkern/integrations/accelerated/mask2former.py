"""Mask2Former of transformers: pixel decoder's attention, query decoder, criterion.

Letters: B image, R prediction, Q query, S pixels of a level, C channels, M channels of the mask
features, K class.
"""

import torch
from transformers.models.mask2former import modeling_mask2former as theirs

from ...nn.position import sine_position
from ...ops.query_layer import Layer
from . import deformable
from .criterion import Factors, point_losses
from .plain import as_transformers, idle, plain, unhooked
from .queries import decode


class Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(
    theirs.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
):
    """Attention of pixels to places that they choose."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        position_embeddings=None,
        reference_points=None,
        spatial_shapes_list=None,
        level_start_index=None,
        output_attentions=False,
    ):
        if output_attentions or reference_points.shape[-1] != 2 or not deformable.fits(self):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                position_embeddings,
                reference_points,
                spatial_shapes_list,
                level_start_index,
                output_attentions,
            )
        query = self.with_pos_embed(hidden_states, position_embeddings)
        given = attention_mask, reference_points, spatial_shapes_list
        out = deformable.sample(self, query, encoder_hidden_states, *given)
        return self.output_proj(out), None


class Mask2FormerPixelDecoderEncoderLayer(theirs.Mask2FormerPixelDecoderEncoderLayer):
    """That attention and a feed-forward network whose hidden layer is not held."""

    def forward(
        self,
        hidden_states,
        attention_mask,
        position_embeddings=None,
        reference_points=None,
        spatial_shapes_list=None,
        level_start_index=None,
        output_attentions=False,
    ):
        places = {
            "position_embeddings": position_embeddings,
            "reference_points": reference_points,
            "spatial_shapes_list": spatial_shapes_list,
            "level_start_index": level_start_index,
        }
        dropping = not idle(self.training, self.dropout, self.activation_dropout)
        out = None
        if not output_attentions:
            given = hidden_states, attention_mask, dropping, self.training
            out = deformable.layer(self, *given, **places)
        if out is None:
            return super().forward(
                hidden_states, attention_mask, output_attentions=output_attentions, **places
            )
        return out


class Mask2FormerTransformerModule(theirs.Mask2FormerTransformerModule):
    """The query decoder."""

    def fits(self) -> bool:
        """Whether `decoded` computes what transformers does with these settings and layers."""
        decoder = self.decoder
        config, layers = decoder.config, decoder.layers
        leaves = [m for m in decoder.modules() if m._parameters]
        return (
            config.activation_function == "relu"
            and not config.pre_norm
            and idle(self.training, config.dropout)
            and not any(layer.gradient_checkpointing for layer in layers)
            and unhooked(*decoder.modules())
            and plain(*leaves)
        )

    def decoded(self, multi_scale_features, mask_features):
        """As `queries.decode`, of the maps [B, *, h, w] of three levels and [B, M, h, w]."""
        decoder, pixels, places, sizes = self.decoder, [], [], []
        for project, x, embed in zip(
            self.input_projections, multi_scale_features, self.level_embed.weight
        ):
            rows = project(x).flatten(2).transpose(1, 2)  # [B, S, C]
            sizes.append((x.shape[2], x.shape[3]))
            places.append(sine_position((sizes[-1],), rows.shape[2], x.device, x.dtype))
            pixels.append(rows + embed)
        queries = self.queries_features.weight.expand(len(mask_features), -1, -1)
        return decode(
            queries,
            self.queries_embedder.weight,
            *(pixels, places, mask_features, sizes),
            [layer.cross_attn for layer in decoder.layers],
            [_layer(layer) for layer in decoder.layers],
            decoder.layernorm,
            [block.layers[0] for block in decoder.mask_predictor.mask_embedder.layers],
        )

    def forward(
        self,
        multi_scale_features,
        mask_features,
        output_hidden_states=False,
        output_attentions=False,
    ):
        if output_attentions or not self.fits():
            given = output_hidden_states, output_attentions
            return super().forward(multi_scale_features, mask_features, *given)
        states, normed, embeddings = self.decoded(multi_scale_features, mask_features)
        hidden = tuple(x.transpose(0, 1) for x in states) if output_hidden_states else None
        return theirs.Mask2FormerMaskedAttentionDecoderOutput(
            last_hidden_state=states[-1],
            hidden_states=hidden,
            intermediate_hidden_states=tuple(x.transpose(0, 1) for x in normed),
            masks_queries_logits=tuple(
                Factors(torch.stack(embeddings, 1), mask_features).logits()
            ),
        )


def _layer(layer: theirs.Mask2FormerMaskedAttentionDecoderLayer) -> Layer:
    """The weights of all that comes after the product of the cross attention."""
    attn = layer.self_attn
    parts = (layer.cross_attn.out_proj, layer.cross_attn_layer_norm)
    parts += (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, layer.self_attn_layer_norm)
    parts += (layer.fc1, layer.fc2, layer.final_layer_norm)
    return Layer(*(t for part in parts for t in (part.weight, part.bias)))


class Mask2FormerLoss(theirs.Mask2FormerLoss):
    """The criterion, which takes mask logits or their `Factors`."""

    def forward(
        self,
        masks_queries_logits,  # [B, Q, h, w], or Factors of all predictions
        class_queries_logits,  # [B, Q, K + 1], or [B, R, Q, K + 1]
        mask_labels,
        class_labels,
        auxiliary_predictions=None,
    ):
        given = mask_labels, class_labels, auxiliary_predictions
        losses = point_losses(self, masks_queries_logits, class_queries_logits, *given)
        if losses is not None:
            return losses
        if isinstance(masks_queries_logits, Factors):
            names = "masks_queries_logits", "class_queries_logits"
            pairs = list(zip(masks_queries_logits.logits(), class_queries_logits.unbind(1)))
            auxiliary_predictions = [dict(zip(names, pair)) for pair in pairs[:-1]]
            masks_queries_logits, class_queries_logits = pairs[-1]
        return super().forward(
            masks_queries_logits,
            class_queries_logits,
            mask_labels,
            class_labels,
            auxiliary_predictions,
        )


@as_transformers
class Mask2FormerForUniversalSegmentation(theirs.Mask2FormerForUniversalSegmentation):
    """The whole model, which forms the mask logits of the predictions that are asked for."""

    def forward(
        self,
        pixel_values,
        mask_labels=None,
        class_labels=None,
        pixel_mask=None,
        output_hidden_states=None,
        output_auxiliary_logits=None,
        output_attentions=None,
        return_dict=None,
        **kwargs,
    ):
        def chosen(given, name):
            return getattr(self.config, name) if given is None else given

        hidden = chosen(output_hidden_states, "output_hidden_states")
        auxiliary = chosen(output_auxiliary_logits, "output_auxiliary_logits")
        labelled, module = mask_labels is not None and class_labels is not None, self.model
        queries = module.transformer_module
        if (
            chosen(output_attentions, "output_attentions")
            or not chosen(return_dict, "return_dict")
            or (labelled and not isinstance(self.criterion, Mask2FormerLoss))
            or not isinstance(queries, Mask2FormerTransformerModule)
            or not unhooked(module, queries)
            or not queries.fits()
        ):
            return super().forward(
                pixel_values,
                mask_labels,
                class_labels,
                pixel_mask,
                output_hidden_states,
                output_auxiliary_logits,
                output_attentions,
                return_dict,
                **kwargs,
            )
        pixels = module.pixel_level_module(pixel_values=pixel_values, output_hidden_states=hidden)
        maps, features = pixels.decoder_hidden_states, pixels.decoder_last_hidden_state
        states, normed, embeddings = queries.decoded(maps, features)
        wanted = slice(None) if labelled or auxiliary else slice(-1, None)
        classes = self.class_predictor(torch.stack(normed[wanted], 1))  # [B, R, Q, K + 1]
        factors = Factors(torch.stack(embeddings[wanted], 1), features)
        loss = None
        if labelled:
            parts = self.get_loss_dict(factors, classes, mask_labels, class_labels, None)
            loss = self.get_loss(parts)
        if not auxiliary:
            factors = factors._replace(embeddings=factors.embeddings[:, -1:])
        *earlier, last = factors.logits()
        pairs = zip(earlier, classes.unbind(1))
        names = "masks_queries_logits", "class_queries_logits"
        return theirs.Mask2FormerForUniversalSegmentationOutput(
            loss=loss,
            class_queries_logits=classes[:, -1],
            masks_queries_logits=last,
            auxiliary_logits=[dict(zip(names, p)) for p in pairs] if auxiliary else None,
            encoder_last_hidden_state=pixels.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=features,
            transformer_decoder_last_hidden_state=states[-1],
            encoder_hidden_states=pixels.encoder_hidden_states if hidden else None,
            pixel_decoder_hidden_states=maps if hidden else None,
            transformer_decoder_hidden_states=(
                tuple(x.transpose(0, 1) for x in states) if hidden else None
            ),
        )


PARTS = {
    "deformable_attention": {
        part.__name__: part
        for part in (
            Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
            Mask2FormerPixelDecoderEncoderLayer,
        )
    },
    "masked_attention": {
        part.__name__: part
        for part in (Mask2FormerTransformerModule, Mask2FormerForUniversalSegmentation)
    },
    "loss": {"Mask2FormerLoss": Mask2FormerLoss},
}
CONVOLUTIONS = {"Mask2FormerPixelDecoder", "Mask2FormerTransformerModule"}
