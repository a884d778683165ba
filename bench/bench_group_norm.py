"""group_norm, with the map that is added or the ReLU, against PyTorch's ops one after another."""

import pytest
import torch
from _measure import Work, pick

from segkern.ops import group_norm
from segkern.ops.group_norm import group_norm_reference
from support.inputs import group_norm_inputs

IMPLS = ("segkern", "plain PyTorch")
CASES = pick(  # B, channels, side of the map, what follows
    [(1, 32, 6, "up")],
    [(1, 256, side, then) for side in (128, 256) for then in ("up", "relu")],
    [(8, 256, 256, "up")],
)


def build(B, C, side, then, backward):
    up = (side // 2, side // 2) if then == "up" else None
    inputs = [t.requires_grad_(backward) for t in group_norm_inputs(B, C, side, side, up)]

    def run(function):
        x, weight, bias, *coarse = inputs
        out = function(x, 32, weight, bias, 1e-5, then == "relu", *coarse)
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    functions = dict(zip(IMPLS, (group_norm, group_norm_reference)))
    impls = {name: lambda f=f: run(f) for name, f in functions.items()}
    return Work(impls, (6 if backward else 3) * inputs[0].numel() * 4, 0, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: f"B={s[0]} C={s[1]} {s[2]}x{s[2]} {s[3]}")
def test_group_norm(sizes, backward, impl, measured):
    B, C, side, then = sizes
    case = f"B={B} C={C} {side}x{side} {then} {'fwd+bwd' if backward else 'fwd'}"
    measured("group_norm", case, "float32", impl, lambda: build(*sizes, backward))
