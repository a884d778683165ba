"""upscale in inference, with masks and without, against PyTorch's ops one after another."""

import pytest
import torch
from _measure import Work, pick

from segkern.ops import upscale
from segkern.ops.upscale import upscale_reference
from support.inputs import upscale_inputs

IMPLS = {"segkern": upscale, "plain PyTorch": upscale_reference}
CASES = pick(  # B, side of the map, channels, embeddings
    [(1, 4, 16, None), (1, 4, 16, 3)],
    [(1, 40, 384, None), (1, 80, 384, 200)],
    [(8, 80, 384, 200)],
)


def build(B, side, C, Q):
    inputs = upscale_inputs(B, side, side, C, Q)
    impls = {name: lambda f=f: f(*inputs) for name, f in IMPLS.items()}
    pixels, wide = 4 * B * side**2, Q or 0
    flops = pixels * C * (2 * C + 18 + 2 * wide)
    return Work(impls, 4 * (inputs[0].numel() + pixels * (Q or C)), flops, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "sizes", CASES, ids=lambda s: "B={} {}x{} C={} Q={}".format(*s[:2], *s[1:])
)
def test_upscale(sizes, impl, measured):
    case = "B={} {}x{} C={} Q={} fwd".format(*sizes[:2], *sizes[1:])
    measured("upscale", case, "float32", impl, lambda: build(*sizes))
