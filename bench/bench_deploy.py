"""SegFormer as files: segkern, ONNX Runtime, OpenVINO, and int8 in ONNX Runtime.

The same random weights on all sides, images to label maps, one image at a time; the files give
logits, which are taken to the image's size before the argmax. int8 is calibrated on random images:
its time is that of a trained model, its results are nothing. One command:
`pytest bench/bench_deploy.py`.
"""

import tempfile
from pathlib import Path

import _segformer
import pytest
import torch
from _measure import DEVICE, OPTIONS, Work, pick

from segkern.deploy import quantize_onnx
from segkern.deploy.decompositions import decomposed
from segkern.deploy.export import traced
from segkern.deploy.formats import openers, write_onnx, write_openvino
from segkern.deploy.graph import Graph
from segkern.models.smaller import SENSITIVE

IMPLS = ("segkern", "ONNX Runtime", "OpenVINO", "ONNX Runtime, int8", "OpenVINO, int8")
CASES = pick([("tiny", 64)], [("b0", 512)], [])  # model, size
_kept = []


def build(name, size):
    folder = _segformer.weights(name)
    impls = {IMPLS[0]: _segformer.build("segkern", folder, "inference", size, 1)}
    model = _segformer.open_model("segkern", folder)
    kept = tempfile.TemporaryDirectory()
    _kept.append(kept)
    whole, small = (Path(kept.name, f"{name}.onnx") for name in ("float32", "int8"))
    graph = Graph(model)
    program = decomposed(traced(graph, (size, size), batches=False, sides=False), True)
    write_onnx(program, whole, graph, batches=False, sides=False, opset=20)
    source = quantize_onnx.prepared(whole, quantize_onnx.made_from(program))
    seen = [torch.randn(1, 3, size, size) for _ in range(2 if OPTIONS.small else 8)]
    quantize_onnx.to_int8(source, (*SENSITIVE, *model.class_head), seen, small)
    images = torch.randn(1, 3, size, size).numpy()
    for name, path in ((IMPLS[1], whole), (IMPLS[3], small)):
        impls[name] = _run(openers(path), images, size)
    for name, path in ((IMPLS[2], whole), (IMPLS[4], small)):
        try:
            write_openvino(path, path.with_suffix(".xml"), graph)
        except ImportError as missing:
            impls[name] = f"{missing.name} is not installed"
        else:
            impls[name] = _run(openers(path.with_suffix(".xml")), images, size)
    return Work(impls)


def _run(opened, images, size):
    return lambda: _segformer.label_map(opened(images)[0], size)


@pytest.mark.skipif(DEVICE != "cpu", reason="files run on the CPU")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]}")
def test_deploy(case, impl, measured):
    model, size = case
    measured(
        f"deploy segformer {model}", f"inference {size} B=1", "float32", impl, lambda: build(*case)
    )
