"""OneFormer of transformers: pixel decoder's attention, query decoder, criterion.

Letters: B image, R prediction, Q query, C channels, M channels of the mask features, K class.
"""

import torch
from transformers.models.oneformer import modeling_oneformer as theirs

from ...ops import feed_forward
from ...ops.query_layer import Layer
from . import deformable
from .criterion import Factors, point_losses
from .plain import idle, plain, unhooked
from .queries import attend, decode


class OneFormerPixelDecoderEncoderMultiscaleDeformableAttention(
    theirs.OneFormerPixelDecoderEncoderMultiscaleDeformableAttention
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
        spatial_shapes=None,
        level_start_index=None,
        output_attentions=False,
        spatial_shapes_list=None,
    ):
        if output_attentions or reference_points.shape[-1] != 2 or not deformable.fits(self):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                position_embeddings,
                reference_points,
                spatial_shapes,
                level_start_index,
                output_attentions,
                **_sizes(spatial_shapes_list),
            )
        query = self.with_pos_embed(hidden_states, position_embeddings)
        shapes = spatial_shapes.tolist() if spatial_shapes_list is None else spatial_shapes_list
        given = attention_mask, reference_points, shapes
        out = deformable.sample(self, query, encoder_hidden_states, *given)
        return self.output_proj(out), None


class OneFormerPixelDecoderEncoderLayer(theirs.OneFormerPixelDecoderEncoderLayer):
    """That attention and a feed-forward network whose hidden layer is not held."""

    def forward(
        self,
        hidden_states,
        attention_mask,
        position_embeddings=None,
        reference_points=None,
        spatial_shapes=None,
        level_start_index=None,
        output_attentions=False,
        spatial_shapes_list=None,
    ):
        places = {
            "position_embeddings": position_embeddings,
            "reference_points": reference_points,
            "spatial_shapes": spatial_shapes,
            "level_start_index": level_start_index,
        } | _sizes(spatial_shapes_list)
        # transformers asks the config, not the mode, whether to drop and to cut
        dropping = not idle(self.is_training, self.dropout, self.activation_dropout)
        out = None
        if not output_attentions:
            given = hidden_states, attention_mask, dropping, self.is_training
            out = deformable.layer(self, *given, **places)
        if out is None:
            return super().forward(
                hidden_states, attention_mask, output_attentions=output_attentions, **places
            )
        return out


def _sizes(spatial_shapes_list: list[tuple[int, int]] | None) -> dict:
    """An argument that transformers 5.17 does not have."""
    return {} if spatial_shapes_list is None else {"spatial_shapes_list": spatial_shapes_list}


class OneFormerTransformerDecoderQueryTransformerDecoderLayer(
    theirs.OneFormerTransformerDecoderQueryTransformerDecoderLayer
):
    """A layer of the decoder that makes the queries of the task, without weights of attention."""

    def forward(
        self,
        output,
        memory,
        output_mask=None,
        memory_mask=None,
        output_key_padding_mask=None,
        memory_key_padding_mask=None,
        pos=None,
        query_pos=None,
    ):
        masks = output_mask, memory_mask, output_key_padding_mask, memory_key_padding_mask
        if not (
            all(mask is None for mask in masks)
            and idle(self.training, self.dropout.p)
            and not self.normalize_before
            and type(self.activation).__name__ == "ReLU"
            and plain(*(m for m in self.modules() if m._parameters))
        ):
            return super().forward(output, memory, *masks, pos, query_pos)
        x, pixels = output.transpose(0, 1), memory.transpose(0, 1)
        position = 0.0 if query_pos is None else query_pos.transpose(0, 1)
        keys = pixels if pos is None else pixels + pos.transpose(0, 1)
        placed = x + position
        x = self.norm1(x + attend(self.self_attn, placed, placed, x))
        x = self.norm2(x + attend(self.multihead_attn, x + position, keys, pixels))
        first, second = self.linear1, self.linear2
        weights = first.weight, first.bias, second.weight, second.bias
        return self.norm3(feed_forward(x, *weights, "relu", residual=x)).transpose(0, 1)


class OneFormerTransformerDecoder(theirs.OneFormerTransformerDecoder):
    """The query decoder."""

    def fits(self) -> bool:
        """Whether kernels compute what transformers does with these settings and layers."""
        parts = [*self.layers, self.decoder_norm, self.mask_embed]
        modules = [m for part in parts for m in part.modules()]
        cross = [layer.cross_attn for layer in self.layers]
        return (
            not any(part.normalize_before for part in cross)
            and unhooked(*modules)
            and plain(*(m for m in modules if m._parameters))
        )

    def forward(
        self,
        task_token=None,
        multi_stage_features=None,
        multi_stage_positional_embeddings=None,
        mask_features=None,
        query_features=None,
        query_embeddings=None,
        query_embedder=None,
        size_list=None,
        output_attentions=None,
    ):
        if output_attentions or not self.fits():
            return super().forward(
                task_token,
                multi_stage_features,
                multi_stage_positional_embeddings,
                mask_features,
                query_features,
                query_embeddings,
                query_embedder,
                size_list,
                output_attentions,
            )
        if self.use_task_norm:
            task_token = self.decoder_norm(task_token)  # [1, B, C]
        found = self.query_transformer(
            query_features,
            None,
            query_embedder.weight[:-1],
            self.query_input_projection(mask_features),
            task_token if self.use_task_norm else None,
        )
        queries = torch.cat((found[0], task_token.transpose(0, 1)), 1)  # [B, Q, C]
        states, normed, embeddings = decode(
            queries,
            query_embeddings[:, 0],
            [x.transpose(0, 1) for x in multi_stage_features],
            [x[:, 0] for x in multi_stage_positional_embeddings],
            *(mask_features, size_list),
            [layer.cross_attn.multihead_attn for layer in self.layers],
            [_layer(layer) for layer in self.layers],
            self.decoder_norm,
            [block.layers[0] for block in self.mask_embed.layers],
        )
        classes = self.class_embed(torch.stack(normed, 1)).unbind(1)
        masks = Factors(torch.stack(embeddings, 1), mask_features).logits()
        return theirs.OneFormerTransformerDecoderOutput(
            object_queries=states[-1],
            contrastive_logits=queries,
            prediction_masks=masks[-1],
            prediction_class=classes[-1],
            auxiliary_predictions=(
                self._get_aux_predictions(classes, masks) if self.use_auxiliary_loss else None
            ),
            attentions=((),) * len(self.layers),
        )


def _layer(layer: theirs.OneFormerTransformerDecoderLayer) -> Layer:
    """The weights of all that comes after the product of the cross attention."""
    attn, ffn = layer.self_attn.self_attn, layer.ffn
    parts = (layer.cross_attn.multihead_attn.out_proj, layer.cross_attn.norm)
    parts += (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, layer.self_attn.norm)
    parts += (ffn.linear1, ffn.linear2, ffn.norm)
    return Layer(*(t for part in parts for t in (part.weight, part.bias)))


class OneFormerLoss(theirs.OneFormerLoss):
    """The criterion; the contrastive loss is transformers'."""

    def forward(
        self,
        masks_queries_logits,
        class_queries_logits,
        contrastive_queries_logits,
        mask_labels,
        class_labels,
        text_queries,
        auxiliary_predictions=None,
        calculate_contrastive_loss=True,
    ):
        given = masks_queries_logits, class_queries_logits, mask_labels, class_labels
        losses = point_losses(self, *given, auxiliary_predictions)
        if losses is None:
            return super().forward(
                masks_queries_logits,
                class_queries_logits,
                contrastive_queries_logits,
                mask_labels,
                class_labels,
                text_queries,
                auxiliary_predictions,
                calculate_contrastive_loss,
            )
        if calculate_contrastive_loss:
            losses |= self.loss_contrastive(contrastive_queries_logits, text_queries)
        return losses


PARTS = {
    "deformable_attention": {
        part.__name__: part
        for part in (
            OneFormerPixelDecoderEncoderMultiscaleDeformableAttention,
            OneFormerPixelDecoderEncoderLayer,
        )
    },
    "masked_attention": {
        part.__name__: part
        for part in (
            OneFormerTransformerDecoderQueryTransformerDecoderLayer,
            OneFormerTransformerDecoder,
        )
    },
    "loss": {"OneFormerLoss": OneFormerLoss},
}
CONVOLUTIONS = {"OneFormerPixelDecoder", "OneFormerTransformerModule"}
