"""window_attn against Swin's windows as transformers makes them, and with SDPA and a float mask.

The cases are the four stages of Swin-T at 512 x 512, and one of Swin-B's windows of 12; all start
at the projection to q, k and v, and every other block is shifted, as these are.
"""

import pytest
import torch
from _measure import PASSES, Work, pick, repeated, short, step

from segkern.ops import window_attn
from segkern.ops.window_attn import window_attn_reference
from support.inputs import window_attn_inputs

IMPLS = ("segkern", "products", "SDPA, float mask")
D, ONE, HALF = 32, torch.float32, torch.bfloat16
STAGES = [(128, 3, 7), (64, 6, 7), (32, 12, 7), (16, 24, 7), (128, 4, 12)]
CASES = pick(  # B, side of the map, H, window, dtype
    [(1, 10, 2, 4, ONE)],
    [(1, *stage, t) for t in (ONE, HALF) for stage in STAGES] + [(2, 128, 3, 7, ONE)],
    [(B, *stage, HALF) for B in (1, 16) for stage in STAGES] + [(16, *STAGES[0], ONE)],
)


def cut(x, window):
    """[B, y, x, C] to [N, S, C]."""
    B, y, width, C = x.shape
    x = x.view(B, y // window, window, width // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, C)


def products(qkv, qkv_bias, bias, window, shift):
    """pad, roll, partition, two products with the scores between them, and all the way back."""
    B, h, w, _, H, D = qkv.shape
    y, x = h + -h % window, w + -w % window
    tokens = qkv_bias.expand(B, y, x, 3, H, D).clone()
    tokens[:, :h, :w] += qkv
    windows = cut(tokens.flatten(3).roll((-shift, -shift), (1, 2)), window)
    q, k, v = windows.unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * D**-0.5 + bias

    region = torch.zeros(1, y, x, 1, device=qkv.device)
    region[:, y - shift :] += 2
    region[:, :, x - shift :] += 1
    region = cut(region, window)  # [N / B, S, 1]
    mask = torch.where(region == region.mT, 0.0, -100.0)
    scores = scores.view(B, len(mask), H, *scores.shape[2:]) + mask.unsqueeze(1)
    weights = scores.flatten(0, 1).softmax(-1).to(v.dtype)

    out = (weights @ v).transpose(1, 2).reshape(B, y // window, x // window, window, window, -1)
    out = out.transpose(2, 3).reshape(B, y, x, H * D).roll((shift, shift), (1, 2))
    return out[:, :h, :w].contiguous()


def build(B, side, H, window, dtype, backward):
    inputs = window_attn_inputs(1, side, side, H, D, window, window // 2, dtype=dtype)
    (qkv,), (qkv_bias, bias) = repeated(inputs[:1], B), repeated(inputs[1:3], 1)
    peers = {
        "segkern": window_attn,
        "products": products,
        "SDPA, float mask": window_attn_reference,
    }
    impls = {
        name: lambda *t, f=f: f(*t, window, window // 2).contiguous() for name, f in peers.items()
    }
    if backward:
        impls = {name: step(f, [qkv, qkv_bias, bias]) for name, f in impls.items()}
    else:
        impls = {name: lambda f=f: f(qkv, qkv_bias, bias) for name, f in impls.items()}
    tokens = B * side * side  # each attends to a window
    moved = tokens * H * D * (11 if backward else 4) * qkv.element_size()
    flops = 4 * tokens * window**2 * H * D * (3.5 if backward else 1)
    return Work(impls, moved, flops, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"B={c[0]} {c[1]}x{c[1]} H={c[2]} W={c[3]} {short(c[4])}"
)
def test_window_attn(case, direction, impl, measured):
    B, side, H, window, dtype = case
    named = f"B={B} {side}x{side} H={H} W={window}{PASSES[direction]}"
    measured(
        "window_attn", named, short(dtype), impl, lambda: build(*case, direction != "forward")
    )
