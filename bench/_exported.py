"""Transformers' models in OpenVINO and in ONNX Runtime, for the benchmarks of models."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _measure import DEVICE, OPTIONS
from torch import Tensor


def runtimes(
    kind: str,
    open_model: Callable[[], torch.nn.Module],
    results: Sequence[str],
    shape: Sequence[int],
    dtype: str,
    after: Callable = lambda *results: results,
) -> dict[str, Callable | str]:
    """An inference by each, or why there is none.

    Args:
        kind: of the case: they run "inference" alone, on the CPU.
        open_model: opens transformers' model.
        results: names in the model's output.
        shape: [B, 3, H, W] of the images.
        dtype: "float32", or "bfloat16..." for what OpenVINO computes in; images and results are
            float32.
        after: of the results, as arrays of NumPy.
    """
    if kind != "inference" or DEVICE != "cpu" or OPTIONS.small:
        return dict.fromkeys(RUNTIMES, "for inference on a CPU")
    torch.manual_seed(0)
    x = torch.randn(*shape)
    model = _Results(open_model(), results).eval()
    impls = {}
    for name, export in RUNTIMES.items():
        try:
            run = export(model, x, dtype.startswith("bfloat16"))
        except ImportError as missing:
            impls[name] = f"{missing.name} is not installed"
        else:
            impls[name] = run if isinstance(run, str) else lambda run=run: after(*run(x.numpy()))
    return impls


class _Results(torch.nn.Module):
    """Some results of a model of transformers, as a tuple."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.model(x)
        return tuple(out[name] for name in self.names)


@torch.no_grad()
def _openvino(model: torch.nn.Module, x: Tensor, half: bool) -> Callable | str:
    import openvino

    graph = openvino.convert_model(model, example_input=x)
    graph.reshape(list(x.shape))  # constant shapes, as torch.compile has them
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    return lambda images: tuple(compiled(images).values())


@torch.no_grad()
def _onnxruntime(model: torch.nn.Module, x: Tensor, half: bool) -> Callable | str:
    import onnxruntime
    import onnxscript  # noqa: F401  (what PyTorch exports with)

    if half:
        return "no bfloat16 on the CPU"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would go on spinning in the time of the next implementation
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        try:
            exported = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        except torch.onnx.OnnxExporterError as error:
            return f"PyTorch does not export it: {type(error.__cause__ or error).__name__}"
        exported.save(file, external_data=True)  # a file of its own for more than 2 GB
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


RUNTIMES = {"OpenVINO": _openvino, "ONNX Runtime": _onnxruntime}
