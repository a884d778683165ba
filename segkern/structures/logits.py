"""The two forms that a model's predictions take: masks of queries, or class logits of pixels.

Letters: B image, Q query, K class, C channel, h w size of the maps.
"""

from typing import NamedTuple

from torch import Tensor


class QueryLogits(NamedTuple):
    """Masks with a class each, as Mask2Former gives them.

    Attributes:
        classes: [B, Q, K + 1]; the last class is "no object".
        masks: mask logits [B, Q, h, w]; or, with `features`, embeddings [B, Q, C], whose product
            with the features they are, so that no one need form the maps of all queries.
        features: [B, C, h, w] or None.
    """

    classes: Tensor
    masks: Tensor
    features: Tensor | None = None


class PixelLogits(NamedTuple):
    """Class logits on a coarse grid, as Segmenter gives them.

    Attributes:
        maps: [B, K, h, w]: of the image padded with zeros to the right and below to h x w cells.
        stride: side of a cell in pixels of the image.
    """

    maps: Tensor
    stride: int
