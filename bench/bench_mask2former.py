"""Mask2Former against transformers: inference and a training step, same weights.

On the CPU peak memory is that of a process of its own, above what it held after the imports; on a
GPU what a run allocates above weights and inputs. "bfloat16" is autocast on both sides, "bfloat16
weights" a model that was cast itself; inference with either is also compared with transformers
in float32. OpenVINO and ONNX Runtime run transformers' model, exported. A step is forward, loss,
backward, clipping and AdamW; in transformers ResNet's batch norms are not frozen.
"""

import functools

import _exported
import _models
import pytest
from _measure import DEVICE, OPTIONS, Work, largest, pick

IMPLS = ("segkern", "segkern, checkpointing", "transformers", "transformers, float32")
COMPILED = "transformers, compiled"
ALL = (*IMPLS, COMPILED, *_exported.RUNTIMES)
ONE, HALF, WHOLE = "float32", "bfloat16", "bfloat16 weights"
CASES = pick(  # model, kind, height, width, batch, dtype
    [("tiny", "inference", 64, 64, 1, ONE), ("tiny", "training step", 64, 64, 2, ONE)],
    [("swin_tiny", "inference", side, side, 1, ONE) for side in (384, 512, 1024)]
    + [("swin_tiny", "inference", s, s, 1, dtype) for dtype in (HALF, WHOLE) for s in (512, 1024)]
    + [("swin_tiny", "training step", 512, 512, 2, dtype) for dtype in (ONE, HALF)],
    [
        (model, kind, height, width, batch, HALF)
        for kind, height, width, batch in (
            ("inference", 800, 1344, 1),
            ("inference", 1024, 1024, 1),
            ("training step", 1024, 1024, largest({2: 3.4, 8: 11.6})),
        )
        for model in ("swin_tiny", "resnet50")
    ]
    + [
        ("swin_tiny", "inference", 512, 512, 1, HALF),
        ("swin_tiny", "inference", 1024, 1024, 16, HALF),
        ("swin_tiny", "training step", 512, 512, 2, HALF),
        ("swin_tiny", "inference", 1024, 1024, 1, ONE),
    ],
)


def name(kind, height, width, batch):
    size = f"{height}" if height == width else f"{height}x{width}"
    targets = f" T={_models.TARGETS}" if kind == "training step" else ""
    return f"{kind} {size} B={batch}{targets}"


def build(model, *case):
    *sizes, dtype = case
    folder = _models.weights(model)
    cases = {"segkern": case, "transformers": case}
    if sizes[0] == "training step":
        cases["segkern, checkpointing"] = case
    elif dtype != ONE and DEVICE == "cpu":
        cases["transformers, float32"] = (*sizes, ONE)
    impls, peaks = dict.fromkeys(IMPLS, "not for this case"), {}
    for impl, chosen in cases.items():
        if DEVICE == "cpu" and not OPTIONS.small:
            peaks[impl] = _models.peak_memory(impl, folder, *chosen)
        impls[impl] = _models.build(impl, folder, *chosen, DEVICE)
    impls[COMPILED] = "compiling takes minutes (--compiled)"
    if OPTIONS.compiled:
        impls[COMPILED] = _models.build("transformers", folder, *case, DEVICE, compiled=True)
    kind, height, width, batch = sizes
    theirs = functools.partial(_models.open_model, "transformers", folder, DEVICE)
    shape = (batch, 3, height, width)
    impls |= _exported.runtimes(kind, theirs, _models.QUERIES, shape, dtype)
    return Work(impls, peaks=peaks)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {name(*c[1:5])} {c[5]}")
def test_mask2former(case, impl, measured):
    model, *sizes, dtype = case
    measured(f"mask2former {model}", name(*sizes), dtype, impl, lambda: build(*case))
