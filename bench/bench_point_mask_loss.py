"""point_mask_loss against the mask losses of transformers' Mask2Former, forward and backward."""

import torch
from _rows import main, measure
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as peer

from segkern.ops import point_mask_loss
from segkern.testing import point_mask_loss_inputs

CASES = {
    "B=2 R=10 T=16 128x128 of 512x512": dict(B=2, R=10, T=16, h=128, w=128, H=512, W=512),
    "B=2 R=10 T=4 128x128 of 512x512": dict(B=2, R=10, T=4, h=128, w=128, H=512, W=512),
}


def run(runs: int) -> list[dict]:
    rows = []
    config = Mask2FormerConfig()
    theirs = peer.Mask2FormerLoss(
        config, {"loss_cross_entropy": 2, "loss_mask": 5, "loss_dice": 5}
    )
    for case, sizes in CASES.items():
        logits, masks, active, ids, seed = point_mask_loss_inputs(**sizes)
        logits.requires_grad_()
        active[:] = True
        B, R, T = active.shape
        pairs = [(torch.arange(T), torch.arange(T))] * B  # query t belongs to target t
        labels, total = list(masks.float()), B * T

        def segkern(arguments=(logits, masks, active, ids, seed)):
            bce, dice = point_mask_loss(*arguments)
            torch.autograd.grad((bce + dice).sum(), arguments[0])

        def transformers(logits=logits, labels=labels, pairs=pairs, total=total, R=R):
            losses = [theirs.loss_masks(logits[:, r], labels, pairs, total) for r in range(R)]
            torch.autograd.grad(sum(sum(loss.values()) for loss in losses), logits)

        impls = {"segkern": segkern, "transformers": transformers}
        rows += measure("point_mask_loss", case + " fwd+bwd", "float32", impls, runs)
    return rows


if __name__ == "__main__":
    main(run, __doc__)
