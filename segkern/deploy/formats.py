"""Files of ONNX and OpenVINO: how they are written, and how their own runtimes open them."""

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .compare import Run
from .graph import INPUT, Graph

PACKAGES = {  # suffix to what must be importable
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".xml": ("onnx", "onnxscript", "openvino"),
    ".pt2": (),
}


def needed(suffix: str, packages: Sequence[str]) -> None:
    """Raises ImportError for a package that is missing, with the remedy."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"export: a {suffix} file needs {name}: pip install {' '.join(packages)} (or "
                "segkern's extra `export`: pip install '.[export]' in its folder)"
            ) from error


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    graph: Graph,
    batches: bool,
    sides: bool,
    opset: int,
) -> None:
    """Writes a program of PyTorch's own operations as ONNX.

    Weights of more than 2 GB together go to `path`.data. The file's metadata says under "segkern"
    what it is, as JSON.

    Args:
        batches, sides: which axes of the pixels have names and no numbers.
        opset: the version of ONNX's operators.
    """
    axes = {0: "batch"} if batches else {}
    axes |= {2: "height", 3: "width"} if sides else {}
    with torch.no_grad(), quiet():
        made = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=list(graph.form.outputs),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    made.model.producer_name = "segkern"
    for place, name in axes.items():
        made.model.graph.inputs[0].shape[place] = name
    made.model.metadata_props["segkern"] = json.dumps(describe(graph))
    made.save(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch's exporter and its optimizer say of operators that they leave alone."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_openvino(onnx: Path, path: Path, graph: Graph) -> None:
    """Writes an ONNX file as OpenVINO's representation, in float32: .xml and .bin. What it is
    stands under "segkern" in its runtime information."""
    import openvino

    made = openvino.convert_model(onnx)
    made.set_rt_info(json.dumps(describe(graph)), ["segkern"])
    openvino.save_model(made, path, compress_to_fp16=False)


def describe(graph: Graph) -> dict:
    """What a file is: model, task, post, results, labels, and how pictures become pixels; padding
    is a value for each channel, of normalised pixels."""
    config, form = graph.model.config, graph.form
    names = config.labels.names
    takes = config.input
    return {
        "kind": config.kind,
        "task": form.task,
        "post": form.post,
        "outputs": list(form.outputs),
        "num_labels": config.num_labels,
        "labels": None if names is None else {str(k): v for k, v in names.items()},
        "stuff": sorted(config.labels.stuff),
        "mean": list(takes.mean),
        "std": list(takes.std),
        "padding": list(takes.padding),
        "divisor": takes.divisor,
    }


def openers(path: Path) -> Run:
    """The file in its own runtime, on the CPU."""
    return _onnxruntime(path) if path.suffix == ".onnx" else _openvino(path)


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {INPUT: pixels})


def _openvino(path: Path) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def opened(pixels: np.ndarray) -> list[np.ndarray]:
        found = compiled(pixels)
        return [found[port] for port in compiled.outputs]

    return opened
