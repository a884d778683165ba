"""dwconv3x3_gelu at the sizes of SegFormer's stages against PyTorch's convolution and GELU, channels
last, and planar as in transformers, with the copies of tokens to a map and back."""

import pytest
import torch
import torch.nn.functional as F
from _measure import Work, pick, short

from segkern.ops import dwconv3x3_gelu
from support.inputs import dwconv3x3_gelu_inputs

IMPLS = ("segkern", "conv2d, channels last", "conv2d, planar")
B0 = [(1, 128, 128), (1, 64, 256), (1, 32, 640), (1, 16, 1024)]  # B, side, channels at 512
B2 = [(1, 128, 256), (1, 16, 2048), (1, 256, 256), (1, 32, 2048)]  # at 512 and 1024
CASES = pick([(1, 6, 8)], B0 + B2, [(8, *case[1:]) for case in B0 + B2])
DTYPES = pick([torch.float32], [torch.float32], [torch.float32, torch.bfloat16])


def channels_last(x, weight, bias):
    z = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return F.gelu(z).permute(0, 2, 3, 1)


def planar(x, weight, bias):
    z = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, bias, padding=1, groups=len(weight))
    return F.gelu(z.permute(0, 2, 3, 1).contiguous())


def build(B, side, C, backward, dtype):
    inputs = [t.requires_grad_(backward) for t in dwconv3x3_gelu_inputs(B, side, side, C, dtype)]

    def run(function):
        out = function(*inputs)
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    functions = dwconv3x3_gelu, channels_last, planar
    impls = {name: lambda f=f: run(f) for name, f in zip(IMPLS, functions)}
    values = inputs[0].numel()
    moved = (5 if backward else 2) * values * inputs[0].element_size()
    return Work(impls, moved, (4 if backward else 1) * 18 * values, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: f"B={s[0]} {s[1]}x{s[1]} C={s[2]}")
def test_dwconv3x3_gelu(sizes, backward, dtype, impl, measured):
    B, side, C = sizes
    case = f"B={B} {side}x{side} C={C} {'fwd+bwd' if backward else 'fwd'}"
    measured("dwconv3x3_gelu", case, short(dtype), impl, lambda: build(*sizes, backward, dtype))
