"""conv3x3 against PyTorch's convolution, channels last and planar (with the copy to planar)."""

import pytest
import torch
import torch.nn.functional as F
from _measure import Work, pick, short

from segkern.ops import conv3x3
from support.inputs import conv3x3_inputs

IMPLS = ("segkern", "conv2d, channels last", "conv2d, planar")
CASES = pick(  # B, channels, side of the map
    [(1, 8, 6)],
    [(1, 256, 96), (1, 256, 128), (1, 256, 256), (2, 256, 128)],
    [(1, 256, 256), (8, 256, 256)],
)
DTYPES = pick([torch.float32], [torch.float32], [torch.float32, torch.bfloat16])


def build(B, C, side, backward, dtype):
    x, weight = (t.requires_grad_(backward) for t in conv3x3_inputs(B, C, C, side, side, dtype))

    def planar(x, weight):
        out = F.conv2d(x.contiguous(), weight, padding=1)
        return out.contiguous(memory_format=torch.channels_last)

    def run(function):
        out = function(x, weight)
        if backward:
            torch.autograd.grad(out, (x, weight), torch.ones_like(out))

    functions = (conv3x3, lambda x, w: F.conv2d(x, w, padding=1), planar)
    impls = {name: lambda f=f: run(f) for name, f in zip(IMPLS, functions)}
    passes = 3 if backward else 1
    moved = passes * 2 * x.numel() * x.element_size()
    return Work(impls, moved, passes * 32 * B * C * C * (side // 2) ** 2, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: f"B={s[0]} C={s[1]} {s[2]}x{s[2]}")
def test_conv3x3(sizes, backward, dtype, impl, measured):
    B, C, side = sizes
    case = f"B={B} C={C} {side}x{side} {'fwd+bwd' if backward else 'fwd'}"
    measured("conv3x3", case, short(dtype), impl, lambda: build(*sizes, backward, dtype))
