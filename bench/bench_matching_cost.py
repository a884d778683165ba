"""matching_cost against transformers' matcher up to its cost matrix: 10 predictions, 12544 points.

transformers has the logits of all queries on whole maps before it matches, segkern never makes
them; the second row of transformers includes the product that makes them.
"""

from unittest import mock

import pytest
import torch
from _measure import DEVICE, Work, pick, repeated, short
from transformers.models.mask2former import modeling_mask2former as peer

from segkern.ops import matching_cost
from support.inputs import matching_cost_inputs

IMPLS = ("segkern", "transformers", "transformers with its product")
CASES = pick(  # name: B, T, side of the image
    {"1 image Q=4 K=5 T=2 32": (1, 2, 32)},
    {"2 images Q=100 K=133 T=16 512": (2, 16, 512), "1 image Q=100 K=133 T=64 512": (1, 64, 512)},
    {
        "2 images Q=100 K=133 T=16 512": (2, 16, 512),
        "8 images Q=100 K=133 T=64 1024": (8, 64, 1024),
        "16 images Q=100 K=133 T=16 1024": (16, 16, 1024),
    },
)
LARGE = {"R": 10, "Q": 100, "K": 133, "C": 256, "P": 12544}
SIZES = pick({"R": 2, "Q": 4, "K": 5, "C": 8, "P": 30}, LARGE, LARGE)
DTYPES = pick([torch.float32], [torch.float32], [torch.float32, torch.bfloat16])


def build(B, T, side, dtype):
    maps = {"h": side // 4, "w": side // 4, "H": side, "W": side}
    inputs = matching_cost_inputs(B=1, T=T, **maps, **SIZES, dtype=dtype)
    inputs = repeated(inputs[:6], B)
    class_logits, embed, features, labels, masks, _ = inputs
    P, (_, R, Q, C) = SIZES["P"], embed.shape
    matcher = peer.Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, P)
    targets = [m.float() for m in masks]

    def product():
        return torch.einsum("brqc,bchw->brqhw", embed, features)

    def costs(logits):
        def keep(cost):
            return [], []

        with (
            mock.patch.object(peer, "linear_sum_assignment", keep),
            torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32),
        ):
            for r in range(R):
                matcher(logits[:, r], class_logits[:, r], targets, labels)

    logits = product()
    impls = {
        "segkern": lambda: matching_cost(*inputs),
        "transformers": lambda: costs(logits),
        "transformers with its product": lambda: costs(product()),
    }
    size = embed.element_size()
    moved = B * (C * min(side**2 // 16, 4 * R * P) * size + T * min(side**2, 4 * R * P))
    moved += B * R * (P * 8 + Q * (C + class_logits.shape[3]) * size + Q * T * 4)
    return Work(impls, moved, 2 * B * R * Q * P * (C + 2 * T), dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", CASES)
def test_matching_cost(case, dtype, impl, measured):
    measured("matching_cost", case, short(dtype), impl, lambda: build(*CASES[case], dtype))
