"""python bench/plots.py [--small] [--out FOLDER]: what a model costs at growing sizes, drawn.

Each `Case` is a point of a series: its time (median), its peak memory, and the work that formulas
expect, the part that grows with the square of the tokens apart from the rest: FLOP of Segmenter,
pixels of Mask2Former, all of whose parts grow with them. The plot shows the measured figures and,
through the first point of a series, the formula: what grows as it says lies on its line. Beside
Mask2Former stands transformers' with the same weights, timed in turn in the same process. Rows go
to plots.csv, a figure a model to plots_MODEL.png. Time on an idle machine.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import _measure
import _models
import _segmenter
import torch

from segkern.structures.targets import Targets
from support.inputs import moved, random_targets

SECONDS = 5.0  # a run that takes longer is timed once less
# slow or like their neighbours: not timed with transformers, whose memory ends first as well
ALONE = {("image size", 2048), ("images", 2), ("images", 16), ("targets", 4), ("targets", 48)}
COLUMNS = [
    *("date", "commit", "device", "threads", "torch", "plot", "series", "impl", "axis", "x"),
    *("tokens", "square_work", "other_work", "p50_ms", "runs", "peak_mb"),
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
        build: makes the function to time, on `_measure.DEVICE`; takes an implementation.
        peak: its peak memory in MB in a process of its own, for the CPU; likewise.
        impls: implementations, "segkern" and its peer.
    """

    plot: str
    series: str
    axis: str
    x: int
    tokens: int
    work: tuple[int, int]
    build: Callable[[str], Callable]
    peak: Callable[[str], float]
    impls: tuple[str, ...] = ("segkern",)


def segmenter_cases(name: str, sizes: list[int], patches: list[int], dtype: str) -> list[Case]:
    """Inference of one image: image size at each patch size, and patch size at each image size."""
    cases = []
    for size in sizes:
        for patch in patches:
            if size % patch:
                continue
            c = _segmenter.config(name, size, patch)
            arguments = (name, "inference", size, 1, dtype)

            def build(impl, a=arguments, p=patch):
                return _segmenter.build(impl, *a, _measure.DEVICE, patch=p)

            def peak(impl, a=arguments, p=patch):
                return _segmenter.peak_memory(impl, *a, "cpu", False, p)

            tokens, flops = (size // patch) ** 2, _segmenter.flops(c)
            for axis, x, series in (
                ("image side, pixels", size, f"patch {patch}"),
                ("patch side, pixels", patch, f"image {size}"),
            ):
                plot = f"{name} against {axis.split()[0]} size"
                cases.append(Case(plot, series, axis, x, tokens, flops, build, peak))
    return cases


def mask2former(impl: str, folder: str, kind: str, side: int, batch: int, targets: int):
    """The function to time, of the weights in a folder: an inference, or forward and backward."""
    torch.manual_seed(0)
    model = _models.open_model(impl, folder, _measure.DEVICE)
    x = torch.randn(batch, 3, side, side, device=_measure.DEVICE)
    if kind == "inference":
        return torch.inference_mode()(lambda: model(x))
    model.train()
    masks, labels = random_targets([targets] * batch, 7, side, side)
    if impl == "segkern":
        wanted = {"targets": Targets.from_lists(masks, labels).to(_measure.DEVICE)}
    else:
        wanted = {"mask_labels": masks, "class_labels": labels}
        wanted = {name: moved(given, _measure.DEVICE) for name, given in wanted.items()}

    def step():
        model.zero_grad()
        model(x, **wanted).loss.backward()

    return step


def mask2former_cases(small: bool) -> list[Case]:
    """Image size, batch, queries and backbone of an inference, targets of forward and backward."""
    backbone, side = ("tiny", 64) if small else ("swin_tiny", 256)
    sizes = [64, 128] if small else [256, 512, 1024, 2048]
    letters = ["tiny"] if small else ["swin_tiny", "swin_small", "swin_base", "swin_large"]
    points = [  # plot, axis, x, backbone, queries, then arguments of `mask2former`
        *(("image size", "side, pixels", n, backbone, 100, ("inference", n, 1, 1)) for n in sizes),
        *(
            ("images", "images of a batch", n, backbone, 100, ("inference", side, n, 1))
            for n in ([1, 2] if small else [1, 2, 4, 8, 16])
        ),
        *(
            ("queries", "queries", n, backbone, n, ("inference", side, 1, 1))
            for n in ([8, 16] if small else [50, 100, 200])
        ),
        *(
            ("targets", "targets of the image", n, backbone, 100, ("training", side, 1, n))
            for n in ([1, 3] if small else [1, 4, 16, 48, 100])
        ),
        *(
            ("backbone", "tiny, small, base, large", i, b, 100, ("inference", 2 * side, 1, 1))
            for i, b in enumerate(letters, 1)
        ),
    ]
    cases = []
    for plot, axis, x, body, queries, arguments in points:

        def build(impl, body=body, queries=queries, a=arguments):
            return mask2former(impl, _models.weights(body, queries), *a)

        def peak(impl, body=body, queries=queries, a=arguments):
            return _models.peak_memory(impl, _models.weights(body, queries), *a, script=__file__)

        pixels = arguments[1] ** 2 * arguments[2]
        impls = ("segkern",) if (plot, x) in ALONE else ("segkern", "transformers")
        title, work = f"Mask2Former against {plot}", (0, pixels)
        cases.append(Case(title, "", axis, x, pixels // 16, work, build, peak, impls))
    return cases


def measure(cases: list[Case], runs: int) -> list[dict]:
    """Rows of the cases, the implementations of one in turn; what is built alike (same build
    arguments) is timed once."""
    known: dict[tuple, dict[str, tuple[list[float], float]]] = {}
    rows = []
    for case in cases:
        key = case.build.__defaults__
        if key not in known or known[key].keys() < set(case.impls):
            known[key] = _timed_in_turn(case, runs)
        for impl in case.impls:
            times, peak = known[key][impl]
            row = _measure.provenance() | {
                "threads": torch.get_num_threads(),
                "plot": case.plot,
                "series": case.series,
                "impl": impl,
                "axis": case.axis,
                "x": case.x,
                "tokens": case.tokens,
                "square_work": case.work[0],
                "other_work": case.work[1],
                "p50_ms": f"{1e3 * statistics.median(times):.3f}",
                "runs": len(times),
                "peak_mb": f"{peak:.1f}",
            }
            rows.append({column: str(row[column]) for column in COLUMNS})
    return rows


def _timed_in_turn(case: Case, runs: int) -> dict[str, tuple[list[float], float]]:
    """Of each implementation its times in seconds, and its peak memory in MB."""
    _measure.free_memory()
    functions = {impl: case.build(impl) for impl in case.impls}
    slowest = max(_measure._timed(function) for function in functions.values())
    peaks = {impl: _measure._peak_mb(function) for impl, function in functions.items()}
    times = {impl: [] for impl in functions}
    for _ in range(runs - (slowest > SECONDS)):
        for impl, function in functions.items():
            times[impl].append(_measure._timed(function))
    del function, functions  # the memory is that of the processes that follow
    return {
        impl: (times[impl], case.peak(impl) if peak is None else peak)
        for impl, peak in peaks.items()
    }


def draw(rows: list[dict], path: Path) -> None:
    """A row of axes for each plot: tokens, time with the formula, peak memory."""
    from matplotlib.figure import Figure

    plots = list(dict.fromkeys(row["plot"] for row in rows))
    figure = Figure(figsize=(12, 3.6 * len(plots)), layout="constrained")
    grid = figure.subplots(len(plots), 3, squeeze=False)
    for axes, plot in zip(grid, plots):
        of_plot = [row for row in rows if row["plot"] == plot]
        for series, impl in dict.fromkeys((row["series"], row["impl"]) for row in of_plot):
            line = [row for row in of_plot if (row["series"], row["impl"]) == (series, impl)]
            line.sort(key=lambda row: int(row["x"]))
            label, style = series or impl, "o-" if impl == "segkern" else "s--"
            x = [int(r["x"]) for r in line]
            ms = [float(r["p50_ms"]) for r in line]
            work = [int(r["square_work"]) + int(r["other_work"]) for r in line]
            axes[0].plot(x, [int(r["tokens"]) for r in line], style, label=label)
            (drawn,) = axes[1].plot(x, ms, style, label=label)
            scaled = [ms[0] * w / work[0] for w in work]
            axes[1].plot(x, scaled, ":", color=drawn.get_color())
            axes[2].plot(x, [float(r["peak_mb"]) for r in line], style, label=label)
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
        case = json.loads(sys.argv[1])
        _models.load(case[0])
        _models.print_peak(lambda: mask2former(*case))
    else:
        main()
