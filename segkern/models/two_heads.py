"""What models have in common that classify pixels or find objects, as their config's `task_head`
says: their output, the loss of either head, and settings that follow from others.

Letters: B image, H W image size, Q query, K class, h w size of the mask logits.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import mask_classes
from ..nn.pixel_bce import pixel_bce
from ..ops._checks import expect, expect_integer, expect_labels, got
from ..structures.labels import Labels, void_of
from ..structures.logits import PixelLogits, QueryLogits
from ..structures.outputs import Product, output, returned
from ..structures.settings import InputConfig
from ..structures.targets import Targets
from .query_output import given_targets

HEADS = ("semantic", "instance")
CLASSES = ("query", "mask")


@output
class TwoHeadOutput(dict):
    """What `forward` returns; None is what the head or the arguments do not give.

    Attributes:
        loss: [], of the labels or targets.
        logits: [B, K, H, W], of the semantic head.
        class_queries_logits: [B, Q, K + 1], of the instance head; the last class is "no object".
        masks_queries_logits: [B, Q, h, w], of the instance head, of the image padded to its
            divisor; where there are targets, computed when they are first read.
        losses: unweighted parts of the loss by name, [1] each.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None


def tasks(config) -> tuple[str, ...]:
    """What a config's head can do."""
    if config.task_head == "semantic":
        return ("semantic",)
    return ("instance", "panoptic", "semantic")


def logits(config) -> type:
    """What `predict` returns."""
    return PixelLogits if config.task_head == "semantic" else QueryLogits


def labels(config) -> Labels:
    """Names; without instances all are stuff."""
    semantic = config.task_head == "semantic"
    return Labels(config.id2label, tuple(range(config.num_labels) if semantic else config.stuff))


def input_of(config) -> InputConfig:
    """How images are taken: whole, resized between the edges, padded to the divisor."""
    edge = config.shortest_edge or min(config.image_size)
    longest = config.longest_edge or 4 * edge
    mean, std = config.image_mean, config.image_std
    crop = config.image_size
    return InputConfig(mean, std, edge, longest, config.size_divisor, crop=crop)


def check_settings(config, positive: str) -> None:
    """Checks what both kinds of config have.

    Args:
        config: its `image_size` becomes a tuple.
        positive: names of settings, with spaces, that must be integers of at least 1.

    Raises:
        TypeError, ValueError: a setting that is out of range (names it).
    """
    name = type(config).__name__
    if config.task_head not in HEADS:
        raise ValueError(
            f"{name}: task_head must be 'semantic' or 'instance', got {config.task_head!r}"
        )
    if config.task_head == "semantic":
        config.num_queries = None
    elif config.num_queries is None:
        config.num_queries = config.default_queries
    else:
        expect_integer(f"{name}: num_queries", config.num_queries)
    for setting in ("num_labels", *positive.split()):
        expect_integer(f"{name}: {setting}", getattr(config, setting))
    for setting in ("shortest_edge", "longest_edge"):
        if getattr(config, setting) is not None:
            expect_integer(f"{name}: {setting}", getattr(config, setting))
    config.image_size = tuple(config.image_size)
    for side in config.image_size:
        expect_integer(f"{name}: image_size", side)
    divisor = config.size_divisor
    if len(config.image_size) != 2 or any(side % divisor for side in config.image_size):
        raise ValueError(
            f"{name}: image_size must be (H, W), multiples of {divisor}, got {config.image_size}"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"{name}: dropout must be in [0, 1), got {config.dropout}")
    for setting in ("class_weight", "mask_weight", "dice_weight", "no_object_weight"):
        if not getattr(config, setting) >= 0:
            raise ValueError(f"{name}: {setting} must be >= 0, got {getattr(config, setting)}")
    if config.class_from not in CLASSES:
        raise ValueError(
            f"{name}: class_from must be one of {', '.join(CLASSES)}, got {config.class_from!r}"
        )
    if not config.true_mask_weight >= 0:
        raise ValueError(f"{name}: true_mask_weight must be >= 0, got {config.true_mask_weight}")
    if config.true_mask_weight and (config.task_head, config.class_from) != ("instance", "mask"):
        raise ValueError(
            f"{name}: true_mask_weight must be 0 but for task_head 'instance' with class_from "
            f"'mask', got {config.true_mask_weight}"
        )
    _ = config.input  # checks its own


def padded(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Images, padded with zeros to the right and below to multiples of the divisor.

    Raises:
        TypeError, ValueError: wrong dtype or shape.
    """
    name, channels = type(model).__name__, model.config.input.channels
    expect(name, "pixel_values", pixel_values, f"B {channels} H W", "float", {})
    if 0 in pixel_values.shape:
        raise ValueError(f"{name}: pixel_values must not be empty, got {got(pixel_values)}")
    divisor = model.config.size_divisor
    H, W = pixel_values.shape[2:]
    return F.pad(pixel_values, (0, -W % divisor, 0, -H % divisor))


def loss_of_pixels(
    model: nn.Module,
    found: PixelLogits,
    labels: Tensor,
    size: tuple[int, int],
    normalizer: Tensor | None = None,
) -> Tensor:
    """[]: mean binary cross entropy of class logits [B, K, h, w] at labels [B, H, W] int64.

    Args:
        size: (H, W) of the images.

    Raises:
        TypeError, ValueError: wrong dtype or shape, or a label out of range.
    """
    name, K = type(model).__name__, model.config.num_labels
    sizes = {"B": len(found.maps), "H": size[0], "W": size[1]}
    expect(name, "labels", labels, "B H W", "int64", sizes)
    expect_labels(name, labels, K, void_of(K))
    return pixel_bce(found.maps, labels, normalizer)


def loss(
    model: nn.Module, found: PixelLogits | QueryLogits, pixel_values: Tensor, targets: Targets
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of either head.

    Args:
        model: has, for the instance head, a `criterion`.
        found: what it predicts for them.
        pixel_values: [B, C, H, W] floating, normalised.
        targets: of the same B images, on the same device; for the semantic head with `semantic`.

    Returns:
        the weighted sum [], and its parts by name, [1] each, unweighted: "loss_bce", or
        "loss_cross_entropy" and "loss_dice" (and "loss_mask" where it has a weight).

    Raises:
        ValueError: targets without a map of labels, or a label out of range.
    """
    if isinstance(found, PixelLogits):
        if targets.semantic is None:
            name = type(model).__name__
            raise ValueError(f"{name}: targets must have a semantic map, got None")
        labels, size = targets.semantic.long(), pixel_values.shape[2:]
        value = loss_of_pixels(model, found, labels, size, targets.pixel_normalizer)
        return value, {"loss_bce": value[None]}
    coarse, stride = None, model.config.match_stride
    if stride > 1:
        size = [max(1, n // stride) for n in found.features.shape[2:]]
        coarse = F.interpolate(found.features.detach(), size=size, mode="bilinear")
    given = found.classes[:, None], found.masks[:, None], found.features
    return model.criterion(*given, targets, coarse)


def scored(
    model: nn.Module, pixel_values: Tensor, targets: Targets
) -> tuple[PixelLogits | QueryLogits, Tensor, dict[str, Tensor]]:
    """What a model predicts, and its `loss`, whose arguments and errors it has; with
    true_mask_weight the part "loss_true_class", of the classes under the true masks."""
    found, states, grid = model.prediction(pixel_values)
    total, losses = loss(model, found, pixel_values, targets)
    if model.config.true_mask_weight:
        weights = mask_classes.true_cover(targets, grid, states.dtype)
        logits = model.classes_of(mask_classes.mean_under(weights, states))
        value = mask_classes.true_class_loss(logits, targets)
        total = total + model.config.true_mask_weight * value
        losses["loss_true_class"] = value[None]
    return found, total, losses


def forward(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor | None,
    mask_labels: Sequence[Tensor] | None,
    class_labels: Sequence[Tensor] | None,
    return_dict: bool | None,
    targets: Targets | None,
) -> TwoHeadOutput | tuple:
    """Predictions, and the loss if there is a truth; what `Seq2Seg.forward` has is not said again.

    Raises:
        TypeError, ValueError: wrong dtype, shape or combination of arguments.
    """
    name, truths = type(model).__name__, "mask_labels and class_labels"
    lists = mask_labels is not None or class_labels is not None
    semantic = model.config.task_head == "semantic"
    if semantic and lists:
        raise ValueError(f"{name}: {truths} are for task_head 'instance': give labels")
    if not semantic and labels is not None:
        raise ValueError(f"{name}: labels are for task_head 'semantic': give {truths}")
    if targets is not None and labels is not None:
        raise ValueError(f"{name}: targets must be given alone, got labels beside them")
    targets = given_targets(model, pixel_values, mask_labels, class_labels, targets)
    out = TwoHeadOutput()
    if targets is not None:
        found, out.loss, out.losses = model.scored(pixel_values, targets)
    else:
        found = model.predict(pixel_values)
    if labels is not None:
        out.loss = loss_of_pixels(model, found, labels, pixel_values.shape[2:])
        out.losses = {"loss_bce": out.loss[None]}
    if semantic:
        out.logits = found.maps[:, :, : pixel_values.shape[2], : pixel_values.shape[3]]
    else:
        masks = found.masks
        if found.features is not None:
            product = Product(found.masks, found.features)
            masks = product.tensor() if out.loss is None else product
        out.class_queries_logits, out.masks_queries_logits = found.classes, masks
    return returned(out, return_dict)
