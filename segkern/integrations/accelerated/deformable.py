"""Multi-scale deformable attention of DETR's family and of pixel decoders on `ops.ms_deform_attn`.

Letters: B image, Q query, S pixels of all levels, H head, D channels a head, C = H D, L level,
P point.

transformers writes a map of B H D Q samples for each level and puts them side by side, which is
where most of its time goes; here each query's samples are weighted as they are read.
"""

import torch
from torch import Tensor, nn

from ...nn.recompute import recomputed
from ...ops import feed_forward, ms_deform_attn
from ...ops._linear_exact import linear_exact
from ...ops.ms_deform_attn import multi_scale_deformable_attention
from .plain import plain


class MultiScaleDeformableAttention(nn.Module):
    """The sampling of ten models, which has no weights and is written alike in each."""

    def forward(
        self,
        value,  # [B, S, H, D]
        value_spatial_shapes,
        value_spatial_shapes_list,  # (h, w) of each level
        level_start_index,
        sampling_locations,  # [B, Q, H, L, P, 2]
        attention_weights,  # [B, Q, H, L, P]
        im2col_step,
    ):
        shapes = value_spatial_shapes_list
        return multi_scale_deformable_attention(
            value, shapes, sampling_locations, attention_weights
        )


def ragged(
    value: Tensor,  # [B, S, H, D]
    shapes: list[tuple[int, int]],
    locations: Tensor,  # [B, Q, H, N, 2], the points of all levels
    weights: Tensor,  # [B, Q, H, N]
    counts: list[int],  # points of each level
    method: str = "default",
) -> Tensor:  # [B, Q, C]
    """The same where levels may have several numbers of points; `method` is not read."""
    if len(set(counts)) == 1:
        grid = len(counts), -1
        parts = [(value, shapes, locations.unflatten(3, grid), weights.unflatten(3, grid))]
    else:
        levels = value.split([h * w for h, w in shapes], 1), ([shape] for shape in shapes)
        points = (x.split(counts, 3) for x in (locations, weights))
        rest = [[x.unsqueeze(3) for x in split] for split in points]
        parts = zip(*levels, *rest)
    return sum(multi_scale_deformable_attention(*part) for part in parts)


def fits(attn: nn.Module) -> bool:
    """Whether `sample` may have the weights of a pixel decoder's attention."""
    return plain(attn.sampling_offsets, attn.attention_weights, attn.value_proj)


def sample(
    attn: nn.Module,
    query: Tensor,  # [B, Q, C]
    source: Tensor,  # [B, S, C]
    mask: Tensor | None,  # [B, S] bool, True where a pixel counts as zero
    reference: Tensor,  # [B, Q, L, 2]
    shapes: list[tuple[int, int]],
) -> Tensor:  # [B, Q, C]
    """Attention without its last product; backward forms all but the sampling again."""

    def run(query: Tensor, source: Tensor) -> Tensor:
        value = attn.value_proj(source)
        if mask is not None:
            value = value.masked_fill(mask[..., None], 0.0)
        grid = attn.n_heads, attn.n_levels, attn.n_points
        to_offsets = attn.sampling_offsets
        offsets = linear_exact(query, to_offsets.weight, to_offsets.bias).unflatten(-1, (*grid, 2))
        logits = attn.attention_weights(query).unflatten(-1, grid)
        value = value.unflatten(-1, (attn.n_heads, -1))
        return ms_deform_attn(value, shapes, reference, offsets, logits)

    return recomputed(run, query, source)


def layer(
    self: nn.Module,
    hidden_states: Tensor,  # [B, S, C]
    attention_mask: Tensor | None,
    dropping: bool,  # whether dropout drops anything
    finite: bool,  # whether to cut what is not finite
    **places,
) -> tuple[Tensor] | None:
    """A pixel decoder's layer; None where kernels may not have its weights."""
    if dropping or not plain(self.fc1, self.fc2):
        return None
    attended, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        encoder_hidden_states=hidden_states,
        encoder_attention_mask=attention_mask,
        **places,
    )
    x = self.self_attn_layer_norm(hidden_states + attended)
    weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
    x = self.final_layer_norm(feed_forward(x, *weights, "relu", residual=x))
    if finite and not torch.isfinite(x).all():
        most = torch.finfo(x.dtype).max - 1000
        x = torch.clamp(x, min=-most, max=most)
    return (x,)


PARTS = {"deformable_attention": {"MultiScaleDeformableAttention": MultiScaleDeformableAttention}}
