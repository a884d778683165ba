"""MaskFormer of transformers: criterion and feed-forward networks."""

from transformers.models.maskformer import modeling_maskformer as theirs

from ...ops import feed_forward
from .criterion import whole_mask_losses
from .plain import idle, plain


class MaskFormerDetrMLP(theirs.MaskFormerDetrMLP):
    """A feed-forward network whose hidden layer is not held."""

    def forward(self, hidden_states):
        dropping = not idle(self.training, self.dropout, self.activation_dropout)
        relu = type(self.activation_fn).__name__ == "ReLU"
        if dropping or not relu or not plain(self.fc1, self.fc2):
            return super().forward(hidden_states)
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return feed_forward(hidden_states, *weights, "relu")


class MaskFormerLoss(theirs.MaskFormerLoss):
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
        losses = whole_mask_losses(self, *given, auxiliary_predictions)
        if losses is None:
            return super().forward(*given, auxiliary_predictions)
        return losses


PARTS = {
    "feed_forward": {"MaskFormerDetrMLP": MaskFormerDetrMLP},
    "loss": {"MaskFormerLoss": MaskFormerLoss},
}
CONVOLUTIONS = {"MaskFormerPixelDecoder", "MaskFormerTransformerModule"}
