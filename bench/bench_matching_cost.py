"""matching_cost against transformers' matcher up to its cost matrix: 10 predictions, 12544 points.

transformers has the logits of all queries on whole maps before it matches, segkern never makes
them; the second row of transformers includes the product that makes them.
"""

from unittest import mock

import torch
from _rows import main, measure
from transformers.models.mask2former import modeling_mask2former as peer

from segkern.ops import matching_cost
from segkern.testing import matching_cost_inputs

CASES = {
    "2 images Q=100 K=133 T=16 512": {"B": 2, "T": 16},
    "1 image Q=100 K=133 T=64 512": {"B": 1, "T": 64},
}
SIZES = {"R": 10, "Q": 100, "K": 133, "C": 256, "h": 128, "w": 128, "P": 12544, "H": 512, "W": 512}


def run(runs: int) -> list[dict]:
    rows = []
    for case, sizes in CASES.items():
        inputs = matching_cost_inputs(**SIZES, **sizes)
        class_logits, embed, features, labels, masks, points, _ = inputs
        matcher = peer.Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, SIZES["P"])
        targets = [m.float() for m in masks]

        def product(embed=embed, features=features):
            return torch.einsum("brqc,bchw->brqhw", embed, features)

        logits = product()

        def costs(maps, matcher=matcher, targets=targets, scores=class_logits, labels=labels):
            def keep(cost):
                return [], []

            with mock.patch.object(peer, "linear_sum_assignment", keep):
                for r in range(maps.shape[1]):
                    matcher(maps[:, r], scores[:, r], targets, labels)

        tensors = (class_logits, embed, features, labels, masks, points)
        impls = {
            "segkern": lambda i=tensors: matching_cost(*i),
            "transformers": lambda x=logits, f=costs: f(x),
            "transformers with its product": lambda f=costs, p=product: f(p()),
        }
        rows += measure("matching_cost", case, "float32", impls, runs)
    return rows


if __name__ == "__main__":
    main(run, __doc__)
