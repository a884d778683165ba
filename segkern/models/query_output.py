"""The forward pass that models of queries share: Hugging Face's arguments in, its names out.

Letters: B image, H W image size, h w size of the maps, R prediction, Q query, T target, K class,
M channels of the mask features.
"""

from torch import Tensor, nn

from ..ops._checks import expect, got
from ..ops.upscale import masks_of
from ..structures.outputs import output
from ..structures.targets import Targets


@output
class QueryOutput:
    """What `forward` of a model of queries returns.

    Attributes:
        loss: [], weighted sum of `losses`; None without targets.
        class_queries_logits: [B, Q, K + 1]; the last class is "no object".
        masks_queries_logits: [B, Q, h, w]; None in training with targets, unless
            `auxiliary_logits` was asked for.
        auxiliary_logits: class_queries_logits and masks_queries_logits of every prediction but the
            last, if asked for.
        losses: "loss_cross_entropy", "loss_mask" and "loss_dice" of each trained prediction, [R]
            each, unweighted; None without targets.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    losses: dict[str, Tensor] | None = None


def query_output(
    model: nn.Module,
    pixel_values: Tensor,
    mask_labels: list[Tensor] | None,
    class_labels: list[Tensor] | None,
    targets: Targets | None,
    auxiliary_logits: bool,
) -> QueryOutput:
    """Predictions, and the loss if there are targets.

    Args:
        model: has `all_predictions`, `criterion`, `deep_supervision` (whether every prediction is
            trained and not the last alone) and `config`.
        pixel_values: [B, C, H, W] floating, normalised, zero-padded to the right and below.
        mask_labels: for each image [T_b, H, W] float, bool or uint8; together with `class_labels`.
        class_labels: for each image [T_b] int64 in [0, K).
        targets: the same, packed; not together with the lists.
        auxiliary_logits: also return the logits of the earlier predictions.

    Raises:
        TypeError, ValueError: wrong dtype, shape or combination of arguments.
    """
    targets = given_targets(model, pixel_values, mask_labels, class_labels, targets)
    last = not auxiliary_logits and (targets is None or not model.deep_supervision)
    class_logits, embeddings, mask_features = model.all_predictions(pixel_values, last)
    out = QueryOutput(class_queries_logits=class_logits[:, -1])
    if targets is not None:
        trained = slice(None) if model.deep_supervision else slice(-1, None)
        predictions = class_logits[:, trained], embeddings[:, trained]
        out.loss, out.losses = model.criterion(*predictions, mask_features, targets)
    if targets is None or not model.training or auxiliary_logits:
        out.masks_queries_logits = mask_logits(embeddings[:, -1], mask_features)
    if auxiliary_logits:
        out.auxiliary_logits = [
            {
                "class_queries_logits": class_logits[:, r],
                "masks_queries_logits": mask_logits(embeddings[:, r], mask_features),
            }
            for r in range(class_logits.shape[1] - 1)
        ]
    return out


def given_targets(
    model: nn.Module,
    pixel_values: Tensor,
    mask_labels: list[Tensor] | None,
    class_labels: list[Tensor] | None,
    targets: Targets | None,
) -> Targets | None:
    """The targets that were given, the lists packed; arguments as of `query_output`."""
    if mask_labels is not None or class_labels is not None:
        if targets is not None or mask_labels is None or class_labels is None:
            raise ValueError(
                f"{type(model).__name__}: give mask_labels and class_labels together, or targets "
                "alone"
            )
        targets = Targets.from_lists(
            mask_labels,
            class_labels,
            pixel_values.shape[2:],
            model.config.num_labels,
            num_queries=model.config.num_queries,
        ).to(pixel_values.device)
    return targets


def expect_pixels(model: nn.Module, pixel_values: Tensor) -> None:
    """Raises TypeError or ValueError where images are not [B, C, H, W] floating with pixels."""
    name, shape = type(model).__name__, f"B {model.config.input.channels} H W"
    expect(name, "pixel_values", pixel_values, shape, "float", {})
    if 0 in pixel_values.shape:
        raise ValueError(f"{name}: pixel_values must not be empty, got {got(pixel_values)}")


def mask_logits(embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """Product of mask embeddings and mask features.

    Args:
        embeddings: [B, Q, M].
        mask_features: [B, M, h, w].

    Returns:
        [B, Q, h, w].
    """
    return masks_of(embeddings, mask_features.permute(0, 2, 3, 1))
