"""feed_forward against the two linear layers in PyTorch, which hold the hidden layer."""

import pytest
import torch
from _measure import Work, pick, short

from segkern.ops import feed_forward
from segkern.ops.feed_forward import feed_forward_reference
from support.inputs import feed_forward_inputs

IMPLS = ("segkern", "linear, linear")
CASES = pick(  # what, rows, C, F, activation
    [("small", 40, 8, 16, "gelu")],
    [
        ("Swin-T stage 1 of 512x512", 16384, 96, 384, "gelu"),
        ("Swin-T stage 2 of 512x512", 4096, 192, 768, "gelu"),
        ("pixel decoder of 512x512", 5376, 256, 1024, "relu"),
        ("pixel decoder of 1024x1024", 21504, 256, 1024, "relu"),
    ],
    [
        ("Swin-T stage 1 of 8 x 1024x1024", 524288, 96, 384, "gelu"),
        ("pixel decoder of 8 x 1024x1024", 172032, 256, 1024, "relu"),
    ],
)
DTYPES = pick([torch.float32], [torch.float32, torch.bfloat16], [torch.bfloat16])


def build(rows, C, F, activation, backward, dtype):
    inputs = feed_forward_inputs((rows,), C, F, dtype)
    for tensor in inputs:
        tensor.requires_grad_(backward)

    def run(function):
        out = function(*inputs, activation)
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    functions = dict(zip(IMPLS, (feed_forward, feed_forward_reference)))
    impls = {name: lambda f=f: run(f) for name, f in functions.items()}
    moved = (2 * rows * C + 2 * C * F) * inputs[0].element_size() * (2 if backward else 1)
    return Work(impls, moved, (12 if backward else 4) * rows * C * F, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: s[0])
def test_feed_forward(sizes, backward, dtype, impl, measured):
    what, *rest = sizes
    case = f"{what} {'fwd+bwd' if backward else 'fwd'}"
    measured("feed_forward", case, short(dtype), impl, lambda: build(*rest, backward, dtype))
