"""What EoMT returns, and the predictions that this is made of.

Letters as in model.py.
"""

from typing import NamedTuple

from torch import Tensor

from ...structures.outputs import Product, output


@output
class EoMTOutput(dict):
    """What `EoMT.forward` returns.

    Attributes:
        loss: [], weighted sum of `losses`; None without targets.
        class_queries_logits: [B, Q, K + 1]; the last class is "no object".
        masks_queries_logits: [B, Q, h, w]; where there are targets, computed when they are first
            read.
        last_hidden_state: [B, T, D], queries first.
        hidden_states: tokens [B, *, D] before each block, and the last, normed; queries first
            where there are any; if asked for.
        patch_offsets: as they were given, for Hugging Face's image processor.
        auxiliary_logits: class_queries_logits and masks_queries_logits of every prediction but the
            last, if asked for.
        losses: "loss_cross_entropy", "loss_mask" and "loss_dice" of each prediction, [R] each,
            unweighted; None without targets.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    patch_offsets: list[Tensor] | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    losses: dict[str, Tensor] | None = None


class Prediction(NamedTuple):
    """Of all queries.

    Attributes:
        classes: [B, Q, K + 1].
        embeddings: [B, Q, D].
        features: [B, D, h, w]; mask logits are the product of the last two over D.
    """

    classes: Tensor
    embeddings: Tensor
    features: Tensor

    def product(self) -> Product:
        """Of which the mask logits [B, Q, h, w] are."""
        return Product(self.embeddings, self.features.to(self.embeddings.dtype))
