"""The forward pass that models of queries share: Hugging Face's arguments in, its names out.

Letters: B image, H W image size, h w size of the maps, R prediction, Q query, T target, K class,
C channels, M channels of the mask features.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..ops._checks import expect, got
from ..structures.outputs import Product, output, returned
from ..structures.targets import Targets

_VOID = 255  # in masks


@output
class QueryOutput(dict):
    """What `forward` of a model of queries returns: the names, in the order, of transformers.

    Attributes:
        loss: [], weighted sum of the parts in `losses`; None without targets.
        class_queries_logits: [B, Q, K + 1]; the last class is "no object".
        masks_queries_logits: [B, Q, h, w]; where there are targets, computed when they are first
            read.
        auxiliary_logits: class_queries_logits and masks_queries_logits of every prediction but the
            last, if asked for.
        encoder_last_hidden_state: [B, *, *, *], the backbone's coarsest map.
        pixel_decoder_last_hidden_state: [B, M, h, w], the mask features; of MaskFormer, which may
            not form them, if asked for.
        transformer_decoder_last_hidden_state: [B, Q, C], queries after the last layer.
        encoder_hidden_states: the backbone's four maps, finest first, if asked for, as the next.
        pixel_decoder_hidden_states: [B, C, *, *] each, coarsest first; of Mask2Former.
        transformer_decoder_hidden_states: [B, Q, C] each, queries before each layer and after the
            last.
        losses: "loss_cross_entropy", "loss_mask" and "loss_dice" of each trained prediction, [R]
            each, unweighted; None without targets. transformers has none.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None


class HiddenStates(NamedTuple):
    """What a model computes on the way; the last of each is always there, the others if asked for.

    Attributes:
        encoder: the backbone's maps, finest first.
        pixel_decoder: [B, C, *, *] each, coarsest first; () of a model that has no such maps.
        decoder: [B, Q, C] each, queries before each layer and after the last.
        features: [B, M, h, w], the mask features; None of a model that need not form them.
    """

    encoder: tuple[Tensor, ...]
    pixel_decoder: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]
    features: Tensor | None = None


class Predictions(NamedTuple):
    """Of all queries, with the masks as two factors.

    Attributes:
        classes: [B, R, Q, K + 1].
        embeddings: [B, R, Q, M].
        features: [B, M, h, w]; mask logits are the product of the last two over M.
        hidden: what was computed on the way.
    """

    classes: Tensor
    embeddings: Tensor
    features: Tensor
    hidden: HiddenStates


def maps_of(pixels: Tensor, shapes: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    """The pixels of all levels [B, S, C] as the maps [B, C, h, w] of each."""
    split = pixels.split([h * w for h, w in shapes], 1)
    return tuple(x.mT.unflatten(2, size) for x, size in zip(split, shapes))


def only_last(
    model: nn.Module, targets: Targets | None, output_auxiliary_logits: bool | None
) -> bool:
    """Whether `query_output` needs no prediction but the last."""
    return not output_auxiliary_logits and (targets is None or not model.deep_supervision)


def query_output(
    model: nn.Module,
    found: Predictions,
    targets: Targets | None,
    output_auxiliary_logits: bool | None,
    output_hidden_states: bool | None,
    return_dict: bool | None,
    losses: tuple[Tensor, dict[str, Tensor]] | None = None,
) -> QueryOutput | tuple:
    """The output of predictions, and the loss if there are targets.

    Args:
        model: has `criterion` and `deep_supervision` (whether every prediction is trained and not
            the last alone).
        found: all predictions, or the last, where `only_last`.
        targets: of the same images.
        output_auxiliary_logits: also give the logits of the earlier predictions.
        output_hidden_states: also give what was computed on the way.
        return_dict: False gives a tuple of what is not None.
        losses: the loss and its parts, of a model that counts more than its `criterion`.
    """
    classes, embeddings, features, hidden = found
    out = QueryOutput(class_queries_logits=classes[:, -1])
    if targets is not None:
        trained = slice(None) if model.deep_supervision else slice(-1, None)
        predictions = classes[:, trained], embeddings[:, trained]
        out.loss, out.losses = losses or model.criterion(*predictions, features, targets)
    masks = Product(embeddings[:, -1], features)
    unread = targets is not None and not output_auxiliary_logits
    out.masks_queries_logits = masks if unread else masks.tensor()
    if output_auxiliary_logits:
        out.auxiliary_logits = [
            {
                "class_queries_logits": classes[:, r],
                "masks_queries_logits": mask_logits(embeddings[:, r], features),
            }
            for r in range(classes.shape[1] - 1)
        ]
    add_hidden_states(out, hidden, output_hidden_states)
    return returned(out, return_dict)


def add_hidden_states(
    out: QueryOutput, hidden: HiddenStates, output_hidden_states: bool | None
) -> None:
    """Gives an output what was computed on the way: the last of each, and all if asked for."""
    out.encoder_last_hidden_state = hidden.encoder[-1]
    out.pixel_decoder_last_hidden_state = hidden.features
    out.transformer_decoder_last_hidden_state = hidden.decoder[-1]
    if output_hidden_states:
        out.encoder_hidden_states = hidden.encoder
        out.pixel_decoder_hidden_states = hidden.pixel_decoder or None
        out.transformer_decoder_hidden_states = hidden.decoder


def given_targets(
    model: nn.Module,
    pixel_values: Tensor,
    mask_labels: Sequence[Tensor] | None,
    class_labels: Sequence[Tensor] | None,
    targets: Targets | None,
) -> Targets | None:
    """The targets that were given, the lists packed.

    Args:
        model: has `config`.
        pixel_values: [B, C, H, W].
        mask_labels: for each image [T_b, *, *] of any dtype: 1 inside, 0 outside, 255 where a
            pixel has no weight; of one size in a batch, which need not be the images'. Together
            with `class_labels`.
        class_labels: for each image [T_b] integers in [0, K).
        targets: the same, packed; not together with the lists.

    Raises:
        TypeError, ValueError: wrong dtype, shape, value or combination of arguments.
    """
    if mask_labels is None and class_labels is None:
        return targets
    name = type(model).__name__
    if targets is not None or mask_labels is None or class_labels is None:
        raise ValueError(f"{name}: give mask_labels and class_labels together, or targets alone")
    if len(mask_labels) != len(pixel_values):
        raise ValueError(
            f"{name}: mask_labels must be of {len(pixel_values)} images, got {len(mask_labels)}"
        )
    masks, void = split_void(name, mask_labels)
    config = model.config
    return Targets.from_lists(
        masks,
        class_labels,
        num_labels=config.num_labels,
        num_queries=config.num_queries,
        void=void,
    ).to(pixel_values.device)


def split_void(
    name: str, mask_labels: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Masks without 255, and for each image the pixels [*, *] bool where a mask has it.

    255 is what image processors fill padding with, where they are told to ignore it.

    Args:
        name: of the model, for messages.
        mask_labels: for each image [T_b, *, *].

    Raises:
        TypeError: no tensor [T_b, *, *].
        ValueError: an image whose masks have 255 and no 1, which are masks of 0 and 255.
    """
    masks, void = [], []
    for b, mask in enumerate(mask_labels):
        if not isinstance(mask, Tensor) or mask.ndim != 3:
            raise TypeError(
                f"{name}: mask_labels of image {b} must be a tensor [T, H, W], got {got(mask)}"
            )
        ignored = mask == _VOID
        void.append(ignored.any(0))
        if void[-1].any() and not (mask == 1).any():
            raise ValueError(
                f"{name}: mask_labels of image {b} must be 1 inside, 0 outside and {_VOID} where "
                f"a pixel has no weight, got {_VOID} and no 1 (give masks > 0)"
            )
        masks.append(mask.masked_fill(ignored, 0) if void[-1].any() else mask)
    return masks, void if any(v.any() for v in void) else None


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
    return Product(embeddings, mask_features).tensor()
