"""ms_deform_attn against transformers' grid_sample path, in the encoder of Mask2Former.

One query a pixel of the three levels, 8 heads of 32 channels, 4 points; offsets of a standard
deviation of 2 pixels. Both start from raw offsets and logits. The original CUDA op and DCNv4's are
no packages that can be installed: their times are not here.
"""

import pytest
import torch
from _measure import PASSES, Work, pick, repeated, short, step

from segkern.ops import ms_deform_attn
from support.inputs import ms_deform_attn_inputs

IMPLS = ("segkern", "transformers", "original CUDA op", "DCNv4 FlashDeformAttn")
CASES = pick(  # B, height, width of the image, padded to 32
    {"64x64": (1, 64, 64)},
    {"512x512": (1, 512, 512), "1024x1024": (1, 1024, 1024)},
    {
        "512x512": (1, 512, 512),
        "1024x1024": (1, 1024, 1024),
        "800x1333": (1, 800, 1344),
        "B=2 512x512": (2, 512, 512),
        "B=8 1024x1024": (8, 1024, 1024),
        "B=16 1024x1024": (16, 1024, 1024),
    },
)
DTYPES = pick([torch.float32], [torch.float32], [torch.float32, torch.bfloat16])
SIZES = pick({"H": 2, "D": 8, "P": 2}, *[{"H": 8, "D": 32, "P": 4}] * 2)


def grid_sample_path(value, shapes, reference, offsets, logits):
    from transformers.models.mask2former.modeling_mask2former import (
        multi_scale_deformable_attention,
    )

    # per level by numbers: a tensor of sizes would be copied from the host
    pixels = [
        torch.stack((x / w, y / h), -1)
        for (h, w), (x, y) in zip(shapes, (o.unbind(-1) for o in offsets.unbind(3)))
    ]
    locations = reference[:, :, None, :, None] + torch.stack(pixels, 3)
    weights = logits.flatten(3).softmax(3).view_as(logits)
    # as under autocast, where grid_sample takes its inputs in the wider dtype
    return multi_scale_deformable_attention(value.float(), shapes, locations, weights.float())


def build(B, height, width, dtype, backward):
    shapes = [(height // stride, width // stride) for stride in (32, 16, 8)]
    inputs = ms_deform_attn_inputs(B=1, **SIZES, shapes=shapes, Q=None, spread=2.0, dtype=dtype)
    value, shapes, reference, offsets, logits = repeated(inputs, B)

    tensors = [value, offsets, logits]
    impls = {
        "segkern": lambda v, o, a: ms_deform_attn(v, shapes, reference, o, a),
        "transformers": lambda v, o, a: grid_sample_path(v, shapes, reference, o, a),
    }
    if backward:
        impls = {name: step(f, tensors) for name, f in impls.items()}
    else:
        impls = {name: lambda f=f: f(*tensors) for name, f in impls.items()}
    impls |= dict.fromkeys(IMPLS[2:], "no installable package")
    read = sum(t.numel() * t.element_size() for t in (*tensors, value))  # and the output
    samples = logits.numel() * value.shape[3]
    return Work(impls, read * (3 if backward else 1), samples * (24 if backward else 8))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", CASES)
def test_ms_deform_attn(case, dtype, direction, impl, measured):
    def work():
        return build(*CASES[case], dtype, direction != "forward")

    measured("ms_deform_attn", case + PASSES[direction], short(dtype), impl, work)
