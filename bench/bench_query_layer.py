"""query_layer against PyTorch's kernels, one for each line of a decoder layer."""

import pytest
import torch
from _measure import Work, pick, short

from segkern.ops import query_layer
from segkern.ops.query_layer import Layer, Prediction, query_layer_reference
from support.inputs import query_layer_inputs

IMPLS = ("segkern", "PyTorch")
CASES = pick(  # what, B, Q, C, H, F, M
    [("small", 1, 5, 32, 2, 40, 24)],
    [("decoder", 1, 100, 256, 8, 2048, 256)],
    [("decoder", 1, 100, 256, 8, 2048, 256), ("decoder, 4 images", 4, 100, 256, 8, 2048, 256)],
)
DTYPES = pick([torch.bfloat16], [torch.bfloat16], [torch.bfloat16, torch.float16])


def build(B, Q, C, H, F, M, dtype):
    inputs = query_layer_inputs(B, Q, C, H, F, M, dtype=dtype)
    rows, layer, prediction = inputs[:3], Layer(*inputs[3:23]), Prediction(*inputs[23:])
    functions = zip(IMPLS, (query_layer, query_layer_reference))
    impls = {name: lambda f=f: f(*rows, layer, prediction, H) for name, f in functions}
    matrices = sum(t.numel() for t in (*layer, *prediction) if t.ndim == 2)
    moved = (matrices + B * Q * (5 * C + M)) * rows[0].element_size()
    return Work(impls, moved, 2 * B * Q * matrices + 4 * B * Q * Q * C, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: s[0])
def test_query_layer(sizes, dtype, impl, measured):
    what, *rest = sizes
    measured("query_layer", what, short(dtype), impl, lambda: build(*rest, dtype))
