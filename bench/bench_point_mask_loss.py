"""point_mask_loss against the mask losses of transformers' Mask2Former, forward and backward."""

import pytest
import torch
from _measure import DEVICE, Work, pick, repeated, short, step
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as peer

from segkern.ops import point_mask_loss
from support.inputs import point_mask_loss_inputs

IMPLS = ("segkern", "transformers")
CASES = pick(  # name: B, R, T, side of the image
    {"B=1 R=2 T=2 8x8 of 32x32": (1, 2, 2, 32)},
    {
        "B=2 R=10 T=16 128x128 of 512x512": (2, 10, 16, 512),
        "B=2 R=10 T=4 128x128 of 512x512": (2, 10, 4, 512),
    },
    {
        "B=2 R=10 T=16 128x128 of 512x512": (2, 10, 16, 512),
        "B=16 R=10 T=16 256x256 of 1024x1024": (16, 10, 16, 1024),
    },
)
POINTS = pick(40, 12544, 12544)
DTYPES = pick([torch.float32], [torch.float32], [torch.float32, torch.bfloat16])
WEIGHTS = {"loss_cross_entropy": 2, "loss_mask": 5, "loss_dice": 5}


def build(B, R, T, side, dtype):
    maps = {"h": side // 4, "w": side // 4, "H": side, "W": side}
    inputs = point_mask_loss_inputs(B=1, R=R, T=T, **maps, dtype=dtype)
    logits, masks, active, ids = repeated(inputs[:4], B)
    seed = inputs[4].to(DEVICE)
    active[:] = True
    ids += torch.arange(B, device=DEVICE)
    theirs = peer.Mask2FormerLoss(Mask2FormerConfig(train_num_points=POINTS), WEIGHTS)
    pairs = [(torch.arange(T), torch.arange(T))] * B  # query t belongs to target t
    labels, total = list(masks.float()), B * T

    def segkern(logits):
        bce, dice = point_mask_loss(logits, masks, active, ids, seed, POINTS)
        return (bce + dice).sum()

    def transformers(logits):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            losses = [theirs.loss_masks(logits[:, r], labels, pairs, total) for r in range(R)]
        return sum(sum(loss.values()) for loss in losses)

    impls = {"segkern": step(segkern, [logits]), "transformers": step(transformers, [logits])}
    slots, size = B * R * T, logits.element_size()
    read = (logits.numel() * 2 + slots * 4 * POINTS) * size  # the map, and again at the points
    moved = read + 2 * slots * 4 * POINTS + logits.numel() * size  # masks; the gradient
    return Work(impls, moved, 1000 * slots * POINTS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", CASES)
def test_point_mask_loss(case, dtype, impl, measured):
    def work():
        return build(*CASES[case], dtype)

    measured("point_mask_loss", f"{case} fwd+bwd", short(dtype), impl, work)
