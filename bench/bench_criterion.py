"""The whole criterion, forward and backward, against transformers': matching and losses of all
predictions, from class logits, mask embeddings and mask features.

transformers' criterion wants mask logits: the products that make them are part of its time, as
they are part of its decoder; segkern has them only of what is matched.
"""

import pytest
import torch
from _measure import DEVICE, Work, pick, short, step
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as peer

from segkern.nn.criterion import Criterion
from segkern.structures.targets import Targets
from support.inputs import moved, random_targets

IMPLS = ("segkern", "transformers")
CASES = pick(  # name: B, T, side of the image
    {"B=1 T=2 64x64": (1, 2, 64)},
    {"B=2 T=16 512x512": (2, 16, 512)},
    {"B=16 T=16 1024x1024": (16, 16, 1024), "B=2 T=16 512x512": (2, 16, 512)},
)
R, Q, K, M, POINTS = pick((2, 6, 5, 16, 40), *[(10, 100, 133, 256, 12544)] * 2)
DTYPES = pick([torch.float32], [torch.float32], [torch.bfloat16, torch.float32])


def transformers_loss(logits, classes, masks, labels, dtype):
    """Mask2FormerLoss on mask logits [B, R, Q, h, w] and class logits [B, R, Q, K + 1]."""
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    config = Mask2FormerConfig(num_labels=K, train_num_points=POINTS)
    loss = peer.Mask2FormerLoss(config, weights).to(DEVICE)
    names = ("masks_queries_logits", "class_queries_logits")
    *others, last = [dict(zip(names, pair)) for pair in zip(logits.unbind(1), classes.unbind(1))]
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        losses = loss(*last.values(), masks, labels, others)
    return sum(w * losses[f"{name}{r}"] for name, w in weights.items() for r in suffixes())


def suffixes():
    return ["", *(f"_{r}" for r in range(R - 1))]


def build(B, T, side, dtype):
    masks, labels = (of_one * B for of_one in random_targets([T], K, side, side))
    targets = Targets.from_lists(masks, labels, num_labels=K).to(DEVICE)
    masks, labels = moved((masks, labels), DEVICE)
    classes = torch.randn(B, R, Q, K + 1, device=DEVICE, dtype=dtype)
    embed = torch.randn(B, R, Q, M, device=DEVICE, dtype=dtype)
    features = torch.randn(B, M, side // 4, side // 4, device=DEVICE, dtype=dtype) / M**0.5
    criterion = Criterion(K, num_points=POINTS).to(DEVICE)

    def transformers(classes, embed, features):
        logits = torch.einsum("brqc,bchw->brqhw", embed, features)
        return transformers_loss(logits, classes, masks, labels, dtype)

    functions = {
        "segkern": lambda *tensors: criterion(*tensors, targets)[0],
        "transformers": transformers,
    }
    impls = {name: step(f, [classes, embed, features]) for name, f in functions.items()}
    pixels = side**2 // 16
    # features: matching, logits, the gradient of the embeddings, their own; logits: written and
    # read, their gradient written and read twice
    traffic = B * pixels * (4 * M + 5 * R * T) * features.element_size() + B * T * side**2
    flops = 2 * B * R * (Q * POINTS * (M + 2 * T) + 3 * T * M * pixels)
    return Work(impls, traffic, flops, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", CASES)
def test_criterion(case, dtype, impl, measured):
    def work():
        return build(*CASES[case], dtype)

    measured("criterion", f"{case} forward+backward", short(dtype), impl, work)
