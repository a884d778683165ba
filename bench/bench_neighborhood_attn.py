"""neighborhood_attn against plain PyTorch, which gathers the K x K keys of each pixel.

The cases are the four stages of DiNAT-T at 512 x 512, the first two near and far, and DiNAT-L's
third with the kernel of the published segmentation models. "the block's products" are the linear
layers of a block of its first stage at 640 x 640, beside which the attention should be small.
"""

import pytest
import torch
from _measure import DEVICE, PASSES, Work, pick, repeated, short, step

from segkern.ops import neighborhood_attn
from segkern.ops.neighborhood_attn import neighborhood_attn_reference
from support.inputs import neighborhood_attn_inputs

IMPLS = {"segkern": neighborhood_attn, "gathered keys": neighborhood_attn_reference}
D, ONE, HALF = 32, torch.float32, torch.bfloat16
STAGES = [(128, 2, 7, 1), (128, 2, 7, 8), (64, 4, 7, 4), (32, 8, 7, 2), (16, 16, 7, 1)]
LARGE = (32, 24, 11, 2)
CASES = pick(  # B, side of the map, H, K, t, dtype
    [(1, 10, 2, 3, 2, ONE)],
    [(1, *stage, t) for t in (ONE, HALF) for stage in [*STAGES, LARGE]],
    [(B, *stage, HALF) for B in (1, 8) for stage in [*STAGES, LARGE]] + [(8, *STAGES[0], ONE)],
)


def build(B, side, H, K, t, dtype, backward):
    inputs = neighborhood_attn_inputs(1, side, side, H, D, K, dtype=dtype)
    qkv, (bias,) = repeated(inputs[:3], B), repeated(inputs[3:4], 1)
    impls = {name: lambda *x, f=f: f(*x, K, t) for name, f in IMPLS.items()}
    if backward:
        impls = {name: step(f, [*qkv, bias]) for name, f in impls.items()}
    else:
        impls = {name: lambda f=f: f(*qkv, bias) for name, f in impls.items()}
    pixels = B * side * side
    moved = pixels * H * D * (11 if backward else 4) * inputs[0].element_size()
    flops = 4 * pixels * K**2 * H * D * (3.5 if backward else 1)
    return Work(impls, moved, flops, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "B={} {}x{} H={} K={} t={}".format(c[0], *c[1:2] * 2, *c[2:5])
)
def test_neighborhood_attn(case, direction, impl, measured):
    B, side, H, K, t, dtype = case
    named = f"B={B} {side}x{side} H={H} K={K} t={t}{PASSES[direction]}"
    measured(
        "neighborhood_attn",
        named,
        short(dtype),
        impl,
        lambda: build(*case, direction != "forward"),
    )


WIDE = pick((10, 2, 3, 1), (160, 6, 11, 1), (160, 6, 11, 1))  # side, H, K, t


def beside_products():
    side, H, K, t = WIDE
    inputs = neighborhood_attn_inputs(1, side, side, H, D, K, dtype=ONE)
    q, k, v, bias = (x.to(DEVICE) for x in inputs[:4])
    C, x = H * D, q.flatten(3)
    sizes = (C, 3 * C), (C, C), (C, 2 * C), (2 * C, C)
    layers = [torch.nn.Linear(*size, device=DEVICE) for size in sizes]
    wide = torch.randn(1, side, side, 2 * C, device=DEVICE)

    def products():
        with torch.no_grad():
            for layer in layers:
                layer(wide if layer.in_features > C else x)

    return Work(
        {
            "segkern": lambda: neighborhood_attn(q, k, v, bias, K, t),
            "the block's products": products,
        }
    )


@pytest.mark.parametrize("impl", ["segkern", "the block's products"])
def test_neighborhood_attn_beside_products(impl, measured):
    side, H, K, t = WIDE
    case = f"beside products, B=1 {side}x{side} H={H} K={K} t={t}"
    measured("neighborhood_attn", case, "float32", impl, beside_products)
