"""The report of an evaluation as a page: figures, tables, curves, and the worst images.

It is one file that needs no other. Beside it lie the confusion matrices as pictures and as CSV.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ..io.atomic_files import atomic
from ..io.images import shown
from ..io.overlay import overlay
from ..io.plots import has_curves, save_confusion, save_curves, save_thresholds
from ..models.protocol import SegmentationModel
from ..structures.segmentation import Segmentation
from ..structures.settings import Options, Views
from . import html
from .evaluate import check_dataset, found, options_of
from .instance import SURE
from .report import semantic_truth, truth

# what stands at the top; columns of the table: name, key in each class, key of all, meaning
_HEAD = {
    "PQ": "pq",
    "SQ": "sq",
    "RQ": "rq",
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "boundary AP": "boundary_ap",
    "mIoU": "miou",
    "F1 of objects": "mask_f1",
    "F1 of pixels": "f1",
    "pixel accuracy": "pixel_accuracy",
    "class accuracy": "class_accuracy",
    "Dice": "dice",
}
_COLUMNS = (
    ("PQ", "pq", "pq", "panoptic quality, SQ times RQ"),
    ("SQ", "sq", "sq", "mean IoU of the segments that match"),
    ("RQ", "rq", "rq", "F1 of the segments"),
    ("AP", "ap", "ap", "mask AP, meaned over IoU 0.5 to 0.95"),
    ("AP50", "ap50", "ap50", "mask AP at IoU 0.5"),
    ("boundary AP", "boundary_ap", "boundary_ap", "AP by the IoU of masks and of boundaries"),
    ("F1", "mask_f1", "mask_f1", "of objects at IoU 0.5 and the best score threshold"),
    ("best score", "best_threshold", "best_threshold", "least score that gives the best F1"),
    ("IoU", "iou", "miou", "of pixels"),
    ("F1 (pixels)", "f1", "f1", "of pixels: Dice"),
    ("accuracy (pixels)", "pixel_accuracy", "mean_accuracy", "share of the class's true pixels"),
    ("accuracy", "class_accuracy", "class_accuracy", "of matched objects: the right class"),
    ("Dice", "dice", "dice", "mean over the objects that match"),
    ("objects", "instances", "instances", "true ones"),
)
_CONFUSIONS = {
    "confusion": ("objects", "Of true objects and the segments that match them at IoU above 0.5"),
    "instance_confusion": (
        "objects",
        f"Of true objects and the results with a score of at least {SURE} that match them at IoU "
        "above 0.5",
    ),
    "pixel_confusion": ("pixels", "Of all pixels that are not void"),
}


def write_page(
    path: str | Path,
    value: dict,
    model: SegmentationModel,
    dataset,
    title: str,
    options: Options | None = None,
    views: Views | None = None,
    log: str | Path | None = None,
    settings: dict[str, dict] | None = None,
    cuda_graphs: bool = True,
) -> list[Path]:
    """Writes the report of an evaluation, each file whole or not at all.

    Args:
        path: HTML file to write; beside it lie the confusion matrices of objects and pixels, such
            as metrics.confusion.png and .csv where it is metrics.html.
        value: what `evaluate` returned.
        model, dataset, options, views, cuda_graphs: as `evaluate` had them; the worst images are
            read and looked at again.
        title: of the page.
        log: of the training, whose curves are drawn; None or one without lines draws none.
        settings: to list, by the name of the group.

    Returns:
        the files.
    """
    path, options, views = Path(path), options or Options(), views or Views()
    parts = [html.section("figures", "Figures", html.tiles(_headline(value))), _classes(value)]
    names = [row["name"] for row in value["classes"]]
    shown = [key for key in _CONFUSIONS if key in value]
    if "confusion" in shown and "instance_confusion" in shown:
        shown.remove("instance_confusion")  # one of objects is enough
    files = {key: path.with_name(f"{path.stem}.{key}.png") for key in shown}
    if files:
        drawn = [_confusion(file, value[key], names, key) for key, file in files.items()]
        body = f'<div class="pair">{"".join(drawn)}</div>'
        parts.append(html.section("confusion", "Confusion", body))
    if value.get("thresholds"):
        parts.append(_thresholds(value))
    if log is not None and has_curves(log):
        parts.append(_curves(log))
    rows = worst(model, dataset, value, options, views, cuda_graphs)
    parts.append(_worst(value, rows))
    groups = [
        html.settings(name, x, opened=name == "data") for name, x in (settings or {}).items()
    ]
    parts.append(html.section("settings", "Settings and data", "".join(groups)))
    about = (
        f"{value['images']} images, {len(names)} classes, {', '.join(value['tasks'])}; "
        f"{value['images_per_second']} images/s; {datetime.now():%Y-%m-%d %H:%M}"
    )
    with atomic(path) as temporary:
        temporary.write_text(html.document(title, about, parts), encoding="utf-8")
    return [path, *files.values(), *(file.with_suffix(".csv") for file in files.values())]


def worst(
    model: SegmentationModel,
    dataset,
    value: dict,
    options: Options,
    views: Views,
    cuda_graphs: bool = True,
) -> Iterator[tuple[dict, np.ndarray, Segmentation, Segmentation]]:
    """Of each of the worst images its row of `value`, the picture, the truth and the result.

    Of instances those that the best threshold leaves.
    """
    if isinstance(dataset, DataLoader):
        dataset = dataset.dataset
    task = value["tasks"][0]
    classes, stuff = check_dataset(dataset, model.config, value["tasks"])
    wanted = options_of((task,), options, value.get("max_detections", 100))
    names = dict(enumerate(classes))
    least = value.get("best_threshold")
    for row in value["worst"]:
        sample = dataset[row["image"]]
        ((_, results),) = found(model, [sample], wanted, views, stuff, cuda_graphs)
        result = replace(results[task], names=names).above(SURE if least is None else least)
        by_pixels = task == "semantic"
        if by_pixels:  # drawn as strongly as the truth
            strong = [x._replace(isthing=True) for x in result.segments]
            result = replace(result, segments=strong)
        true = semantic_truth(sample, classes) if by_pixels else truth(sample, stuff, classes)
        yield row, _picture(sample, model, tuple(true.segmentation.shape)), true, result


def _picture(sample: dict, model: SegmentationModel, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8, of the size of the targets."""
    if "image" in sample:
        pixels = torch.as_tensor(np.asarray(sample["image"])).movedim(2, 0)
    else:
        mean, std = (torch.tensor(x)[:, None, None] for x in _colours(model))
        pixels = (torch.as_tensor(sample["pixel_values"]) * std + mean).clamp(0, 1)
        pixels = (255 * pixels).round().byte()
    pixels = np.ascontiguousarray(shown(pixels).expand(3, -1, -1).permute(1, 2, 0).numpy())
    if pixels.shape[:2] != size:
        pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1]))
    return pixels


def _colours(model: SegmentationModel):
    return model.config.input.mean, model.config.input.std


def _headline(value: dict) -> dict[str, float | None]:
    figures = {name: value[key] for name, key in _HEAD.items() if key in value}
    for part in ("things", "stuff"):
        if part in value:
            figures[f"PQ of {part}"] = value[part]["pq"]
    return figures


def _classes(value: dict) -> str:
    rows = value["classes"]
    columns = [c for c in _COLUMNS if c[1] in rows[0]]
    table = html.sortable(
        ["class", *(name for name, *_ in columns)],
        [[row["name"], *(row[key] for _, key, *_ in columns)] for row in rows],
        ["all", *(value[key] for _, _, key, _ in columns)],
        ["name", *(title for *_, title in columns)],
    )
    return html.section("classes", "Classes", table)


def _confusion(path: Path, matrix: Sequence[Sequence[int]], names: list[str], key: str) -> str:
    what, about = _CONFUSIONS[key]
    save_confusion(path, matrix, names)
    labels = [*names, "nothing"][: len(matrix)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["truth \\ prediction", *labels])
    writer.writerows([label, *row] for label, row in zip(labels, matrix))
    with atomic(path.with_suffix(".csv")) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    link = f'<a href="{escape(quote(path.with_suffix(".csv").name))}">as CSV</a>'
    caption = f"{about}; each row as shares of its sum; {link}."
    return html.figure(caption, html.drawing(path.read_bytes(), f"confusion matrix of {what}"))


def _thresholds(value: dict) -> str:
    f1, score = (html.number(value[name]) for name in ("mask_f1", "best_threshold"))
    best = f"F1 is best, {f1}, with results of a score of at least {score}"
    if value["best_threshold"] is None:
        best = "no score leaves a result that is right"
    caption = f"Of all objects at IoU 0.5: {best}."
    drawn = _drawn(save_thresholds, value["thresholds"], value["best_threshold"])
    body = html.figure(caption, html.drawing(drawn, "precision, recall and F1 by score"))
    return html.section("thresholds", "Thresholds", body)


def _curves(log: str | Path) -> str:
    body = html.figure("By step.", html.drawing(_drawn(save_curves, log), "curves of training"))
    return html.section("curves", "Training", body)


def _drawn(save, *given) -> bytes:
    """The PNG that a function of `io.plots` writes."""
    buffer = io.BytesIO()
    save(buffer, *given)
    return buffer.getvalue()


_SCORES = {
    "panoptic": "PQ of the image",
    "instance": f"F1 of the image's results with a score of at least {SURE}",
    "semantic": "mIoU of the image",
}


def _worst(value: dict, rows) -> str:
    figures = []
    for row, image, true, result in rows:
        name = Path(row["path"]).name if "path" in row else f"image {row['image']}"
        truth, prediction = overlay(image, true), overlay(image, result)
        plain = Image.fromarray(image).resize(truth.size, Image.Resampling.NEAREST)
        views = {"picture": plain, "truth": truth, "prediction": prediction}
        drawn = [html.picture(view, f"{what} of {name}") for what, view in views.items()]
        figures.append(html.figure(f"<b>{html.number(row['score'])}</b> {escape(name)}", *drawn))
    about = f"Picture, truth and prediction; the number is the {_SCORES[value['tasks'][0]]}."
    body = f'<p class="dim">{escape(about)}</p>\n{"".join(figures)}'
    return html.section("worst", "Worst images", body)
