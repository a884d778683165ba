"""Panoptic quality, and which classes are taken for which.

Letters: H W image size, K class, n target, p predicted segment, t true segment.

    PQ = sum of IoU over matches / (TP + FP / 2 + FN / 2), per class, match: same class, IoU > 1/2
    SQ = mean IoU of the matches,  RQ = PQ / SQ; means go over the classes that occur

Source: Panoptic Segmentation (Kirillov et al., CVPR 2019).
The rules are those of its code, panopticapi: void pixels of the truth leave the union; a segment
that lies by more than half in void and crowds of its class is not counted as wrong; a crowd is
neither matched nor missed.
Differs: torchmetrics' PanopticQuality forgives a missed segment where the prediction is void, and
takes void predictions out of the union; the paper counts them, and so do we.
"""

from collections.abc import Sequence

import numpy as np

from ..structures.segmentation import Segmentation
from .optional import mean_or_none, or_none, ratio_or_none

# IoU and Dice of matches are above 1/2, so that as float64 they are whole multiples of 1 / _UNIT:
# summed as integers they give the same in any order
_UNIT = 2**53


class Panoptic:
    """PQ, and matches of true things with whatever segment covers them."""

    # what adds up over images, and lists with an entry an image
    counted, listed = ("iou", "tp", "fp", "fn", "dice", "confusion"), ()

    def __init__(self, classes: int, stuff: Sequence[int]):
        self.stuff = stuff
        self.tp, self.fp, self.fn = np.zeros((3, classes), np.int64)
        # sums over the matches of each class, of the true class, as integers of any size
        self.iou, self.dice = np.zeros((2, classes), object)
        self.confusion = np.zeros((classes + 1, classes + 1), np.int64)

    def update(self, result: Segmentation, sample: dict) -> float | None:
        """Counts an image in.

        Returns:
            its own PQ, of all classes together; None where nothing could be found nor was.
        """
        true, t_labels, crowd = truth_map(sample, self.stuff)
        p_labels = np.array([s.label_id for s in result.segments], np.int64)
        P, T, K = len(p_labels) + 1, len(t_labels) + 1, len(self.iou)
        predicted = result.segmentation.cpu().numpy().astype(np.int64)
        both = np.bincount((predicted * T + true).ravel(), minlength=P * T).reshape(P, T)
        t_area, p_area, void = both.sum(0)[1:], both.sum(1)[1:], both[1:, 0]
        both = both[1:, 1:]
        union = (p_area - void)[:, None] + t_area - both
        iou = both / np.maximum(union, 1)  # [p, t]
        same, seen = p_labels[:, None] == t_labels, (t_area > 0) & ~crowd
        ignored = void + (both * (same & crowd)).sum(1)
        counted = (p_area > 0) & (ignored <= 0.5 * p_area)

        match = same & (iou > 0.5) & ~crowd
        p, t = match.nonzero()
        overlap = iou[p, t]
        _add(self.iou, t_labels[t], overlap)
        figures = (
            np.bincount(t_labels[t], minlength=K),
            np.bincount(p_labels[counted & ~match.any(1)], minlength=K),
            np.bincount(t_labels[seen & ~match.any(0)], minlength=K),
        )
        for total, x in zip((self.tp, self.fp, self.fn), figures):
            total += x

        things = seen & ~np.isin(t_labels, self.stuff)
        match = (iou > 0.5) & things  # at most one in a row and in a column
        p, t = match.nonzero()
        np.add.at(self.confusion, (t_labels[t], p_labels[p]), 1)
        np.add.at(self.confusion, (t_labels[things & ~match.any(0)], K), 1)
        extra = counted & ~match.any(1) & ~np.isin(p_labels, self.stuff)
        np.add.at(self.confusion, (K, p_labels[extra]), 1)
        dice = 2 * both[p, t] / (p_area[p] - void[p] + t_area[t])
        _add(self.dice, t_labels[t], dice)
        tp, fp, fn = (x.sum() for x in figures)
        return ratio_or_none(overlap.sum(), tp + 0.5 * fp + 0.5 * fn)

    def compute(self, rows: list[dict]) -> dict:
        """PQ and the confusion of segments.

        Args:
            rows: of each class a dict, which gets the figures of that class.

        Returns:
            those of all.
        """
        total = self.tp + 0.5 * self.fp + 0.5 * self.fn
        iou, dice = ((x / _UNIT).astype(np.float64) for x in (self.iou, self.dice))
        figures = np.full((3, len(total)), np.nan)  # pq, sq, rq
        occurs = total > 0
        figures[0, occurs] = iou[occurs] / total[occurs]
        figures[1, occurs] = iou[occurs] / np.maximum(self.tp[occurs], 1)
        figures[2, occurs] = self.tp[occurs] / total[occurs]
        matches, found = self.confusion[:-1, :-1], self.confusion[:-1].sum(1)
        right, matched = matches.diagonal(), matches.sum(1)
        for k, row in enumerate(rows):
            row |= {name: or_none(x) for name, x in zip(("pq", "sq", "rq"), figures[:, k])}
            row |= {n: int(getattr(self, n)[k]) for n in ("tp", "fp", "fn")}
            row["instances"] = int(found[k])
            row["occurs"] = row.get("occurs", False) or bool(self.tp[k] + self.fn[k])
            row["class_accuracy"] = ratio_or_none(right[k], matched[k])
            row["dice"] = ratio_or_none(dice[k], matched[k])
        is_stuff = np.isin(np.arange(len(total)), self.stuff)

        def means(chosen):
            return {
                name: mean_or_none(x[chosen & occurs])
                for name, x in zip(("pq", "sq", "rq"), figures)
            }

        return {
            **means(occurs),
            "things": means(~is_stuff),
            "stuff": means(is_stuff),
            "class_accuracy": ratio_or_none(right.sum(), matched.sum()),
            "dice": ratio_or_none(self.dice.sum() / _UNIT, matched.sum()),
            "matched": int(matched.sum()),
            "instances": int(found.sum()),
            "confusion": self.confusion.tolist(),
        }


def _add(total: np.ndarray, labels: np.ndarray, values: np.ndarray) -> None:
    """Adds values in (1/2, 1] to the sums of their labels, without rounding."""
    np.add.at(total, labels, (values * _UNIT).astype(np.int64).astype(object))


def truth_map(sample: dict, stuff: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The segments of a sample as a map.

    Crowds lie under the others; those of a class are one, and so are the pieces of stuff.

    Returns:
        [H, W] int32 with 0 for void and i for the i-th segment; of the segments the labels [n]
        int64 and which are crowds [n] bool.
    """
    masks, labels = sample["masks"], np.asarray(sample["labels"]).astype(np.int64)
    crowd = np.asarray(sample.get("crowd", np.zeros(len(labels)))).astype(bool)
    ids = np.zeros(masks.shape[1:], np.int32)
    first: dict[tuple[int, bool], int] = {}
    for i in np.argsort(~crowd, kind="stable").tolist():
        label, many = int(labels[i]), bool(crowd[i])
        one = many or label in stuff
        ids[np.asarray(masks[i]) > 0] = first.setdefault((label, many), i + 1) if one else i + 1
    return ids, labels, crowd
