"""What models of pixels share: the label map of an image, and the loss of a map of labels.

Letters: B image, C channel, H W image size.
"""

import torch
from torch import Tensor, nn

from ..nn.bilinear import resize_matrix
from ..ops import resize_argmax
from ..structures.targets import Targets


@torch.no_grad()
def label_map(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The likeliest class of each pixel, of logits resized to the image's size and never held.

    Args:
        model: its `predict` gives `PixelLogits`.
        pixel_values: [B, C, H, W] floating, normalised, as `predict` takes them.

    Returns:
        [B, H, W] int32.
    """
    maps, stride = model.predict(pixel_values)
    rows, columns = (
        resize_matrix(n, stride, length, maps.device)
        for n, length in zip(maps.shape[2:], pixel_values.shape[2:])
    )
    return resize_argmax(maps, rows, columns)


def labelled_loss(
    model: nn.Module, pixel_values: Tensor, targets: Targets
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss.

    Args:
        model: called with pixels, labels [B, H, W] and `normalizer`, what their loss is divided
            by.
        pixel_values: [B, C, H, W] floating, normalised.
        targets: of the same B images, on the same device, with `semantic`.

    Returns:
        the loss [], and the same as "loss_cross_entropy", [1].

    Raises:
        ValueError: targets without a map of labels, or a label out of range.
    """
    if targets.semantic is None:
        name = type(model).__name__
        raise ValueError(f"{name}: targets must have a semantic map, got None")
    labels, normalizer = targets.semantic.long(), targets.pixel_normalizer
    loss = model(pixel_values, labels, normalizer=normalizer).loss
    return loss, {"loss_cross_entropy": loss[None]}
