"""Meters of an evaluation: each takes a result and its sample at a time, then gives the figures.

Letters: H W image size, K class, n target, p predicted segment, t true segment.

    PQ = sum of IoU over matches / (TP + FP / 2 + FN / 2), per class, match: same class, IoU > 1/2
    SQ = mean IoU of the matches,  RQ = PQ / SQ; means go over the classes that occur

Source: Panoptic Segmentation (Kirillov et al., CVPR 2019); COCO for AP (pycocotools); mIoU from
torchmetrics' confusion matrix.
Differs: torchmetrics' PanopticQuality forgives a missed segment where the prediction is void, and
takes void predictions out of the union; the paper counts them, and so do we.
"""

import contextlib
import importlib
import io
from collections.abc import Sequence

import numpy as np
import torch

from .results import Segmentation

VOID = -1  # in place of a label that the model does not have


class Panoptic:
    """PQ, and matches of true things with whatever segment covers them."""

    def __init__(self, classes: int, stuff: Sequence[int]):
        self.stuff = stuff
        self.iou, self.tp, self.fp, self.fn = np.zeros((4, classes))
        self.dice = np.zeros(classes)  # sums over the matches of each true class
        self.confusion = np.zeros((classes + 1, classes + 1), np.int64)

    def update(self, result: Segmentation, sample: dict) -> None:
        true, t_labels = truth_map(sample, self.stuff)
        p_labels = np.array([s.label_id for s in result.segments], np.int64)
        P, T, K = len(p_labels) + 1, len(t_labels) + 1, len(self.iou)
        predicted = result.segmentation.cpu().numpy().astype(np.int64)
        both = np.bincount((predicted * T + true).ravel(), minlength=P * T).reshape(P, T)
        t_area, p_area, ignored = both.sum(0)[1:], both.sum(1)[1:], both[1:, 0]
        both = both[1:, 1:]
        union = (p_area - ignored)[:, None] + t_area - both
        iou = both / np.maximum(union, 1)  # [p, t]
        seen = t_area > 0
        counted = (p_area > 0) & (ignored <= 0.5 * p_area)

        match = (p_labels[:, None] == t_labels) & (iou > 0.5)
        p, t = match.nonzero()
        self.iou += np.bincount(t_labels[t], iou[p, t], K)
        self.tp += np.bincount(t_labels[t], minlength=K)
        self.fn += np.bincount(t_labels[seen & ~match.any(0)], minlength=K)
        self.fp += np.bincount(p_labels[counted & ~match.any(1)], minlength=K)

        things = seen & ~np.isin(t_labels, self.stuff)
        match = (iou > 0.5) & things  # at most one in a row and in a column
        p, t = match.nonzero()
        np.add.at(self.confusion, (t_labels[t], p_labels[p]), 1)
        np.add.at(self.confusion, (t_labels[things & ~match.any(0)], K), 1)
        extra = counted & ~match.any(1) & ~np.isin(p_labels, self.stuff)
        np.add.at(self.confusion, (K, p_labels[extra]), 1)
        dice = 2 * both[p, t] / (p_area[p] - ignored[p] + t_area[t])
        self.dice += np.bincount(t_labels[t], dice, K)

    def compute(self, rows: list[dict]) -> dict:
        total = self.tp + 0.5 * self.fp + 0.5 * self.fn
        figures = np.full((3, len(total)), np.nan)  # pq, sq, rq
        occurs = total > 0
        figures[0, occurs] = self.iou[occurs] / total[occurs]
        figures[1, occurs] = self.iou[occurs] / np.maximum(self.tp[occurs], 1)
        figures[2, occurs] = self.tp[occurs] / total[occurs]
        matches, found = self.confusion[:-1, :-1], self.confusion[:-1].sum(1)
        right, matched = matches.diagonal(), matches.sum(1)
        for k, row in enumerate(rows):
            row |= {name: _number(x) for name, x in zip(("pq", "sq", "rq"), figures[:, k])}
            row |= {n: int(getattr(self, n)[k]) for n in ("tp", "fp", "fn")}
            row["instances"] = int(found[k])
            row["class_accuracy"] = _ratio(right[k], matched[k])
            row["dice"] = _ratio(self.dice[k], matched[k])
        is_stuff = np.isin(np.arange(len(total)), self.stuff)

        def means(chosen):
            return {
                name: _mean(x[chosen & occurs]) for name, x in zip(("pq", "sq", "rq"), figures)
            }

        return {
            **means(occurs),
            "things": means(~is_stuff),
            "stuff": means(is_stuff),
            "class_accuracy": _ratio(right.sum(), matched.sum()),
            "dice": _ratio(self.dice.sum(), matched.sum()),
            "matched": int(matched.sum()),
            "instances": int(found.sum()),
            "confusion": self.confusion.tolist(),
        }


class Instances:
    """Mask AP by pycocotools; truth and results are kept as run-length codes."""

    def __init__(self, classes: int, stuff: Sequence[int]):
        self.coco = _extra("pycocotools.mask")
        self.things = [k for k in range(classes) if k not in stuff]
        self.images: list[dict] = []
        self.truth: list[dict] = []
        self.results: list[dict] = []

    def update(self, result: Segmentation, sample: dict) -> None:
        masks = np.asarray(sample["masks"])
        image = len(self.images) + 1
        self.images.append({"id": image, "height": masks.shape[1], "width": masks.shape[2]})
        codes = self.coco.encode(np.asfortranarray(masks.transpose(1, 2, 0))) if len(masks) else []
        for code, label in zip(codes, np.asarray(sample["labels"]).tolist()):
            if label in self.things:
                self.truth.append(
                    {
                        "id": len(self.truth) + 1,
                        "image_id": image,
                        "category_id": label,
                        "segmentation": code,
                        "area": float(self.coco.area(code)),
                        "iscrowd": 0,
                    }
                )
        codes = [self.coco.encode(np.asfortranarray(m.byte().cpu().numpy())) for m in result.masks]
        for code, label, score in zip(codes, result.labels.tolist(), result.scores.tolist()):
            self.results.append(
                {
                    "image_id": image,
                    "category_id": label,
                    "segmentation": code,
                    "score": score,
                }
            )

    def compute(self, rows: list[dict]) -> dict:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        for row in rows:
            row["ap"] = None
        if not self.truth:
            return {"ap": None, "ap50": None, "ap75": None}
        with contextlib.redirect_stdout(io.StringIO()):
            target = COCO()
            target.dataset = {
                "info": {},
                "images": self.images,
                "annotations": self.truth,
                "categories": [{"id": k, "name": rows[k]["name"]} for k in self.things],
            }
            target.createIndex()
            if not self.results:
                precision = np.where(self._occurs(), 0.0, np.nan) * np.ones((10, 1, 1))
            else:
                run = COCOeval(target, target.loadRes(self.results), "segm")
                run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
                run.evaluate()
                run.accumulate()
                precision = run.eval["precision"][..., 0, -1]  # [IoU .5 to .95, recall, class]
        precision = np.where(precision < 0, np.nan, precision)  # -1: the class does not occur
        for k, values in zip(self.things, np.moveaxis(precision, 2, 0)):
            rows[k]["ap"] = _mean(values)
        return {
            "ap": _mean(precision),
            "ap50": _mean(precision[0]),
            "ap75": _mean(precision[5]),
        }

    def _occurs(self) -> list[bool]:
        labels = {t["category_id"] for t in self.truth}
        return [k in labels for k in self.things]


class Semantic:
    """mIoU and pixel accuracy from torchmetrics' confusion matrix of the pixels not void."""

    def __init__(self, classes: int, stuff: Sequence[int]):
        matrix = _extra("torchmetrics.classification").MulticlassConfusionMatrix
        self.classes = classes
        self.matrix = matrix(classes, ignore_index=VOID, validate_args=False)

    def update(self, result: Segmentation, sample: dict) -> None:
        target = torch.as_tensor(np.asarray(sample["semantic"])).long()
        target = target.where((target >= 0) & (target < self.classes), VOID)
        self.matrix.update(result.segmentation.cpu().long(), target)

    def compute(self, rows: list[dict]) -> dict:
        matrix = self.matrix.compute().numpy()
        right, pixels = matrix.diagonal(), matrix.sum()
        union = matrix.sum(0) + matrix.sum(1) - right
        iou = np.where(union > 0, right / np.maximum(union, 1), np.nan)
        for row, value in zip(rows, iou):
            row["iou"] = _number(value)
        return {"miou": _mean(iou), "pixel_accuracy": _ratio(right.sum(), pixels)}


def truth_map(sample: dict, stuff: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """[H, W] int32 with 0 for void and i for the i-th segment, and the labels of the segments."""
    masks, labels = np.asarray(sample["masks"]), np.asarray(sample["labels"]).astype(np.int64)
    ids = np.zeros(masks.shape[1:], np.int32)
    first: dict[int, int] = {}
    for i, (mask, label) in enumerate(zip(masks, labels.tolist()), 1):
        ids[mask > 0] = first.setdefault(label, i) if label in stuff else i
    return ids, labels


def _extra(name: str):
    """A module of the extra `train`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"evaluate needs {package}: pip install {package} "
            "(or segkern's extra `train`: pip install '.[train]' in its folder)"
        ) from error


def _number(x: float) -> float | None:
    return None if np.isnan(x) else float(x)


def _mean(x: np.ndarray) -> float | None:
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else None


def _ratio(a: float, b: float) -> float | None:
    return float(a / b) if b else None
