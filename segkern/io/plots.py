"""Figures: rows of scenes, training curves, confusion matrices, attention maps.

Letters: H W picture size, K class. Matplotlib is imported by the functions that need it.
"""

import json
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from .atomic_files import atomic
from .overlay import colour, overlay

LABELLED = 256  # classes: the names of more could not be read


def _plain(text: str) -> str:
    """A name as it is: two dollar signs would make it a formula."""
    return str(text).replace("$", r"\$")


def save_scenes(
    path: str | Path, rows, title: str | None = None, notes=None, names=("truth", "prediction")
) -> None:
    """Draws rows of an input and results on it, such as truth and prediction.

    Args:
        path: PNG, PDF or SVG to write.
        rows: (image [H, W, 3] uint8, result, ...), one result for each of `names`.
        title: above all.
        notes: a line of text beneath each row.
        names: of the columns of results.

    Raises:
        ValueError: no row.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("save_scenes: rows must not be empty")
    height, width = rows[0][0].shape[:2]
    side, columns = 2.6, 1 + len(names)
    figure = _figure(
        columns * side * min(2.0, width / height) + 0.3,
        (side + 0.2 * bool(notes)) * len(rows) + 0.5,
    )
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for r, (image, *results) in enumerate(rows):
        views = [_enlarged(image), *(overlay(image, x, label_stuff=False) for x in results)]
        for axis, view, name in zip(axes[r], views, ("input", *names)):
            axis.imshow(view)
            axis.set_axis_off()
            if r == 0:
                axis.set_title(_plain(name), fontsize=12)
        if notes:
            axes[r, 1].text(
                0.5,
                -0.03,
                _plain(notes[r]),
                transform=axes[r, 1].transAxes,
                ha="center",
                va="top",
                size=8,
            )
    if title:
        figure.suptitle(_plain(title), fontsize=13)
    _save(figure, path)


def save_curves(path: str | Path, log: str | Path) -> None:
    """Draws losses, learning rate and metrics of a training log.

    Args:
        path: PNG, PDF or SVG to write.
        log: JSON lines; each an object with "step" and any of "loss" (number), "losses" (name to
            number), "lr" (number), "metrics" (name to number). A cut last line is left out.

    Raises:
        ValueError: no line with a step.
    """
    series = _series(_read_log(log))
    panels = [name for name, lines in series.items() if lines]
    if not panels:
        raise ValueError(f"{log}: no losses, rates or metrics to draw")
    figure = _figure(4.6 * len(panels), 3.6)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for i, (name, points) in enumerate(series[panel].items()):
            steps, values = (np.asarray(x, dtype=float) for x in zip(*points))
            shade = [x / 255 for x in colour(i)]
            if panel == "loss" and len(values) >= 20:
                axis.plot(steps, values, color=shade, alpha=0.2, linewidth=0.8)
                values = _smooth(values)
            marker = "o" if len(values) < 20 else None
            axis.plot(steps, values, color=shade, label=name, linewidth=1.6, marker=marker, ms=3)
        axis.set_title(panel)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if panel == "loss":
            axis.set_yscale("log")
        if panel == "metrics":
            axis.set_ylim(0, 1)
        if len(series[panel]) > 1:
            axis.legend(fontsize=8, framealpha=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def has_curves(log: str | Path) -> bool:
    """Whether there is such a log, and it has what `save_curves` draws."""
    try:
        return any(_series(_read_log(log)).values())
    except (OSError, ValueError):
        return False


def _series(lines: list[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Of each panel the points of its lines by name."""
    series = {"loss": {}, "lr": {}, "metrics": {}}
    for line in lines:
        step = line["step"]
        for name, value in (("total", line.get("loss")), *line.get("losses", {}).items()):
            _add(series["loss"], name, step, value)
        _add(series["lr"], "learning rate", step, line.get("lr"))
        for name, value in line.get("metrics", {}).items():
            _add(series["metrics"], name, step, value)
    return series


def save_confusion(path: str | Path, matrix, names: list[str]) -> None:
    """Draws a confusion matrix, each row as shares of its sum, with the counts written in, or of
    large counts the shares in percent.

    Args:
        path: PNG, PDF or SVG to write.
        matrix: [K + 1, K + 1] counts: truth by prediction; the last of each is "nothing"; or
            [K, K] without it.
        names: K names.
    """
    matrix = np.asarray(matrix, dtype=float)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = min(max(4.0, 0.42 * len(matrix) + 1.6), 20.0)
    figure = _figure(size, size)
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [*names, "nothing"][: len(matrix)]
    letters = min(8.0, 72 * 0.75 * size / len(labels))  # a row's height, where they are many
    if len(labels) <= LABELLED:
        names = [_plain(name) for name in labels]
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=letters)
        axis.set_yticks(range(len(names)), names, fontsize=letters)
    axis.set_xlabel("prediction")
    axis.set_ylabel("truth")
    if len(matrix) <= 32:
        shown, form = (matrix, "{:.0f}") if matrix.max() < 1e4 else (100 * shares, "{:.0f}%")
        for y, x in zip(*(shown >= 0.5).nonzero()):
            text, shade = form.format(shown[y, x]), "white" if shares[y, x] > 0.6 else "black"
            axis.text(x, y, text, ha="center", va="center", color=shade, size=7)
    _save(figure, path)


def save_thresholds(path: str | Path, curve: dict[str, list], best: float | None) -> None:
    """Draws precision, recall and F1 against the least score.

    Args:
        path: PNG, PDF or SVG to write.
        curve: lists "score", "precision" (None where nothing is left), "recall" and "f1".
        best: score threshold to mark, if any.
    """
    figure = _figure(6.4, 3.6)
    axis = figure.subplots()
    for i, name in enumerate(("precision", "recall", "f1")):
        values = np.array(curve[name], float)  # None is NaN
        axis.plot(curve["score"], values, color=[x / 255 for x in colour(i)], label=name)
    if best is not None:
        axis.axvline(best, color="#5b6675", linestyle="--", linewidth=1, label=f"best: {best:.2f}")
    axis.set_xlabel("least score")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, framealpha=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def save_attention(path: str | Path, image, maps, titles, at, plane, names) -> None:
    """Draws attention maps over a picture, and classes in a plane.

    Args:
        path: PNG, PDF or SVG to write.
        image: [H, W, 3] uint8, or floating in [0, 1].
        maps: [n, h, w] floating, not negative; each is drawn up to its own maximum.
        titles: n.
        at: x and y of the place that looks, in [0, 1].
        plane: [K, 2] places of the classes, or None.
        names: K names of the classes.
    """
    panels = 1 + len(maps) + (plane is not None)
    columns = min(panels, 4)
    rows = -(-panels // columns)
    figure = _figure(3.0 * columns, 3.0 * rows * image.shape[0] / image.shape[1] + 0.4 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    for axis in axes:
        axis.set_axis_off()
    for axis, title in zip(axes, ["image", *titles]):
        axis.imshow(image, extent=extent)
        axis.set_title(_plain(title), fontsize=9)
        axis.plot(at[0] * width, at[1] * height, "o", color="white", mec="black", ms=6)
    for axis, values in zip(axes[1:], maps):
        axis.imshow(values / max(values.max(), 1e-12), extent=extent, cmap="inferno", alpha=0.75)
    if plane is not None:
        axis = axes[panels - 1]
        axis.set_axis_on()
        axis.set_title("class embeddings", fontsize=9)
        for k, (x, y) in enumerate(plane):
            axis.plot(x, y, ".", color=[c / 255 for c in colour(k)])
            axis.annotate(_plain(names[k]), (x, y), fontsize=7)
        axis.tick_params(labelsize=6)
    _save(figure, path)


def _enlarged(image: np.ndarray, least_side: int = 384) -> Image.Image:
    times = max(1, -(-least_side // min(image.shape[:2])))
    return Image.fromarray(image).resize((image.shape[1] * times, image.shape[0] * times), 0)


def _read_log(path: str | Path) -> list[dict]:
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # a run that was killed may leave half a line
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    if not lines:
        raise ValueError(f"{path}: no line with a step")
    return lines


def _add(series: dict, name: str, step: int, value) -> None:
    if isinstance(value, (int, float)) and np.isfinite(value):
        series.setdefault(name, []).append((step, value))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the points."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate(([0.0], values.cumsum()))
    places = np.arange(len(values))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def save_data(path: str | Path, report: dict, title: str) -> None:
    """Draws what a data set holds: objects of each class, sizes of objects and of pictures.

    Args:
        path: PNG, PDF or SVG to write.
        report: of `evaluation.data_report.examine`.
        title: above all.
    """
    rows = sorted(report["classes"], key=lambda row: row["objects"])[-60:]
    figure = _figure(13, max(4.5, 0.2 * len(rows) + 1.2))
    classes, sides, sizes = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    classes.barh(
        [_plain(row["name"]) for row in rows], [row["objects"] for row in rows], color="#1e88e5"
    )
    classes.set_title("objects of each class" + " (the 60 commonest)" * (len(rows) == 60))
    if max((row["objects"] for row in rows), default=0) > 100:
        classes.set_xscale("symlog")
    classes.tick_params(axis="y", labelsize=7)
    counts = report["object_sides"]
    edges = np.geomspace(0.004, 1, len(counts) + 1)
    sides.stairs(counts, edges, fill=True, color="#43be50")
    sides.set_xscale("log")
    sides.set_title("objects: side over the picture's\n(square root of the areas)")
    if report["sizes"]:
        height, width, count = np.array(report["sizes"], float).T
        sizes.scatter(width, height, 12 + 200 * count / count.max(), alpha=0.5, color="#ff8f00")
    sizes.set_title("pictures")
    sizes.set_xlabel("width")
    sizes.set_ylabel("height")
    sizes.set_xlim(left=0)
    sizes.set_ylim(bottom=0)
    figure.suptitle(
        f"{title}: {report['readable']} of {report['pictures']} pictures, "
        f"{report['objects']} objects, {report['findings_in_all']} findings"
    )
    _save(figure, path)


def save_sheet(path: str | Path, pictures, columns: int = 4) -> None:
    """Draws pictures beside and below each other.

    Args:
        path: PNG, PDF or SVG to write.
        pictures: (picture, title).
        columns: pictures in a row.

    Raises:
        ValueError: no picture.
    """
    pictures = list(pictures)
    if not pictures:
        raise ValueError("save_sheet: pictures must not be empty")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = _figure(3.6 * columns, 3.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (picture, title) in zip(axes, pictures):
        axis.imshow(picture)
        axis.set_title(_plain(title), fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing curves needs matplotlib: pip install matplotlib "
            "(or segkern's extra `train`: pip install '.[train]' in its folder)"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no display and no global state
    return figure


def _save(figure, path: str | Path | IO[bytes]) -> None:
    """Into a file, whole or not at all, or as PNG into one that is open."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # names that no font here has
        if hasattr(path, "write"):
            figure.savefig(path, dpi=130, format="png")
            return
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=130)
