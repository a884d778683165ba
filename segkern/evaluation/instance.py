"""Mask AP and boundary AP of instance results, and what each score threshold would leave.

Letters: T IoU threshold, p result, t true object.

    AP = precision at 101 recalls, meaned, at each IoU of 0.5 to 0.95
    boundary AP = the same where IoU is the lesser of that of the masks and of their boundaries
    F1 = 2 TP / (results + objects) at IoU 0.5 of the results with at least a score

Matching and AP are pycocotools'. Of a result it takes no more than its score and the thresholds at
which it found something: no masks are kept, so that thousands of images fit. Crowds are COCO's:
what lies in one is neither right nor wrong, and the union is the result's own area.
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np

from ..structures.segmentation import Segmentation
from .boundary import boundary
from .optional import import_extra, mean_or_none, ratio_or_none

SURE = 0.5  # least score of what the confusion matrix and an image's own F1 count
_GRID = np.linspace(0, 1, 101)  # score thresholds
# of a result: bit T of `hit` says that it found an object at that IoU, of `ignored` that it does
# not count there; of masks and of boundaries
_RESULT = np.dtype([("label", "i4"), ("score", "f8"), ("hit", "u2", 2), ("ignored", "u2", 2)])


class Instances:
    """AP of masks and of boundaries.

    Args:
        classes: their number.
        stuff: labels without instances, which do not count.
        most: results of a class in an image that count, the best ones.
    """

    # what adds up over images, and lists with an entry an image
    counted, listed = ("objects", "crowds", "confusion"), ("results",)

    def __init__(self, classes: int, stuff: Sequence[int], most: int = 100):
        self.coco = import_extra("pycocotools.mask")
        self.run = import_extra("pycocotools.cocoeval").COCOeval(iouType="segm")
        self.things = [k for k in range(classes) if k not in stuff]
        self.most = most
        self.objects = np.zeros(classes, np.int64)  # true ones, without crowds
        self.crowds = np.zeros(classes, np.int64)
        self.confusion = np.zeros((classes + 1, classes + 1), np.int64)
        self.results: list[np.ndarray] = []  # of equal scores the first image's ranks first

    def update(self, result: Segmentation, sample: dict) -> float | None:
        """Counts an image in.

        Returns:
            F1 of its results with a score of at least `SURE`; None where nothing could be found
            nor was.
        """
        labels = np.asarray(sample["labels"]).astype(np.int64)
        crowd = np.asarray(sample.get("crowd", np.zeros(len(labels)))).astype(bool)
        self.objects += np.bincount(labels[~crowd], minlength=len(self.objects))
        self.crowds += np.bincount(labels[crowd], minlength=len(self.objects))
        found = np.asarray(result.labels.tolist(), np.int64)
        scores = np.asarray(result.scores.tolist(), np.float64)
        things = np.isin(labels, self.things)
        codes = result.masks.encoded() if things.any() and len(found) else []
        true = self._codes(np.asarray(m) > 0 for m in sample["masks"]) if codes else []
        kept = []
        for k in np.intersect1d(found, self.things):
            p, t = np.flatnonzero(found == k), np.flatnonzero(labels == k)
            p = p[np.argsort(-scores[p], kind="stable")][: self.most]
            rows = np.zeros(len(p), _RESULT)
            rows["label"], rows["score"] = k, scores[p]
            if len(t):
                whole = self._iou(codes, p, true, t, crowd)
                edges = self._with_edges(whole, result, p, sample, t, crowd)
                for which, ious in enumerate((whole, edges)):
                    hit, ignored = self._match(ious, scores[p], crowd[t])
                    rows["hit"][:, which], rows["ignored"][:, which] = _bits(hit), _bits(ignored)
            kept.append(rows)
        rows = np.concatenate([*kept, np.zeros(0, _RESULT)])
        self.results.append(rows)
        p = np.flatnonzero((scores >= SURE) & np.isin(found, self.things))
        p, t = p[np.argsort(-scores[p], kind="stable")], np.flatnonzero(things)
        ious = (
            self._iou(codes, p, true, t, crowd)
            if len(p) and len(t)
            else np.zeros((len(p), len(t)))
        )
        self._confuse(ious, found[p], labels[t], crowd[t])
        right, wrong = _judged(rows)
        sure = rows["score"] >= SURE
        n = (things & ~crowd).sum()
        return ratio_or_none(2 * (right & sure).sum(), ((right | wrong) & sure).sum() + n)

    def _iou(self, codes: list[dict], p, true: list[dict], t, crowd: np.ndarray) -> np.ndarray:
        """IoU of masks, [p, t]; with a crowd the share of the result that lies in it."""
        parts = [codes[i] for i in p], [true[i] for i in t]
        return self.coco.iou(*parts, crowd[t].astype(int).tolist())

    def _with_edges(self, whole, result: Segmentation, p, sample: dict, t, crowd) -> np.ndarray:
        """The lesser of the IoU of the masks and that of their boundaries, [p, t]."""
        near = whole.max(1) >= self.run.params.iouThrs[0]  # the others match nothing either way
        edges = whole.copy()
        if near.any():
            found = self._codes(boundary(result.masks[int(i)].cpu().numpy()) for i in p[near])
            true = self._codes(boundary(np.asarray(sample["masks"][int(i)]) > 0) for i in t)
            both = self.coco.iou(found, true, crowd[t].astype(int).tolist())
            edges[near] = np.minimum(whole[near], both)
        return edges

    def _confuse(self, ious: np.ndarray, found: np.ndarray, labels: np.ndarray, crowd) -> None:
        """Counts which class is taken for which: each result, the surest first, is matched with
        the free object that it covers best, of whatever class."""
        free, none = ~crowd, len(self.confusion) - 1
        for row, label in zip(ious, found.tolist()):
            open_to = np.where(free, row, 0)
            if open_to.max(initial=0) > 0.5:
                best = open_to.argmax()
                free[best] = False
                self.confusion[labels[best], label] += 1
            elif not (row[crowd & (labels == label)] > 0.5).any():
                self.confusion[none, label] += 1
        np.add.at(self.confusion, (labels[free], none), 1)

    def _codes(self, masks) -> list[dict]:
        return [self.coco.encode(np.asfortranarray(m, np.uint8)) for m in masks]

    def _match(self, ious: np.ndarray, scores: np.ndarray, crowd: np.ndarray):
        """Which results found an object, and which do not count, [T, p] bool each."""
        at = 0, 0  # one image and class at a time
        self.run._gts[at] = [
            {"id": i, "area": 1, "ignore": int(many), "iscrowd": int(many)}
            for i, many in enumerate(crowd, 1)
        ]
        self.run._dts[at] = [{"id": i, "area": 1, "score": s} for i, s in enumerate(scores, 1)]
        self.run.ious = {at: ious}
        found = self.run.evaluateImg(*at, [0, 1e10], self.most)
        return found["dtMatches"] > 0, found["dtIgnore"].astype(bool)

    def compute(self, rows: list[dict]) -> dict:
        """AP, F1 and the confusion of objects.

        Args:
            rows: of each class a dict, which gets the figures of that class.

        Returns:
            those of all.
        """
        results = np.concatenate([*self.results, np.zeros(0, _RESULT)])
        results = [results[results["label"] == k] for k in self.things]
        whole, edges = (self._precision(results, which) for which in range(2))
        for k, row in enumerate(rows):
            row |= dict.fromkeys(("ap", "ap50", "boundary_ap", "best_threshold", "mask_f1"))
            there = self.objects[k] + self.crowds[k] > 0
            # what stuff occurs the panoptic task tells, where it is measured before
            row["occurs"] = row.get("occurs", k not in self.things) or bool(there)
        for i, k in enumerate(self.things):
            curve = _curve(results[i], self.objects[k])
            rows[k] |= {
                "ap": mean_or_none(whole[..., i]),
                "ap50": mean_or_none(whole[0, :, i]),
                "boundary_ap": mean_or_none(edges[..., i]),
                "best_threshold": curve["best_threshold"],
                "mask_f1": curve["mask_f1"],
            }
        total = self.objects[self.things].sum()
        return {
            "ap": mean_or_none(whole),
            "ap50": mean_or_none(whole[0]),
            "ap75": mean_or_none(whole[5]),
            "boundary_ap": mean_or_none(edges),
            "boundary_ap50": mean_or_none(edges[0]),
            "instance_confusion": self.confusion.tolist(),
            **_curve(np.concatenate([*results, np.zeros(0, _RESULT)]), total),
        }

    def _precision(self, results: list[np.ndarray], which: int) -> np.ndarray:
        """[T, recall, class] at IoU 0.5 to 0.95; NaN of a class without objects."""
        run = self.run
        run.params.catIds, run.params.imgIds = self.things, [0]
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.params.maxDets = [max(1, *map(len, results), 0)]
        run._paramsEval = run.params
        run.evalImgs = [
            {
                "dtScores": found["score"],
                "dtMatches": _unpacked(found["hit"][:, which]),
                "dtIgnore": _unpacked(found["ignored"][:, which]),
                "gtIgnore": np.zeros(self.objects[k]),
            }
            for k, found in zip(self.things, results)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            run.accumulate()
        precision = run.eval["precision"][..., 0, 0]
        return np.where(precision < 0, np.nan, precision)


def _bits(values: np.ndarray) -> np.ndarray:
    """[p] of [T, p] bool: bit T."""
    return (values << np.arange(len(values))[:, None]).sum(0)


def _unpacked(bits: np.ndarray) -> np.ndarray:
    """[T, p] bool of what `_bits` packed."""
    return (bits >> np.arange(10)[:, None]) & 1 > 0


def _judged(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which results are right at IoU 0.5, and which are wrong; the others do not count."""
    hit, ignored = rows["hit"][:, 0] & 1 > 0, rows["ignored"][:, 0] & 1 > 0
    return hit & ~ignored, ~hit & ~ignored


def _curve(rows: np.ndarray, objects: int) -> dict:
    """What each score threshold would leave, at IoU 0.5, and the one of the best F1."""
    if not objects:
        return {"best_threshold": None, "mask_f1": None, "thresholds": None}
    scores = (np.sort(rows["score"][judged]) for judged in _judged(rows))
    right, wrong = (len(s) - np.searchsorted(s, _GRID) for s in scores)
    f1 = 2 * right / (right + wrong + objects)
    best = np.flatnonzero(f1 == f1.max())
    middle = best[len(best) // 2]  # of a plateau: as far from its edges as can be
    return {
        "best_threshold": float(_GRID[middle]) if f1[middle] else None,
        "mask_f1": float(f1[middle]),
        "thresholds": {
            "score": _GRID.tolist(),
            "precision": [ratio_or_none(a, a + b) for a, b in zip(right, wrong)],
            "recall": (right / objects).tolist(),
            "f1": f1.tolist(),
        },
    }
