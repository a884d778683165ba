"""Segmenter against timm's ViT under a plain decoder: images to label maps, and a training step.

Same weights on both sides; bfloat16 is autocast. images/s are B over the seconds. The plain side
takes the logits to the image's size before argmax and cross entropy, as the original code does.
On the CPU peak memory is that of a process of its own, above what it held after the imports.
One case alone: -k "Seg-S-Mask/16 and inference and float32", -k training.
"""

import _segmenter
import pytest
import torch
from _measure import DEVICE, OPTIONS, Work, pick

IMPLS = ("segkern", "timm", "timm, compiled")
ONE, HALF = "float32", "bfloat16"
PRESETS = ("Seg-T-Mask/16", "Seg-S-Mask/16", "Seg-B-Mask/16", "Seg-B-Mask/32", "Seg-B/8")
CASES = pick(  # model, kind, size, batch, dtype
    [("tiny", "inference", 32, 1, ONE), ("tiny", "training step", 32, 2, ONE)],
    [(model, "inference", 512, 1, ONE) for model in PRESETS]
    + [("Seg-L-Mask/16", "inference", 640, 1, ONE)]
    + [(f"Seg-{size}-Mask/16", "inference", 512, 1, HALF) for size in "SB"]
    + [("Seg-S-Mask/16", "training step", 512, 2, ONE)],
    # the best batch is the fastest of these
    [("Seg-B-Mask/16", "inference", 512, batch, HALF) for batch in (1, 16, 32, 64, 128)]
    + [(model, "inference", 512, 64, HALF) for model in PRESETS[:2]]
    + [("Seg-B-Mask/32", "inference", 512, 64, HALF), ("Seg-B/8", "inference", 512, 16, HALF)]
    + [("Seg-L-Mask/16", "inference", 640, 16, HALF), ("Seg-B-Mask/16", "inference", 512, 16, ONE)]
    + [("Seg-S-Mask/16", "training step", 512, 8, dtype) for dtype in (HALF, ONE)],
)


def build(*case):
    model, kind, size, batch, dtype = case
    impls, peaks = {}, {}
    for impl in IMPLS[:2]:
        if DEVICE == "cpu" and not OPTIONS.small:
            peaks[impl] = _segmenter.peak_memory(impl, *case)
        impls[impl] = _segmenter.build(impl, *case, DEVICE)
    impls[IMPLS[2]] = "compiling takes minutes (--compiled)"
    if OPTIONS.compiled:
        impls[IMPLS[2]] = _segmenter.build("timm", *case, DEVICE, compiled=True)
    # backward computes every product twice
    flops = (
        batch
        * (3 if kind == "training step" else 1)
        * sum(_segmenter.flops(_segmenter.config(model, size)))
    )
    return Work(impls, flops=flops, rate=getattr(torch, dtype), peaks=peaks)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]} {c[2]} B={c[3]} {c[4]}")
def test_segmenter(case, impl, measured):
    model, kind, size, batch, dtype = case
    name = f"{kind} {size} B={batch}"
    measured(f"segmenter {model}", name, dtype, impl, lambda: build(*case))
