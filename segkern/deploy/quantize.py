"""Models with fewer bits a number: int8 or bfloat16, always with what that costs.

The file that is written is evaluated itself, in its own runtime, on the same images as the model
before; one that loses more than is allowed is not written.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..evaluation.evaluate import check_dataset, found, options_of
from ..inference.segment import check
from ..io.atomic_files import new_place, write_json
from ..models import open_model, smaller
from ..models.protocol import SegmentationModel
from ..ops._checks import expect_integer
from ..structures.logits import PixelLogits
from ..structures.settings import Options, Views
from . import quantize_onnx, quantize_pt2
from .aot import metadata, write_program
from .compare import BOUND, compared
from .decompositions import decomposed
from .export import expect_plain, one_size, samples, traced
from .figures import FIGURES, Measure, sizes
from .formats import PACKAGES, needed, openers, write_onnx
from .graph import Graph
from .opened import open_file
from .prune import Watched

METHODS = ("int8", "int8-weights", "bf16")
_SUFFIXES = (".onnx", ".pt2")
_OPSET = 20  # of ONNX


class QualityLostError(RuntimeError):
    """The file lost more than it may, and was not written.

    Attributes:
        rows: the table, as `quantize` returns it.
    """

    def __init__(self, message: str, rows: list[dict]):
        super().__init__(message)
        self.rows = rows


def quantize(
    model: SegmentationModel,
    out: str | Path,
    dataset,
    method: str = "int8",
    calibration=None,
    pictures: int = 32,
    keep: Sequence[str] = (),
    max_drop: float = 0.01,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    options: Options | None = None,
    runs: int = 5,
    progress: bool = True,
    report: str | Path | None = None,
) -> list[dict]:
    """Writes a model with fewer bits, and measures the file beside the model.

    Sensitive parts stay in float32 in files: sampling offsets, the words of a task, the class
    head, and what is no product with a weight or convolution, such as norms.

    Args:
        model: in float32 on the CPU; is not changed.
        out: by method an .onnx file, a .pt2 file of torch.export, or a folder of weights; there is
            nothing yet. A file gives logits, as `export` without a post.
        dataset: to measure on: samples by index, as `evaluate` takes them.
        method: "int8": weights by output channel and activations by tensor, of .onnx (ONNX
            Runtime's static quantisation) or .pt2 (torchao's PT2E for Inductor on x86);
            "int8-weights": weights alone, of the same; "bf16": weights in bfloat16, of .onnx,
            where float32 is computed, or of a folder for `open_model(out, dtype="auto")`.
        calibration: samples whose activations give the ranges of "int8"; None takes those of
            `dataset`. Better not what is measured on.
        pictures: the first so many of `calibration`.
        keep: patterns of names of weights that stay in float32, too, such as "backbone.*".
        max_drop: the most that a figure may fall, in its own unit from 0 to 1.
        tasks, limit, options: of `evaluate`; of a model that is told its task, a file is for one,
            the first.
        runs: of which `ms` is the median.
        progress: show bars.
        report: JSON file for the method and the rows, also of a file that is not written.

    Returns:
        rows of plain types, each with a name, `ms` and `mb`: "model", which also has the figure of
        each task, and its size in the same format; "float32 file", where there is one; and the
        method's, with figures.

    Raises:
        QualityLostError: a figure falls by more than `max_drop`; nothing is written.
        ImportError: a package that the format needs is missing.
        TypeError: no model by `models.protocol`.
        ValueError: an argument out of range or not for this model, or `out` is there.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    _check(model, out, method, pictures, max_drop)
    options = Options() if options is None else options
    tasks = check("quantize", model, tasks, options, Views())
    if out.suffix in _SUFFIXES and model.inputs(tasks[0], 1):
        tasks = tasks[:1]
    check_dataset(dataset, model.config, tasks, "quantize: dataset")
    smaller.weights_of_layers(model, keep)  # refuses patterns that fit nothing
    measure = Measure(dataset, tasks, limit, options, runs, progress)
    with new_place("quantize: out", out) as temporary:
        rows = [measure("model", model)]
        if out.suffix not in _SUFFIXES:
            written = _folder(model, temporary)
            beside = temporary.parent / "float32"
            model.save_pretrained(beside)
            rows[0] |= sizes(beside)
        else:
            source = dataset if calibration is None else calibration
            seen, stride = _seen(model, source, tasks[:1], pictures)
            patterns = (*smaller.SENSITIVE, *model.class_head, *keep)
            beside = temporary.parent / f"float32{out.suffix}"
            make = _onnx if out.suffix == ".onnx" else _pt2
            make(model, tasks[0], method, patterns, seen, beside, temporary)
            whole = open_file(beside, model.config, stride)
            ms = round(measure.milliseconds(whole), 3)
            rows[0] |= sizes(beside)
            rows.append({"name": "float32 file", "ms": ms} | sizes(beside))
            written = open_file(temporary, model.config, stride)
        rows.append(measure(method, written) | sizes(temporary))
        if report is not None:
            write_json(report, {"method": method, "max_drop": max_drop, "rows": rows})
        _expect_kept(rows, tasks, max_drop, out)
    return rows


def _check(
    model: SegmentationModel, out: Path, method: str, pictures: int, max_drop: float
) -> None:
    """Raises ValueError, TypeError or ImportError before any work."""
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {method!r}")
    folder = out.suffix not in _SUFFIXES
    if folder and (method != "bf16" or out.suffix in (".xml", ".pth", ".engine", ".bin")):
        raise ValueError(
            f"quantize: out must end in .onnx or .pt2{' or be a folder' * (method == 'bf16')} "
            f"for method {method}, got {out}"
        )
    if out.suffix == ".pt2" and method == "bf16":
        raise ValueError(f"quantize: out must end in .onnx or be a folder for bf16, got {out}")
    expect_integer("quantize: pictures", pictures)
    if not 0 <= max_drop <= 1:
        raise ValueError(f"quantize: max_drop must be in [0, 1], got {max_drop}")
    expect_plain("quantize", model)
    needed(out.suffix, ("torchao",) if out.suffix == ".pt2" else PACKAGES.get(out.suffix, ()))


def _seen(
    model: SegmentationModel, source, tasks: Sequence[str], pictures: int
) -> tuple[list[Tensor], int]:
    """What the model takes of the first pictures, as inference makes it, and the stride of its
    maps."""
    seen, strides = [], [1]

    def see(pixel_values: Tensor, logits) -> None:
        seen.extend(pixel_values.float().split(1))
        strides[0] = logits.stride if isinstance(logits, PixelLogits) else 1

    watched, wanted = Watched(model, see), options_of(tasks, Options(), 100)
    for i in range(min(pictures, len(source))):
        list(found(watched, [source[i]], wanted, Views(), (), cuda_graphs=False))
    if not seen:
        raise ValueError("quantize: calibration must have pictures, got none")
    return seen, strides[0]


def _folder(model: SegmentationModel, folder: Path) -> SegmentationModel:
    smaller.copied(model).bfloat16().save_pretrained(folder)
    return open_model(folder, dtype="auto")


def _onnx(
    model: SegmentationModel,
    task: str,
    method: str,
    keep: Sequence[str],
    seen: list[Tensor],
    whole: Path,
    path: Path,
) -> None:
    """Writes both files."""
    graph = Graph(model, task)
    size = graph.example
    sides = one_size(graph, size) is None
    program = decomposed(traced(graph, size, sides=sides), grid_sample=True)
    write_onnx(program, whole, graph, batches=True, sides=sides, opset=_OPSET)
    compared(graph, openers(whole), samples(model, size, 1, True, sides), BOUND, whole)
    source = quantize_onnx.prepared(whole, quantize_onnx.made_from(program))
    if method == "int8":
        quantize_onnx.to_int8(source, keep, seen, path)
    elif method == "int8-weights":
        quantize_onnx.to_int8_weights(source, keep, path)
    else:
        quantize_onnx.to_bf16(source, keep, path)


def _pt2(
    model: SegmentationModel,
    task: str,
    method: str,
    keep: Sequence[str],
    seen: list[Tensor],
    whole: Path,
    path: Path,
) -> None:
    """Writes both files."""
    graph = Graph(model, task)
    size = graph.example
    sides = one_size(graph, size) is None
    program = traced(graph, size, sides=sides)
    write_program(program, whole, metadata(graph, program))
    alone = method == "int8-weights"
    program = quantize_pt2.to_int8(graph, keep, seen, size, sides, alone)
    write_program(program, path, metadata(graph, program))


def _expect_kept(rows: list[dict], tasks: Sequence[str], max_drop: float, out: Path) -> None:
    """Raises QualityLostError where a figure of the last row is too far below the first's."""
    lost = dict(_drops(rows, tasks))
    worst = max(lost, key=lost.get, default=None)
    if worst is not None and lost[worst] > max_drop:
        raise QualityLostError(
            f"quantize: {worst} falls by {lost[worst]:.3f}, more than max_drop {max_drop:g}: "
            f"{out} was not written; keep more parts in float32 (keep), calibrate on more "
            "pictures, or take another method",
            rows,
        )


def _drops(rows: list[dict], tasks: Sequence[str]) -> Iterator[tuple[str, float]]:
    for task in tasks:
        figure = FIGURES[task]
        before, after = rows[0][figure], rows[-1][figure]
        if before is not None:
            yield figure, before - (after or 0.0)
