"""OneFormer against transformers: inference and a training step, same weights.

As bench_mask2former.py measures. All are asked for panoptic segmentation. A step is that of a
model without text encoder, so without the contrastive loss, which is how published models come;
OpenVINO and ONNX Runtime run transformers' model, exported.
"""

import functools

import _exported
import _models
import pytest
from _measure import DEVICE, OPTIONS, Work, pick
from bench_mask2former import name

IMPLS = ("segkern", "transformers")
COMPILED = "transformers, compiled"
ONE, HALF = "float32", "bfloat16"
CASES = pick(  # model, kind, height, width, batch, dtype
    [("tiny", "inference", 64, 64, 1, ONE), ("tiny", "training step", 64, 64, 2, ONE)],
    [("swin_tiny", "inference", side, side, 1, ONE) for side in (512, 1024)]
    + [("swin_tiny", "training step", 512, 512, 2, ONE)],
    [
        ("swin_tiny", kind, 1024, 1024, batch, HALF)
        for kind, batch in (("inference", 1), ("training step", 8))
    ]
    + [("swin_tiny", "inference", 512, 512, 1, HALF)],
)


def build(model, *case):
    kind, height, width, batch, dtype = case
    folder = _models.weights(model, kind="oneformer")
    impls, peaks = {}, {}
    for impl in IMPLS:
        if DEVICE == "cpu" and not OPTIONS.small:
            peaks[impl] = _models.peak_memory(impl, folder, *case)
        impls[impl] = _models.build(impl, folder, *case, DEVICE)
    impls[COMPILED] = "compiling takes minutes (--compiled)"
    if OPTIONS.compiled:
        impls[COMPILED] = _models.build("transformers", folder, *case, DEVICE, compiled=True)
    theirs = functools.partial(_models.open_model, "transformers", folder, DEVICE)
    shape = (batch, 3, height, width)
    impls |= _exported.runtimes(kind, theirs, _models.QUERIES, shape, dtype)
    return Work(impls, peaks=peaks)


@pytest.mark.parametrize("impl", [*IMPLS, COMPILED, *_exported.RUNTIMES])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {name(*c[1:5])} {c[5]}")
def test_oneformer(case, impl, measured):
    model, *sizes, dtype = case
    measured(f"oneformer {model}", name(*sizes), dtype, impl, lambda: build(*case))
