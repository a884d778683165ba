"""Seq2Seg and U-Net against the same in plain PyTorch layers: inference, and a training step.

Same weights on both sides, images of 128 x 256 (of the instance head 64 x 64). The plain side
writes down the truth of every class of every pixel for its loss.
"""

import _two_heads
import pytest
from _measure import DEVICE, Work, pick

IMPLS = ("segkern", "PyTorch")
SEMANTIC = ("seq2seg", "unet")
CASES = pick(  # model, kind, batch
    [("tiny seq2seg", "training step", 1), ("tiny seq2seg instance", "inference", 1)]
    + [("tiny unet", "training step", 1)],
    [
        (name, kind, batch)
        for name in SEMANTIC
        for kind, batch in (("inference", 1), ("training step", 4))
    ]
    + [("seq2seg instance", "inference", 1), ("seq2seg instance", "inference", 16)],
    [(name, kind, 24) for name in SEMANTIC for kind in ("inference", "training step")]
    + [("seq2seg instance", "inference", 64)],
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]} B={c[2]}")
def test_seq2seg(case, impl, measured):
    name, kind, batch = case

    def make():
        return Work({impl: _two_heads.build(impl, *case, DEVICE) for impl in IMPLS})

    measured(name, f"{kind} B={batch}", "float32", impl, make)
