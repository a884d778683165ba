"""SegFormer of transformers: attention's reduction, feed-forward networks, head and loss.

Letters: B image, h w size of a map, C channels, r the reduction, E channels of the head.
"""

import torch
from torch import Tensor, nn
from transformers.models.segformer import modeling_segformer as theirs

from ...nn.resized_cross_entropy import resized_cross_entropy
from ...ops import attention, dwconv3x3_gelu, linear, resize_sum
from ...ops._checks import exact_dtype
from ...structures.labels import void_of
from .plain import as_transformers, idle, is_gelu, plain, unhooked


class SegformerSequenceReduction(theirs.SegformerSequenceReduction):
    """A convolution whose windows do not overlap, as the product that it is."""

    def forward(self, hidden_states, height, width):
        conv = self.sequence_reduction
        if not plain(conv) or hidden_states.shape[1] != height * width:
            return super().forward(hidden_states, height, width)
        r, (b, _, c) = conv.stride[0], hidden_states.shape
        x = hidden_states.view(b, height, width, c)[:, : height // r * r, : width // r * r]
        x = x.unflatten(2, (-1, r)).unflatten(1, (-1, r)).transpose(2, 3)  # [B, h/r, w/r, r, r, C]
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        return self.layer_norm(linear(x.flatten(3).flatten(1, 2), weight, conv.bias))


class SegformerAttention(theirs.SegformerAttention):
    """Attention whose scores are not stored, by a kernel where no gradient flows."""

    def forward(self, hidden_states, height, width, attention_mask=None, **kwargs):
        if (
            self.config._attn_implementation != "sdpa"
            or attention_mask is not None
            or not idle(self.training, self.attention_dropout)
        ):
            return super().forward(hidden_states, height, width, attention_mask, **kwargs)
        source = hidden_states
        if self.sequence_reduction_ratio > 1:
            source = self.sequence_reduction(hidden_states, height, width)
        parts = (self.q_proj(hidden_states), self.k_proj(source), self.v_proj(source))
        out = attention(*(x.unflatten(-1, (-1, self.head_dim)) for x in parts))
        return self.o_proj(out), None


class SegformerMixMLP(theirs.SegformerMixMLP):
    """Products around a depthwise convolution with GELU inside, on tokens as they lie."""

    def forward(self, hidden_states, height, width):
        conv = self.dwconv.dwconv
        if not (
            idle(self.training, self.dropout.p)
            and is_gelu(self.activation_fn)
            and unhooked(self.dwconv, self.activation_fn, self.dropout)
            and plain(conv)
        ):
            return super().forward(hidden_states, height, width)
        x = self.fc1(hidden_states).unflatten(1, (height, width))
        return self.fc2(dwconv3x3_gelu(x, conv.weight, conv.bias).flatten(1, 2))


class SegformerDecodeHead(theirs.SegformerDecodeHead):
    """The head as a sum of resized maps, each projected once, where it is small.

    The projection of a level and its columns of `linear_fuse` are one product, which goes before
    the resizing, whose weights sum to 1. In inference the batch norm is part of it.
    """

    def forward(self, encoder_hidden_states, **kwargs):
        parts = [part.proj for part in self.linear_projections]
        norm = self.batch_norm
        if not (
            all(x.ndim == 4 for x in encoder_hidden_states)
            and unhooked(self.activation, *self.linear_projections)
            and plain(self.linear_fuse, norm, *parts)
        ):
            return super().forward(encoder_hidden_states, **kwargs)
        folds = not norm.training and norm.running_mean is not None
        matrices, bias = self._composed(parts, folds)
        rows = (linear(x.permute(0, 2, 3, 1), a) for x, a in zip(encoder_hidden_states, matrices))
        x = resize_sum([x.permute(0, 3, 1, 2) for x in rows], bias, relu=folds)
        if not folds:
            x = self.activation(norm(x))
        return self.classifier(self.dropout(x))

    def _composed(self, parts: list[nn.Linear], folds: bool) -> tuple[list[Tensor], Tensor]:
        """The matrix [E, C] of each level and the bias [E], with the norm in them if it folds."""
        weight, norm = self.linear_fuse.weight.flatten(1), self.batch_norm
        exact = exact_dtype(weight)
        with torch.autocast(weight.device.type, enabled=False):
            columns = weight.to(exact).chunk(len(parts), 1)[::-1]  # the last level lies first
            matrices = [f @ part.weight.to(exact) for f, part in zip(columns, parts)]
            bias = sum(f @ part.bias.to(exact) for f, part in zip(columns, parts))
            if folds:
                scale = norm.weight.to(exact) * (norm.running_var.to(exact) + norm.eps).rsqrt()
                matrices = [scale[:, None] * a for a in matrices]
                bias = scale * (bias - norm.running_mean.to(exact)) + norm.bias.to(exact)
        return [a.to(weight.dtype) for a in matrices], bias.to(weight.dtype)


@as_transformers
class SegformerForSemanticSegmentation(theirs.SegformerForSemanticSegmentation):
    """The model with a loss whose resized logits are never held."""

    def forward(self, pixel_values, labels=None, **kwargs):
        config = self.config
        if (
            labels is None
            or config.num_labels < 2
            or config.semantic_loss_ignore_index != void_of(config.num_labels)
        ):
            return super().forward(pixel_values, labels, **kwargs)
        as_dict = kwargs.pop("return_dict", None)
        as_dict = config.return_dict if as_dict is None else as_dict
        out = super().forward(pixel_values, return_dict=True, **kwargs)
        loss = resized_cross_entropy(out.logits, labels, labels.shape[-2:])
        out = type(out)(loss=loss, **out)
        return out if as_dict else out.to_tuple()


PARTS = {
    "attention": {
        part.__name__: part for part in (SegformerSequenceReduction, SegformerAttention)
    },
    "feed_forward": {"SegformerMixMLP": SegformerMixMLP},
    "convolution": {"SegformerDecodeHead": SegformerDecodeHead},
    "loss": {"SegformerForSemanticSegmentation": SegformerForSemanticSegmentation},
}
CONVOLUTIONS = {"SegformerDecodeHead"}
