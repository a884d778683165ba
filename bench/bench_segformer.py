"""SegFormer against transformers, OpenVINO, ONNX Runtime: images to label maps, a training step.

Same random weights on all sides; bfloat16 is autocast, and OpenVINO's own. Peers take the logits
to the image's size before the argmax, as transformers' processor does. A step is forward, loss,
backward and AdamW. On the CPU peak memory is that of a process of its own, above what it held
after the imports. One case alone: -k "b2 and inference and 512", -k training.
"""

import functools

import _exported
import _segformer
import pytest
from _measure import DEVICE, OPTIONS, Work, pick

IMPLS = ("segkern", "transformers", "transformers, compiled")
ONE, HALF = "float32", "bfloat16"
CASES = pick(  # model, kind, size, batch, dtype
    [("tiny", "inference", 64, 1, ONE), ("tiny", "training step", 64, 2, ONE)],
    [(model, "inference", size, 1, ONE) for model in ("b0", "b2") for size in (512, 1024)]
    + [("b2", "inference", 512, 1, HALF), ("b2", "training step", 512, 2, ONE)],
    [(model, "inference", 1024, 1, dtype) for model in ("b0", "b2") for dtype in (ONE, HALF)]
    + [("b2", "inference", 512, 16, HALF), ("b2", "training step", 512, 8, HALF)],
)


def build(model, *case):
    kind, size, batch, dtype = case
    folder = _segformer.weights(model)
    impls, peaks = {}, {}
    for impl in IMPLS[:2]:
        if DEVICE == "cpu" and not OPTIONS.small:
            peaks[impl] = _segformer.peak_memory(impl, folder, *case)
        impls[impl] = _segformer.build(impl, folder, *case, DEVICE)
    impls[IMPLS[2]] = "compiling takes minutes (--compiled)"
    if OPTIONS.compiled:
        impls[IMPLS[2]] = _segformer.build("transformers", folder, *case, DEVICE, compiled=True)
    theirs = functools.partial(_segformer.open_model, "transformers", folder)
    after = functools.partial(_segformer.label_map, size=size)
    impls |= _exported.runtimes(kind, theirs, ["logits"], (batch, 3, size, size), dtype, after)
    return Work(impls, peaks=peaks)


@pytest.mark.parametrize("impl", [*IMPLS, *_exported.RUNTIMES])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]} {c[2]} B={c[3]} {c[4]}")
def test_segformer(case, impl, measured):
    model, kind, size, batch, dtype = case
    name = f"{kind} {size} B={batch}"
    measured(f"segformer {model}", name, dtype, impl, lambda: build(*case))
