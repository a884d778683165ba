"""resize_sum at the sizes of SegFormer's head, against interpolation and sums, channels last and
planar (with the copy to channels last, which the classifier's product reads)."""

import pytest
import torch
import torch.nn.functional as F
from _measure import Work, pick, short

from segkern.ops import resize_sum
from support.inputs import resize_sum_inputs

IMPLS = ("segkern", "interpolate, channels last", "interpolate, planar")
CASES = pick(  # B, channels, side of the first map
    [(1, 8, 16)],
    [(1, E, side) for E in (256, 768) for side in (128, 256)],
    [(8, E, side) for E in (256, 768) for side in (128, 256)],
)
DTYPES = pick([torch.float32], [torch.float32], [torch.float32, torch.bfloat16])


def summed(maps, bias, relu):
    first, *others = maps
    out = first + bias[:, None, None]
    for x in others:
        out = out + F.interpolate(x, first.shape[2:], mode="bilinear")
    return F.relu(out).contiguous(memory_format=torch.channels_last)


def planar(maps, bias, relu):
    return summed([x.contiguous() for x in maps], bias, relu)


def build(B, E, side, backward, dtype):
    sizes = [(side >> l, side >> l) for l in range(4)]
    inputs = [t.requires_grad_(backward) for t in resize_sum_inputs(B, E, sizes, dtype)]
    bias, *maps = inputs

    def run(function):
        out = function(maps, bias, True)
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    impls = {name: lambda f=f: run(f) for name, f in zip(IMPLS, (resize_sum, summed, planar))}
    read, written = sum(x.numel() for x in maps), maps[0].numel()
    moved = (3 * (read + written) if backward else read + written) * maps[0].element_size()
    return Work(impls, moved, (3 if backward else 1) * 12 * written, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: f"B={s[0]} E={s[1]} {s[2]}x{s[2]}")
def test_resize_sum(sizes, backward, dtype, impl, measured):
    B, E, side = sizes
    case = f"B={B} E={E} {side}x{side} {'fwd+bwd' if backward else 'fwd'}"
    measured("resize_sum", case, short(dtype), impl, lambda: build(*sizes, backward, dtype))
