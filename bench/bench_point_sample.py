"""point_sample against grid_sample, at the sizes of the criterion."""

import pytest
import torch
import torch.nn.functional as F
from _measure import PASSES, Work, pick, repeated, short, step

from segkern.ops import point_sample
from support.inputs import point_sample_inputs

IMPLS = ("segkern", "grid_sample")
FEATURES = {  # name: B, C, h, w, P
    "features 256x128x128 P=12544": (1, 256, 128, 128, 12544),
    "masks 16x512x512 P=12544": (1, 16, 512, 512, 12544),
}
LARGE = {
    "features B=2 256x200x336 P=12544": (2, 256, 200, 336, 12544),
    "features B=16 256x256x256 P=12544": (16, 256, 256, 256, 12544),
    "masks B=8 16x1024x1024 P=12544": (8, 16, 1024, 1024, 12544),
}
CASES = pick({"features 4x8x8 P=20": (1, 4, 8, 8, 20)}, FEATURES, FEATURES | LARGE)
DTYPES = pick([torch.float32], [torch.float32], [torch.float32, torch.bfloat16])


def build(B, C, h, w, P, dtype, backward):
    inputs = point_sample_inputs(B=1, C=C, h=h, w=w, P=P, spread=0, dtype=dtype)
    features, points = repeated(inputs, B)
    grid = (2 * points - 1).unsqueeze(2)

    def torchs(features):
        # as under autocast: it wants both in one dtype, and a bfloat16 grid is off by pixels
        return F.grid_sample(features.float(), grid, align_corners=False)

    impls = {"segkern": lambda f: point_sample(f, points), "grid_sample": torchs}
    if backward:
        impls = {name: step(f, [features]) for name, f in impls.items()}
    else:
        impls = {name: lambda f=f: f(features) for name, f in impls.items()}
    size = features.element_size()
    moved = B * C * (min(h * w, 4 * P) + P) * size  # no pixel is read twice, no line wasted
    if backward:
        moved += B * C * (P + h * w) * size
    return Work(impls, moved, B * C * P * 8 * (2 if backward else 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", CASES)
def test_point_sample(case, dtype, direction, impl, measured):
    def work():
        return build(*CASES[case], dtype, direction != "forward")

    measured("point_sample", case + PASSES[direction], short(dtype), impl, work)
