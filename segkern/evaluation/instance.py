"""Mask AP of instance results, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np

from ..structures.segmentation import Segmentation
from .optional import import_extra, mean_or_none


class Instances:
    """Mask AP by pycocotools; truth and results are kept as run-length codes."""

    def __init__(self, classes: int, stuff: Sequence[int]):
        self.coco = import_extra("pycocotools.mask")
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

        true = {t["category_id"] for t in self.truth}
        for k, row in enumerate(rows):
            row["ap"] = None
            row["occurs"] = row.get("occurs", False) or k in true or k not in self.things
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
            rows[k]["ap"] = mean_or_none(values)
        return {
            "ap": mean_or_none(precision),
            "ap50": mean_or_none(precision[0]),
            "ap75": mean_or_none(precision[5]),
        }

    def _occurs(self) -> list[bool]:
        labels = {t["category_id"] for t in self.truth}
        return [k in labels for k in self.things]
