"""point_sample against grid_sample, at the sizes of the criterion."""

import torch
import torch.nn.functional as F
from _rows import main, measure

from segkern.ops import point_sample
from segkern.testing import point_sample_inputs

CASES = {
    "features 256x128x128 P=12544": {
        "B": 1,
        "C": 256,
        "h": 128,
        "w": 128,
        "P": 12544,
        "spread": 0,
    },
    "masks 16x512x512 P=12544": {"B": 1, "C": 16, "h": 512, "w": 512, "P": 12544, "spread": 0},
}


def run(runs: int) -> list[dict]:
    rows = []
    for case, sizes in CASES.items():
        features, points = point_sample_inputs(**sizes)
        grid = (2 * points - 1).unsqueeze(2)
        impls = {
            "segkern": lambda f=features, p=points: point_sample(f, p),
            "grid_sample": lambda f=features, g=grid: F.grid_sample(f, g, align_corners=False),
        }
        rows += measure("point_sample", case, "float32", impls, runs)
        leaf = features.clone().requires_grad_()

        def step(function, leaf=leaf):
            torch.autograd.grad(function(leaf).sum(), leaf)

        impls = {
            "segkern": lambda p=points: step(lambda f: point_sample(f, p)),
            "grid_sample": lambda g=grid: step(lambda f: F.grid_sample(f, g, align_corners=False)),
        }
        rows += measure("point_sample", case + " forward+backward", "float32", impls, runs)
    return rows


if __name__ == "__main__":
    main(run, __doc__)
