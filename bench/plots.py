"""python bench/plots.py [--small] [--out FOLDER]: what a model costs at growing sizes, drawn.

Each `Case` is a point of a series: its time (median), its peak memory, and the work that formulas
expect, the part that grows with the square of the tokens apart from the rest: FLOP of Segmenter,
pixels of Mask2Former, all of whose parts grow with them. The plot shows the measured figures and,
through the first point of a series, the formula: what grows as it says lies on its line. Rows go
to plots.csv, a figure a model to plots_MODEL.png. Time on an idle machine.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import _measure
import _models
import _segmenter
import torch

from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.nn.targets import Targets
from segkern.testing import random_targets

COLUMNS = [
    *("date", "commit", "device", "threads", "torch", "plot", "series", "axis", "x", "tokens"),
    *("square_work", "other_work", "p50_ms", "runs", "peak_mb"),
]


@dataclass
class Case:
    """A point of a plot.

    Attributes:
        plot: title of the plot.
        series: name of the line.
        axis: what `x` is.
        x: the size.
        tokens: that attention is over.
        work: what grows with the square of the tokens, and the rest, in one run.
        build: makes the function to time, on `_measure.DEVICE`.
        peak: its peak memory in MB in a process of its own, for the CPU.
    """

    plot: str
    series: str
    axis: str
    x: int
    tokens: int
    work: tuple[int, int]
    build: Callable[[], Callable]
    peak: Callable[[], float]
    row: dict = field(default_factory=dict)


def segmenter_cases(name: str, sizes: list[int], patches: list[int], dtype: str) -> list[Case]:
    """Inference of one image: image size at each patch size, and patch size at each image size."""
    cases = []
    for size in sizes:
        for patch in patches:
            if size % patch:
                continue
            c = _segmenter.config(name, size, patch)
            arguments = (name, "inference", size, 1, dtype)

            def build(a=arguments, p=patch):
                return _segmenter.build("segkern", *a, _measure.DEVICE, patch=p)

            def peak(a=arguments, p=patch):
                return _segmenter.peak_memory("segkern", *a, "cpu", False, p)

            tokens, flops = (size // patch) ** 2, _segmenter.flops(c)
            for axis, x, series in (
                ("image side, pixels", size, f"patch {patch}"),
                ("patch side, pixels", patch, f"image {size}"),
            ):
                plot = f"{name} against {axis.split()[0]} size"
                cases.append(Case(plot, series, axis, x, tokens, flops, build, peak))
    return cases


def mask2former(kind: str, backbone: str, side: int, batch: int, queries: int, targets: int):
    """The function to time: our model of random weights; "tiny" is one that runs in a moment."""
    torch.manual_seed(0)
    tiny = backbone == "tiny"
    config = Mask2FormerConfig.tiny(7) if tiny else Mask2FormerConfig.preset(backbone)
    config.num_queries = queries
    model = Mask2Former(config).to(_measure.DEVICE)
    x = torch.randn(batch, 3, side, side, device=_measure.DEVICE)
    if kind == "inference":
        model.eval()
        return torch.inference_mode()(lambda: model(x))
    packed = Targets.from_lists(*random_targets([targets] * batch, 7, side, side))
    packed = packed.to(_measure.DEVICE)

    def step():
        model.zero_grad()
        model.loss(x, packed)[0].backward()

    return step


def mask2former_cases(small: bool) -> list[Case]:
    """Image size, batch, queries and backbone of an inference, targets of forward and backward."""
    backbone, side = ("tiny", 32) if small else ("swin_tiny", 256)
    sizes = [32, 64] if small else [256, 512, 1024, 2048]
    letters = ["tiny"] if small else ["swin_tiny", "swin_small", "swin_base", "swin_large"]
    counts = [1, 3] if small else [1, 4, 16, 48, 100]
    points = [  # plot, axis, x, arguments of `mask2former`
        *(("image size", "side, pixels", n, ("inference", backbone, n, 1, 100, 1)) for n in sizes),
        *(
            ("images", "images of a batch", n, ("inference", backbone, side, n, 100, 1))
            for n in ([1, 2] if small else [1, 2, 4, 8, 16])
        ),
        *(
            ("queries", "queries", n, ("inference", backbone, side, 1, n, 1))
            for n in ([8, 16] if small else [50, 100, 200])
        ),
        *(
            ("targets", "targets of the image", n, ("training", backbone, side, 1, 100, n))
            for n in counts
        ),
        *(
            ("backbone", "tiny, small, base, large", i + 1, ("inference", b, 2 * side, 1, 100, 1))
            for i, b in enumerate(letters)
        ),
    ]
    cases = []
    for plot, axis, x, arguments in points:

        def build(a=arguments):
            return mask2former(*a)

        def peak(a=arguments):
            return _models.peak_memory(*a, script=__file__)

        pixels = arguments[2] ** 2 * arguments[3]
        title = f"Mask2Former against {plot}"
        cases.append(Case(title, "segkern", axis, x, pixels // 16, (0, pixels), build, peak))
    return cases


def measure(cases: list[Case], runs: int) -> list[dict]:
    """A row for each case; what is built alike (same tokens and build arguments) is timed once."""
    known: dict[tuple, tuple[list[float], float]] = {}
    for case in cases:
        key = case.build.__defaults__
        if key not in known:
            _measure.free_memory()
            function = case.build()
            function()
            peak = _measure._peak_mb(function)
            times = [_measure._timed(function) for _ in range(runs)]
            known[key] = times, case.peak() if peak is None else peak
        times, peak = known[key]
        case.row = _measure.provenance() | {
            "threads": torch.get_num_threads(),
            "plot": case.plot,
            "series": case.series,
            "axis": case.axis,
            "x": case.x,
            "tokens": case.tokens,
            "square_work": case.work[0],
            "other_work": case.work[1],
            "p50_ms": f"{1e3 * statistics.median(times):.3f}",
            "runs": len(times),
            "peak_mb": f"{peak:.1f}",
        }
    return [{column: str(case.row[column]) for column in COLUMNS} for case in cases]


def draw(rows: list[dict], path: Path) -> None:
    """A row of axes for each plot: tokens, time with the formula, peak memory."""
    from matplotlib.figure import Figure

    plots = list(dict.fromkeys(row["plot"] for row in rows))
    figure = Figure(figsize=(12, 3.6 * len(plots)), layout="constrained")
    grid = figure.subplots(len(plots), 3, squeeze=False)
    for axes, plot in zip(grid, plots):
        of_plot = [row for row in rows if row["plot"] == plot]
        for series in dict.fromkeys(row["series"] for row in of_plot):
            line = sorted((r for r in of_plot if r["series"] == series), key=lambda r: int(r["x"]))
            x = [int(r["x"]) for r in line]
            ms = [float(r["p50_ms"]) for r in line]
            work = [int(r["square_work"]) + int(r["other_work"]) for r in line]
            axes[0].plot(x, [int(r["tokens"]) for r in line], "o-", label=series)
            (drawn,) = axes[1].plot(x, ms, "o-", label=series)
            scaled = [ms[0] * w / work[0] for w in work]
            axes[1].plot(x, scaled, ":", color=drawn.get_color())
            axes[2].plot(x, [float(r["peak_mb"]) for r in line], "o-", label=series)
        for ax, title in zip(
            axes, ("tokens", "time, ms (dotted: the formula)", "peak memory, MB")
        ):
            ax.set(title=title, xlabel=of_plot[0]["axis"], xscale="log", yscale="log")
            ax.legend(fontsize="small")
        axes[0].set_ylabel(plot)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    cuda = _measure.DEVICE == "cuda"
    if options.small:
        segmenter = segmenter_cases("tiny", [16, 32], [4, 8], "float32")
    elif cuda:
        segmenter = segmenter_cases(
            "Seg-B-Mask/16", [256, 512, 1024, 2048], [8, 16, 32], "bfloat16"
        )
    else:
        segmenter = segmenter_cases("Seg-S-Mask/16", [256, 512, 768], [8, 16, 32], "float32")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    models = {"mask2former": mask2former_cases(options.small), "segmenter": segmenter}
    for name, cases in models.items():
        start = time.monotonic()
        found = measure(cases, 9 if cuda else 3)
        draw(found, options.out / f"plots_{name}.png")
        rows += found
        with (options.out / "plots.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"{name}: {len(found)} points in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("["):  # the process of its own of `peak_memory`
        _models.print_peak(lambda: mask2former(*json.loads(sys.argv[1])))
    else:
        main()
