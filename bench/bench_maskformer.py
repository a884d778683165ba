"""MaskFormer against transformers: inference and a training step, same weights.

On the CPU peak memory is that of a process of its own, above what it held after the imports; on a
GPU what a run allocates above weights and inputs. bfloat16 is autocast on both sides. OpenVINO
runs transformers' model, converted. A step is forward, loss of the last prediction (which is what
transformers trains by itself), backward, clipping and AdamW.
"""

import _models
import pytest
from _measure import DEVICE, OPTIONS, Work, pick
from bench_mask2former import name

IMPLS = ("segkern", "transformers")
COMPILED, OPENVINO = "transformers, compiled", "OpenVINO"
ONE, HALF = "float32", "bfloat16"
CASES = pick(  # model, kind, height, width, batch, dtype
    [("tiny", "inference", 64, 64, 1, ONE), ("tiny", "training step", 64, 64, 2, ONE)],
    [("swin_tiny", "inference", side, side, 1, ONE) for side in (512, 1024)]
    + [("resnet50", "inference", 512, 512, 1, ONE)]
    + [("swin_tiny", "training step", 512, 512, 2, ONE)],
    [
        (model, kind, 1024, 1024, batch, HALF)
        for kind, batch in (("inference", 1), ("training step", 8))
        for model in ("swin_tiny", "resnet50")
    ]
    + [("swin_tiny", "inference", 512, 512, 1, HALF)],
)


def build(model, *case):
    kind, *sizes, dtype = case
    folder = _models.weights(model, kind="maskformer")
    impls, peaks = {}, {}
    for impl in IMPLS:
        if DEVICE == "cpu" and not OPTIONS.small:
            peaks[impl] = _models.peak_memory(impl, folder, *case)
        impls[impl] = _models.build(impl, folder, *case, DEVICE)
    impls[COMPILED] = "compiling takes minutes (--compiled)"
    if OPTIONS.compiled:
        impls[COMPILED] = _models.build("transformers", folder, *case, DEVICE, compiled=True)
    impls[OPENVINO] = "for inference on a CPU"
    if kind == "inference" and DEVICE == "cpu" and not OPTIONS.small:
        impls[OPENVINO] = _models.build_openvino(folder, *sizes, dtype)
    return Work(impls, peaks=peaks)


@pytest.mark.parametrize("impl", [*IMPLS, COMPILED, OPENVINO])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {name(*c[1:5])} {c[5]}")
def test_maskformer(case, impl, measured):
    model, *sizes, dtype = case
    measured(f"maskformer {model}", name(*sizes), dtype, impl, lambda: build(*case))
