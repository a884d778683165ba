"""What a model's file is worth: quality on a data set, time of an image, size; as a table."""

import gzip
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from rich.table import Table

from ..evaluation.evaluate import check_dataset, evaluate, found, options_of
from ..models.protocol import SegmentationModel
from ..structures.settings import Options, Views

FIGURES = {"panoptic": "pq", "instance": "ap", "semantic": "miou"}  # of each task, 0 to 1
_UNITS = {"ms": "ms an image", "mb": "MB", "gzip_mb": "MB, gzip"}
_BLOCK = 2**20


class Measure(NamedTuple):
    """On what a model is measured, the same before and after.

    Attributes:
        dataset: samples by index, as `evaluate` takes them; None measures no quality.
        tasks: of the model.
        limit: the first so many images; None for all.
        options: as of `evaluate`.
        runs: of which `ms` is the median.
        progress: show a bar.
    """

    dataset: object
    tasks: tuple[str, ...]
    limit: int | None = None
    options: Options = Options()
    runs: int = 5
    progress: bool = True

    def __call__(self, name: str, model: SegmentationModel) -> dict:
        """A row of the table: the name, the figure of each task, and `ms`."""
        row = {"name": name}
        if self.dataset is not None:
            value = evaluate(
                model,
                self.dataset,
                self.tasks,
                self.limit,
                batch_size=1,  # graphs of a fixed batch are run, too
                options=self.options,
                progress=self.progress,
            )
            row |= {FIGURES[task]: value[FIGURES[task]] for task in self.tasks}
        return row | {"ms": round(self.milliseconds(model), 3)}

    def milliseconds(self, model: SegmentationModel) -> float:
        """From the pixels of the first image to its result, one image at a time; without a data
        set, of a black picture of 640 x 480."""
        sample, stuff = self.picture(), ()
        if self.dataset is not None:
            _, stuff = check_dataset(self.dataset, model.config, self.tasks, "dataset")
        wanted = options_of(self.tasks[:1], Options(), 100)
        times = []
        for _ in range(self.runs + 1):  # the first prepares what others find done
            start = time.perf_counter()
            list(found(model, [sample], wanted, Views(), stuff, cuda_graphs=False))
            times.append(time.perf_counter() - start)
        return 1e3 * median(times[1:])

    def picture(self) -> dict:
        """The first sample; masks and labels without a data set are empty."""
        if self.dataset is not None:
            return self.dataset[0]
        size = (480, 640)
        return {
            "image": np.zeros((*size, 3), np.uint8),
            "masks": np.zeros((0, *size), np.uint8),
            "labels": np.zeros(0, np.int64),
        }


def sizes(path: Path) -> dict[str, float]:
    """Megabytes (10^6) of a file, or of the weights in a folder, as they are and after gzip."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {
        "mb": round(sum(file.stat().st_size for file in files) / 1e6, 3),
        "gzip_mb": round(sum(map(_gzipped, files)) / 1e6, 3),
    }


class _Counted:
    """A file that keeps no more than how much was written to it."""

    def __init__(self):
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)


def _gzipped(path: Path) -> int:
    counted = _Counted()
    with path.open("rb") as file, gzip.GzipFile(fileobj=counted, mode="wb", mtime=0) as zipped:
        while block := file.read(_BLOCK):
            zipped.write(block)
    return counted.size


def columns(rows: Sequence[dict]) -> dict[str, str]:
    """Keys of rows, and what stands over their columns."""
    known = {figure: figure.upper() for figure in FIGURES.values()} | {"miou": "mIoU"} | _UNITS
    return {key: text for key, text in known.items() if any(key in row for row in rows)}


def table(rows: Sequence[dict], title: str) -> Table:
    """Rows for the terminal."""
    out, wanted = Table(title=title), columns(rows)
    out.add_column("")
    for text in wanted.values():
        out.add_column(text, justify="right")
    for row in rows:
        out.add_row(row["name"], *(text_of(key, row.get(key)) for key in wanted))
    return out


def markdown(rows: Sequence[dict]) -> str:
    """Rows as a table in Markdown."""
    wanted = columns(rows)
    lines = [["", *wanted.values()], ["---", *["---:"] * len(wanted)]]
    lines += [[row["name"], *(text_of(key, row.get(key)) for key in wanted)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_of(key: str, value: float | None) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    return f"{value:.1f}" if key in _UNITS else f"{value:.3f}"
