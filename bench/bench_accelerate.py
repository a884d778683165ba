"""Models of transformers before `segkern.accelerate` ("transformers") and after it ("segkern").

The same classes with the same weights and arguments; only the modules' forwards differ. On the CPU
peak memory is that of a process of its own, above what it held after the imports. A step is
forward, loss, backward, clipping and AdamW.
"""

import _accelerate
import pytest
from _measure import DEVICE, OPTIONS, Work, pick

IMPLS = ("segkern", "transformers")
OTHERS = ("maskformer", "oneformer", "segformer", "eomt", "deformable_detr")
CASES = pick(  # model, kind, side, batch
    [("mask2former tiny", "training step", 64, 2), ("oneformer tiny", "inference", 64, 1)],
    [("mask2former", "inference", 512, 1), ("mask2former", "training step", 512, 2)]
    + [(name, "inference", 512, 1) for name in OTHERS],
    [("mask2former", "inference", 1024, 1)]
    + [("mask2former", "training step", 1024, 2)]
    + [(name, "inference", 512, 8) for name in OTHERS],
)


def build(*case):
    impls, peaks = {}, {}
    for impl in IMPLS:
        if DEVICE == "cpu" and not OPTIONS.small:
            peaks[impl] = _accelerate.peak_memory(impl, *case)
        impls[impl] = _accelerate.build(impl, *case, DEVICE)
    return Work(impls, peaks=peaks)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]} {c[2]} B={c[3]}")
def test_accelerate(case, impl, measured):
    model, kind, side, batch = case
    name = f"{kind} {side} B={batch}"
    measured(f"accelerate {model}", name, "float32", impl, lambda: build(*case))
