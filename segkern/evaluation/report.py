"""Evaluation results for the terminal, and targets as results to draw beside predictions."""

from collections.abc import Sequence

import numpy as np
import torch
from rich.table import Table

from ..structures.segmentation import Segment, Segmentation
from .panoptic import truth_map


def truth(sample: dict, stuff: Sequence[int], names: Sequence[str]) -> Segmentation:
    """A sample's targets as a panoptic result.

    Later masks lie over earlier ones; stuff is merged by class; crowds are left out.

    Args:
        sample: has masks [n, H, W] and labels [n].
        stuff: labels without instances.
        names: of the labels.

    Returns:
        a `Segmentation` without scores; targets of which nothing is seen are left out.
    """
    ids, labels, crowd = truth_map(sample, stuff)
    ids[np.append(False, crowd)[ids]] = 0
    areas = np.bincount(ids.ravel(), minlength=len(labels) + 1)[1:]
    segments = [
        Segment(i, k, None, int(a), k not in stuff)
        for i, (k, a) in enumerate(zip(labels.tolist(), areas), 1)
        if a
    ]
    return Segmentation("panoptic", torch.from_numpy(ids), segments, dict(enumerate(names)))


def semantic_truth(sample: dict, names: Sequence[str]) -> Segmentation:
    """A sample's map of labels as a panoptic result without scores; other labels are void."""
    labels = torch.as_tensor(np.asarray(sample["semantic"])).int()
    ids = torch.where((labels >= 0) & (labels < len(names)), labels + 1, 0)
    segments = [
        Segment(i, i - 1, None, int((ids == i).sum()), True) for i in ids.unique().tolist() if i
    ]
    return Segmentation("panoptic", ids, segments, dict(enumerate(names)))


def table(value: dict, title: str = "evaluation") -> Table:
    """The result of `evaluate` for the terminal: a row for each class, the means beneath."""
    names = {c: c for c in ("pq", "sq", "rq", "ap", "iou", "dice")}
    names |= {"class_accuracy": "accuracy", "instances": "n"}
    columns = [c for c in names if c in value["classes"][0]]
    out = Table(title=f"{title}: {value['images']} images", show_footer=True)
    means = value | {"iou": value.get("miou")}
    out.add_column("class", footer="all", no_wrap=True)
    for c in columns:
        out.add_column(names[c], footer=_text(means[c]), justify="right")
    for row in value["classes"]:
        out.add_row(row["name"], *(_text(row[c]) for c in columns))
    return out


def _text(x) -> str:
    if x is None:
        return "-"
    return str(x) if isinstance(x, int) else f"{x:.3f}"
