"""What to do before training on data of one's own: read it whole once, and look at its samples."""

import warnings
from dataclasses import replace
from pathlib import Path

from ..data import FORMATS, DataConfig, FolderConfig, InstanceViews, SemanticViews, build_dataset
from ..evaluation.data_report import draw_samples, examine, usable, write_report
from ..structures.labels import IMAGENET_MEAN, IMAGENET_STD

_TOLD = 20  # findings of a split that are printed


def check_data(config: DataConfig, out: Path, count: int = 12, workers: int | None = None) -> bool:
    """Reads both splits of a data set, prints what is broken and why, and writes report.json,
    train.png, val.png and samples.png.

    Args:
        config: of the data set.
        out: folder to write to.
        count: of samples to draw.
        workers: processes that read; None takes one a core, at most 16.

    Returns:
        whether the train split can be used.
    """
    sets, reports = {}, {}
    for split in ("train", "val"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is among the findings
            try:
                sets[split] = build_dataset(config, split)
            except ValueError as error:
                print(f"{split}: {error}")
                continue
        reports[split] = report = examine(sets[split], split, workers)
        print(f"{split}: {_line(report)}")
        for finding in report["findings"][:_TOLD]:
            print(f"  {finding}")
        if report["findings_in_all"] > _TOLD:
            print(f"  and more: {out / 'report.json'}")
    good = "train" in reports and usable(reports["train"])
    about = {"root": str(config.root), "kind": config.kind, "task": config.task, "usable": good}
    write_report(out, reports, about)
    if good:
        draw_samples(out / "samples.png", sets["train"], count)
    return good


def _line(report: dict) -> str:
    unused = [row["name"] for row in report["classes"] if not row["objects"]]
    return (
        f"{report['readable']} of {report['pictures']} pictures can be read, "
        f"{report['objects']} objects of {len(report['classes'])} classes, "
        f"{report['findings_in_all']} findings"
        + (f"; nothing of {', '.join(unused[:_TOLD])}" if unused else "")
    )


def show_data(
    config: DataConfig,
    path: Path,
    split: str = "train",
    count: int = 12,
    size: tuple[int, int] | None = None,
) -> int:
    """Draws samples of a data set as training sees them, with ImageNet's colours.

    Args:
        config: of the data set.
        path: PNG, PDF or SVG to write.
        split: "train" or "val".
        count: of samples.
        size: (H, W) of the views; None takes the config's, or 512 x 512 of maps of classes.

    Returns:
        how many were drawn.
    """
    channels, colours = config.read.channels, (IMAGENET_MEAN, IMAGENET_STD)
    if channels != 3:
        colours = (0.5,) * channels, (0.5,) * channels
    if isinstance(config, FolderConfig):
        crop = size or (512, 512)
        views = SemanticViews(crop, (min(crop), 4 * max(crop)), *colours)
    else:
        wanted = config.views if size is None else replace(config.views, size=size)
        views = InstanceViews(wanted, *colours)
    dataset = FORMATS[config.kind].dataset(config, split, views)
    path.parent.mkdir(parents=True, exist_ok=True)
    return draw_samples(path, dataset, count, *colours)
