"""linear against PyTorch's product with its ends as ops of their own, on shapes of the models.

The rows with a gradient also hold both products of backward. On a GPU both are PyTorch's.
"""

import pytest
import torch
from _measure import Work, pick, short

from segkern.ops import linear
from segkern.ops.linear import linear_reference
from support.inputs import linear_inputs

IMPLS = ("segkern", "PyTorch")
CASES = pick(  # what, M, K, N, activation, residual
    [("small", 40, 16, 8, "gelu", True)],
    [
        ("Swin-T stage 1 of 512x512, q k v", 16384, 96, 288, "none", False),
        ("Swin-T stage 1 of 512x512, projection", 16384, 96, 96, "none", True),
        ("Swin-T stage 2 of 512x512, first of MLP", 4096, 192, 768, "gelu", False),
        ("Swin-T stage 3 of 512x512, first of MLP", 1024, 384, 1536, "gelu", False),
        ("Swin-T stage 3 of 512x512, second of MLP", 1024, 1536, 384, "none", True),
        ("Swin-T stage 4 of 512x512, first of MLP", 256, 768, 3072, "gelu", False),
        ("pixel decoder of 512x512, first of MLP", 5376, 256, 1024, "relu", False),
        ("pixel decoder of 512x512, second of MLP", 5376, 1024, 256, "none", True),
        ("query decoder, first of MLP", 100, 256, 2048, "relu", False),
        ("ViT-B/16 of 512x512, first of MLP", 1025, 768, 3072, "gelu", False),
    ],
    [("pixel decoder of 1024x1024, first of MLP", 21504, 256, 1024, "relu", False)],
)
DTYPES = pick([torch.float32], [torch.float32], [torch.float32])


def build(M, K, N, activation, residual, backward, dtype):
    inputs = linear_inputs((M,), K, N, dtype)
    x, weight, bias, beside = (t.requires_grad_(backward) for t in inputs)
    given = [x, weight, bias] + [beside] * residual

    def run(function):
        out = function(x, weight, bias, activation, beside if residual else None)
        if backward:
            torch.autograd.grad(out, given, torch.ones_like(out))

    functions = dict(zip(IMPLS, (linear, linear_reference)))
    impls = {name: lambda f=f: run(f) for name, f in functions.items()}
    moved = (M * (K + N * (1 + residual)) + K * N) * x.element_size() * (2 if backward else 1)
    return Work(impls, moved, (6 if backward else 2) * M * K * N, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: s[0])
def test_linear(sizes, backward, dtype, impl, measured):
    what, *rest = sizes
    case = f"{what} {'fwd+bwd' if backward else 'fwd'}"
    measured("linear", case, short(dtype), impl, lambda: build(*rest, backward, dtype))
