"""The deformable attention of transformers' RT-DETR v2."""

from transformers.models.rt_detr_v2 import modeling_rt_detr_v2 as theirs

from .deformable import ragged


class RTDetrV2MultiscaleDeformableAttention(theirs.RTDetrV2MultiscaleDeformableAttention):
    """Attention around boxes, whose offsets are shares of a box."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        position_embeddings=None,
        reference_points=None,  # [B, Q, 1, 4]
        spatial_shapes=None,
        spatial_shapes_list=None,
        level_start_index=None,
        **kwargs,
    ):
        if self.method != "default" or reference_points.shape[-1] != 4:
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                position_embeddings,
                reference_points,
                spatial_shapes,
                spatial_shapes_list,
                level_start_index,
                **kwargs,
            )
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(~attention_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.n_heads, -1))
        offsets = self.sampling_offsets(hidden_states).unflatten(-1, (self.n_heads, -1, 2))
        weights = self.attention_weights(hidden_states).unflatten(-1, (self.n_heads, -1))
        weights = weights.softmax(-1)  # [B, Q, H, N]
        centre, size = reference_points[:, :, None].split(2, -1)  # [B, Q, 1, 1, 2]
        scale = self.n_points_scale.to(hidden_states.dtype)[:, None]
        places = centre + offsets * scale * size * self.offset_scale
        out = ragged(value, spatial_shapes_list, places, weights, self.n_points_list)
        return self.output_proj(out), weights


PARTS = {
    "deformable_attention": {
        "RTDetrV2MultiscaleDeformableAttention": RTDetrV2MultiscaleDeformableAttention
    }
}
