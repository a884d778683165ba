"""Export: a model for one task as a file that other runtimes open, run and compared at once.

    graph    = `Graph`: pixels in, named tensors out
    program  = torch.export of it, in segkern's ops or, `decomposed`, in PyTorch's own
    file     = by suffix .onnx, .xml (OpenVINO's) or .pt2 (segkern's kernels inside)

Files are made in a folder beside the target, run there in their own runtime and compared with the
model, and only then take their names: what is missed leaves nothing behind.

Letters: B image, h w size of the picture as the model takes it.
"""

import bisect
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from sympy import Eq, Ne
from sympy.core.relational import Relational
from torch import Tensor
from torch.fx.experimental.sym_node import SymNode
from torch.utils._sympy.numbers import int_oo

from ..io.atomic_files import writable_folder
from ..models.protocol import SegmentationModel
from ..ops._checks import expect_integer
from ..structures.settings import Options
from .compare import BOUND, Difference, compared
from .decompositions import decomposed
from .formats import PACKAGES, needed, openers, write_onnx, write_openvino
from .graph import INPUT, Form, Graph, expect_size

SUFFIXES = (".onnx", ".xml", ".pt2")
_LEAST = 128  # a side that is traced: a map of one row would be one for good
_LARGE = 1 << 20  # a side that no picture has


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        form: task, post and names of the results.
        batch: images at a time; None for any number.
        size: (h, w); None for any sides that are multiples of the model's divisor.
        differences: to the model, of each input that was compared.
    """

    path: Path
    form: Form
    batch: int | None
    size: tuple[int, int] | None
    differences: tuple[Difference, ...]

    def lines(self) -> list[str]:
        """What became of the comparison, a line an input."""
        return [str(difference) for difference in self.differences]


def export(
    model: SegmentationModel,
    path: str | Path,
    task: str | None = None,
    post: str | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    dynamic: bool | Literal["batch", "sides"] = True,
    grid_sample: bool = False,
    check: bool = True,
    options: Options | None = None,
    opset: int = 20,
    bound: float = BOUND,
    program: bool = False,
) -> Exported:
    """Writes a model as a file for other runtimes, and proves that it computes the same.

    The file takes `pixel_values` [B, C, h, w] float32, resized, normalised and padded to
    multiples of the divisor as `model.config.input` says, and gives what `Graph` says.

    Args:
        model: in float32 on the CPU, in whatever mode.
        path: the file: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2. What is there is
            replaced, once the new one is right.
        task: what a model that is told its task is asked; None is the first that it can do.
        post: None gives logits as the model makes them; "full" logits at the picture's size;
            "semantic", "instance" or "panoptic" that result.
        size: (h, w) of the pictures; None is the size of the model's own crops or windows.
        batch: pictures at a time, where that is fixed; None is 1.
        dynamic: True takes any number of pictures and, where the model does, of any sides that
            are multiples of its divisor (rows and columns beyond the last multiple are left
            out); "batch" any number of one size; "sides" as True, or an
            error where the model has one size; False neither.
        grid_sample: deformable attention by GridSample in place of gathers, for ONNX Runtime and
            OpenVINO: TensorRT has been seen to compile it wrongly.
        check: run the file and compare; False only where its runtime is not at hand.
        options: thresholds and top_k of a post; None is as in `segment`.
        opset: of ONNX, 18 to 23.
        bound: the most by which a result may differ, as a share of its largest magnitude, at
            least 1; of a map of labels the share of pixels that may differ.
        program: of .pt2: a torch.export program, which runs from Python and may be compiled there;
            else an AOTInductor package, compiled here for this kind of CPU, which also runs from
            C++. The library of the kernels, libsegkern.so, is written beside both.

    Returns:
        what was written, with the differences.

    Raises:
        ImportError: a package that the format needs is missing.
        OSError: the folder cannot be written to.
        TypeError, ValueError: an argument out of range or not for this model, or a file that
            differs by more than the bound; nothing is written then.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"export: path must end in {', '.join(SUFFIXES)}, got {path}")
    if dynamic not in (True, False, "batch", "sides"):
        raise ValueError(f"export: dynamic must be a bool, 'batch' or 'sides', got {dynamic!r}")
    if batch is not None:
        expect_integer("export: batch", batch)
        if dynamic is not False:
            raise ValueError(
                f"export: batch must be left out unless dynamic is False, got {batch} with "
                f"dynamic {dynamic!r}"
            )
    if not 18 <= opset <= 23:
        raise ValueError(f"export: opset must be from 18 to 23, got {opset}")
    if program and path.suffix != ".pt2":
        raise ValueError(f"export: program is for .pt2 files, got {path}")
    graph = Graph(model, task, post, options)
    expect_plain("export", model)
    size = tuple(graph.example if size is None else size)
    expect_size(model, size)
    needed(path.suffix, PACKAGES[path.suffix])
    writable_folder(path.parent)
    sides = dynamic in (True, "sides")
    if sides:
        why = one_size(graph, size)
        if why is not None and dynamic == "sides":
            raise ValueError(
                f"export: dynamic must be 'batch' or False for this {type(model).__name__}, which "
                f"takes pictures of one size: {why}"
            )
        sides = why is None
    batches = dynamic is not False
    if path.suffix == ".pt2":
        from .aot import export_pt2

        found = export_pt2(graph, path, size, batch or 1, batches, sides, check, bound, program)
    else:
        recorded = decomposed(traced(graph, size, batch or 1, batches, sides), grid_sample)
        found = ()
        with aside(path) as folder:
            file = folder / path.name
            write_onnx(recorded, file.with_suffix(".onnx"), graph, batches, sides, opset)
            if path.suffix == ".xml":
                write_openvino(file.with_suffix(".onnx"), file, graph)
            if check:
                inputs = samples(model, size, batch or 1, batches, sides)
                found = compared(graph, openers(file), inputs, bound, path)
    kept, count = None if sides else size, None if batches else batch or 1
    return Exported(path, graph.form, count, kept, tuple(found))


def expect_plain(caller: str, model: SegmentationModel) -> None:
    """Raises ValueError for a model in another dtype or place than a file for all has."""
    weight = next(model.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"{caller}: model must be in float32 on the CPU (model.float().cpu()), got "
            f"{weight.dtype} on {weight.device}"
        )


def one_size(graph: Graph, size: tuple[int, int]) -> str | None:
    """Why the model takes pictures of no other size; None where it does. It is tried on a small
    one."""
    settings = graph.model.config.input
    side = -(-_LEAST // settings.divisor) * settings.divisor
    other = (side, side + settings.divisor)
    if other == size:
        other = other[::-1]
    try:
        with torch.no_grad():
            graph(torch.zeros(1, settings.channels, *other))
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def traced(
    graph: Graph, size: tuple[int, int], batch: int = 1, batches: bool = True, sides: bool = True
) -> torch.export.ExportedProgram:
    """The graph as torch.export records it, in segkern's ops.

    Args:
        size: (h, w) of the pictures.
        batch: of them, where it is fixed.
        batches: any number of pictures.
        sides: any sides.

    Raises:
        ValueError: a graph for some numbers or sides alone.
    """
    takes, name = graph.model.config.input, type(graph.model).__name__
    channels, divisor = takes.channels, takes.divisor
    if sides:  # sizes of one, or equal ones, would be taken for constants
        least = -(-_LEAST // divisor) * divisor
        size = max(size[0], least), max(size[1], least)
        size = size if size[0] != size[1] else (size[0], size[1] + divisor)
        graph = copy(graph)
        graph.multiples = True
    pixels = torch.zeros(2 if batches else batch, channels, *size)
    any_ = [axis for axis, free in enumerate((batches, False, sides, sides)) if free]
    shapes = {INPUT: dict.fromkeys(any_, torch.export.Dim.DYNAMIC)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, (pixels,), dynamic_shapes=shapes if any_ else None)
    _expect_free(program, any_, name, divisor)
    return program


def _expect_free(
    program: torch.export.ExportedProgram, axes: list[int], name: str, divisor: int
) -> None:
    """Raises ValueError where a decision of the model's, made when it was recorded, holds for some
    sizes alone."""
    (pixels,) = (n for n in program.graph.nodes if n.op == "placeholder" and n.name == INPUT)
    for axis in axes:
        size = pixels.meta["val"].shape[axis].node
        known = program.range_constraints.get(size.expr)
        lower, upper = (known.lower, known.upper) if known is not None else (0, int_oo)
        if axis > 0:
            upper = min(upper, _most(size, divisor))
        if upper != int_oo or lower > _LEAST:
            raise ValueError(
                f"export: dynamic must leave axis {axis} of the pixels fixed for this {name}, "
                f"whose graph holds from {lower} to {upper} alone"
            )


def _most(size: SymNode, divisor: int):
    """The largest side, a multiple of the divisor, for which all decisions about it hold; they are
    about the whole multiple in it, which is no range that PyTorch keeps."""
    least, most = -(-_LEAST // divisor), _LARGE // divisor
    for guard in size.shape_env.guards:
        bound = isinstance(guard.expr, Relational) and not isinstance(guard.expr, (Eq, Ne))
        if not bound or guard.expr.free_symbols != {size.expr}:
            continue

        def broken(n: int, expr=guard.expr) -> bool:
            return not expr.subs(size.expr, n * divisor)

        if broken(most):
            most = least + bisect.bisect(range(least, most), 0, key=broken) - 1
    return int_oo if most == _LARGE // divisor else most * divisor


def samples(
    model: SegmentationModel, size: tuple[int, int], batch: int, batches: bool, sides: bool
) -> list[Tensor]:
    """Inputs that a file is compared on: two sizes where it takes several, else two numbers of
    pictures where it takes those, else one."""
    settings = model.config.input
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, *size)]
    if sides:
        down, right = (_nearby(n, settings.divisor) for n in size)
        shapes.append((batch + 1 if batches else batch, down, right))
    elif batches:
        shapes.append((batch + 1, *size))
    return [torch.randn(b, settings.channels, h, w, generator=generator) for b, h, w in shapes]


def _nearby(side: int, divisor: int) -> int:
    """Another side: three quarters of it, but not so few that maps have one row."""
    smaller = -(-side * 3 // 4 // divisor) * divisor
    return smaller if smaller >= _LEAST and smaller != side else side + divisor


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A folder beside the target, whose files of the target's name take their places when the
    block ends well: first what stands beside the file, then the file."""
    kept = {path.name, f"{path.name}.data"}
    if path.suffix == ".xml":
        kept.add(path.with_suffix(".bin").name)
    folder = Path(tempfile.mkdtemp(prefix=".export-", dir=path.parent))
    try:
        yield folder
        for name in sorted(kept, key=lambda name: name == path.name):
            if (folder / name).is_file():
                os.replace(folder / name, path.with_name(name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
