"""The command `segkern quantize`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ..deploy.figures import table
from ..deploy.quantize import METHODS, QualityLostError
from ..deploy.quantize import quantize as run_quantize
from ..models import open_model
from .measured import data_for, training_data


def quantize(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    method: Literal[METHODS] = "int8",
    data: str | None = None,
    pictures: int = 32,
    keep: tuple[str, ...] = (),
    max_drop: float = 0.01,
    limit: int | None = None,
    report: Path | None = None,
) -> int:
    """Write a model with fewer bits, int8 or bfloat16, and measure it: quality, size, time.

    The file is run in its own runtime on the data, and written only where no figure falls by more
    than --max-drop; exit code 1 and the table where one does.

    Args:
        model: folder of a run or a model, or a name on the Hugging Face hub.
        out: .onnx for ONNX Runtime and others, .pt2 for torch.export, or, of bf16, a folder; there
            is nothing yet.
        method: int8, weights and activations; int8-weights, weights alone; bf16, weights alone.
        data: folder, or address of shards, whose val split is measured on, and whose train split
            gives the ranges of activations; not given, the run's data, or scenes of digits.
        pictures: of the train split that give the ranges.
        keep: patterns of names of weights that stay in float32, such as "backbone.*"; sampling
            offsets, the task's words, the class head and norms always do.
        max_drop: the most that PQ, AP or mIoU may fall, from 0 to 1.
        limit: the first so many images; not given, all, or 100 scenes.
        report: JSON file for the table.
    """
    opened = open_model(model)
    measured = data_for(model, opened, data, limit)
    source, title, tasks, limit, options = measured
    calibration = training_data(model, data, source)
    settings = method, calibration, pictures, keep, max_drop, tasks, limit, options
    lost = None
    try:
        rows = run_quantize(opened, out, source, *settings, report=report)
    except QualityLostError as error:
        rows, lost = error.rows, error
    Console().print(table(rows, f"{model} on {title}"))
    if lost is not None:
        print(f"segkern: error: {lost}", file=sys.stderr)
        return 1
    print(f"written: {out}")
    return 0
