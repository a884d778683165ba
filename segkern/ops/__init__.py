"""The ops: `segkern.ops.NAME(..., impl="kernel" | "reference")`.

The specification of each is `NAME_reference` in its file.
"""

from . import _norm_relu as _norm_relu  # of backbones alone, but declared with the others
from .attention import attention as attention
from .conv3x3 import conv3x3 as conv3x3
from .dwconv3x3_gelu import dwconv3x3_gelu as dwconv3x3_gelu
from .feed_forward import feed_forward as feed_forward
from .group_norm import group_norm as group_norm
from .linear import linear as linear
from .linear_assignment import linear_assignment as linear_assignment
from .mask_bits import mask_bits as mask_bits
from .mask_bits import pack_bits as pack_bits
from .mask_bits import unpack_bits as unpack_bits
from .masked_attn import masked_attn as masked_attn
from .matching_cost import matching_cost as matching_cost
from .ms_deform_attn import ms_deform_attn as ms_deform_attn
from .ms_deform_attn import multi_scale_deformable_attention as multi_scale_deformable_attention
from .neighborhood_attn import neighborhood_attn as neighborhood_attn
from .point_mask_loss import point_mask_loss as point_mask_loss
from .point_sample import point_sample as point_sample
from .point_sample import random_points as random_points
from .query_layer import query_layer as query_layer
from .query_layer import query_prediction as query_prediction
from .resize_argmax import resize_argmax as resize_argmax
from .resize_sum import resize_sum as resize_sum
from .segment_map import SegmentMap as SegmentMap
from .segment_map import segment_map as segment_map
from .upscale import upscale as upscale
from .window_attn import window_attn as window_attn
