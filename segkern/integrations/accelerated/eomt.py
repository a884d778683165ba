"""EoMT of transformers: attention, feed-forward networks, upscaling, criterion."""

from transformers.models.eomt import modeling_eomt as theirs

from ...ops import attention, feed_forward, upscale
from .criterion import point_losses
from .plain import idle, is_gelu, plain, unhooked


class EomtAttention(theirs.EomtAttention):
    """Attention without a mask, whose scores are not stored."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if (
            attention_mask is not None
            or self.config._attn_implementation != "sdpa"
            or not idle(self.training, self.dropout)
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        heads = (part(hidden_states).unflatten(-1, (self.num_heads, -1)) for part in parts)
        return self.out_proj(attention(*heads)), None


class EomtMLP(theirs.EomtMLP):
    """A feed-forward network whose hidden layer is not held."""

    def forward(self, hidden_states):
        activation = getattr(self, "activation_fn", None) or self.activation  # of 5.17
        if not is_gelu(activation) or not plain(self.fc1, self.fc2):
            return super().forward(hidden_states)
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return feed_forward(hidden_states, *weights)


class EomtScaleLayer(theirs.EomtScaleLayer):
    """Twice the resolution of a map."""

    def forward(self, hidden_states):
        first, second, norm = self.conv1, self.conv2, self.layernorm2d
        if not (
            is_gelu(self.activation)
            and unhooked(self.activation, norm)
            and plain(first, second)
            and first.bias is not None
        ):
            return super().forward(hidden_states)
        weights = first.weight, first.bias, second.weight, norm.weight, norm.bias, norm.eps
        return upscale(hidden_states.permute(0, 2, 3, 1), *weights).permute(0, 3, 1, 2)


class EomtLoss(theirs.EomtLoss):
    """The criterion."""

    def forward(
        self,
        masks_queries_logits,
        class_queries_logits,
        mask_labels,
        class_labels,
        auxiliary_predictions=None,
    ):
        given = (masks_queries_logits, class_queries_logits, mask_labels, class_labels)
        losses = point_losses(self, *given, auxiliary_predictions)
        if losses is None:
            return super().forward(*given, auxiliary_predictions)
        return losses


PARTS = {
    "attention": {"EomtAttention": EomtAttention},
    "feed_forward": {"EomtMLP": EomtMLP},
    "convolution": {"EomtScaleLayer": EomtScaleLayer},
    "loss": {"EomtLoss": EomtLoss},
}
