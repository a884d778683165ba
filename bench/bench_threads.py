"""Mask2Former's inference on one thread, two, four and so on, as far as the cores go."""

import os

import _models
import pytest
from _measure import DEVICE, Work, pick
from bench_mask2former import ONE, name

IMPLS = ("segkern", "transformers")
CORES = len(os.sched_getaffinity(0))
COUNTS = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= CORES]
CASES = pick(  # model, height, width, batch, threads
    [("tiny", 64, 64, 1, 1)], [("swin_tiny", 512, 512, 1, n) for n in COUNTS], []
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[-1]} threads")
def test_threads(case, impl, measured):
    model, *sizes, threads = case

    def work():
        setting = _models.weights(model), "inference", *sizes, ONE, DEVICE
        return Work({impl: _models.build(impl, *setting) for impl in IMPLS}, threads=threads)

    inference = name("inference", *sizes)
    measured(f"mask2former {model}", f"{inference}, {threads} threads", ONE, impl, work)
