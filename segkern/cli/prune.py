"""The command `segkern prune`."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ..deploy.figures import table
from ..deploy.prune import FILE
from ..deploy.prune import prune as run_prune
from ..models import open_model
from ..runtime.device import usable_device
from .measured import data_for


def prune(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    layers: int | None = None,
    queries: int | None = None,
    zeros: float | None = None,
    everywhere: bool = False,
    keep: tuple[str, ...] = (),
    data: str | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> None:
    """Write a smaller model: fewer decoder layers, fewer queries, weights that are 0; and say what
    that costs.

    Prints a table of quality, time and size before and after, which OUT/pruning.json holds, too.
    Fewer layers and queries save time; zeros save bytes of a compressed file and nothing else.
    Train on with `segkern train --init OUT`, with --keep-zeros where there are zeros.

    Args:
        model: folder of a run or a model, or a name on the Hugging Face hub.
        out: folder for the smaller model; there is nothing yet.
        layers: decoder layers that stay (Mask2Former, MaskFormer, OneFormer).
        queries: that stay, those that find most in the data (these three and EoMT).
        zeros: share of the weights that become 0, the least ones, such as 0.3.
        everywhere: that share in each tensor, and not of all together.
        keep: patterns of names of weights that stay, such as "backbone.*"; sampling offsets, the
            task's words and the class head always do.
        data: folder, or address of shards, whose val split is measured on; not given, the run's
            data, or scenes of digits.
        limit: the first so many images; not given, all, or 100 scenes.
        device: "cpu", "cuda", or "auto" for cuda where there are kernels for it.
    """
    opened = open_model(model).to(usable_device(device))
    source, title, tasks, limit, options = data_for(model, opened, data, limit)
    sizes = layers, queries, zeros, everywhere, keep
    report = run_prune(opened, out, *sizes, source, tasks, limit, options)
    Console().print(table(report["rows"], f"{model} on {title}"))
    if "zeros" in report:
        print("{count} of {of} weights are 0".format(**report["zeros"]))
    kept = " --keep-zeros" if zeros else ""
    print(f"written: {out} and {out / FILE}; train on: segkern train --init {out}{kept}")
