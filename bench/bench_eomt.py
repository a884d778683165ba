"""EoMT against transformers: inference and a training step, same weights.

As bench_mask2former.py measures. Inference has no masks of attention, training draws and computes
them.
"""

import pytest
from _measure import pick
from bench_mask2former import ALL, HALF, ONE, build, name

CASES = pick(  # model, kind, height, width, batch, dtype
    [("tiny", "inference", 64, 64, 1, ONE), ("tiny", "training step", 64, 64, 2, ONE)],
    [("small", "inference", 640, 640, 1, dtype) for dtype in (ONE, HALF)]
    + [("base", "inference", 640, 640, 1, ONE), ("small", "training step", 640, 640, 2, ONE)],
    [
        (size, "inference", 640, 640, batch, HALF)
        for size in ("small", "large")
        for batch in (1, 16)
    ]
    + [(size, "training step", 640, 640, 8, HALF) for size in ("small", "large")],
)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {name(*c[1:5])} {c[5]}")
def test_eomt(case, impl, measured):
    size, *sizes, dtype = case
    model = f"eomt {size}"
    measured(model, name(*sizes), dtype, impl, lambda: build(model, *sizes, dtype))
