"""attention in inference against PyTorch's scaled_dot_product_attention."""

import pytest
import torch
from _measure import Work, pick

from segkern.ops import attention
from segkern.ops.attention import of_pytorch
from support.inputs import attention_inputs

IMPLS = {"segkern": attention, "SDPA": of_pytorch}
CASES = pick(  # B, queries, keys, heads, channels a head
    [(1, 20, 30, 2, 8)],
    [(1, 1605, 1605, 6, 64), (1, 1805, 1805, 12, 64), (1, 100, 256, 8, 32)],
    [(8, 1605, 1605, 6, 64)],
)


def build(B, Q, S, H, D):
    q, k, v = attention_inputs(B, Q, S, H, D)
    impls = {name: lambda f=f: f(q, k, v) for name, f in IMPLS.items()}
    return Work(impls, 4 * (2 * q.numel() + 2 * k.numel()), 4 * Q * S * B * H * D, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: "B={} Q={} S={} H={} D={}".format(*s))
def test_attention(sizes, impl, measured):
    case = "B={} Q={} S={} H={} D={} fwd".format(*sizes)
    measured("attention", case, "float32", impl, lambda: build(*sizes))
