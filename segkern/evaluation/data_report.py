"""What a data set holds, read whole before training: counts, sizes, faults, and pictures of it.

A data set is one of `data.build_dataset` without views, or anything with a length, `classes`,
`stuff`, and `examined(i)` that gives a sample and what was left out of it, or raises ValueError.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from ..io.atomic_files import atomic
from ..io.images import shown
from ..io.overlay import overlay
from ..io.plots import save_data, save_sheet
from ..structures.labels import void_in
from ..structures.segmentation import Segmentation
from .report import semantic_truth, truth

_FINDINGS = 1000  # are listed one by one in the report; all are counted


class _Examined(Dataset):
    """Of sample i what the report counts: a dict of arrays and texts."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                sample, faults = self.dataset.examined(index)
            except ValueError as error:
                return {"error": str(error)}
        labels, areas = _objects(sample)
        return {
            "size": sample["image"].shape[:2],
            "labels": labels,
            "areas": areas,
            "crowds": int(np.sum(sample.get("crowd", 0))),
            "faults": [*faults, *(str(w.message) for w in told if w.category is UserWarning)],
        }


def _objects(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """Labels and areas in pixels of a sample's objects; of a map of classes, of each class."""
    if "masks" not in sample:
        semantic = sample["semantic"]
        counts = np.bincount(semantic.ravel(), minlength=1)[: void_in(semantic)]
        return counts.nonzero()[0], counts[counts > 0]
    masks = sample["masks"]
    areas = masks.areas() if hasattr(masks, "areas") else np.asarray(masks).sum((1, 2))
    return np.asarray(sample["labels"]), np.asarray(areas)


def examine(dataset, title: str = "data", workers: int | None = None, progress: bool = True):
    """Reads every sample once, in parallel.

    Args:
        dataset: as above.
        title: of the progress bar.
        workers: processes; None takes a process a core, at most 16.
        progress: show a bar.

    Returns:
        A dict that JSON can hold. "pictures", "readable", "objects", "crowds"; "classes": for each
        its name, objects and the pictures that have it; "height", "width", "objects_in_a_picture"
        and "object_side" (square root of the area over that of the picture): least, median and
        largest; "findings": what is broken or left out, with file and reason, of which the first
        1,000 are listed and "findings_in_all" counts all; "object_sides" and "sizes": histograms
        for `save_data`.
    """
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    rows = DataLoader(
        _Examined(dataset), batch_size=None, num_workers=workers if len(dataset) > 64 else 0
    )
    objects, in_pictures = (np.zeros(len(dataset.classes), np.int64) for _ in range(2))
    findings, sizes, sides, numbers, crowds = list(getattr(dataset, "faults", ())), [], [], [], 0
    shown = progress and Console().is_terminal
    for row in track(rows, f"read {title}", len(dataset), disable=not shown, transient=True):
        if "error" in row:
            findings.append(row["error"])
            continue
        labels, areas = np.asarray(row["labels"], np.int64), np.asarray(row["areas"])
        objects += np.bincount(labels, minlength=len(objects))
        in_pictures[np.unique(labels)] += 1
        height, width = (int(x) for x in row["size"])
        sizes.append((height, width))
        sides.append(np.sqrt(areas / (height * width)))
        numbers.append(len(labels))
        crowds += int(row["crowds"])
        findings += row["faults"]
    sides = np.concatenate([*sides, np.zeros(0)])
    heights, widths = np.array(sizes or np.zeros((0, 2)), np.int64).T
    return {
        "pictures": len(dataset),
        "readable": len(sizes),
        "objects": int(objects.sum()),
        "crowds": crowds,
        "classes": [
            {"name": name, "objects": n, "pictures": p}
            for name, n, p in zip(dataset.classes, objects.tolist(), in_pictures.tolist())
        ],
        "height": _spread(heights),
        "width": _spread(widths),
        "objects_in_a_picture": _spread(np.array(numbers)),
        "object_side": _spread(sides),
        "findings_in_all": len(findings),
        "findings": findings[:_FINDINGS],
        "object_sides": np.histogram(sides, np.geomspace(0.004, 1, 25))[0].tolist(),
        "sizes": [[h, w, n] for (h, w), n in _commonest(sizes)],
    }


def _spread(values: np.ndarray) -> list[float] | None:
    """Least, median and largest; None of nothing."""
    if not len(values):
        return None
    return [round(float(x), 4) for x in (values.min(), np.median(values), values.max())]


def _commonest(sizes: Sequence[tuple[int, int]], most: int = 500):
    """Sizes and how often they occur, the commonest first."""
    found, counts = np.unique(np.array(sizes).reshape(-1, 2), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(tuple(found[i].tolist()), int(counts[i])) for i in order]


def usable(report: dict) -> bool:
    """Whether something can be learned from a split."""
    return report["readable"] > 0 and report["objects"] > 0


def write_report(folder: str | Path, reports: dict[str, dict], about: dict) -> None:
    """Writes report.json and, of each split, SPLIT.png: objects of each class, sizes of objects
    and of pictures.

    Args:
        folder: is made; earlier reports in it are replaced.
        reports: of each split what `examine` gave.
        about: what the data is, for the JSON.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(about | {"splits": reports}, indent=1), encoding="utf-8")
    for split, report in reports.items():
        save_data(folder / f"{split}.png", report, split)


def draw_samples(path: str | Path, dataset, count: int = 12, mean=None, std=None) -> int:
    """Draws samples spread over a data set with their segments, as one picture.

    Args:
        path: PNG, PDF or SVG.
        dataset: whole, or with views.
        count: of samples.
        mean, std: of the views' pixels.

    Returns:
        how many were drawn.
    """
    places = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round())
    drawn = []
    for place in places.astype(int).tolist():
        sample = dataset[place]
        image = _picture(sample, mean, std)
        drawn.append((overlay(image, _truth(sample, dataset)), Path(sample.get("path", "")).name))
    save_sheet(path, drawn)
    return len(drawn)


def _picture(sample: dict, mean, std) -> np.ndarray:
    """[H, W, 3] uint8 of a picture or of normalised pixels, of their first three channels."""
    if "image" in sample:
        pixels = torch.as_tensor(sample["image"]).movedim(2, 0)
    else:
        mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
        pixels = (torch.as_tensor(sample["pixel_values"]) * std + mean).clamp(0, 1)
        pixels = (255 * pixels).round().byte()
    return shown(pixels).expand(3, -1, -1).permute(1, 2, 0).numpy()


def _truth(sample: dict, dataset) -> Segmentation:
    if len(sample.get("labels", ())) or "semantic" not in sample:
        return truth(sample, dataset.stuff, dataset.classes)
    return semantic_truth(sample, dataset.classes)
