"""The semantic kernel of segment_map with what the matrix units cut off, in Triton's interpreter.

The interpreter itself multiplies in float32.
"""

import os

import numpy as np
import pytest

from segkern.ops import segment_map
from support.comparison import compare
from support.inputs import segment_map_inputs

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of the interpreter: `make interpret`", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder


def of_11_bits(x):
    """float32 cut to what the matrix units read of it."""
    return (x.view(np.int32) & -8192).view(np.float32)


def matrix_units(self, a, b, sums, precision, max_num_imprecise_acc):
    """A product of the interpreter as GPUs form it of halves ("tf32x3"): of 8 terms at a time,
    cut off after every sum."""
    assert precision.name == "TF32x3"
    halves = []
    for x in (a.data, b.data):
        high = of_11_bits((x.view(np.int32) + 4096).view(np.float32))  # to the nearest
        halves.append((of_11_bits(x - high), high))
    (low_a, high_a), (low_b, high_b) = halves
    total = sums.data.astype(np.float64)
    for left, right in ((low_a, high_b), (high_a, low_b), (high_a, high_b)):
        for k in range(0, left.shape[1], 8):
            exact = total + left[:, k : k + 8].astype(np.float64) @ right[k : k + 8]
            total = exact.astype(np.float32)
            above = np.abs(total) > np.abs(exact)
            total = np.where(above, np.nextafter(total, np.float32(0)), total).astype(np.float64)
    return type(sums)(total.astype(np.float32), sums.dtype.scalar)


@pytest.mark.parametrize("sizes", [{}, {"B": 1, "Q": 100, "K": 133, "kind": "shapes"}], ids=str)
def test_scores(sizes, monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", matrix_units)

    def scores(classes, masks, impl="kernel"):
        geometry = (64, 96), (60, 83), (70, 111)
        options = {"return_scores": True, "impl": impl}
        return segment_map(classes, masks, "semantic", *geometry, **options).class_scores

    inputs = segment_map_inputs(**sizes)
    compare(scores, lambda *values: scores(*values, impl="reference"), inputs)
