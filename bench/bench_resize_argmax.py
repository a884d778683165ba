"""resize_argmax against resizing the logits and taking their argmax, as Segmenter's code does."""

import pytest
import torch
from _measure import Work, pick, repeated, short

from segkern.ops import resize_argmax
from support.inputs import resize_argmax_inputs

IMPLS = ("segkern", "interpolate, argmax")
CASES = pick(  # B, K, side of the maps, side of the result
    [(1, 5, 4, 40)],
    [(1, 150, 32, 512), (1, 150, 64, 1024), (1, 19, 48, 768), (8, 11, 16, 64)],
    [(B, 150, 32, 512) for B in (1, 16, 64)] + [(1, 19, 64, 1024)],
)
DTYPES = pick([torch.float32], [torch.float32, torch.bfloat16], [torch.bfloat16, torch.float32])


def build(B, K, h, H, dtype):
    maps, rows, columns = resize_argmax_inputs(1, K, h, h, H, H, dtype=dtype)
    (maps,) = repeated([maps], B)

    def naive():
        logits = torch.nn.functional.interpolate(maps, size=(H, H), mode="bilinear")
        return logits.argmax(1)

    impls = dict(zip(IMPLS, (lambda: resize_argmax(maps, rows, columns), naive)))
    moved = B * (K * h * h * maps.element_size() + 4 * H * H)
    return Work(impls, moved, 2 * 3 * B * K * H * H, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: f"B={s[0]} K={s[1]} {s[2]} to {s[3]}")
def test_resize_argmax(sizes, dtype, impl, measured):
    B, K, h, H = sizes
    case = f"B={B} K={K} {h} to {H}"
    measured("resize_argmax", case, short(dtype), impl, lambda: build(*sizes, dtype))
