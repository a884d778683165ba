"""mask_bits against the product and comparison in PyTorch, without and with a mask a head."""

import pytest
import torch
from _measure import Work, pick, repeated, short

from segkern.ops import mask_bits
from support.inputs import mask_bits_inputs

HEADS = 8
IMPLS = ("segkern", "product, compare", "transformers' way")
CASES = pick(  # B, Q, C, S
    [(1, 4, 8, 40)],
    [(1, 100, 256, S) for S in (256, 1024, 4096, 16384)],
    [(B, 100, 256, S) for B in (1, 2, 8, 16) for S in (256, 1024, 4096, 16384)],
)
DTYPES = pick([torch.float32], [torch.float32, torch.bfloat16], [torch.bfloat16, torch.float32])


def compared(queries, features):
    return queries @ features >= 0


def with_heads(queries, features):
    """As transformers makes it: sigmoid, comparison, one mask a head."""
    closed = (queries @ features).sigmoid() < 0.5
    return closed.unsqueeze(1).repeat(1, HEADS, 1, 1).flatten(0, 1)


def build(B, Q, C, S, dtype):
    inputs = repeated(mask_bits_inputs(B=1, Q=Q, C=C, S=S, dtype=dtype), B)
    functions = dict(zip(IMPLS, (mask_bits, compared, with_heads)))
    impls = {name: lambda f=f: f(*inputs) for name, f in functions.items()}
    moved = B * ((Q * C + C * S) * inputs[0].element_size() + Q * S / 8)
    return Work(impls, moved, 2 * B * Q * C * S, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: f"B={s[0]} S={s[3]}")
def test_mask_bits(sizes, dtype, impl, measured):
    B, Q, C, S = sizes
    case = f"B={B} Q={Q} C={C} S={S}"
    measured("mask_bits", case, short(dtype), impl, lambda: build(*sizes, dtype))
