"""Writes .pt2 files with segkern's kernels inside: AOTInductor packages and torch.export programs.

    package  = the graph compiled for this kind of CPU; runs from C++ and Python
    program  = the graph as torch.export records it; runs from Python, and can be compiled there

Both call segkern's ops through PyTorch's dispatcher, so a process needs the ops: those of an
imported segkern, or of the library that is written beside the file. What has its kernel in Python
is written out in ops that have one there (`with_kernels`).
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..io.atomic_files import atomic
from ..ops import _library
from ..ops.linear import NUMBERS
from .compare import Difference, compared, torch_run
from .decompositions import norm_relu
from .export import aside, samples, traced
from .formats import describe
from .graph import INPUT, Graph
from .load import ABOUT, LIBRARY, load

_linear = torch.ops.segkern.linear.default


def export_pt2(
    graph: Graph,
    path: Path,
    size: tuple[int, int],
    batch: int,
    batches: bool,
    sides: bool,
    check: bool,
    bound: float,
    program: bool = False,
) -> tuple[Difference, ...]:
    """Writes a graph as a .pt2 file, and beside it the library of the kernels.

    Args:
        graph: in float32 on the CPU.
        path: the file; it and the library are replaced where they exist.
        size: (h, w) of the pictures, where sides are fixed.
        batch: pictures at a time, where that is fixed.
        batches: any number of pictures.
        sides: any sides.
        check: open the file and compare it with the graph.
        bound: the most by which a result may differ.
        program: a torch.export program in place of an AOTInductor package.

    Returns:
        the differences.

    Raises:
        ImportError: segkern's kernels are missing here.
        RuntimeError: the package does not compile.
        ValueError: the file differs by more than the bound; nothing is written then.
    """
    why = _library.MISSING.get("cpu")
    if why is not None:
        raise ImportError(f"export: a .pt2 file holds segkern's kernels, but {why}")
    made = with_kernels(traced(graph, size, batch, batches, sides))
    with aside(path) as folder:
        file = folder / path.name
        (write_program if program else _write_package)(made, file, metadata(graph, made))
        found = ()
        if check:
            inputs = samples(graph.model, size, batch, batches, sides)
            found = compared(graph, torch_run(load(file).run), inputs, bound, path)
        with atomic(path.with_name(LIBRARY)) as library:
            shutil.copyfile(_library.PACKAGE / "_C_cpu.abi3.so", library)
    return found


def with_kernels(program: ExportedProgram) -> ExportedProgram:
    """The program without the ops whose kernel is in Python: in their place stands what they are
    made of."""
    made_of = {"feed_forward": _feed_forward, "norm_relu": norm_relu}
    made_of |= {name: _library.COMPOSED[name] for name in ("query_layer", "query_prediction")}
    table = {getattr(torch.ops.segkern, name).default: made for name, made in made_of.items()}
    return program.run_decompositions(table)


def _feed_forward(
    x: Tensor,  # [R, C]
    weight1: Tensor,  # [F, C]
    bias1: Tensor,  # [F]
    weight2: Tensor,  # [C, F]
    bias2: Tensor,  # [C]
    gelu: bool,
    residual: Tensor | None,  # [R, C]
) -> Tensor:  # [R, C]
    """All rows in one block: a graph has no loop over a number of them that it does not know."""
    activation = NUMBERS["gelu" if gelu else "relu"]
    hidden = _linear(x, weight1, bias1, activation, None, False)[0]
    return _linear(hidden, weight2, bias2, NUMBERS["none"], residual, False)[0]


def metadata(graph: Graph, program: ExportedProgram) -> dict[str, str]:
    """What a file says of itself: all as JSON, and as plain numbers what a program in C++ needs
    to make pixels of a picture. The shape of the pixels has None, or 0 in plain numbers, where any
    number goes."""
    (pixels,) = (n for n in program.graph.nodes if n.op == "placeholder" and n.name == INPUT)
    shape = [n if isinstance(n, int) else None for n in pixels.meta["val"].shape]
    about = describe(graph) | {"shape": shape}
    numbers = {name: about[name] for name in ("mean", "std", "padding")}
    numbers |= {"divisor": [about["divisor"]], "shape": [n or 0 for n in shape]}
    plain = {name: " ".join(map(str, values)) for name, values in numbers.items()}
    return {ABOUT: json.dumps(about)} | plain


def write_program(program: ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    """Writes a program with `metadata`, as `load` opens it."""
    torch.export.save(program, file, extra_files=metadata)


def _write_package(program: ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    settings = {"aot_inductor.metadata": metadata}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(file), inductor_configs=settings
        )
