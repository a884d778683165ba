"""python bench/plots.py [--small] [--out FOLDER]: what a model costs at growing sizes, drawn.

Each `Case` is a point of a series: its time (median), its peak memory, and the FLOP that formulas
expect, those that grow with the square of the tokens apart from the others. The plot shows the
measured figures and, through the first point of a series, the formula: what grows as it says lies
on its line. Rows go to plots.csv, the figure to plots.png. Time on an idle machine.

A further model is a further list of cases, added in `main`.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import _measure
import _segmenter
import torch

COLUMNS = [
    *("date", "commit", "device", "threads", "torch", "plot", "series", "axis", "x", "tokens"),
    *("attention_flops", "other_flops", "p50_ms", "runs", "peak_mb"),
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
        flops: of attention, and of the rest, in one run.
        build: makes the function to time, on `_measure.DEVICE`.
        peak: its peak memory in MB in a process of its own, for the CPU.
    """

    plot: str
    series: str
    axis: str
    x: int
    tokens: int
    flops: tuple[int, int]
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
            "attention_flops": case.flops[0],
            "other_flops": case.flops[1],
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
            flops = [int(r["attention_flops"]) + int(r["other_flops"]) for r in line]
            axes[0].plot(x, [int(r["tokens"]) for r in line], "o-", label=series)
            (drawn,) = axes[1].plot(x, ms, "o-", label=series)
            scaled = [ms[0] * f / flops[0] for f in flops]
            axes[1].plot(x, scaled, ":", color=drawn.get_color())
            axes[2].plot(x, [float(r["peak_mb"]) for r in line], "o-", label=series)
        for ax, title in zip(axes, ("tokens", "time, ms (dotted: FLOP)", "peak memory, MB")):
            ax.set(title=title, xlabel=of_plot[0]["axis"], xscale="log", yscale="log")
            ax.legend(fontsize="small")
        axes[0].set_ylabel(plot)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    if options.small:
        cases = segmenter_cases("tiny", [16, 32], [4, 8], "float32")
    elif _measure.DEVICE == "cpu":
        cases = segmenter_cases("Seg-S-Mask/16", [256, 512, 1024], [8, 16, 32], "float32")
    else:
        sizes = [256, 512, 1024, 2048]
        cases = segmenter_cases("Seg-B-Mask/16", sizes, [8, 16, 32], "bfloat16")
    start = time.monotonic()
    rows = measure(cases, 2 if options.small else 9)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "plots.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.out / "plots.png")
    print(f"{len(rows)} points in {time.monotonic() - start:.0f} s: {options.out / 'plots.png'}")


if __name__ == "__main__":
    main()
