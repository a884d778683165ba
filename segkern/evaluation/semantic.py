"""Mean IoU and pixel accuracy of semantic results."""

from collections.abc import Sequence

import numpy as np
import torch

from ..structures.segmentation import Segmentation
from .optional import import_extra, mean_or_none, or_none, ratio_or_none


class Semantic:
    """mIoU and pixel accuracy from torchmetrics' confusion matrix of the pixels not void."""

    def __init__(self, classes: int, stuff: Sequence[int]):
        matrix = import_extra("torchmetrics.classification").MulticlassConfusionMatrix
        self.classes = classes
        self.matrix = matrix(classes, validate_args=False)

    def update(self, result: Segmentation, sample: dict) -> None:
        target = torch.as_tensor(np.asarray(sample["semantic"])).long()
        counts = (target >= 0) & (target < self.classes)  # else void
        self.matrix.update(result.segmentation.cpu().long()[counts], target[counts])

    def compute(self, rows: list[dict]) -> dict:
        matrix = self.matrix.compute().numpy().reshape(self.classes, -1)  # of one class a number
        right, pixels = matrix.diagonal(), matrix.sum()
        union = matrix.sum(0) + matrix.sum(1) - right
        iou = np.where(union > 0, right / np.maximum(union, 1), np.nan)
        for row, value, true in zip(rows, iou, matrix.sum(1)):
            row["iou"] = or_none(value)
            row["occurs"] = row.get("occurs", False) or bool(true)
        return {"miou": mean_or_none(iou), "pixel_accuracy": ratio_or_none(right.sum(), pixels)}
