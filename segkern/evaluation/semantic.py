"""Figures of semantic results, from their confusion matrix.

Letters: TP, FP, FN are pixels of a class; void pixels of the truth do not count.

    IoU = TP / (TP + FP + FN),  F1 = 2 TP / (2 TP + FP + FN),  accuracy of a class = TP / (TP + FN)
    mIoU, F1, mean accuracy: over the classes that occur;  pixel accuracy = right pixels / pixels
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..structures.segmentation import Segmentation
from .optional import import_extra, mean_or_none, or_none, ratio_or_none


class Semantic:
    """Figures from torchmetrics' confusion matrix of the pixels not void."""

    # what adds up over images, and lists with an entry an image
    counted, listed = ("pixels",), ()

    def __init__(self, classes: int, stuff: Sequence[int]):
        matrix = import_extra("torchmetrics.classification").MulticlassConfusionMatrix
        self.classes = classes
        # what processes counted `evaluate` adds up
        self.matrix = matrix(classes, validate_args=False, sync_on_compute=False)

    @property
    def pixels(self) -> np.ndarray:
        """[K, K] int64: truth by prediction."""
        return self.matrix.confmat.cpu().numpy()

    @pixels.setter
    def pixels(self, value: np.ndarray) -> None:
        """Puts the counts of all processes in place of its own."""
        self.matrix.confmat = torch.from_numpy(value)

    def update(self, result: Segmentation, sample: dict) -> float | None:
        """Counts an image in.

        Returns:
            its own mIoU, over the classes in truth or result; None where all is void.
        """
        target = torch.as_tensor(np.asarray(sample["semantic"])).long()
        counts = (target >= 0) & (target < self.classes)  # else void
        found, target = result.segmentation.cpu().long()[counts], target[counts]
        self.matrix.update(found, target)
        sizes = (
            torch.bincount(x, minlength=self.classes)
            for x in (target[found == target], found, target)
        )
        right, found, target = (x.numpy() for x in sizes)
        return mean_or_none(_share(right, found + target - right))

    def compute(self, rows: list[dict]) -> dict:
        """IoU, F1, accuracy and the confusion of pixels.

        Args:
            rows: of each class a dict, which gets the figures of that class.

        Returns:
            those of all.
        """
        matrix = self.matrix.compute().numpy().reshape(self.classes, -1)  # of one class a number
        right, found, true = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
        figures = {
            "iou": _share(right, found + true - right),
            "f1": _share(2 * right, found + true),
            "pixel_accuracy": _share(right, true),
        }
        for k, row in enumerate(rows):
            row |= {name: or_none(x[k]) for name, x in figures.items()}
            row["occurs"] = row.get("occurs", False) or bool(true[k])
        return {
            "miou": mean_or_none(figures["iou"]),
            "f1": mean_or_none(figures["f1"]),
            "pixel_accuracy": ratio_or_none(right.sum(), matrix.sum()),
            "mean_accuracy": mean_or_none(figures["pixel_accuracy"]),
            "pixel_confusion": matrix.tolist(),
        }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Their ratio, NaN where there is nothing."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
